"""Images whose labels are in a text file: a table as Kaggle's, or the annotations of Tiny-ImageNet."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import PurePath

from .archives import Parts, is_image, join_parts
from .errors import DataError, list_some, note
from .image_folders import find_classes, label_images
from .reading import LabelledImages, Listing, ReadOptions, check_split, read_labelled
from .store import RawData
from .texts import LONGEST_TEXT

_TABLE = re.compile(r"train([-_ ]?labels)?\.csv", re.IGNORECASE)
_PLACES = ((), ("train",), ("images",), ("train_images",))
"""Folders of a table's images, beside it."""
_IDS, _LABELS = ("id", "image_id", "filename", "file_name", "image"), ("label", "class")

_ANNOTATIONS, _WORDS = "val_annotations.txt", "words.txt"


def has_table(listing: Listing) -> bool:
    """Return True if a table of labels is beside its images, or beside their folder, such as train."""
    return bool(_find_tables(listing))


def read_table(listing: Listing, options: ReadOptions) -> RawData:
    """Read the images of a table with the columns id and label; an id is the name of a file, or that without suffix.

    Images that are not in the table are left out with a `Note`. Raises `DataError` if it names one that is missing.
    """
    tables = _find_tables(listing)
    if len(tables) > 1:
        raise DataError(
            f"{listing.path} has several tables of labels: {list_some(list(map(join_parts, tables)))}. Keep one."
        )
    ((table, images),) = tables.items()
    check_split(listing.path, None, options)
    name = f"{listing.path}: {join_parts(table)}"
    labels = _read_rows(_read_text(listing, table), name, images)
    is_numbered = all(label.isdecimal() for label in labels.values())
    classes = tuple(sorted({*labels.values()}, key=int if is_numbered else str))
    numbers = {label: number for number, label in enumerate(classes)}
    _note_unlabelled(listing, set(labels), join_parts(table))
    labelled = [(image, numbers[label]) for image, label in labels.items()]
    return read_labelled(listing, LabelledImages(classes, labelled, None), options)


def _find_tables(listing: Listing) -> dict[Parts, list[Parts]]:
    """Find tables, each with its images."""
    tables = {} if listing.is_file else {file: file[:-1] for file in listing.files if _TABLE.fullmatch(file[-1])}
    images: dict[Parts, list[Parts]] = {}
    for file in listing.files if tables else ():
        if is_image(file[-1]):
            images.setdefault(file[:-1], []).append(file)
    found = {
        table: [image for folder in _PLACES for image in images.get((*place, *folder), [])]
        for table, place in tables.items()
    }
    return {table: files for table, files in found.items() if files}


def _read_rows(text: str, name: str, images: list[Parts]) -> dict[Parts, str]:
    """Read the label of each image in a table."""
    files: dict[str, list[Parts]] = {}
    for image in images:
        for key in {image[-1], PurePath(image[-1]).stem}:
            files.setdefault(key, []).append(image)
    labels: dict[Parts, str] = {}
    missing = list[str]()
    count = 0
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip().lower() for column in next(rows, [])]
        columns = [next((header.index(known) for known in names if known in header), None) for names in (_IDS, _LABELS)]
        id_column, label_column = columns
        if id_column is None or label_column is None:
            raise DataError(
                f"{name} begins with {','.join(header)[:60]!r}. Its first line must name columns: id,label."
            )
        for row in filter(None, rows):
            if max(id_column, label_column) >= len(row) or not (label := row[label_column].strip()):
                raise DataError(f"{name}, line {rows.line_num}, has no label.")
            key = row[id_column].strip()
            found = files.get(key, [])
            if len(found) > 1 or (found and found[0] in labels):
                raise DataError(f"{name}, line {rows.line_num}: several images or labels of id {key[:60]!r}. Keep one.")
            if found:
                labels[found[0]] = label
            else:
                count += 1
                missing = [*missing, repr(key[:60])][:3]
    except csv.Error as error:
        raise DataError(f"{name}, line {rows.line_num}, cannot be read: {error}.") from None
    if missing:
        raise DataError(f"{name} names images that are missing ({count:,}): {', '.join(missing)}.")
    return labels


