"""`torchdata.nodes` in place of a `DataLoader`, as its migration guide composes them, with PIL images."""

from __future__ import annotations

import torch
from torch.utils.data import RandomSampler, default_collate
from torchdata import nodes

from benchmarks.peers.torchvision_dataloader import NormalizedImages, OnDevice
from pipelines.store import Dataset


class _Collated:
    """Function of the rows of a batch: their images and labels. A class, because processes receive it."""

    def __init__(self, images: NormalizedImages) -> None:
        self._images = images

    def __call__(self, rows: list[int]) -> list[torch.Tensor]:
        return default_collate([self._images[row] for row in rows])


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> OnDevice:
    """Open a loader, see `benchmarks.peers`; `workers` is the number of processes."""
    images = NormalizedImages(dataset.train)
    rows = nodes.Batcher(nodes.SamplerWrapper(RandomSampler(images)), batch_size, drop_last=True)
    batches: nodes.BaseNode = nodes.ParallelMapper(rows, _Collated(images), num_workers=workers, method="process")
    if device.type == "cuda":
        batches = nodes.PinMemory(batches)
    return OnDevice(nodes.Loader(nodes.Prefetcher(batches, prefetch_factor=2 * workers)), device, dtype)
