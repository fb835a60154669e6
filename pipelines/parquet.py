"""Parquet files of images, as datasets on the Hugging Face hub have them."""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any

import numpy as np

from .archives import File, Parts, join_parts, most_files, most_unpacked
from .errors import DataError, UsageError, list_some, note
from .reading import Listing, ReadOptions, check_split, choose_test_split, explained, read_rows, split_of
from .store import RawData, are_class_names
from .texts import parse_json
from .thrift import ThriftReader

_SUFFIX = ".parquet"
_SHARD = re.compile(r"-(\d{1,6})-of-(\d{1,6})")
_IMAGES, _LABELS = ("img", "image"), ("label", "fine_label")
_INTEGER = re.compile(r"u?int(8|16|32|64)")
_BATCH, _BATCH_BYTES = 64, 16 << 20  # images that are in memory encoded
_PAGE_HEADER = 64 << 10  # bytes
# Numbers of fields, as the format names them: row_groups, columns, meta_data; num_values, total_compressed_size,
# data_page_offset, dictionary_page_offset; uncompressed_page_size, compressed_page_size.
_GROUPS, _COLUMNS, _CHUNK = 4, 1, 3
_VALUES, _PACKED, _FIRST_PAGE, _DICTIONARY = 5, 7, 9, 11
_PAGE_UNPACKED, _PAGE_PACKED = 2, 3


@dataclass(frozen=True, slots=True)
class _Table:
    """Table in one file, as its footer describes it."""

    rows: int
    image: str
    """Column of the images, structures with the field bytes."""
    label: str
    classes: tuple[str, ...] | None
    batch: int
    """Rows to read at once."""
    size: int
    """Bytes of the file."""


def has_parquet(listing: Listing) -> bool:
    """Return True if there are Parquet files."""
    return bool(_find_files(listing))


def _find_files(listing: Listing) -> list[Parts]:
    return sorted(file for file in listing.files if file[-1].lower().endswith(_SUFFIX))


def read_parquet(listing: Listing, options: ReadOptions) -> RawData:
    """Read the images in column img or image, and their labels in label or fine_label.

    The names of files, or of their folders, tell the split. Names of classes are those that the hub's metadata has.
    Raises `DataError` if files are damaged, missing or of other columns, `UsageError` without pyarrow.
    """
    splits = _find_splits(listing)
    test_split = choose_test_split(listing.path, {split: join_parts(files[0]) for split, files in splits.items()})
    train, test = splits.get("train"), splits.get(test_split or "")
    if train is None and not options.only_test:
        raise DataError(f"{listing.path} has no train images: a Parquet file to train on has train in its name.")
    check_split(listing.path, join_parts(test[0]) if test else None, options)
    if options.only_test and test:
        train, test = test, None
    files = [*(train or []), *(test or [])]
    if rest := sorted({*map(join_parts, _find_files(listing))} - {*map(join_parts, files)}):
        note(f"left out Parquet files of neither training nor test images: {list_some(rest)}.")

    tables: dict[Parts, _Table] = {}
    for file in listing.open(set(files)):
        with file.open() as stream:
            tables[file.parts] = _inspect(stream, file.name)
    first, *others = (tables[file] for file in files)
    if any((table.image, table.label, table.classes) != (first.image, first.label, first.classes) for table in others):
        raise DataError(
            f"{listing.path} has Parquet files with different columns or classes. Give those of one data set."
        )
    starts = dict(zip(files, np.cumsum([0, *(tables[file].rows for file in files)]).tolist(), strict=False))
    labels = np.zeros(sum(table.rows for table in tables.values()), np.int64)
    images = _read_files(listing, tables, starts, labels)
    count = starts[test[0]] if test else None
    size = sum(table.size for table in tables.values())  # rows may repeat an image
    return read_rows(listing.path, images, labels, count, first.classes, options, source_bytes=size)


def _find_splits(listing: Listing) -> dict[str, list[Parts]]:
    """Find the files of each split, in order; all are for training if none is called as a split is."""
    splits: dict[str, list[Parts]] = {}
    folders = set()
    for file in _find_files(listing):
        words = re.split(r"[^a-z]+", PurePath(file[-1]).stem.lower())
        split = next(filter(None, map(split_of, (*words, *reversed(file[:-1])))), None)
        if split is not None:
            splits.setdefault(split, []).append(file)
            folders.add("/".join(name for name in file[:-1] if split_of(name) != split))
    if len(folders) > 1:
        raise DataError(
            f"{listing.path} has data sets in several folders: {list_some(sorted(folders))}. Give one of them."
        )
    splits = splits or {"train": _find_files(listing)}
    for split, files in splits.items():
        shards = [found for file in files if (found := _SHARD.search(file[-1]))]
        numbers, totals = {int(shard[1]) for shard in shards}, {int(shard[2]) for shard in shards}
        if shards and (totals != {len(files)} or numbers != set(range(len(files)))):
            raise DataError(f"{listing.path} has {len(files)} of {max(totals)} Parquet files for {split}. Fetch all.")
    return splits


