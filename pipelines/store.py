"""Binary data set on disk: a folder of plain NumPy files and a `meta.json` with their SHA-256.

    <root>/<name>/train_images.npy   uint8 [N, 32, 32, 3]      test_images.npy
                  train_labels.npy   int64 [N]                 test_labels.npy
                  pixel_mean.npy     float32 [32, 32, 3], mean of the training images, in 0..1
                  meta.json          name, classes, counts, mean and std, source, version; size and SHA-256 of each file

One rename creates the folder, so it is complete or does not exist.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shlex
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from .errors import DataError, UsageError, reason_of
from .files import sha256, sync_folder, temporary_folder, write_json
from .prng import Stream, permutation, stream_key
from .sampling import IMAGE_SIZE
from .texts import read_json

CIFAR10, CIFAR100, SHAPES10 = BUILT_IN = "cifar10", "cifar100", "shapes10"
"""Data sets that are prepared without files from the user."""

MOST_CLASSES = 1 << 15
"""Largest number of classes; ImageNet-21k has 21,841. Networks and tables grow with it, whatever a file claims."""

LONGEST_NAME = 1000
"""Most characters of the name of a class or data set."""

SCHEMA = 1
_ARRAYS = {
    "train_images": np.dtype(np.uint8),
    "train_labels": np.dtype(np.int64),
    "test_images": np.dtype(np.uint8),
    "test_labels": np.dtype(np.int64),
    "pixel_mean": np.dtype(np.float32),
}

DERIVED_FILES = {"beton": ("train.beton", "test.beton"), "jpeg": ("train.tar", "train.idx", "test.tar", "test.idx")}
"""Files of each format that is made from a store (`formats.py`)."""

_DERIVED = [name for kind, names in DERIVED_FILES.items() for name in (f"{kind}.json", *names)]
STORE_FILES = frozenset({"meta.json", *(f"{key}.npy" for key in _ARRAYS), *_DERIVED})
"""Names of files in the folder of a store."""


@dataclass(frozen=True, slots=True)
class RawData:
    """Data set in memory, as a source delivers it."""

    classes: tuple[str, ...]
    train_images: np.ndarray
    """Pixels, uint8 [N, 32, 32, 3]."""
    train_labels: np.ndarray
    """Classes of the images, int64 [N], 0..len(classes)-1."""
    test_images: np.ndarray
    test_labels: np.ndarray
    files_md5: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """MD5 of the files of CIFAR-10 or CIFAR-100 that it was read from, by name."""

    def splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return images and labels of each split, by its name."""
        return {"train": (self.train_images, self.train_labels), "test": (self.test_images, self.test_labels)}


@dataclass(frozen=True, slots=True)
class Split:
    """Samples of a store; `ids` are their row numbers in it and select a part of the rows."""

    name: str
    """Files that the rows are in: `train` or `test`."""

    images: np.ndarray = field(repr=False)
    """Read-only memory map, uint8 [rows of the store, 32, 32, 3]."""
    labels: np.ndarray = field(repr=False)
    """Classes of all rows, int64 [rows of the store]."""
    ids: np.ndarray = field(repr=False)
    """Row numbers of the samples, int64 [N]."""

    def __len__(self) -> int:
        return len(self.ids)

    def check_whole(self) -> None:
        """Raise `DataError` if the mapped file of the images was truncated."""
        mapped: object = self.images.base
        if isinstance(mapped, mmap.mmap) and mapped.size() < len(mapped):
            file = Path(getattr(self.images, "filename", self.name))
            raise DataError(f"{file} was truncated while it was in use. {_remedy(file.parent)}")


