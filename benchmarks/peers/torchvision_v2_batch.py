"""torchvision's v2 transforms on whole batches: all images of a batch have the same crop and the same flip.

The data set is one tensor of bytes on the device, and an index gathers a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.peers.torchvision_dataloader import OnDevice
from pipelines.store import Dataset, Split


class WholeBatches:
    """Batches of bytes, [B, 3, 32, 32], in a new random order every epoch, each passed to `transform` at once."""

    def __init__(self, split: Split, batch_size: int, device: torch.device, transform: Callable) -> None:
        self._images = torch.tensor(split.images, device=device).permute(0, 3, 1, 2)
        self._labels = torch.tensor(split.labels, dtype=torch.int64, device=device)
        self._batch_size, self._transform = batch_size, transform

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._labels), device=self._labels.device)
        for first in range(0, len(order) - self._batch_size + 1, self._batch_size):
            rows = order[first : first + self._batch_size]
            yield self._transform(self._images[rows]), self._labels[rows]


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> OnDevice:
    """Open a loader, see `benchmarks.peers`; it has no `workers`."""
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return OnDevice(WholeBatches(dataset.train, batch_size, device, transform), device, dtype)
