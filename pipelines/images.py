"""Image files: which they are, and their pixels."""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from .archives import ArchiveError, File
from .contents import WINDOW, describe
from .errors import DataError, list_some, note, reason_of
from .image_limits import Effort, LimitedStream, check_pixels, is_transparent, leave_out_long_exif, limited
from .sampling import IMAGE_SIZE

_FILE_LIMIT = 64 << 20  # bytes

Report = Callable[[str, int, int], None]
"""Report of progress, called with (current task, amount done, total amount)."""

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels: white, as on a page, for which such pictures are made."""

# Pillow tries no other format, whatever the name: for some, such as PostScript, it would start a program. These are
# what torchvision's ImageFolder takes, and GIF; they are decoded within Pillow.
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_NAMED = 3  # of the images that cannot be read
_SIZE = f"{IMAGE_SIZE}x{IMAGE_SIZE}"
_STRIP = 1 << 20  # pixels

_ORIENTATION = 0x0112  # tag of Exif
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_SIDEWAYS = 5  # and all above
_BACKWARDS = (3, 4, 7, 8)  # the first row is shown as the last one

_PPM_MAXIMUM = re.compile(rb"P[2356](?:(?:\s|#[^\n]*\n)+(\d+)){3}")


class SizeError(DataError):
    """Image of another size, of which there may be many."""


def read_images(
    files: Iterable[tuple[int, File]],
    count: int,
    report: Report = lambda *_: None,
    *,
    skip_unreadable: bool = False,
    resize: bool = True,
    source_bytes: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read images, each with its row; return pixels, uint8 [count, 32, 32, 3], and True for each row that was read.

    `source_bytes` are those of the archive that holds them. Raises `DataError` about the first image that cannot be
    read, once all were tried. `skip_unreadable` leaves those out with a `Note`. Raises `SizeError` at once about an
    image of another size, unless `resize`. Raises `ArchiveError` if all together have too many pixels for their bytes.
    """
    pixels, is_read = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), np.zeros(count, bool)
    first_failed: list[tuple[int, str, str]] = []  # few: a file may hold millions
    failed = resized = 0
    effort = Effort(source_bytes)
    for done, (row, file) in enumerate(files, start=1):
        try:
            pixels[row], was_resized = read_image(file, effort, resize=resize)
            is_read[row] = True
            resized += was_resized
        except (ArchiveError, SizeError):
            raise
        except DataError as error:
            failed += 1
            first_failed = sorted([*first_failed, (row, file.name, str(error))])[:_NAMED]
        report("reading images", done, count)
    if failed and not skip_unreadable:
        others = f" Others that cannot be read: {failed - 1:,}." if failed > 1 else ""
        remedy = " prepare and predict --skip-unreadable leave such images out." if count > 1 else ""
        raise DataError(f"{first_failed[0][2]}{others}{remedy}")
    if failed:
        names = ", ".join(name for _, name, _ in first_failed)
        more = f" and {failed - _NAMED:,} more" if failed > _NAMED else ""
        note(f"{failed:,} of {count:,} images cannot be read and were skipped: {names}{more}.")
    note_resized(resized, count - failed)
    return pixels, is_read


def note_resized(resized: int, count: int) -> None:
    """Warn with a `Note` if some of `count` images were `resized`."""
    if resized:
        note(f"{resized:,} of {count:,} images were not {_SIZE} and have been cropped to a square and resized.")


def read_image(file: File, effort: Effort | None = None, *, resize: bool = True) -> tuple[np.ndarray, bool]:
    """Read RGB pixels, uint8 [32, 32, 3]; return them, and True if the image was cropped to a square and resized.

    It is upright by its EXIF orientation, and transparent pixels show `BACKGROUND`. Raises `DataError` if the file is
    not an image, is too large to decode safely, or has over 8 bits per channel. Raises `SizeError` if it has another
    size, unless `resize`.
    """
    from PIL import Image

    with file.open() as opened:
        content = opened.read(_FILE_LIMIT + 1)
    if len(content) > _FILE_LIMIT:
        raise DataError(f"{file.name} has over {_FILE_LIMIT:,} bytes. Scale the image down.")
    head, effort = content[:WINDOW], effort or Effort()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            stream = limited(content, file.name)
            with _open(stream, file.name, effort) as image:
                _check_depth(image, head, file.name)
                check_pixels(image, content, file.name, effort)
                check_size(image.size, file.name, resize=resize)
                image.load()
                return _fit(image), image.size != (IMAGE_SIZE, IMAGE_SIZE)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise DataError(f"{file.name} has over {Image.MAX_IMAGE_PIXELS:,} pixels. Scale it down.") from None
        except Image.UnidentifiedImageError:
            reason = describe(head, head, "image") or "cannot be read as an image: unknown format"
            raise DataError(f"{file.name} {reason}.") from None
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  a damaged image can raise nearly anything
            raise DataError(f"{file.name} cannot be read as an image: {reason_of(error)}.") from None


