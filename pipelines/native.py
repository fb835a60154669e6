"""`augment.c`, compiled on first use for the machine at hand, and the choice between it and plain PyTorch."""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import Augment, Normalization, fill_color
from .compiler import CompilerError, compile_c
from .errors import Note
from .sampling import IMAGE_SIZE, Augmentation, Draws
from .store import Dataset


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("images", "rows", "top", "left", "flip", "cutout_top", "cutout_left")),
        *((name, ctypes.c_void_p) for name in ("mean", "scale", "out")),
        *((name, ctypes.c_int64) for name in ("mean_stride", "padding", "reflect", "cutout")),
        ("fill", ctypes.c_uint8 * 3),
    )


class _Buffers:
    """Memory for batches, used again once nothing refers to the batch that was in it.

    Memory from the system comes in pages that fault and are zeroed: 1.3M images/s instead of 1.6M on 2 cores.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=8)  # no more, if the user kept many batches and let all go

    def take(self, size: int) -> Tensor:
        """uint8 [size], contents undefined."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.empty(size, dtype=torch.uint8).numpy()
        if memory.nbytes != size:
            return self.take(size)
        lent = memory[:]  # an object that dies with the last tensor that shares its memory
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


class NativeAugment:
    """What `Augment` does, bit for bit, on a CPU: one pass over the pixels, without Python's global lock."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, dtype: torch.dtype, library: ctypes.CDLL) -> None:
        self._kernel = getattr(library, f"augment_{str(dtype).removeprefix('torch.')}")
        self._dtype, self._augmentation, self._buffers = dtype, augmentation, _Buffers()
        normalization = Normalization.of(augmentation.normalization, dataset)
        self._mean = normalization.mean.expand(*normalization.mean.shape[:-2], IMAGE_SIZE, 3).contiguous()
        self._mean_stride = IMAGE_SIZE * 3 if normalization.mean.ndim == 3 else 0
        self._scale = normalization.scale.expand(IMAGE_SIZE, 3).contiguous()
        self._fill = (ctypes.c_uint8 * 3)(*fill_color(dataset).tolist())

    def __call__(self, images: np.ndarray, rows: np.ndarray, draws: Draws) -> Tensor:
        """Augmented and normalised copies of `images[rows]`, uint8 [N, 32, 32, 3] C-contiguous; see `Augment`."""
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
    """The fastest augmentation for `device`; a `Note` says so where it is not the native one on a CPU."""
    if device.type == "cpu" and (library := _load()) is not None:
        return NativeAugment(dataset, augmentation, dtype, library)
    return Augment(dataset, augmentation, device, dtype)


@functools.cache
def _load() -> ctypes.CDLL | None:
    """`augment.c`, ready to be called; None, and a `Note`, where that is impossible."""
    try:
        # Contraction to fused multiply-adds would round once where the reference rounds twice.
        library = compile_c(Path(__file__).with_name("augment.c"), "-ffp-contract=off")
    except CompilerError as error:
        warnings.warn(f"images are augmented by PyTorch, at a tenth of the speed: {error}.", Note, stacklevel=3)
        return None
    for name in ("uint8", "float32", "bfloat16", "float16"):
        kernel = getattr(library, f"augment_{name}")
        kernel.argtypes, kernel.restype = (ctypes.POINTER(_Batch), ctypes.c_int64), None
    return library
