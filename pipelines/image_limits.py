"""Limits of what decoders of images are given: no claim in a file takes time or memory that its size does not allow.

Pillow bounds less: the pixels of one image, and the texts of a PNG.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

from .archives import ArchiveError
from .errors import DataError

# Photos have one to thirty pixels for each byte, and drawings of few colours hundreds. One image may have as many as
# decode in 32 MB, and more by its size. All images of a source have a budget too: 100 million opaque pixels take a
# second, transparent ones four.
_DECODED, _PIXELS_PER_BYTE = 32 << 20, 16
_ALL_PIXELS, _ALL_PIXELS_PER_BYTE = 128 << 20, 32
_COST_OF_TRANSPARENCY = 4
_BYTES_PER_PIXEL = {"WEBP": 16, "TIFF": 8}  # while decoding: libwebp keeps three canvases, libtiff a strip
_BYTES_PER_PIXEL_OF_SCANS = 10  # libjpeg keeps the coefficients
_SIDE = 0xFFFF  # as in JPEG

_IN_PYTHON = ("ppm", "ppm_plain", "bmp_rle")  # decoders of Pillow, which take about 128 times as long
_PIXELS_IN_PYTHON, _BYTES_A_PIXEL = 1 << 20, 16
_COMMENTS = 1000  # of a plain PPM: Pillow copies a megabyte to pass over one

_SCANS, _BYTES_A_SCAN = 100, 8192  # of a JPEG; one of a few bytes takes as long as any, and encoders write ten
_PARTS = 10_000  # read from a file before its pixels, and chunks of a PNG
_BYTES_A_CHUNK = 1024
_FREE_BYTES, _COST_OF_A_BYTE = 4096, 16  # Exif has numbers, and each becomes an object of Python
_FREE_PARTS, _COST_OF_A_PART, _COST_OF_A_TILE = 100, 200, 5000  # in pixels
_METADATA = 4 << 20

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_PNG_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # they may tell the orientation
_KEYWORD = 80  # the longest, and its end
_EXIF, _EXIFS = 64 << 10, 16  # a JPEG has no more in one segment; Pillow joins those of several

_COMPRESSION, _TILE_WIDTH, _TILE_HEIGHT = 259, 322, 323  # tags of TIFF
_JPEG_IN_TIFF = (6, 7)  # no other code of a compression has such a byte
_TIFF_TAGS, _TIFF_VALUES = range(254, 533), 1 << 16  # of the pixels, and numbers in one of them: a strip may be a row
_ASCII = 2
_OPAQUE = (1, _ASCII, 7)  # types of values that stay bytes


class Effort:
    """Pixels that the images of a source may still have in all, by the size of its file, or else by their own."""

    def __init__(self, source_bytes: int | None = None) -> None:
        self._pixels = _ALL_PIXELS + _ALL_PIXELS_PER_BYTE * (source_bytes or 0)
        self._counts_images = source_bytes is None

    def take(self, pixels: int, content_bytes: int, name: str) -> None:
        """Count an image. Raises `ArchiveError` if it is one too many."""
        self._pixels -= pixels - self._counts_images * _ALL_PIXELS_PER_BYTE * content_bytes
        if self._pixels < 0:
            raise ArchiveError(f"{name} and those before it have too many pixels for their bytes. Scale them down.")


class LimitedStream(io.BytesIO):
    """Content of an image, of which an opened image has read a few MB in some thousand parts, and later all."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        share = 1 if _is_tiff(content) else 0.5 if _is_jpeg(content) else 0  # Pillow copies a profile of a JPEG twice
        self._name, self._parts, self._most = name, _PARTS, _METADATA + int(share * len(content))
        self._bytes = self._most
        self.is_opened = False

    @property
    def cost(self) -> int:
        """Pixels that take as long as reading and parsing the parts did, beyond those of honest files."""
        parts, size = _PARTS - self._parts, self._most - self._bytes
        return _COST_OF_A_PART * max(0, parts - _FREE_PARTS) + _COST_OF_A_BYTE * max(0, size - _FREE_BYTES)

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not self.is_opened and size not in (None, -1):
            self._parts -= 1
            self._bytes -= len(data)
            if self._parts < 0 or self._bytes < 0:
                _refuse(self._name, "has metadata without end")
        return data


def limited(content: bytes, name: str) -> LimitedStream:
    """Return a stream of `content` for Pillow. Raises `DataError` if its structure would take too much time or memory.

    So does the stream, until it `is_opened`.
    """
    if content.startswith(_PNG):
        content = _without_texts(content, name)
    if _is_tiff(content):
        _check_tags(content, name)
    if _is_jpeg(content) and content.count(b"Exif\0\0") > _EXIFS:
        _refuse(name, f"has over {_EXIFS} parts of Exif")
    if _canvas_of_webp(content) > _most_pixels("WEBP", content):
        _refuse_pixels(name)  # Pillow allocates it at once
    if (scans := _count_scans(content)) > _SCANS + len(content) // _BYTES_A_SCAN:
        _refuse(name, f"has {scans:,} scans")
    if content[:2] in (b"P1", b"P2", b"P3") and content.count(b"#") > _COMMENTS:
        _refuse(name, f"has over {_COMMENTS:,} comments")
    return LimitedStream(content, name)


