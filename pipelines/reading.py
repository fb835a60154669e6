"""Listing of a source, choices of the user, and splits, which all readers of sources share."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .archives import File, Parts, file_at, list_files
from .errors import DataError, UsageError, UserError, note, reason_of
from .images import Report, read_images
from .store import MOST_CLASSES, RawData

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}
"""Names of splits, in lower case and without a word such as "set" after them."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Names of all that a source contains, without debris."""

    path: Path
    """Folder, archive or file that the user gave."""
    files: list[Parts]
    folders: list[Parts]
    """Folders, as far as an archive names them."""
    is_file: bool = False
    """True if the source is one file, which is not opened as an archive."""

    def open(self, wanted: Collection[Parts]) -> Iterator[File]:
        """Yield the files called `wanted`, in any order; read each before asking for the next."""
        files = [file_at(self.path)] if self.is_file else list_files(self.path)
        return (file for file in files if not file.is_folder and file.parts in wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """Choices of the user, and the report of progress."""

    report: Report = lambda *_: None
    split: float | None = None
    """Fraction to test on of images that come without test images."""
    resize: bool = False
    """True if images of another size may be cropped to a square and resized."""
    skip_unreadable: bool = False
    only_test: bool = False
    """True if images that come without test images are all for testing."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Image files with their labels."""

    classes: tuple[str, ...]
    train: list[tuple[Parts, int]]
    test: list[tuple[Parts, int]] | None
    """None if those of `train` have to be divided."""


def split_of(name: str) -> str | None:
    """Return the split that a folder or file called `name` is: train, test, validation, or None."""
    return _SPLITS.get(re.sub(r"[-_ ]?(set|data|images)$", "", name.lower()))


def choose_test_split(path: Path, names: Mapping[str, str]) -> str | None:
    """Return the split to test on: that called test, else with a `Note` validation, else None.

    `names` are those in the source, by split.
    """
    if "test" in names or "validation" not in names:
        return "test" if "test" in names else None
    note(f"{path} has no test images; those of {names['validation']} are taken.")
    return "validation"


def check_split(path: Path, test: str | None, options: ReadOptions) -> None:
    """Raise `DataError` if images without a `test` split cannot be divided, `UsageError` if those with one shall be."""
    if test is None and options.only_test:
        note(f"{path} has no test images; its training images are taken.")
    elif test is None and options.split is None:
        raise DataError(f"{path} has no test images. --split 0.2 makes about a fifth of its images test images.")
    if test is not None and options.split is not None:
        raise UsageError(f"--split {options.split}: {path} has test images already, in {test}.")


def divide(classes: tuple[str, ...], images: np.ndarray, labels: np.ndarray, options: ReadOptions) -> RawData:
    """Divide images that come without test images, uint8 [N, 32, 32, 3].

    The hash of its pixels puts an image into the part `options.split` that is for testing. So other images cannot move
    it, and equal images are on one side.
    """
    split = 1.0 if options.only_test else options.split or 0.0
    is_test = np.array([_fraction(image) < split for image in images], bool)
    return RawData(classes, images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _fraction(image: np.ndarray) -> float:
    """Return a number in 0..1 that only the pixels of `image` determine."""
    return int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big") / 2**64


def read_labelled(listing: Listing, labelled: LabelledImages, options: ReadOptions) -> RawData:
    """Read image files. Raises the errors of `read_images`."""
    images = labelled.train + (labelled.test or [])
    rows = {file: row for row, (file, _) in enumerate(images)}
    files = ((rows[file.parts], file) for file in listing.open(rows))
    labels = np.array([label for _, label in images], np.int64)
    train = None if labelled.test is None else len(labelled.train)
    size = None if listing.path.is_dir() else listing.path.stat().st_size
    return read_rows(listing.path, files, labels, train, labelled.classes, options, source_bytes=size)


def read_rows(
    path: Path,
    files: Iterable[tuple[int, File]],
    labels: np.ndarray,
    train: int | None,
    classes: tuple[str, ...] | None,
    options: ReadOptions,
    *,
    source_bytes: int | None,
) -> RawData:
    """Read image files, each with its row. Raises the errors of `read_images`.

    `labels` are those of all rows, int64 [N], which `files` may fill in. The first `train` rows are those to train on;
    without a number the images are divided. Without names of `classes`, these are numbers.
    """
    pixels, is_read = read_images(
        files,
        len(labels),
        options.report,
        skip_unreadable=options.skip_unreadable,
        resize=options.resize,
        source_bytes=source_bytes,
    )
    if classes is None:
        classes = number_names(path, labels)
    if train is not None:
        train = int(np.count_nonzero(is_read[:train]))
    if not is_read.all():
        pixels, labels = pixels[is_read], labels[is_read]
    if train is None:
        return divide(classes, pixels, labels, options)
    return RawData(classes, pixels[:train], labels[:train], pixels[train:], labels[train:])


def number_names(path: Path, *labels: np.ndarray) -> tuple[str, ...]:
    """Name classes that have numbers only: "0", "1" and so on. Raises `DataError` if one cannot be of a class."""
    largest = max((int(part.max()) for part in labels if len(part)), default=0)
    if largest >= MOST_CLASSES:
        raise DataError(f"{path} has label {largest}, but {MOST_CLASSES:,} classes are the most.")
    return tuple(map(str, range(largest + 1)))


@contextlib.contextmanager
def explained(name: str, kind: str) -> Iterator[None]:
    """Raise `DataError` for what a library raises that reads the damaged file `name` as one of a `kind`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{name} cannot be read as {kind}: {reason_of(error).rstrip('.')}. Fetch it again.") from None
