"""The plain way: a `Dataset` that augments one sample at a time with torchvision's functional transforms, in a
`DataLoader`. The simplest thing that is right, and what the others are compared with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import Batch, usable_processors
from .augment import Normalization, fill_color, normalize
from .errors import UsageError
from .sampling import IMAGE_SIZE, Augmentation, Sampler, draw
from .store import Dataset, Split

try:
    from torchvision.transforms.v2 import functional as F
except ModuleNotFoundError as error:
    raise UsageError(f"torchvision is not installed ({error}): pip install torchvision") from None

_GRACE_S = 20
"""How long a worker lives after SIGTERM."""


class _Sample(NamedTuple):
    """What a worker is asked for: a row of the store and how to augment it. Nothing is random in a worker."""

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
        """uint8 image [3, 32, 32] and label."""
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


class _Plan:
    """The batches of the epoch to come, as the `DataLoader`'s batch sampler."""

    def __init__(self) -> None:
        self.batches: list[list[_Sample]] = []

    def __iter__(self) -> Iterator[list[_Sample]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _outlive_stop_signals(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the workers too, who must live on until the parent has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))


class TorchvisionPipeline:
    """Uses a worker process for each usable processor, 8 at most, while training, and none for evaluation."""

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        sampler: Sampler,
        augmentation: Augmentation,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._split, self._sampler, self._augmentation = split, sampler, augmentation
        self._device, self._dtype = device, dtype
        self._normalization = Normalization.of(augmentation.normalization, dataset, device)
        self._plan = _Plan()
        workers = min(usable_processors(), 8) if sampler.train else 0
        self._loader = DataLoader(
            _AugmentedSamples(split, augmentation, fill_color(dataset)),
            batch_sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_outlive_stop_signals,
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        ids = self._split.ids
        positions = self._sampler.positions(epoch, ids)[start:]
        self._plan.batches = [self._samples(epoch, ids[rows]) for rows in positions]
        for step, (images, labels) in enumerate(self._loader, start):
            images = images.to(self._device, non_blocking=True).permute(0, 2, 3, 1).contiguous()
            labels = labels.to(self._device, non_blocking=True)
            yield Batch(normalize(images, self._normalization, self._dtype), labels, self._sampler.valid(step))

    def _samples(self, epoch: int, ids) -> list[_Sample]:
        draws = draw(self._sampler.seed, epoch, ids, self._augmentation)
        columns = (ids, draws.top, draws.left, draws.flip, draws.cutout_top, draws.cutout_left)
        return [_Sample(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def close(self) -> None:
        del self._loader