@dataclass(frozen=True, slots=True)
class Dataset:
    """Opened and verified store."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    """Mean of the training pixels of each channel, in 0..1."""
    std: tuple[float, ...]
    """Standard deviation of the training pixels of each channel, in 0..1; 1 for a constant channel, which
    normalisation then only centres."""
    pixel_mean: np.ndarray = field(repr=False)
    """Mean of the training images, float32 [32, 32, 3], in 0..1."""
    digest: str
    """SHA-256 over classes, images and labels, independent of folder, source file and version of the program."""
    folder: Path

    @classmethod
    def of_test_images(cls, name: str, data: RawData, folder: Path) -> Dataset:
        """Create a data set in memory, to test on the images of `data`; mean and deviation are theirs."""
        images, labels = data.test_images, data.test_labels
        return cls._in_memory(name, RawData(data.classes, images[:0], labels[:0], images, labels), folder)

    @classmethod
    def of_arrays(
        cls, name: str, train_images: Any, train_labels: Any, test_images: Any, test_labels: Any, classes: Any = None
    ) -> Dataset:
        """Create a data set in memory; see `fastresnet.create_dataset`."""
        if not isinstance(name, str) or not is_name(name):
            raise UsageError(f"{name!r:.200} is not a name for a data set: use letters, digits and dashes.")
        train = _checked_split("train", train_images, train_labels)
        test = _checked_split("test", test_images, test_labels)
        highest = max(int(labels.max()) for _, labels in (train, test))
        if isinstance(classes, str) or not isinstance(classes, Sequence | None):
            raise UsageError(f"classes is {classes!r:.200}: give a list of names, or leave it out.")
        names = list(map(str, range(highest + 1)) if classes is None else classes)
        if not are_class_names(names) or len(set(names)) < len(names) or highest >= len(names):
            raise UsageError(
                f"{len(names)} classes for labels up to {highest}: give a name for each class, no two the same."
            )
        return cls._in_memory(name, RawData(tuple(names), *train, *test), Path(f"<{name}, in memory>"))

    @classmethod
    def _in_memory(cls, name: str, data: RawData, folder: Path) -> Dataset:
        """Create a data set of `data`, with mean and deviation of its training images or, without any, of all."""
        splits = {split: Split(split, *rows, np.arange(len(rows[1]))) for split, rows in data.splits().items()}
        images = data.train_images if len(data.train_images) else data.test_images
        mean, std = channel_statistics(images)
        digest = hashlib.sha256(json.dumps(data.classes).encode())
        for split in splits.values():
            digest.update(split.images.tobytes())
            digest.update(split.labels.tobytes())
        return cls(
            name=name,
            classes=data.classes,
            train=splits["train"],
            test=splits["test"],
            mean=tuple(mean),
            std=_divisors(std),
            pixel_mean=(images.mean(axis=0, dtype=np.float64) / 255).astype(np.float32),
            digest=digest.hexdigest(),
            folder=folder,
        )

    def hold_out(self, count: int) -> tuple[Dataset, Dataset]:
        """Hold out `count` training images.

        Returns the data set without them, and one with them as its test split. The hash alone selects the images, the
        same for every seed. Raises `UsageError` unless both parts have images.
        """
        if not 0 < count < len(self.train):
            raise UsageError(f"--val-split {count} leaves nothing of the {len(self.train)} training images. Give less.")
        order = self.train.ids[permutation(stream_key(0, 0, Stream.HOLD_OUT), self.train.ids)]
        held, kept = np.sort(order[:count]), np.sort(order[count:])
        return (replace(self, train=replace(self.train, ids=kept)), replace(self, test=replace(self.train, ids=held)))


def _checked_split(split: str, images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of a user as arrays of a store. Raises `UsageError` on other shapes, types or values."""
    try:
        images, labels = (np.asarray(array).copy(order="C") for array in (images, labels))  # the user may change theirs
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{split}_images or {split}_labels are no arrays: {reason_of(error)}") from None
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or not len(images):
        raise UsageError(
            f"{split}_images is {images.dtype} {list(images.shape)}: give uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], "
            "the pixels of at least one image in RGB, channels last."
        )
    is_whole = labels.dtype.kind in "iu"
    if not is_whole or labels.shape != (len(images),) or not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        extremes = f", {labels.min()}..{labels.max()}" if is_whole and labels.size else ""
        raise UsageError(
            f"{split}_labels is {labels.dtype} {list(labels.shape)}{extremes}: give an integer in "
            f"0..{MOST_CLASSES - 1} for each of the {len(images)} images."
        )
    return images, labels.astype(np.int64)


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel of uint8 [N, 32, 32, 3], in 0..1, from exact counts."""
    counts = np.zeros((3, 256))
    for start in range(0, len(images), 4096):  # bincount widens to int64: all at once would need 8 bytes per pixel
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
    weights = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    mean = weights @ levels
    std = np.sqrt((weights * (levels - mean[:, None]) ** 2).sum(axis=1))
    return mean.tolist(), std.tolist()


def _divisors(std: list[float]) -> tuple[float, ...]:
    """Return what normalisation divides by: the standard deviations, and 1 for a constant channel."""
    return tuple(value or 1.0 for value in std)


def write_store(folder: Path, data: RawData, *, source: str, version: str) -> None:
    """Write `data` as the store `folder`; replace a damaged one, or a link, once the new one is complete.

    The caller holds the lock of `folder`. Raises `OSError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        _write_files(new, folder.name, data, source, version)
        if os.path.lexists(folder):
            os.rename(folder, old)
        os.rename(new, folder)
        sync_folder(folder.parent)


def _meta_digest(meta: dict[str, Any]) -> str:
    """Compute the SHA-256 of all entries of meta.json except `sha256` itself."""
    return _json_digest({key: value for key, value in meta.items() if key != "sha256"})


def _content_digest(meta: dict[str, Any]) -> str:
    files = {f"{key}.npy": meta["files"][f"{key}.npy"]["sha256"] for key in _ARRAYS if key != "pixel_mean"}
    return _json_digest([meta["classes"], files])


def _json_digest(contents: Any) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _write_files(folder: Path, name: str, data: RawData, source: str, version: str) -> None:
    mean, std = channel_statistics(data.train_images)
    pixel_mean = data.train_images.mean(axis=0, dtype=np.float64) / 255
    files = {}
    for key, kind in _ARRAYS.items():
        array = pixel_mean.astype(kind) if key == "pixel_mean" else getattr(data, key)
        path = folder / f"{key}.npy"
        with open(path, "wb") as file:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    meta = {
        "schema": SCHEMA,
        "name": name,
        "classes": list(data.classes),
        "counts": {split: len(labels) for split, (_, labels) in data.splits().items()},
        "mean": mean,
        "std": std,
        "source": source,
        "version": version,
        "files": files,
    }
    meta["sha256"] = _meta_digest(meta)
    write_json(folder / "meta.json", meta)  # which syncs the folder too


def open_store(folder: Path) -> Dataset:
    """Open and verify the store `folder`.

    Raises `DataError` that names the file and the remedy if the store is missing, damaged or of another kind.
    """
    meta = _read_meta(folder)
    arrays = {key: _open_array(folder, key, meta["files"]) for key in _ARRAYS}
    remedy = _remedy(folder)
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if labels.ndim != 1 or images.shape != (len(labels), IMAGE_SIZE, IMAGE_SIZE, 3):
            raise DataError(f"{folder / split}_images.npy and _labels.npy do not match. {remedy}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(meta["classes"]):
            raise DataError(
                f"{folder / split}_labels.npy has labels outside the {len(meta['classes'])} classes. {remedy}"
            )
    if arrays["pixel_mean"].shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise DataError(f"{folder / 'pixel_mean.npy'} has shape {arrays['pixel_mean'].shape}. {remedy}")
    return Dataset(
        name=meta["name"],
        classes=tuple(meta["classes"]),
        train=_whole_split("train", arrays),
        test=_whole_split("test", arrays),
        mean=tuple(meta["mean"]),
        std=_divisors(meta["std"]),
        pixel_mean=arrays["pixel_mean"],
        digest=_content_digest(meta),
        folder=folder,
    )


def is_name(name: str) -> bool:
    """Return True if `name` is valid for a data set: it becomes a folder name, and part of other folders' names."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == Path(name).name and not name.startswith(".")


def are_class_names(names: Any) -> TypeGuard[list[str]]:
    """Return True if a file's `names` can be those of classes: a list of texts, not too many and none too long."""
    if not isinstance(names, list) or not 0 < len(names) <= MOST_CLASSES:
        return False
    return all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in names)


def prepare_command(folder: Path) -> str:
    """Return the command that prepares the store `folder` or, with --formats, files derived from it."""
    folder = folder.absolute()
    return shlex.join(["fastresnet", "prepare", "--data", folder.name, "--root", str(folder.parent)])


def prepare_again_command(folder: Path) -> str:
    """Return the command that prepares a missing or damaged store; a user's own data set needs --source."""
    source = "" if folder.absolute().name in BUILT_IN else " --source PATH"
    return f"{prepare_command(folder)}{source}"


def _whole_split(name: str, arrays: dict[str, np.ndarray]) -> Split:
    labels = arrays[f"{name}_labels"]
    return Split(name, arrays[f"{name}_images"], labels, np.arange(len(labels), dtype=np.int64))


def _remedy(folder: Path) -> str:
    return f"Prepare it again: {prepare_again_command(folder)}"


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        if inside := sorted(path.parent for path in folder.glob("*/meta.json")):
            raise DataError(f"no prepared data set in {folder} itself, but there is one in {inside[0]}.") from None
        if folder.is_dir() and not (folder / "train_images.npy").exists() and any(folder.iterdir()):
            raise DataError(
                f"{folder} is not a prepared data set. If it has images by class, prepare them under a name: "
                f"fastresnet prepare --data NAME --source {shlex.quote(str(folder))}"
            ) from None
        raise DataError(f"no prepared data set in {folder}. Prepare it: {prepare_again_command(folder)}") from None
    except (ValueError, IsADirectoryError) as error:
        raise DataError(f"{path} is damaged: {error}. {_remedy(folder)}") from None
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        raise DataError(f"{path} does not describe a store that this version reads. {_remedy(folder)}")
    checks = {
        "name": lambda value: isinstance(value, str) and is_name(value),
        "classes": are_class_names,
        "mean": _is_three_fractions,
        "std": _is_three_fractions,
        "files": lambda value: isinstance(value, dict) and {f"{key}.npy" for key in _ARRAYS} <= value.keys(),
    }
    for key, good in checks.items():
        if not good(meta.get(key)):
            raise DataError(f"{path}: {key!r} is missing or wrong. {_remedy(folder)}")
    if meta.get("sha256") != _meta_digest(meta):
        raise DataError(f"{path} is damaged: its own SHA-256 is wrong. {_remedy(folder)}")
    return meta


def _is_three_fractions(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, float) and 0 <= v <= 1 for v in value)


def check_file(path: Path, expected: dict[str, Any], manifest: str, remedy: str) -> None:
    """Raise `DataError`, with the `remedy`, unless `path` has the size and SHA-256 that `manifest` expects."""
    if not path.is_file():
        raise DataError(f"{path} is missing. {remedy}")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise DataError(f"{path} has {size} bytes, not {expected['bytes']!r:.30}. {remedy}")
    if sha256(path) != expected["sha256"]:
        raise DataError(f"{path} is damaged: its SHA-256 is not the one in {manifest}. {remedy}")


def _open_array(folder: Path, key: str, files: dict[str, Any]) -> np.ndarray:
    """Memory-map `key`.npy after verifying its size and SHA-256."""
    path = folder / f"{key}.npy"
    expected = files[path.name]
    try:
        check_file(path, expected, "meta.json", _remedy(folder))
        with np.errstate(over="ignore"):  # a shape is multiplied before it is compared with the size
            array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, accepts only .npy
    except (KeyError, TypeError, ValueError, OverflowError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}. {_remedy(folder)}") from None
    if array.dtype != _ARRAYS[key]:
        raise DataError(f"{path} holds {str(array.dtype)[:100]}, not {_ARRAYS[key]}. {_remedy(folder)}")
    if not array.flags.c_contiguous:  # compiled code reads its memory in order
        raise DataError(f"{path} is not in C order. {_remedy(folder)}")
    return array
