"""JPEG shards: one WebDataset tar for each split, with the index that DALI reads.

A sample is `00000042.jpg` and `00000042.cls`, its label in decimal digits. The images go through lossy compression:
what comes out of a shard is close to the store's pixels, not equal to them.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import DataError, UsageError, check_choice
from .store import Split

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_BLOCK = tarfile.BLOCKSIZE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JpegSettings:
    """How images are compressed. Raises `UsageError` on impossible values."""

    quality: int = 95
    """libjpeg's quality, 1..100."""
    subsampling: str = "4:4:4"
    """Resolution of the colour differences: 4:4:4 (full), 4:2:2 or 4:2:0."""

    def __post_init__(self) -> None:
        check_choice("JPEG subsampling", self.subsampling, SUBSAMPLINGS)
        if not 1 <= self.quality <= 100:
            raise UsageError(f"JPEG quality {self.quality} is not in 1..100.")


def write_shard(
    split: Split, tar: Path, index: Path, settings: JpegSettings, report: Callable[[int], None]
) -> dict[str, float]:
    """Write the samples of `split`, in their order, and tell what the compression cost.

    Returns `psnr_db` (over all pixels) and `exact_pixels` (the share whose three channels all came back unchanged).
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
    """An opened shard, memory-mapped."""

    data: np.ndarray
    """uint8 [bytes of the tar]"""
    offsets: np.ndarray
    """int64 [N], where the JPEG of each sample begins."""
    sizes: np.ndarray
    """int64 [N], its length in bytes."""

    def encoded(self, row: int) -> np.ndarray:
        """The JPEG of sample `row`, uint8 [bytes], a view."""
        return self.data[self.offsets[row] : self.offsets[row] + self.sizes[row]]


def open_shard(tar: Path, index: Path) -> Shard:
    """Open a shard by its index. Raises `DataError` where the index does not describe the tar."""
    data = np.asarray(np.memmap(tar, np.uint8, mode="r"))
    try:
        header, *lines = index.read_text().splitlines()
        entries = [line.split() for line in lines]
        offsets, sizes = (np.array([int(entry[i]) for entry in entries], np.int64) for i in (1, 2))
        sound = header == f"v1.2 {len(entries)}" and all(entry[0] == "jpg" for entry in entries)
    except (ValueError, IndexError):
        sound = False
    if not sound or (len(sizes) and ((offsets < 0) | (sizes < 0) | (offsets + sizes > len(data))).any()):
        raise DataError(f"{index} is no index of {tar}.")
    return Shard(data, offsets, sizes)


def facts_text(facts: dict[str, Any]) -> str:
    """What `write_shard` returned, for people."""
    return f"PSNR {facts['psnr_db']:.1f} dB, {100 * facts['exact_pixels']:.1f} % of the pixels exact"