def has_annotations(listing: Listing) -> bool:
    """Return True if there are annotations of Tiny-ImageNet beside the images that they label."""
    return _find_annotations(listing) is not None


def read_annotated(listing: Listing, options: ReadOptions) -> RawData:
    """Read Tiny-ImageNet: train/WNID/images/, and to test on val/images/, whose labels are in val_annotations.txt.

    Its test images have no labels, and are left out with a `Note`. Classes have the order of their WordNet ids, and the
    names in words.txt where that exists.
    """
    annotations = _find_annotations(listing) or ()
    root, name = annotations[:-2], f"{listing.path}: {join_parts(annotations)}"
    check_split(listing.path, join_parts(annotations[:-1]), options)
    classes = find_classes(listing, [(*root, "train")])
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    files = {file[-1]: file for file in listing.files if _is_annotated(file, annotations)}
    test = []
    for number, line in enumerate(_read_text(listing, annotations).splitlines(), start=1):
        file, wnid, *_ = [*line.split("\t"), ""]
        if file not in files or wnid not in numbers:
            what = f"image {file[:60]!r} is missing" if file not in files else f"{wnid[:60]!r} is no class in train"
            raise DataError(f"{name}, line {number}: {what}.")
        test.append((files.pop(file), numbers[wnid]))
    train = label_images(listing, (*root, "train"), classes)
    _note_unlabelled(listing, {file for file, _ in (*train, *test)}, join_parts(annotations))
    if (words := (*root, _WORDS)) in listing.files:
        classes = _name_classes(classes, _read_text(listing, words))
    labelled = LabelledImages(classes, test, None) if options.only_test else LabelledImages(classes, train, test)
    return read_labelled(listing, labelled, options)


def _find_annotations(listing: Listing) -> Parts | None:
    """Find the file of annotations, beside a folder train."""
    places = {file[:-1] for file in listing.files if is_image(file[-1])}
    found = (file for file in listing.files if file[-2:] == ("val", _ANNOTATIONS))
    return next((file for file in found if (*file[:-1], "images") in places), None)


def _is_annotated(file: Parts, annotations: Parts) -> bool:
    return file[:-1] == (*annotations[:-1], "images") and is_image(file[-1])


def _name_classes(wnids: tuple[str, ...], words: str) -> tuple[str, ...]:
    """Return for each WordNet id its first name in words.txt, all its names if another has that too, or else the id."""
    pairs = (line.partition("\t") for line in words.splitlines())
    known = set(wnids)
    names = {wnid: text.strip() for wnid, _, text in pairs if wnid in known and text.strip()}
    for shorten in (lambda text: text.partition(",")[0], str):
        short = tuple(shorten(names.get(wnid, wnid)) for wnid in wnids)
        if len(set(short)) == len(short):
            return short
    return wnids


def _note_unlabelled(listing: Listing, used: set[Parts], labels: str) -> None:
    """Warn of images that are not read."""
    if rest := sorted(join_parts(file) for file in listing.files if is_image(file[-1]) and file not in used):
        folders = Counter(str(PurePath(file).parent) for file in rest)
        counts = [f"{count:,} in {folder}" for folder, count in folders.most_common()]
        note(f"left out images without a label in {labels}: {list_some(counts)}.")


def _read_text(listing: Listing, parts: Parts) -> str:
    content = b""
    for file in listing.open([parts]):
        with file.open() as stream:
            content = stream.read(LONGEST_TEXT + 1)
    name = f"{listing.path}: {join_parts(parts)}"
    if len(content) > LONGEST_TEXT:
        raise DataError(f"{name} has over {LONGEST_TEXT:,} bytes, too many for labels. Split the data set.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name} is no text in UTF-8. Save it as UTF-8.") from None
