"""Folders of images by class, in a folder, a zip or a tar: which are the splits, the classes and the images."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .archives import Parts, is_image, list_files
from .errors import DataError, UsageError, list_some, note
from .images import Report, note_left_out, read_images
from .store import RawData

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}
"""Names of the folders of splits, in lower case and without a word such as "set" after them."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Names of all that a source contains, without debris."""

    files: list[Parts]
    folders: list[Parts]
    """Folders, as far as an archive names them."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Folders, each with folders of images by class."""

    train: Parts
    test: Parts | None
    """None if the images of `train` have to be split."""
    left_out: Parts | None
    """Validation images, beside those to test on."""


def find_splits(listing: Listing) -> list[Parts]:
    """Find the topmost folders that are called as splits are and that contain folders with images."""
    above = {file[:-1] for file in listing.files if is_image(file[-1])}
    splits = {
        folder[:depth]
        for folder in above
        for depth in range(1, len(folder))  # not the last: a class may be called train
        if _split_of(folder[depth - 1])
    }
    top = min(map(len, splits), default=0)
    return sorted(folder for folder in splits if len(folder) == top)


def _split_of(name: str) -> str | None:
    return _SPLITS.get(re.sub(r"[-_ ]?(set|data|images)$", "", name.lower()))


def read_image_folders(
    path: Path, listing: Listing, report: Report, *, split: float | None = None, skip_unreadable: bool = False
) -> RawData:
    """Read the images of `path`, which contains `listing`.

    Images that come without test images are split: the hash of its pixels puts an image into the part `split` that is
    for testing. So other images cannot move it, and equal images are on one side. Raises `DataError` if there are no
    images by class or `split` is missing, `UsageError` if it is out of place.
    """
    layout = _find_layout(path, listing)
    if layout.test is None and split is None:
        raise DataError(f"{path} has no test images. --split 0.2 makes about a fifth of its images test images.")
    if layout.test is not None and split is not None:
        raise UsageError(f"--split {split}: {path} has test images already, in {_join(layout.test)}.")
    return _read(path, listing, layout, report, split=split, skip_unreadable=skip_unreadable)


def read_test_folders(path: Path, listing: Listing, report: Report) -> RawData:
    """Read the images of `path` that are for testing, or all if no folder is called as a split is.

    Without those for testing, a `Note` says which are taken. The training split is empty. Raises `DataError` as
    `read_image_folders` does.
    """
    splits = _find_split_folders(path, listing)
    folder = splits.get("test") or splits.get("validation") or splits.get("train") or _find_root(path, listing)
    if splits and "test" not in splits:
        note(f"{path} has no test images in folders of their classes; those of {_join(folder)} are taken.")
    inside = Listing(*([file for file in all_ if _is_below(folder, file)] for all_ in (listing.files, listing.folders)))
    return _read(path, inside, _Layout(folder, None, None), report, split=1.0)


def _read(
    path: Path,
    listing: Listing,
    layout: _Layout,
    report: Report,
    *,
    split: float | None = None,
    skip_unreadable: bool = False,
) -> RawData:
    folders = [folder for folder in (layout.train, layout.test) if folder is not None]
    classes = _find_classes(path, listing, folders)
    images = [image for folder in folders for image in _label(listing, folder, classes)]
    _note_left_out(listing, layout, folders, {file for file, _ in images})

    rows = {file: row for row, (file, _) in enumerate(images)}
    files = ((rows[file.parts], file) for file in list_files(path) if not file.is_folder and file.parts in rows)
    source_bytes = None if path.is_dir() else path.stat().st_size
    pixels, is_read = read_images(files, len(rows), report, skip_unreadable=skip_unreadable, source_bytes=source_bytes)
    labels = np.array([label for _, label in images], np.int64)
    if split is None:
        is_test = np.array([_is_below(layout.test, file) for file, _ in images], bool)
    else:
        is_test = np.array([_fraction(image) < split for image in pixels], bool)
    train, test = is_read & ~is_test, is_read & is_test
    _note_empty_classes(classes, {"train": labels[train], "test": labels[test]})
    if split is None and is_read.all():  # those to train on are first, and need no copy
        parts = np.split(pixels, [np.count_nonzero(train)])
    else:
        parts = [pixels[train], pixels[test]]
    return RawData(classes, parts[0], labels[train], parts[1], labels[test])


def _find_split_folders(path: Path, listing: Listing) -> dict[str | None, Parts]:
    splits: dict[str | None, Parts] = {}
    for folder in find_splits(listing):
        if (other := splits.setdefault(_split_of(folder[-1]), folder)) != folder:
            raise DataError(f"{path} has two folders for one split, {_join(other)} and {_join(folder)}. Keep one.")
    return splits


