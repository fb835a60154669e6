"""Tensors in files, which are described first and read later, in pieces: only those that are needed take memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

_PIECE = 4 << 20
_LARGEST_SCATTERED = 32 << 20
_MOST_SCATTERED = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Tensor in an open file."""

    file: BinaryIO
    start: int
    """Place of its first value in the file, in bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes from its first value to the end of its last one in the file."""
        return _extent(self.shape, self.stride) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """Read its values in their order, in flat tensors of at most 4 MB if they are in this order in the file."""
        self.file.seek(self.start)
        if not _in_order(self.shape, self.stride):
            yield torch.as_strided(self._next(self.extent), self.shape, self.stride).flatten()
            return
        for begin in range(0, self.size, _PIECE):
            yield self._next(min(_PIECE, self.size - begin))

    def _next(self, size: int) -> Tensor:
        data = bytearray(size)
        if self.file.readinto(data) != size:  # type: ignore[attr-defined]
            raise EOFError("it has become shorter")
        return torch.frombuffer(data, dtype=torch.uint8).view(self.dtype)

    def read(self) -> Tensor:
        """Read it whole, contiguous."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(tensor)
        return tensor

    def copy_to(self, tensor: Tensor) -> None:
        """Copy its values to `tensor`, which is contiguous and of the same shape."""
        values, begin = tensor.view(-1), 0
        for piece in self.pieces():
            values[begin : begin + len(piece)].copy_(piece)
            begin += len(piece)


def place(
    file: BinaryIO, begin: int, end: int, dtype: torch.dtype, offset: Any, shape: Any, stride: Any = None
) -> StoredTensor:
    """Describe a tensor among the values in bytes `begin` to `end` of `file`; without `stride`, it is contiguous.

    Raises `ValueError` if these claims of a file cannot be true.
    """
    stride = _contiguous_stride(shape) if stride is None else stride
    if not _are_sizes([offset]) or not _are_sizes(shape) or not _are_sizes(stride) or len(shape) != len(stride):
        raise ValueError("a tensor has no valid shape")
    values, extent = (end - begin) // dtype.itemsize, _extent(shape, stride)
    if math.prod(shape) > values or (extent and offset + extent > values):
        raise ValueError(f"a tensor of shape {tuple(shape)} claims more values than it has")
    if not _in_order(shape, stride) and extent * dtype.itemsize > _LARGEST_SCATTERED:
        raise ValueError(f"a tensor of shape {tuple(shape)} has its values in another order: save it contiguous")
    return StoredTensor(file, begin + offset * dtype.itemsize, dtype, tuple(shape), tuple(stride))


def check_distinct(tensors: Iterable[StoredTensor], size: int) -> None:
    """Raise `ValueError` if `tensors` have more values than a file of `size` bytes can have: they share some."""
    tensors = list(tensors)
    if sum(tensor.size for tensor in tensors) > size:
        raise ValueError("its tensors claim more values than it has")
    if sum(tensor.extent for tensor in tensors) > size + _MOST_SCATTERED:
        raise ValueError("the values of its tensors are mixed: save them contiguous")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) <= 8 and all(_is_size(value) for value in values)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 63


def _contiguous_stride(shape: Any) -> Any:
    return [math.prod(shape[number + 1 :]) for number in range(len(shape))] if _are_sizes(shape) else None


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Count the values from the first to the last one."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0


def _in_order(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for n, step in reversed(list(zip(shape, stride, strict=True))):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True
