"""Crop, flip, cutout and normalise: the reference for every pipeline, batched, on any device.

Pixels stay uint8 [B, 32, 32, 3] until `normalize`, so that pipelines can be compared bit by bit. The crop is index
arithmetic over one gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import Array, Augmentation, Draws
from .store import Dataset


@dataclass(frozen=True, slots=True)
class Normalization:
    """`(pixel - mean) * scale` in float32, pixel in 0..255."""

    mean: Tensor
    """[3], or [32, 32, 3] for a per-pixel mean."""
    scale: Tensor
    """[3]: the reciprocal of the standard deviation."""

    @classmethod
    def of(cls, name: str, dataset: Dataset, device: torch.device | str = "cpu") -> Normalization:
        """The constants of normalisation `name` (see `Augmentation.normalization`) for `dataset`."""
        mean, std = {
            "half": ([0.5] * 3, [0.5] * 3),
            "channel": (dataset.mean, dataset.std),
            "pixel": (dataset.pixel_mean.copy(), [1.0] * 3),
        }[name]
        mean = torch.as_tensor(mean, dtype=torch.float64) * 255
        scale = 1 / (torch.as_tensor(std, dtype=torch.float64) * 255)
        return cls(mean.float().to(device), scale.float().to(device))


def fill_color(dataset: Dataset) -> Tensor:
    """Colour of cutout squares, uint8 [3]: the data set's mean, so that they are close to zero once normalised."""
    return (torch.tensor(dataset.mean, dtype=torch.float64) * 255).round().to(torch.uint8)


class Augment:
    """Crop, flip, cutout and normalisation by PyTorch's own operators, on any device: the reference."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, device: torch.device, dtype: torch.dtype) -> None:
        self._augmentation, self._device, self._dtype = augmentation, device, dtype
        self._normalization = Normalization.of(augmentation.normalization, dataset, device)
        self._fill = fill_color(dataset).to(device)

    def __call__(self, images: Array, rows: Array, draws: Draws) -> Tensor:
        """Augmented and normalised copies of `images[rows]`: `dtype` [B, 3, 32, 32] channels_last.

        `images` is uint8 [N, 32, 32, 3], `rows` int64 [B]; both, like `draws`, are tensors on the device or, for the
        CPU, NumPy arrays.
        """
        chosen = torch.as_tensor(images[rows], device=self._device)
        if self._augmentation.changes_pixels:
            draws = draws.map(lambda column: torch.as_tensor(column, device=self._device))
            chosen = crop_flip_cutout(chosen, draws, self._augmentation, self._fill)
        return normalize(chosen, self._normalization, self._dtype)


def crop_flip_cutout(images: Tensor, draws: Draws, augmentation: Augmentation, fill: Tensor) -> Tensor:
    """Augmented copies of uint8 `images` [B, 32, 32, 3], `draws` holding tensors [B] on the same device."""
    count, height, width, _ = images.shape
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    padding = augmentation.crop_padding
    rows = y + (draws.top - padding)[:, None]
    columns = torch.where(draws.flip[:, None] == 1, width - 1 - x, x) + (draws.left - padding)[:, None]
    batch = torch.arange(count, device=images.device)[:, None, None]
    if augmentation.padding_mode == "reflect":
        out = images[batch, _reflect(rows, height)[:, :, None], _reflect(columns, width)[:, None, :]]
    else:
        out = images[batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
        inside = _between(rows, 0, height)[:, :, None] & _between(columns, 0, width)[:, None, :]
        out = out * inside[..., None]
    if augmentation.cutout:
        in_rows = _between(y - draws.cutout_top[:, None], 0, augmentation.cutout)
        in_columns = _between(x - draws.cutout_left[:, None], 0, augmentation.cutout)
        out = torch.where((in_rows[:, :, None] & in_columns[:, None, :])[..., None], fill, out)
    return out


def normalize(images: Tensor, normalization: Normalization, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 32, 32, 3] to `dtype` [B, 3, 32, 32] channels_last; `torch.uint8` leaves the pixels as they are."""
    if dtype != torch.uint8:
        images = images.float().sub_(normalization.mean).mul_(normalization.scale).to(dtype)
    return images.permute(0, 3, 1, 2)


def _reflect(index: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - index.abs()).abs()


def _between(value: Tensor, low: int, high: int) -> Tensor:
    return (value >= low) & (value < high)
