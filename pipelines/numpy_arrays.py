"""Arrays of NumPy as a source: `.npy` files, in a `.npz` or in a folder, named as Keras or MedMNIST name them."""

from __future__ import annotations

import io
import math
import tokenize
from pathlib import PurePath
from typing import IO, Any

import numpy as np

from .archives import Parts
from .errors import DataError, list_some, note, reason_of
from .images import check_size, fit_pixels, note_resized
from .reading import Listing, ReadOptions, check_split, divide, number_names
from .sampling import IMAGE_SIZE
from .store import LONGEST_NAME, MOST_CLASSES, RawData

_NAMES = (("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels"))
_CLASSES = ("classes", "class_names")
_SUFFIX = ".npy"

_SMALLEST_SIDE = 8  # smaller images would grow a thousand times
_CHUNK = 4 << 20  # bytes of images that are converted at once


def has_arrays(listing: Listing) -> bool:
    """Return True if there are arrays called as Keras or MedMNIST call them, or nothing but arrays."""
    if ("meta.json",) in listing.files:  # a store of ours
        return False
    stems = [PurePath(file[-1]).stem for file in _find_arrays(listing)]
    return 0 < len(stems) == len(listing.files) or any(stem in names for names in _NAMES for stem in stems)


def _find_arrays(listing: Listing) -> list[Parts]:
    return [file for file in listing.files if file and file[-1].endswith(_SUFFIX)]


def read_arrays(listing: Listing, options: ReadOptions) -> RawData:
    """Read images, uint8 [N, height, width] or [N, height, width, 1 or 3], integer labels [N], and names of classes.

    Raises `DataError` if arrays are missing, damaged or of another type or shape.
    """
    path, files = listing.path, {PurePath(file[-1]).stem: file for file in _find_arrays(listing)}
    if len(files) != len(_find_arrays(listing)):
        raise DataError(f"{path} has several arrays of one name in its folders. Give one of the folders.")
    names = next((names for names in _NAMES if any(name in files for name in names)), _NAMES[0])
    has_test = names[2] in files or names[3] in files
    used = names[2:] if has_test and options.only_test else names[: 4 if has_test else 2]
    if missing := [name for name in used if name not in files]:
        raise DataError(f"{path} lacks array {missing[0]}: it has {list_some(sorted(files))}.")
    check_split(path, names[2] if has_test else None, options)
    if other := sorted(files.keys() - {*names, *_CLASSES}):
        note(f"left out arrays that are neither of training nor of test images: {list_some(other)}.")

    wanted = {files[name]: name for name in (*used, *_CLASSES) if name in files}
    arrays: dict[str, Any] = {}
    resized = 0
    for file in listing.open(wanted):
        name = wanted[file.parts]
        with file.open() as stream:
            if name in used[::2]:
                arrays[name], was_resized = _read_images(stream, file.name, resize=options.resize)
                resized += was_resized * len(arrays[name])
            else:
                arrays[name] = (_read_names if name in _CLASSES else _read_labels)(stream, file.name)
        options.report("reading arrays", len(arrays), len(wanted))
    for images, labels in zip(used[::2], used[1::2], strict=True):
        if len(arrays[images]) != len(arrays[labels]):
            raise DataError(f"{path} has {len(arrays[images]):,} {images}, but {len(arrays[labels]):,} {labels}.")
        arrays[labels] = arrays[labels].astype(np.int64)
    note_resized(resized, sum(len(arrays[images]) for images in used[::2]))
    classes = next((arrays[name] for name in _CLASSES if name in arrays), None)
    if classes is None:
        classes = number_names(path, *(arrays[labels] for labels in used[1::2]))
    if len(used) == 2:
        return divide(classes, arrays[used[0]], arrays[used[1]], options)
    return RawData(classes, *(arrays[name] for name in used))


def _read_images(stream: IO[bytes], name: str, *, resize: bool) -> tuple[np.ndarray, bool]:
    """Read images as uint8 [N, 32, 32, 3]; return them, and True if they were resized."""
    shape, dtype = _read_header(stream, name)
    if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
        raise DataError(
            f"{name} has {dtype} {list(shape)}. Save images as uint8 [N, height, width, 3], or grey ones without the 3."
        )
    count, height, width = shape[:3]
    if min(height, width) < _SMALLEST_SIDE:
        raise DataError(
            f"{name} has images of {width}x{height} pixels, fewer than {_SMALLEST_SIDE} in a row or column."
        )
    check_size((width, height), name, resize=resize)
    pixels = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    size = math.prod(shape[1:])
    step = max(1, _CHUNK // size)
    for start in range(0, count, step):
        rows = min(step, count - start)
        chunk = np.frombuffer(stream.read(rows * size), np.uint8)
        pixels[start : start + rows] = fit_pixels(chunk.reshape(rows, *shape[1:]))
    return pixels, (height, width) != (IMAGE_SIZE, IMAGE_SIZE)


def _read_labels(stream: IO[bytes], name: str) -> np.ndarray:
    """Read labels, integers [N] of any type."""
    shape, dtype = _read_header(stream, name)
    if dtype.kind not in "iu" or shape[1:] not in ((), (1,)):
        raise DataError(f"{name} has {dtype} {list(shape)}. Save labels as integers [N], 0 for the first class.")
    return np.frombuffer(stream.read(), dtype)


def _read_names(stream: IO[bytes], name: str) -> tuple[str, ...]:
    """Read names of classes, texts or bytes [N]."""
    shape, dtype = _read_header(stream, name)
    if dtype.kind not in "US" or len(shape) != 1 or shape[0] > MOST_CLASSES or dtype.itemsize > 4 * LONGEST_NAME:
        raise DataError(f"{name} has {dtype} {list(shape)}. Save the names of classes as an array of texts [classes].")
    try:
        texts = np.frombuffer(stream.read(), dtype).tolist()
        return tuple(text if isinstance(text, str) else text.decode() for text in texts)
    except ValueError as error:
        raise DataError(f"{name} has names of classes that are no texts: {reason_of(error)}.") from None


def _read_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and type of an array, after which the stream has exactly its content."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, is_fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except (KeyError, TypeError, ValueError, OverflowError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise DataError(f"{name} cannot be read as an array: {reason_of(error)}. Save it again.") from None
    if dtype.hasobject:
        raise DataError(f"{name} has objects of Python, which are not read. Save it as an array of numbers.")
    if not shape or min(shape) < 0 or (is_fortran and len(shape) > 1):
        raise DataError(f"{name} has shape {list(shape)} or Fortran's order. Save it by numpy.ascontiguousarray.")
    start = stream.tell()
    size = stream.seek(0, io.SEEK_END) - start
    stream.seek(start)
    if size != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{name} has {size:,} bytes for {dtype} {list(shape)}: it is truncated or damaged.")
    return shape, dtype
