"""Plain pipeline: a `Dataset` in a `DataLoader` augments one sample at a time with torchvision's functional transforms.

It is the simplest correct implementation, and the others are compared with it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .augment import Normalization, fill_color, normalize
from .base import Batch, Pipeline, usable_processors
from .errors import UsageError
from .sampling import IMAGE_SIZE, Augmentation, Draws, EpochPlan
from .store import Split

try:
    from torchvision.transforms.v2 import functional as F
except ModuleNotFoundError as error:
    raise UsageError(f"torchvision is not installed ({error}): pip install torchvision") from None

_GRACE_S = 20
"""Seconds that a worker continues after SIGTERM."""


class _Sample(NamedTuple):
    """Row of the store and its augmentation, for a worker, which draws no random numbers."""

    row: int
    top: int
    left: int
    flip: int
    cutout_top: int
    cutout_left: int


class _AugmentedSamples(torch.utils.data.Dataset):
    def __init__(self, split: Split, augmentation: Augmentation, fill: Tensor) -> None:
        self._split, self._augmentation, self._fill = split, augmentation, fill[:, None, None]

    def __getitem__(self, sample: _Sample) -> tuple[Tensor, int]:
        """Return image, uint8 [3, 32, 32], and label."""
        image = torch.from_numpy(self._split.images[sample.row].copy()).permute(2, 0, 1)
        if padding := self._augmentation.crop_padding:
            mode = {"zeros": "constant", "reflect": "reflect"}[self._augmentation.padding_mode]
            image = F.pad(image, [padding] * 4, padding_mode=mode)
            image = F.crop(image, sample.top, sample.left, IMAGE_SIZE, IMAGE_SIZE)
        if sample.flip:
            image = F.horizontal_flip(image)
        if side := self._augmentation.cutout:
            top, left = max(sample.cutout_top, 0), max(sample.cutout_left, 0)
            height, width = sample.cutout_top + side - top, sample.cutout_left + side - left
            image = F.erase(image, top, left, height, width, self._fill)
        return image, int(self._split.labels[sample.row])


class _Batches(list[list[_Sample]]):
    """Batches of the next epoch, as the `DataLoader`'s batch sampler. An iterator keeps those that it started with."""

    def __iter__(self) -> Iterator[list[_Sample]]:
        return iter(self[:])


def _survive_stop_signals(_: int) -> None:
    """Ignore the signals that reach the workers too, before the parent has saved; delay SIGTERM.

    The parent ends its workers by SIGTERM, and a scheduler may send it to all.
    """
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))


class TorchvisionPipeline(Pipeline):
    """Pipeline with a worker process for each usable processor, 8 at most, in training, and none in evaluation."""

    def _open(self) -> None:
        self._normalization = Normalization.of(self._augmentation.normalization, self._dataset, self._device)
        self._batches = _Batches()
        workers = min(usable_processors(), 8) if self._sampler.train else 0
        self._loader = DataLoader(
            _AugmentedSamples(self._split, self._augmentation, fill_color(self._dataset)),
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_survive_stop_signals,
        )

    def _execute(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        self._batches[:] = [self._samples(plan.rows[step], plan.draws.of(step)) for step in range(start, len(self))]
        for step, (images, labels) in enumerate(self._loader, start):
            images = images.to(self._device, non_blocking=True).permute(0, 2, 3, 1).contiguous()
            labels = labels.to(self._device, non_blocking=True)
            yield Batch(normalize(images, self._normalization, self._dtype), labels, self.valid(step))

    @staticmethod
    def _samples(rows: np.ndarray, draws: Draws) -> list[_Sample]:
        columns = (rows, draws.top, draws.left, draws.flip, draws.cutout_top, draws.cutout_left)
        return [_Sample(*sample) for sample in zip(*(column.tolist() for column in columns), strict=True)]

    def close(self) -> None:
        del self._loader
