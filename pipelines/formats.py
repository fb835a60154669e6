"""Files derived from a store for libraries with their own formats, in its folder and tied to its contents.

    <root>/<name>/beton.json   train.beton  test.beton                     (FFCV; written by `ffcv.py`)
                  jpeg.json    train.tar  train.idx  test.tar  test.idx    (JPEG shards, WebDataset tars)

The JSON has the digest of the store, the settings, and the size and SHA-256 of each file. It is written last, so its
existence means that the files are complete.

A JPEG shard is one WebDataset tar for each split, with the index that DALI reads. A sample is `00000042.jpg` and
`00000042.cls`, its label in decimal digits. JPEG is lossy: its pixels are close to the store's, not equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tarfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .errors import DataError, UsageError, check_literals
from .files import replacing, sha256, write_json
from .store import DERIVED_FILES, Dataset, Split, check_file, prepare_command
from .texts import read_json

SCHEMA = 1

FACTS: dict[str, set[str]] = {"beton": set(), "jpeg": {"psnr_db", "exact_pixels"}}
"""Measurements of each split in a manifest."""


@contextlib.contextmanager
def writing_derived(
    dataset: Dataset, kind: str, settings: dict[str, Any]
) -> Iterator[tuple[dict[str, Path], dict[str, dict[str, float]]]]:
    """Write all files of format `kind` again, or none.

    The block writes to the yielded paths, by file name, and fills in the `FACTS` of each split. Raises the errors of
    the block, and `OSError`.
    """
    manifest, facts = _manifest_path(dataset, kind), dict[str, dict[str, float]]()
    manifest.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        paths = {name: stack.enter_context(replacing(dataset.folder / name)) for name in DERIVED_FILES[kind]}
        yield paths, facts
        files = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}
    contents = {"schema": SCHEMA, "data_sha256": dataset.digest, "settings": settings, "facts": facts, "files": files}
    write_json(manifest, contents)


def read_manifest(dataset: Dataset, kind: str) -> dict[str, Any]:
    """Read the manifest of format `kind`. Raises `DataError` if it is missing, damaged or of another data set."""
    path, remedy = _manifest_path(dataset, kind), _remedy(dataset, kind)
    try:
        manifest = read_json(path)
        expected = {name: manifest["files"][name] for name in DERIVED_FILES[kind]}
        facts = [manifest["facts"][split] for split in ("train", "test")]
        sound = (
            manifest["schema"] == SCHEMA
            and all({"bytes", "sha256"} <= entry.keys() for entry in expected.values())
            and all(isinstance(entry[name], float) for entry in facts for name in FACTS[kind])
        )
        origin, _ = manifest["data_sha256"], manifest["settings"]
    except FileNotFoundError:
        raise DataError(f"{dataset.folder} has no {kind} files. {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise DataError(f"{path} is damaged. {remedy}")
    if origin != dataset.digest:
        raise DataError(f"{path} was made from another data set than the one in {dataset.folder}. {remedy}")
    return manifest


def open_derived(dataset: Dataset, kind: str, split: str) -> list[Path]:
    """Verify the files of format `kind` for split `train` or `test`, and return their paths.

    Raises `DataError`, with the remedy, if they are missing, damaged or made from another data set.
    """
    files, remedy = read_manifest(dataset, kind)["files"], _remedy(dataset, kind)
    paths = [dataset.folder / name for name in DERIVED_FILES[kind] if name.startswith(f"{split}.")]
    for path in paths:
        check_file(path, files[path.name], f"{kind}.json", remedy)
    return paths


def _manifest_path(dataset: Dataset, kind: str) -> Path:
    return dataset.folder / f"{kind}.json"


def _remedy(dataset: Dataset, kind: str) -> str:
    return f"Make them: {prepare_command(dataset.folder)} --formats {kind}"


# --- JPEG shards -------------------------------------------------------------------------------------------------

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_LINE = 1000  # of an index


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JpegSettings:
    """Settings of the compression. Raises `UsageError` on invalid values."""

    quality: int = 95
    """libjpeg's quality, 1..100."""
    subsampling: Subsampling = "4:4:4"
    """Resolution of the colour differences: 4:4:4 (full), 4:2:2 or 4:2:0."""

    def __post_init__(self) -> None:
        check_literals(self)
        if not 1 <= self.quality <= 100:
            raise UsageError(f"JPEG quality {self.quality} is not in 1..100.")