def check_pixels(image: Any, content: bytes, name: str, effort: Effort) -> None:
    """Raise `DataError` if an opened image has more pixels than its content allows, or takes too much `effort`."""
    width, height = image.size
    pixels, size = width * height, len(content)
    if _is_tiff(content):  # whose tiles may be larger than the image
        pixels = max(pixels, int(image.tag_v2.get(_TILE_WIDTH, 0)) * int(image.tag_v2.get(_TILE_HEIGHT, 0)))
    in_python = any(tile[0] in _IN_PYTHON for tile in image.tile)
    kind = "grey" if image.mode in ("1", "L", "P") else image.format
    most = _PIXELS_IN_PYTHON if in_python else _most_pixels(kind, content)
    if pixels > most or max(width, height) > _SIDE:
        _refuse_pixels(name)
    if in_python and size > (64 << 10) + _BYTES_A_PIXEL * pixels:
        _refuse(name, f"has {size:,} bytes for {pixels:,} pixels")
    cost = pixels * (_COST_OF_TRANSPARENCY if is_transparent(image) else 1)
    cost = cost * (1 + _count_scans(content) // 8) + _COST_OF_A_TILE * max(0, len(image.tile) - 1)
    effort.take(128 * pixels + 16 * size if in_python else cost, size, name)


def leave_out_long_exif(image: Any) -> None:
    """Leave out Exif of an opened image that is longer than a JPEG's: Pillow makes an object of each number."""
    if len(image.info.get("exif", b"")) > _EXIF:
        del image.info["exif"]


def is_transparent(image: Any) -> bool:
    """Return True if pixels of an opened image may be transparent."""
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _most_pixels(kind: str, content: bytes) -> int:
    each = _BYTES_PER_PIXEL.get(kind, 4 if _count_scans(content) <= 1 else _BYTES_PER_PIXEL_OF_SCANS)
    return _DECODED // each + _PIXELS_PER_BYTE * len(content)


def _canvas_of_webp(content: bytes) -> int:
    """Return the number of pixels in the header of a WebP, or 0."""
    kind, head = content[12:16], content[:30].ljust(30, b"\0")
    if not content.startswith(b"RIFF"):
        return 0
    if kind == b"VP8X":
        return (1 + int.from_bytes(head[24:27], "little")) * (1 + int.from_bytes(head[27:30], "little"))
    bits = int.from_bytes(head[21:25] if kind == b"VP8L" else head[26:30], "little")
    return ((bits & 0x3FFF) + 1) * ((bits >> (14 if kind == b"VP8L" else 16) & 0x3FFF) + 1)


def _refuse_pixels(name: str) -> NoReturn:
    raise DataError(f"{name} has too many pixels for its size in bytes, or over {_SIDE:,} in a row. Scale it down.")


def _refuse(name: str, excess: str) -> NoReturn:
    raise DataError(f"{name} {excess}, which no decoder needs. Save it again, as PNG.")


def _is_tiff(content: bytes) -> bool:
    return content.startswith((b"II", b"MM"))


def _is_jpeg(content: bytes) -> bool:
    return content.startswith(b"\xff\xd8")


def _count_scans(content: bytes) -> int:
    """Count the scans of a JPEG, or of those within a TIFF."""
    return content.count(b"\xff\xda") if _is_jpeg(content) or _has_jpegs(content) else 0


def _has_jpegs(content: bytes) -> bool:
    """Return True if the pixels of a TIFF are, or may be, packed as JPEG."""
    for tag, _, values, value in _tags(content) if _is_tiff(content) else ():
        if tag == _COMPRESSION and (values != 1 or any(packing in value for packing in _JPEG_IN_TIFF)):
            return True
    return False


def _without_texts(content: bytes, name: str) -> bytes:
    """Leave out the chunks of a PNG that do not concern its pixels; texts unpack to megabytes each."""
    kept, start, texts = [content[: len(_PNG)]], len(_PNG), set(_PNG_TEXTS)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        kind = content[start + 4 : start + 8]
        keyword = content[start + 8 : start + 8 + _KEYWORD].partition(b"\0")[0]
        is_kept = kind in _PNG_CHUNKS and (kind != b"eXIf" or end - start - 12 <= _EXIF)
        if kind in (b"tEXt", b"zTXt", b"iTXt") and keyword in texts:
            texts.discard(keyword)  # the first is tried, as each may take long
            is_kept = _is_short(kind, content[start + 8 + len(keyword) + 1 : end - 4])
        if is_kept:
            kept.append(content[start:end])
        start = end
    if len(kept) > _PARTS + len(content) // _BYTES_A_CHUNK:
        _refuse(name, f"has {len(kept):,} chunks")
    return b"".join(kept)


def _is_short(kind: bytes, text: bytes) -> bool:
    """Return True if a text of a PNG, from after its keyword, does not unpack to more than Exif of a JPEG may have."""
    if kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1"):
        packed = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1]
        try:
            return len(zlib.decompressobj().decompress(packed, _EXIF + 1)) <= _EXIF
        except zlib.error:
            return False
    return len(text) <= _EXIF


def _check_tags(content: bytes, name: str) -> None:
    """Refuse tags of a TIFF that have many numbers, each of which would become an object of Python."""
    for tag, kind, values, _ in _tags(content):
        if values > _TIFF_VALUES and kind != _ASCII and (tag in _TIFF_TAGS or kind not in _OPAQUE):
            _refuse(name, f"has {values:,} values in one tag")


def _tags(content: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the tags of a TIFF's first image: the tag, type and count of its values, and them or their place."""
    order, is_big = "<" if content.startswith(b"II") else ">", content[2:3] == b"+"
    entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
    try:
        (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), content, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), content, start)
        start += 8 if is_big else 2
        yield from entry.iter_unpack(content[start : start + entry.size * min(count, _PARTS)])
    except (struct.error, OverflowError):
        pass  # damaged, as Pillow will say
