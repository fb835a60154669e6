"""Image files: which they are, and their pixels."""

from __future__ import annotations

import collections
import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from .archives import File
from .contents import WINDOW, describe
from .errors import DataError, list_some, note
from .sampling import IMAGE_SIZE

Report = Callable[[str, int, int], None]
"""Report of progress, called with (current task, amount done, total amount)."""

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels: white, as on a page, for which such pictures are made."""

# Pillow tries no other format, whatever the name: for some, such as PostScript, it would start a program.
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_PPM_MAXIMUM = re.compile(rb"P[2356](?:(?:\s|#[^\n]*\n)+(\d+)){3}")


def read_images(
    files: Iterable[tuple[int, File]], count: int, report: Report = lambda *_: None, *, skip_unreadable: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Read images, each with its row; return pixels, uint8 [count, 32, 32, 3], and True for each row that was read.

    Raises `DataError` about the first image that cannot be read, once all were tried. `skip_unreadable` leaves those
    out with a `Note`.
    """
    pixels, is_read = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), np.zeros(count, bool)
    unreadable: dict[int, tuple[str, DataError]] = {}
    resized = 0
    for done, (row, file) in enumerate(files, start=1):
        try:
            pixels[row], was_resized = read_image(file)
            is_read[row] = True
            resized += was_resized
        except DataError as error:
            unreadable[row] = file.name, error
        report("reading images", done, count)
    failed = [unreadable[row] for row in sorted(unreadable)]
    if failed and not skip_unreadable:
        others = f" Others that cannot be read: {len(failed) - 1:,}." if len(failed) > 1 else ""
        remedy = " prepare and predict --skip-unreadable leave such images out." if count > 1 else ""
        raise DataError(f"{failed[0][1]}{others}{remedy}")
    if failed:
        names = list_some([name for name, _ in failed])
        note(f"{len(failed):,} of {count:,} images cannot be read and were skipped: {names}.")
    if resized:
        note(
            f"{resized} of {count - len(failed)} images were not {IMAGE_SIZE}x{IMAGE_SIZE} and have been cropped "
            "to a square and resized."
        )
    return pixels, is_read


def read_image(file: File) -> tuple[np.ndarray, bool]:
    """Read RGB pixels, uint8 [32, 32, 3]; return them, and True if the image was cropped to a square and resized.

    It is upright by its EXIF orientation, and transparent pixels show `BACKGROUND`. Raises `DataError` if the file is
    not an image, is too large to decode safely, or has over 8 bits per channel.
    """
    from PIL import Image, ImageOps

    with file.open() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        stream = opened if opened.seekable() else io.BytesIO(opened.read())  # a pipe
        head = stream.read(WINDOW)
        stream.seek(0)
        try:
            with Image.open(stream, formats=_FORMATS) as image:
                _check_depth(image, head, file.name)
                image.load()
                _turn_upright(image)
                rgb = _flatten(image)
        except Image.UnidentifiedImageError:
            reason = describe(head, head, "image") or "cannot be read as an image: unknown format"
            raise DataError(f"{file.name} {reason}.") from None
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  a damaged image can raise nearly anything
            raise DataError(f"{file.name} cannot be read as an image: {error}.") from None
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = rgb.size != size
    return np.asarray(ImageOps.fit(rgb, size) if resized else rgb), resized


def _check_depth(image: Any, head: bytes, name: str) -> None:
    """Refuse integers of 16 or 32 bits, and floats: Pillow would clip them at 255, or keep their high bytes only."""
    depths = {
        "PNG": lambda: head[24],
        "TIFF": lambda: max(image.tag_v2.get(258, (1,))),
        "PPM": lambda: int(found[1]).bit_length() if (found := _PPM_MAXIMUM.match(head)) else 8,
    }
    if image.mode[0] in "IF" or depths.get(image.format, lambda: 8)() > 8:
        raise DataError(f"{name} has more than 8 bits per channel (mode {image.mode}). Save it with 8.")


def _turn_upright(image: Any) -> None:
    from PIL import ImageOps

    # Damaged metadata can raise nearly anything, and the pixels are there.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _flatten(image: Any) -> Any:
    """Convert to RGB, over `BACKGROUND` where pixels are transparent."""
    from PIL import Image

    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer).convert("RGB")


def note_left_out(names: Sequence[str], kind: str) -> None:
    """Warn with a `Note`, if there are any, of files that are not of a `kind`."""
    if names:
        kinds = collections.Counter(PurePath(name).suffix.lower() or "without suffix" for name in names)
        counts = [f"{count:,} {suffix}" for suffix, count in kinds.most_common()]
        note(f"left out files that are not {kind}: {list_some(counts)} ({list_some(names)}).")
