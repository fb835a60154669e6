"""SVHN, the cropped digits: train_32x32.mat and test_32x32.mat, in MATLAB's format 5."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import IO

import numpy as np

from .archives import Parts
from .contents import WINDOW, describe
from .errors import DataError, list_some, note
from .reading import Listing, ReadOptions, check_split, divide, explained
from .sampling import IMAGE_SIZE
from .store import RawData

_TRAIN, _TEST, _EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
_DIGITS = tuple("0123456789")
_MAGIC, _HEADER, _COMPRESSED = b"MATLAB 5.0 MAT-file", 128, 15
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_RATIO, _SPARE, _SHORT = 4, 16 << 20, 1 << 10  # photos shrink by a fifth; names and shapes are short
_CHUNK = 1 << 20


def has_svhn(listing: Listing) -> bool:
    """Return True if there is a file of SVHN's images."""
    return any(file[-1] in (_TRAIN, _TEST) for file in listing.files)


def read_svhn(listing: Listing, options: ReadOptions) -> RawData:
    """Read the images of digits; the classes are "0" to "9".

    Raises `DataError` if a file is damaged or missing.
    """
    path, places = listing.path, dict[str, Parts]()
    for file in listing.files:
        if file[-1] in (_TRAIN, _TEST, _EXTRA) and places.setdefault(file[-1], file) != file:
            raise DataError(f"{path} has two files {file[-1]}: give the folder of one.")
    if _EXTRA in places:
        note(f"left out {'/'.join(places.pop(_EXTRA))}: the images to train on are those of {_TRAIN}.")
    if _TRAIN not in places and not options.only_test:
        raise DataError(f"{path} is not a complete SVHN: {_TRAIN} missing. Fetch it too.")
    check_split(path, _TEST if _TEST in places else None, options)
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for item in listing.open({*places.values()}):
        options.report("reading", len(parts), len(places))
        with item.open() as stream:
            parts[item.parts[-1]] = _read_images(stream, item.name)
    if len(parts) == 1:
        return divide(_DIGITS, *parts.popitem()[1], options)
    return RawData(_DIGITS, *parts[_TRAIN], *parts[_TEST])


def _read_images(stream: IO[bytes], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images [N, 32, 32, 3] and labels [N]."""
    head = stream.read(WINDOW)
    if not head.startswith(_MAGIC):
        raise DataError(f"{name} {describe(head, head, 'images') or 'is no MATLAB file of version 5: fetch it again'}.")
    with explained(name, "a MATLAB file"):
        variables = _read_variables(stream)
    pixels, digits = variables.get("X", np.empty(0)), variables.get("y", np.empty(0))
    count = pixels.shape[-1]
    if (pixels.shape, digits.shape) != ((IMAGE_SIZE, IMAGE_SIZE, 3, count), (count, 1)) or pixels.dtype != np.uint8:
        found = list_some([f"{key} ({array.dtype} {list(array.shape)})" for key, array in variables.items()])
        raise DataError(f"{name} has {found or 'no images'}. SVHN has X (uint8 [32, 32, 3, N]) and y (uint8 [N, 1]).")
    if not np.isin(digits, range(1, 11)).all():
        text = f"{digits.min()}..{digits.max()}"
        raise DataError(f"{name} has labels {text}, but those of SVHN are 1..10, 10 for digit 0.")
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), digits.ravel().astype(np.int64) % 10


# SciPy's reader ends the process on some damaged files, and unpacks without a limit.


def _read_variables(stream: IO[bytes]) -> dict[str, np.ndarray]:
    """Read the arrays X and y of a file in MATLAB's format 5. Raises `ValueError` or `zlib.error` if it is damaged."""
    most = _SPARE + _RATIO * stream.seek(0, io.SEEK_END)
    stream.seek(_HEADER - 2)
    order = "<" if stream.read(2) == b"IM" else ">"
    variables = {}
    while head := stream.read(8):
        kind, size = struct.unpack(f"{order}II", head.ljust(8, b"\0"))
        end = stream.tell() + size
        content: _Reader = stream
        if kind == _COMPRESSED:
            content = _Packed(stream, size)
            content.read(8)  # the head of what is packed
        _read_element(content, order)  # flags
        shape = tuple(_read_element(content, order).tolist())
        name = _read_element(content, order).tobytes().decode("latin-1")
        if name in ("X", "y"):
            array = _read_element(content, order, most)
            most -= array.nbytes
            if min(shape) < 0 or math.prod(shape) != array.size:
                raise ValueError(f"{name} has {array.size:,} numbers, and shape {list(shape)}")
            variables[name] = array.reshape(shape, order="F")
        stream.seek(end)
    return variables


def _read_element(content: _Reader, order: str, most: int = _SHORT) -> np.ndarray:
    """Read a list of numbers of at most `most` bytes."""
    head = content.read(8)
    kind, size = struct.unpack(f"{order}II", head.ljust(8, b"\0"))
    if kind >> 16:  # four bytes at most are in the head itself
        kind, size, data = kind & 0xFFFF, kind >> 16, head[4:]
    elif size > most:
        raise ValueError(f"it claims {size:,} bytes")
    else:
        data = content.read(size)
        content.read(-size % 8)
    if kind not in _TYPES or len(data) < size:
        raise ValueError("it is truncated or damaged")
    return np.frombuffer(memoryview(data)[:size], order + _TYPES[kind])


class _Packed:
    """Content of a variable that is compressed by zlib, unpacked as far as it is read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._packed = stream, size
        self._unpacker = zlib.decompressobj()

    def read(self, size: int) -> bytes | bytearray:
        """Read `size` bytes, or less at the end."""
        data = bytearray()
        while len(data) < size:
            packed = self._unpacker.unconsumed_tail
            if not packed:
                packed = self._stream.read(min(_CHUNK, self._packed))
                self._packed -= len(packed)
            unpacked = self._unpacker.decompress(packed, size - len(data))
            if not packed and not unpacked:
                break
            data += unpacked
        return data


_Reader = IO[bytes] | _Packed
