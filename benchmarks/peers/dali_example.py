"""DALI with its own random operators, in a typical pipeline for CIFAR.

An external source is shuffled, and each image is pasted onto a larger black canvas. One operator crops, mirrors and
normalises. `DALIGenericIterator` makes torch tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from torch import Tensor

from pipelines.store import Dataset, Split


class _Shuffled:
    """Batches of raw pixels and labels in a new random order every epoch."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self._images, self._labels = np.asarray(split.images), split.labels.astype(np.int64)
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.random.permutation(len(self._labels))  # noqa: NPY002  as in typical code
        for first in range(0, len(order) - self._batch_size + 1, self._batch_size):
            rows = order[first : first + self._batch_size]
            yield self._images[rows], self._labels[rows]


@pipeline_def
def _graph(source: _Shuffled, on_gpu: bool, dtype: types.DALIDataType):
    images, labels = fn.external_source(source=source, num_outputs=2, batch=True, cycle="raise", layout=["HWC", ""])
    if on_gpu:
        images, labels = images.gpu(), labels.gpu()
    images = fn.crop_mirror_normalize(
        fn.paste(images, ratio=40 / 32, fill_value=0),
        crop=(32, 32),
        crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
        crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
        mirror=fn.random.coin_flip(),
        mean=[127.5] * 3,
        std=[127.5] * 3,
        dtype=dtype,
        output_layout="HWC",
    )
    return images, labels


class _AsTuples:
    def __init__(self, iterator: DALIGenericIterator, dtype: torch.dtype) -> None:
        self._iterator, self._dtype = iterator, dtype

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (batch,) in self._iterator:
            yield batch["images"].permute(0, 3, 1, 2).to(self._dtype), batch["labels"]


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> _AsTuples:
    """Open a loader, see `benchmarks.peers`; `workers` is the number of DALI's threads."""
    on_gpu = device.type == "cuda"
    graph = _graph(
        _Shuffled(dataset.train, batch_size),
        on_gpu,
        types.FLOAT16 if dtype == torch.float16 else types.FLOAT,
        batch_size=batch_size,
        num_threads=workers,
        device_id=0 if on_gpu else None,
    )
    iterator = DALIGenericIterator(graph, ["images", "labels"], last_batch_policy=LastBatchPolicy.DROP, auto_reset=True)
    return _AsTuples(iterator, dtype)
