"""Folders of images by class, in a folder, a zip or a tar: which are the splits, the classes and the images."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from .archives import Parts, is_image, join_parts
from .errors import DataError, list_some, note
from .images import note_left_out
from .reading import LabelledImages, Listing, ReadOptions, check_split, choose_test_split, read_labelled, split_of
from .store import RawData


@dataclass(frozen=True, slots=True)
class _Layout:
    """Folders, each with folders of images by class."""

    train: Parts
    test: Parts | None
    """None if the images of `train` have to be split."""
    left_out: Parts | None
    """Validation images, beside those to test on."""


def find_splits(listing: Listing) -> list[Parts]:
    """Find the topmost folders that are called as splits are and that contain folders with images.

    A folder called images is that of a class, or of images without labels, and no class itself.
    """
    above = {file[:-2] if file[-2:-1] == ("images",) else file[:-1] for file in listing.files if is_image(file[-1])}
    splits = {
        folder[:depth]
        for folder in above
        for depth in range(1, len(folder))  # not the last: a class may be called train
        if split_of(folder[depth - 1])
    }
    top = min(map(len, splits), default=0)
    return sorted(folder for folder in splits if len(folder) == top)


def has_images(listing: Listing) -> bool:
    """Return True if there are images in a folder or an archive."""
    return not listing.is_file and any(is_image(file[-1]) for file in listing.files)


def read_image_folders(listing: Listing, options: ReadOptions) -> RawData:
    """Read images in folders of their classes.

    With `options.only_test` these are the images for testing, or all if no folder is called as a split is; without
    those for testing, a `Note` says which are taken. Raises `DataError` if there are no images by class or `--split` is
    missing, `UsageError` if it is out of place.
    """
    if options.only_test:
        layout = _Layout(_find_test_folder(listing), None, None)
        files, folders = (
            [parts for parts in all_ if _is_below(layout.train, parts)] for all_ in (listing.files, listing.folders)
        )
        listing = replace(listing, files=files, folders=folders)
    else:
        layout = _find_layout(listing, options)
    folders = [folder for folder in (layout.train, layout.test) if folder is not None]
    classes = find_classes(listing, folders)
    train, *test = (label_images(listing, folder, classes) for folder in folders)
    _note_left_out(listing, layout, folders, {file for images in (train, *test) for file, _ in images})
    return read_labelled(listing, LabelledImages(classes, train, test[0] if test else None), options)


def _find_split_folders(listing: Listing) -> dict[str | None, Parts]:
    splits: dict[str | None, Parts] = {}
    for folder in find_splits(listing):
        if (other := splits.setdefault(split_of(folder[-1]), folder)) != folder:
            raise DataError(
                f"{listing.path} has two folders for one split, {join_parts(other)} and {join_parts(folder)}. Keep one."
            )
    return splits


def _find_layout(listing: Listing, options: ReadOptions) -> _Layout:
    splits = _find_split_folders(listing)
    if not splits:
        layout = _Layout(_find_root(listing), None, None)
        check_split(listing.path, None, options)
        return layout
    if "train" not in splits:
        raise DataError(f"{listing.path} has no train images: a folder of images has train/CLASS/ and test/CLASS/.")
    test = splits.get(
        choose_test_split(listing.path, {str(split): join_parts(folder) for split, folder in splits.items()})
    )
    check_split(listing.path, None if test is None else join_parts(test), options)
    validation = splits.get("validation")
    return _Layout(splits["train"], test, None if validation == test else validation)


def _find_test_folder(listing: Listing) -> Parts:
    splits = _find_split_folders(listing)
    folder = splits.get("test") or splits.get("validation") or splits.get("train") or _find_root(listing)
    if splits and "test" not in splits:
        note(f"{listing.path} has no test images in folders of their classes; those of {join_parts(folder)} are taken.")
    return folder


def _find_root(listing: Listing) -> Parts:
    """Find the folder of the folders of classes, where no folder is called as a split is."""
    above = {file[:-1] for file in listing.files if is_image(file[-1])}
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(above), max(above), strict=False))
    root = tuple(name for name, _ in pairs)
    if above == {root}:
        root = root[:-1]  # a single class
    names = {folder[len(root)] for folder in above if len(folder) > len(root)}
    if not names or all(map(split_of, names)):
        raise DataError(
            f"{listing.path}: the images are not in folders of their classes, train/CLASS/ and test/CLASS/."
        )
    return root


def find_classes(listing: Listing, folders: list[Parts]) -> tuple[str, ...]:
    """Return the names of the folders that contain images, sorted as torchvision's ImageFolder does."""
    train = folders[0]
    inside = [folder[len(train)] for folder in listing.folders if len(folder) > len(train) and _is_below(train, folder)]
    known = {*inside, *_classes_with_images(listing, train)}
    found = set().union(*(_classes_with_images(listing, folder) for folder in folders))
    if unknown := sorted(found - known):
        raise DataError(
            f"{listing.path}: {join_parts(folders[1])} has classes that {join_parts(train)} lacks: "
            f"{list_some(unknown)}."
        )
    if empty := sorted(known - found):
        note(f"left out class folders without an image: {list_some(empty)}.")
    if len(found) == 1:
        place = join_parts(train) or listing.path
        note(f"there is one class only, {list_some([*found])}: classes are the folders in {place}.")
    return tuple(sorted(found))


def _classes_with_images(listing: Listing, folder: Parts) -> set[str]:
    return {file[len(folder)] for file in listing.files if _is_image_of_class(file, folder)}


def label_images(listing: Listing, folder: Parts, classes: tuple[str, ...]) -> list[tuple[Parts, int]]:
    """List the images in a split's folder with their labels, in the order of torchvision's ImageFolder."""
    labels = {name: label for label, name in enumerate(classes)}
    images = [(file, labels[file[len(folder)]]) for file in listing.files if _is_image_of_class(file, folder)]
    return sorted(images, key=lambda image: (image[1], join_parts(image[0][:-1]), image[0][-1]))


def _is_image_of_class(file: Parts, folder: Parts) -> bool:
    return len(file) > len(folder) + 1 and _is_below(folder, file) and is_image(file[-1])


def _is_below(folder: Parts | None, file: Parts) -> bool:
    return folder is not None and file[: len(folder)] == folder


def _note_left_out(listing: Listing, layout: _Layout, folders: list[Parts], used: set[Parts]) -> None:
    """Warn of files in the splits that are not read, and of images anywhere."""
    rest = [file for file in listing.files if file not in used]
    if layout.left_out is not None:
        held = [file for file in rest if _is_below(layout.left_out, file) and is_image(file[-1])]
        note(f"left out {join_parts(layout.left_out)}, which is beside the test images (images: {len(held):,}).")
        rest = [file for file in rest if not _is_below(layout.left_out, file)]
    in_splits = [file for file in rest if is_image(file[-1]) or any(_is_below(folder, file) for folder in folders)]
    note_left_out([join_parts(file) for file in sorted(in_splits)], "images of a class")
