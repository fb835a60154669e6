"""`torchdata.nodes` in place of a `DataLoader`, as its migration guide composes them, with PIL images.

It has threads, the guide's other choice. Its processes hung at the start of a full benchmark, for an unknown reason.
"""

from __future__ import annotations

import torch
from torch.utils.data import RandomSampler, default_collate
from torchdata import nodes

from benchmarks.peers.torchvision_dataloader import NormalizedImages, OnDevice
from pipelines.store import Dataset


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> OnDevice:
    """Open a loader, see `benchmarks.peers`; `workers` is the number of threads."""
    images = NormalizedImages(dataset.train)

    def load(rows: list[int]) -> list[torch.Tensor]:
        return default_collate([images[row] for row in rows])

    batches: nodes.BaseNode = nodes.Batcher(nodes.SamplerWrapper(RandomSampler(images)), batch_size, drop_last=True)
    batches = nodes.ParallelMapper(batches, load, num_workers=workers, method="thread")
    if device.type == "cuda":
        batches = nodes.PinMemory(batches)
    return OnDevice(nodes.Loader(nodes.Prefetcher(batches, prefetch_factor=2 * workers)), device, dtype)
