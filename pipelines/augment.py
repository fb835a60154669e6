"""Crop, flip, cutout and normalisation of a batch: the reference in PyTorch, and a C loop for CPUs.

Pixels stay uint8 [B, 32, 32, 3] until `normalize`, so that pipelines can be compared bit by bit. The crop is index
arithmetic over one gather. `augment.c` is compiled for the host CPU on first use.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .compiler import load_kernels
from .prng import Array
from .sampling import IMAGE_SIZE, Augmentation, Draws
from .store import Dataset


@dataclass(frozen=True, slots=True)
class Normalization:
    """Constants of `(pixel - mean) * scale` in float32, pixel in 0..255."""

    mean: Tensor
    """Means [3], or [32, 32, 3] for a per-pixel mean, in 0..255."""
    scale: Tensor
    """Reciprocals of the standard deviations [3]."""

    @classmethod
    def of(cls, name: str, dataset: Dataset, device: torch.device | str = "cpu") -> Normalization:
        """Compute the constants of normalisation `name` (see `Augmentation.normalization`) for `dataset`."""
        mean, std = {
            "half": ([0.5] * 3, [0.5] * 3),
            "channel": (dataset.mean, dataset.std),
            "pixel": (dataset.pixel_mean.copy(), [1.0] * 3),
        }[name]
        mean = torch.as_tensor(mean, dtype=torch.float64) * 255
        scale = 1 / (torch.as_tensor(std, dtype=torch.float64) * 255)
        return cls(mean.float().to(device), scale.float().to(device))


def fill_color(dataset: Dataset) -> Tensor:
    """Compute the colour of cutout squares, uint8 [3]: the data set's mean, close to zero once normalised."""
    return (torch.tensor(dataset.mean, dtype=torch.float64) * 255).round().to(torch.uint8)


class Augment:
    """Crop, flip, cutout and normalisation with PyTorch operators, on any device: the reference."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, device: torch.device, dtype: torch.dtype) -> None:
        self._augmentation, self._device, self._dtype = augmentation, device, dtype
        self._normalization = Normalization.of(augmentation.normalization, dataset, device)
        self._fill = fill_color(dataset).to(device)

    def __call__(self, images: Array, rows: Array, draws: Draws) -> Tensor:
        """Augment and normalise copies of `images[rows]`: `dtype` [B, 3, 32, 32] channels_last.

        `images` is uint8 [N, 32, 32, 3], `rows` int64 [B]; both, like `draws`, are tensors on the device or, for the
        CPU, NumPy arrays.
        """
        chosen = torch.as_tensor(images[rows], device=self._device)
        if self._augmentation.changes_pixels:
            draws = draws.map(lambda column: torch.as_tensor(column, device=self._device))
            chosen = crop_flip_cutout(chosen, draws, self._augmentation, self._fill)
        return normalize(chosen, self._normalization, self._dtype)


def crop_flip_cutout(images: Tensor, draws: Draws, augmentation: Augmentation, fill: Tensor) -> Tensor:
    """Augment copies of uint8 `images` [B, 32, 32, 3], `draws` holding tensors [B] on the same device."""
    count, height, width, _ = images.shape
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    padding = augmentation.crop_padding
    rows = y + (draws.top - padding)[:, None]
    columns = torch.where(draws.flip[:, None] == 1, width - 1 - x, x) + (draws.left - padding)[:, None]
    batch = torch.arange(count, device=images.device)[:, None, None]
    if augmentation.padding_mode == "reflect":
        out = images[batch, reflect(rows, height)[:, :, None], reflect(columns, width)[:, None, :]]
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
    """Convert uint8 [B, 32, 32, 3] to `dtype` [B, 3, 32, 32] channels_last; `torch.uint8` keeps the pixels."""
    if dtype != torch.uint8:
        images = images.float().sub_(normalization.mean).mul_(normalization.scale).to(dtype)
    return images.permute(0, 3, 1, 2)


def denormalize(images: Tensor, normalization: Normalization) -> Tensor:
    """Convert images [B, 3, 32, 32] that `normalize` returned to pixels in 0..255, float32 and not rounded."""
    pixels = images.permute(0, 2, 3, 1).float() / normalization.scale + normalization.mean
    return pixels.permute(0, 3, 1, 2)


def reflect(index: Tensor, size: int) -> Tensor:
    """Move an `index` outside of 0..size - 1 to its place mirrored at the edge, which is not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _between(value: Tensor, low: int, high: int) -> Tensor:
    return (value >= low) & (value < high)