def write_shard(
    split: Split, tar: Path, index: Path, settings: JpegSettings, report: Callable[[int], None]
) -> dict[str, float]:
    """Write the samples of `split`, in their order, and measure the loss of the compression.

    Returns `psnr_db` (over all pixels) and `exact_pixels` (the share with all three channels unchanged).
    """
    squared_error, exact, lines = 0, 0, []
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            encoded = _encode(image, settings)
            difference = np.asarray(Image.open(io.BytesIO(encoded))).astype(np.int32) - image
            squared_error += int((difference**2).sum())
            exact += int((difference == 0).all(axis=-1).sum())
            members = {f"{row:08}.jpg": encoded, f"{row:08}.cls": str(label).encode()}
            lines.append(" ".join(_add(archive, name, data) for name, data in members.items()))
            if row % 1000 == 999:
                report(row + 1)
    index.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
    pixels = split.images.size
    mean_squared_error = squared_error / pixels
    return {
        "psnr_db": 10 * np.log10(255**2 / mean_squared_error) if squared_error else float("inf"),
        "exact_pixels": exact / (pixels / 3),
    }


def _encode(image: np.ndarray, settings: JpegSettings) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=settings.quality, subsampling=settings.subsampling)
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> str:
    """Append a file and return its part of an index line: extension, offset, size and name."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    offset = archive.offset + _BLOCK
    archive.addfile(entry, io.BytesIO(data))
    return f"{name.partition('.')[2]} {offset} {len(data)} {name}"


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Opened shard, memory-mapped."""

    data: np.ndarray
    """Contents of the tar, uint8 [bytes]."""
    offsets: np.ndarray
    """Start of the JPEG of each sample, int64 [N]."""
    sizes: np.ndarray
    """Length of the JPEG of each sample in bytes, int64 [N]."""

    def encoded(self, row: int) -> np.ndarray:
        """Return the JPEG of sample `row`, uint8 [bytes], a view."""
        return self.data[self.offsets[row] : self.offsets[row] + self.sizes[row]]


def open_shard(tar: Path, index: Path) -> Shard:
    """Open a shard by its index. Raises `DataError` if the index does not describe the tar."""
    data = np.asarray(np.memmap(tar, np.uint8, mode="r"))
    try:
        offsets, sizes = (np.array(numbers, np.int64) for numbers in _read_index(index, len(data)))
        sound = not ((offsets < 0) | (sizes < 0) | (offsets > len(data) - sizes)).any()
    except (ValueError, OverflowError):
        sound = False
    if not sound:
        raise DataError(f"{index} is not an index of {tar}.")
    return Shard(data, offsets, sizes)


def _read_index(path: Path, size: int) -> tuple[array[int], array[int]]:
    """Read offsets and sizes of the JPEGs in a tar of `size` bytes. Raises `ValueError` if they cannot be true."""
    offsets, sizes = array("q"), array("q")
    with open(path, encoding="ascii") as lines:
        header = lines.readline(_LONGEST_LINE)
        while line := lines.readline(_LONGEST_LINE):
            kind, offset, length, _ = line.split(maxsplit=3)
            offsets.append(int(offset))
            sizes.append(int(length))
            if kind != "jpg" or len(offsets) > size // (2 * _BLOCK):  # a sample has two files, each with a header
                raise ValueError
    if header != f"v1.2 {len(offsets)}\n":
        raise ValueError
    return offsets, sizes


def facts_text(facts: dict[str, Any]) -> str:
    """Describe the facts that `write_shard` returned."""
    return f"PSNR {facts['psnr_db']:.1f} dB, {100 * facts['exact_pixels']:.1f} % of the pixels exact"
