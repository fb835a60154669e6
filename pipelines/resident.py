"""The whole split stays in memory, on the CPU or the GPU, and every batch is gathered from it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from . import Batch
from .augment import Normalization, crop_flip_cutout, fill_color, normalize
from .sampling import IMAGE_SIZE, Augmentation, Draws, Sampler, draw
from .store import Dataset, Split


class ResidentCudaPipeline:
    """uint8 images on the GPU; order, augmentation parameters and pixels are all computed there."""

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        sampler: Sampler,
        augmentation: Augmentation,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._images = torch.from_numpy(split.images[split.ids]).to(device)
        self._labels = torch.from_numpy(split.labels[split.ids]).to(device)
        self._ids = torch.from_numpy(split.ids).to(device)
        self._sampler, self._augmentation, self._dtype = sampler, augmentation, dtype
        self._normalization = Normalization.of(augmentation.normalization, dataset, device)
        self._fill = fill_color(dataset).to(device)

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step, rows in enumerate(self._sampler.positions(epoch, self._ids)[start:], start):
            images = self._images[rows]
            if self._sampler.train:
                draws = draw(self._sampler.seed, epoch, self._ids[rows], self._augmentation)
                images = crop_flip_cutout(images, draws, self._augmentation, self._fill)
            yield Batch(
                normalize(images, self._normalization, self._dtype), self._labels[rows], self._sampler.valid(step)
            )

    def close(self) -> None:
        del self._images, self._labels, self._ids


class ResidentCpuPipeline:
    """uint8 images in main memory, padded once: every crop is a strided window, and one NumPy call copies a batch."""

    def __init__(
        self, dataset: Dataset, split: Split, sampler: Sampler, augmentation: Augmentation, dtype: torch.dtype
    ) -> None:
        self._split, self._sampler, self._augmentation, self._dtype = split, sampler, augmentation, dtype
        self._windows = _crop_windows(split, augmentation)
        self._labels = torch.from_numpy(split.labels[split.ids])
        self._normalization = Normalization.of(augmentation.normalization, dataset)
        self._fill = fill_color(dataset).numpy()

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step, rows in enumerate(self._sampler.positions(epoch, self._split.ids)[start:], start):
            draws = draw(self._sampler.seed, epoch, self._split.ids[rows], self._augmentation)
            images = torch.from_numpy(self._gather(rows, draws))
            yield Batch(
                normalize(images, self._normalization, self._dtype), self._labels[rows], self._sampler.valid(step)
            )

    def _gather(self, rows: np.ndarray, draws: Draws) -> np.ndarray:
        """Augmented uint8 images [B, 32, 32, 3], bit-equal to `augment.crop_flip_cutout`."""
        out = self._windows[rows, draws.top, draws.left]
        flipped = np.flatnonzero(draws.flip)
        out[flipped] = out[flipped, :, ::-1]
        if side := self._augmentation.cutout:
            for image, top, left in zip(out, draws.cutout_top, draws.cutout_left, strict=True):
                image[max(top, 0) : top + side, max(left, 0) : left + side] = self._fill
        return out

    def close(self) -> None:
        del self._windows, self._labels


def _crop_windows(split: Split, augmentation: Augmentation) -> np.ndarray:
    """A view [N, 2p + 1, 2p + 1, 32, 32, 3] of the split padded by p: all crops of all images, none of them copied."""
    images = split.images if len(split.ids) == len(split.images) else split.images[split.ids]
    padding = augmentation.crop_padding
    if padding:
        mode = {"zeros": "constant", "reflect": "reflect"}[augmentation.padding_mode]
        images = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode)
    windows = np.lib.stride_tricks.sliding_window_view(images, (IMAGE_SIZE, IMAGE_SIZE), axis=(1, 2))
    return windows.transpose(0, 1, 2, 4, 5, 3)