# --- on a CPU ---------------------------------------------------------------------------------------------------


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("images", "rows", "top", "left", "flip", "cutout_top", "cutout_left")),
        *((name, ctypes.c_void_p) for name in ("mean", "scale", "out")),
        *((name, ctypes.c_int64) for name in ("mean_stride", "padding", "reflect", "cutout")),
        ("fill", ctypes.c_uint8 * 3),
    )


class _Buffers:
    """Pool of memory for batches, reused once nothing refers to the old batch.

    New memory from the system costs page faults and zeroing: 1.3M images/s instead of 1.6M on 2 cores.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=8)  # a limit, if the user kept many batches and released all

    def take(self, size: int) -> Tensor:
        """Return uninitialised memory, uint8 [size]."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.empty(size, dtype=torch.uint8).numpy()
        if memory.nbytes != size:
            return self.take(size)
        view = memory[:]  # freed with the last tensor that shares its memory
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)


class NativeAugment:
    """Bit-exact `Augment` for CPUs in C (`augment.c`): one pass over the pixels, without Python's global lock."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, dtype: torch.dtype, library: ctypes.CDLL) -> None:
        self._kernel = getattr(library, f"augment_{str(dtype).removeprefix('torch.')}")
        self._dtype, self._augmentation, self._buffers = dtype, augmentation, _Buffers()
        normalization = Normalization.of(augmentation.normalization, dataset)
        self._mean = normalization.mean.expand(*normalization.mean.shape[:-2], IMAGE_SIZE, 3).contiguous()
        self._mean_stride = IMAGE_SIZE * 3 if normalization.mean.ndim == 3 else 0
        self._scale = normalization.scale.expand(IMAGE_SIZE, 3).contiguous()
        self._fill = (ctypes.c_uint8 * 3)(*fill_color(dataset).tolist())

    def __call__(self, images: np.ndarray, rows: np.ndarray, draws: Draws) -> Tensor:
        """Augment and normalise copies of `images[rows]`, uint8 [N, 32, 32, 3] C-contiguous; see `Augment`."""
        count = len(rows)
        out = (
            self._buffers.take(count * 3 * IMAGE_SIZE**2 * self._dtype.itemsize)
            .view(self._dtype)
            .view(count, IMAGE_SIZE, IMAGE_SIZE, 3)
        )
        columns = [
            np.ascontiguousarray(column, np.int64)
            for column in (rows, draws.top, draws.left, draws.flip, draws.cutout_top, draws.cutout_left)
        ]
        batch = _Batch(
            images.ctypes.data,
            *(column.ctypes.data for column in columns),
            self._mean.data_ptr(),
            self._scale.data_ptr(),
            out.data_ptr(),
            self._mean_stride,
            self._augmentation.crop_padding,
            self._augmentation.padding_mode == "reflect",
            self._augmentation.cutout,
            self._fill,
        )
        self._kernel(ctypes.byref(batch), count)
        return out.permute(0, 3, 1, 2)


def create_augment(
    dataset: Dataset, augmentation: Augmentation, device: torch.device, dtype: torch.dtype
) -> Augment | NativeAugment:
    """Choose the fastest augmentation for `device`. On a CPU without the native one, warn with a `Note`."""
    if device.type == "cpu" and (library := _load()) is not None:
        return NativeAugment(dataset, augmentation, dtype, library)
    return Augment(dataset, augmentation, device, dtype)


@functools.cache
def _load() -> ctypes.CDLL | None:
    return load_kernels(
        Path(__file__).with_name("augment.c"),
        "-ffp-contract=off",  # a fused multiply-add would round once where the reference rounds twice
        [f"augment_{name}" for name in ("uint8", "float32", "bfloat16", "float16")],
        (ctypes.POINTER(_Batch), ctypes.c_int64),
        None,
        "images are augmented by PyTorch, at a tenth of the speed",
    )