def _inspect(stream: IO[bytes], name: str) -> _Table:
    """Check the columns of a file, and that its size allows what it claims."""
    with explained(name, "Parquet"):
        file = _open(stream)
        metadata, schema = file.metadata, file.schema_arrow
        columns = {metadata.schema.column(row).path: metadata.schema.column(row) for row in range(metadata.num_columns)}
        image = next((image for image in _IMAGES if f"{image}.bytes" in columns), None)
        label = next((label for label in _LABELS if label in columns), None)
        is_right = (
            image is not None
            and label is not None
            and columns[f"{image}.bytes"].physical_type == "BYTE_ARRAY"
            and _INTEGER.fullmatch(str(schema.field(label).type))
        )
        if image is None or label is None or not is_right:
            found = list_some([repr(f"{field.name} ({field.type})")[1:-1][:80] for field in schema], shown=6)
            raise DataError(f"{name} has columns {found}. It needs img or image, with bytes, and an integer label.")
        size = stream.seek(0, io.SEEK_END)
        pages = list(itertools.islice(_pages(stream), most_files(size) + 1))
    if (
        not 0 <= metadata.num_rows <= most_files(size)
        or len(pages) > most_files(size)
        or sum(pages) > most_unpacked(size)
    ):
        raise DataError(f"{name} claims {metadata.num_rows:,} rows and {sum(pages):,} bytes, too many for its size.")
    batch = max(1, min(_BATCH, _BATCH_BYTES // max([1, *pages])))  # a page may have one image, and rows that repeat it
    return _Table(metadata.num_rows, image, label, _class_names(schema.metadata, label), batch, size)


def _pages(stream: IO[bytes]) -> Iterator[int]:
    """Yield the size of each page, unpacked. pyarrow takes this memory, whatever the footer says."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 8))
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(max(0, size - 8 - length))
    footer = ThriftReader(stream.read(length)).read()
    chunks = [column[_CHUNK] for group in footer[_GROUPS] for column in group[_COLUMNS]]
    if sum(abs(chunk[_PACKED]) for chunk in chunks) > size:
        raise ValueError("its columns have more bytes than the file")
    for chunk in chunks:
        start = chunk[_FIRST_PAGE]
        if 0 < chunk.get(_DICTIONARY, 0) < start:
            start = chunk[_DICTIONARY]
        end = start + chunk[_PACKED]
        while chunk[_VALUES] > 0 and start < end:
            stream.seek(start)
            header = ThriftReader(stream.read(_PAGE_HEADER))
            page = header.read()
            if page[_PAGE_UNPACKED] < 0 or page[_PAGE_PACKED] < 0:
                raise ValueError("a page has no size")
            yield page[_PAGE_UNPACKED]
            start += header.place + page[_PAGE_PACKED]


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Read the names of classes in the hub's metadata."""
    try:
        names = parse_json((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(names) if are_class_names(names) else None


def _read_files(
    listing: Listing, tables: dict[Parts, _Table], starts: dict[Parts, int], labels: np.ndarray
) -> Iterator[tuple[int, File]]:
    """Yield all images, each with its row, and fill in `labels`."""
    for file in listing.open(tables):
        table, start = tables[file.parts], starts[file.parts]
        row = start
        with file.open() as stream:
            for images, numbers in _read_batches(stream, file.name, table):
                if row + len(images) > start + table.rows:
                    raise DataError(
                        f"{file.name} has more than the {table.rows:,} rows that it claims. Fetch it again."
                    )
                labels[row : row + len(images)] = numbers
                for content in images:
                    name = f"{file.name}, row {row - start}"
                    yield row, File(file.parts, name, functools.partial(_open_image, content, name))
                    row += 1
        if row != start + table.rows:
            raise DataError(
                f"{file.name} has {row - start:,} of the {table.rows:,} rows that it claims. Fetch it again."
            )


def _read_batches(stream: IO[bytes], name: str, table: _Table) -> Iterator[tuple[list[bytes | None], np.ndarray]]:
    with explained(name, "Parquet"):
        columns = [f"{table.image}.bytes", table.label]
        for batch in _open(stream).iter_batches(batch_size=table.batch, columns=columns, use_threads=False):
            numbers = batch.column(table.label)
            if numbers.null_count:
                raise DataError(f"{name} has images without a label. Leave them out.")
            images = batch.column(table.image).field("bytes").to_pylist()
            yield images, numbers.to_numpy(zero_copy_only=False).astype(np.int64)


def _open_image(content: bytes | None, name: str) -> IO[bytes]:
    if content is None:
        raise DataError(f"{name} has no image, at most its path. Save the bytes of images in the file.")
    return io.BytesIO(content)


def _open(stream: IO[bytes]) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(f"Parquet files need pyarrow ({error}): pip install 'fastresnet[parquet]'") from None
    return ParquetFile(stream, pre_buffer=False)  # with a buffer it would take the memory that a page claims