def check_size(size: tuple[int, int], name: str, *, resize: bool) -> None:
    """Raise `SizeError` about images of another `size` (width, height), unless `resize`."""
    if size != (IMAGE_SIZE, IMAGE_SIZE) and not resize:
        width, height = size
        raise SizeError(f"{name} has {width}x{height} pixels, not {_SIZE}. --resize crops to a square and resizes.")


def _open(stream: LimitedStream, name: str, effort: Effort) -> Any:
    """Open an image. It takes effort whether or not it succeeds."""
    from PIL import Image

    try:
        return Image.open(stream, formats=_FORMATS)
    finally:
        stream.is_opened = True
        effort.take(stream.cost, 0, name)


def _check_depth(image: Any, head: bytes, name: str) -> None:
    """Refuse integers of 16 or 32 bits, and floats: Pillow would clip them at 255, or keep their high bytes only."""
    depths = {
        "PNG": lambda: head[24],
        "TIFF": lambda: max(image.tag_v2.get(258, (1,))),
        "PPM": lambda: int(found[1]).bit_length() if (found := _PPM_MAXIMUM.match(head)) else 8,
    }
    if image.mode[0] in "IF" or depths.get(image.format, lambda: 8)() > 8:
        raise DataError(f"{name} has more than 8 bits per channel (mode {image.mode}). Save it with 8.")


def _fit(image: Any) -> np.ndarray:
    """Return the pixels, upright, over `BACKGROUND`, cropped to a square and resized."""
    from PIL import ImageOps

    upright, size = _upright(image), (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(upright if upright.size == size else ImageOps.fit(upright, size))


def fit_pixels(images: np.ndarray) -> np.ndarray:
    """Return images, uint8 [N, height, width] or [N, height, width, 1 or 3], as uint8 [N, 32, 32, 3], as for files."""
    from PIL import Image

    if images.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        planes = images[..., 0] if images.shape[3:] == (1,) else images
        return np.stack([_fit(Image.fromarray(image)) for image in planes])
    return np.broadcast_to(images if images.ndim == 4 else images[..., None], (len(images), IMAGE_SIZE, IMAGE_SIZE, 3))


def _upright(image: Any) -> Any:
    """Convert to RGB, upright, over `BACKGROUND`; by strips, so that a large image takes one copy, or none."""
    from PIL import Image

    orientation = _orientation(image)
    if image.mode == "RGB" and orientation == 1 and "transparency" not in image.info:
        return image
    width, height = image.size if orientation < _SIDEWAYS else image.size[::-1]
    upright = Image.new("RGB", (width, height))
    step = max(1, _STRIP // width)
    for start in range(0, height, step):
        rows = _upright_rows(image, orientation, start, min(start + step, height), height)
        upright.paste(rows, (0, start))
    return upright


def _orientation(image: Any) -> int:
    """Read the place of the first row and column, 1..8 as Exif numbers them, 1 if it is unknown."""
    try:
        leave_out_long_exif(image)
        orientation = image.getexif().get(_ORIENTATION)
        return orientation if orientation in range(1, 9) else 1
    except Exception:  # noqa: BLE001  damaged metadata can raise nearly anything, and the pixels are there
        return 1


def _upright_rows(image: Any, orientation: int, start: int, stop: int, height: int) -> Any:
    """Return rows of the upright image, of `height`, as RGB."""
    from PIL import Image

    if orientation in _BACKWARDS:
        start, stop = height - stop, height - start
    box = (start, 0, stop, image.height) if orientation >= _SIDEWAYS else (0, start, image.width, stop)
    rows = _flatten(image.crop(box))
    return rows if orientation == 1 else rows.transpose(getattr(Image.Transpose, _TURNS[orientation]))


def _flatten(image: Any) -> Any:
    """Convert to RGB, over `BACKGROUND` where pixels are transparent."""
    from PIL import Image

    if not is_transparent(image):
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer).convert("RGB")


def note_left_out(names: Sequence[str], kind: str) -> None:
    """Warn with a `Note`, if there are any, of files that are not of a `kind`."""
    if names:
        kinds = collections.Counter(PurePath(name).suffix.lower() or "without suffix" for name in names)
        counts = [f"{count:,} {suffix}" for suffix, count in kinds.most_common()]
        note(f"left out files that are not {kind}: {list_some(counts)} ({list_some(names)}).")