def _find_layout(path: Path, listing: Listing) -> _Layout:
    splits = _find_split_folders(path, listing)
    if not splits:
        return _Layout(_find_root(path, listing), None, None)
    if "train" not in splits:
        raise DataError(f"{path} has no train images: a folder of images has train/CLASS/ and test/CLASS/.")
    test, validation = splits.get("test"), splits.get("validation")
    if test is None and validation is not None:
        note(f"{path} has no test folder; its test images are those of {_join(validation)}.")
        return _Layout(splits["train"], validation, None)
    return _Layout(splits["train"], test, validation)


def _find_root(path: Path, listing: Listing) -> Parts:
    """Find the folder of the folders of classes, where no folder is called as a split is."""
    above = {file[:-1] for file in listing.files if is_image(file[-1])}
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(above), max(above), strict=False))
    root = tuple(name for name, _ in pairs)
    if above == {root}:
        root = root[:-1]  # a single class
    names = {folder[len(root)] for folder in above if len(folder) > len(root)}
    if not names or all(map(_split_of, names)):
        raise DataError(f"{path}: the images are not in folders of their classes, train/CLASS/ and test/CLASS/.")
    return root


def _find_classes(path: Path, listing: Listing, folders: list[Parts]) -> tuple[str, ...]:
    """Return the names of the folders that contain images, sorted as torchvision's ImageFolder does."""
    train = folders[0]
    inside = [folder[len(train)] for folder in listing.folders if len(folder) > len(train) and _is_below(train, folder)]
    known = {*inside, *_classes_with_images(listing, train)}
    found = set().union(*(_classes_with_images(listing, folder) for folder in folders))
    if unknown := sorted(found - known):
        raise DataError(f"{path}: {_join(folders[1])} has classes that {_join(train)} lacks: {list_some(unknown)}.")
    if empty := sorted(known - found):
        note(f"left out class folders without an image: {list_some(empty)}.")
    if len(found) == 1:
        note(f"there is one class only, {list_some([*found])}: classes are the folders in {_join(train) or path}.")
    return tuple(sorted(found))


def _classes_with_images(listing: Listing, folder: Parts) -> set[str]:
    return {file[len(folder)] for file in listing.files if _is_image_of_class(file, folder)}


def _label(listing: Listing, folder: Parts, classes: tuple[str, ...]) -> list[tuple[Parts, int]]:
    """List the images in a split's folder with their labels, in the order of torchvision's ImageFolder."""
    labels = {name: label for label, name in enumerate(classes)}
    images = [(file, labels[file[len(folder)]]) for file in listing.files if _is_image_of_class(file, folder)]
    return sorted(images, key=lambda image: (image[1], _join(image[0][:-1]), image[0][-1]))


def _is_image_of_class(file: Parts, folder: Parts) -> bool:
    return len(file) > len(folder) + 1 and _is_below(folder, file) and is_image(file[-1])


def _is_below(folder: Parts | None, file: Parts) -> bool:
    return folder is not None and file[: len(folder)] == folder


def _fraction(image: np.ndarray) -> float:
    """Return a number in 0..1 that only the pixels of `image` determine."""
    return int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big") / 2**64


def _note_left_out(listing: Listing, layout: _Layout, folders: list[Parts], used: set[Parts]) -> None:
    """Warn of files in the splits that are not read, and of images anywhere."""
    rest = [file for file in listing.files if file not in used]
    if layout.left_out is not None:
        held = [file for file in rest if _is_below(layout.left_out, file) and is_image(file[-1])]
        note(f"left out {_join(layout.left_out)}, which is beside the test images (images: {len(held):,}).")
        rest = [file for file in rest if not _is_below(layout.left_out, file)]
    in_splits = [file for file in rest if is_image(file[-1]) or any(_is_below(folder, file) for folder in folders)]
    note_left_out([_join(file) for file in sorted(in_splits)], "images of a class")


def _note_empty_classes(classes: tuple[str, ...], splits: dict[str, np.ndarray]) -> None:
    for split, labels in splits.items():
        counts = np.bincount(labels, minlength=len(classes))
        if len(labels) and (empty := [name for name, count in zip(classes, counts, strict=True) if not count]):
            note(f"no {split} images of {len(empty)} of {len(classes)} classes: {list_some(empty)}.")


def _join(parts: Parts) -> str:
    return "/".join(parts)
