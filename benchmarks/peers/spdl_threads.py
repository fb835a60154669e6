"""SPDL's `DataLoader`: threads apply torchvision's transforms to PIL images, then normalise the batch.

A thread makes a whole batch, as in SPDL's examples that decode images; one task per image is several times slower.
"""

from __future__ import annotations

import torch
from spdl.dataloader import DataLoader
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, default_collate
from torchvision.transforms import Normalize, PILToTensor

from benchmarks.peers.torchvision_dataloader import Images, OnDevice
from pipelines.store import Dataset


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> OnDevice:
    """Open a loader, see `benchmarks.peers`; `workers` is the number of SPDL's threads."""
    images = Images(dataset.train, PILToTensor())
    normalize = Normalize([0.5] * 3, [0.5] * 3)

    def load(rows: list[int]) -> tuple[Tensor, Tensor]:
        pixels, labels = default_collate([images[row] for row in rows])
        return normalize(pixels.float() / 255), labels

    order = BatchSampler(RandomSampler(images), batch_size, drop_last=True)
    return OnDevice(DataLoader(order, preprocessor=load, num_threads=workers), device, dtype)
