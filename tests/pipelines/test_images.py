"""Reading of image files, against pixels that the tests draw and files that they write byte by byte."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.archives import file_at
from pipelines.errors import DataError, Note
from pipelines.images import read_image, read_images
from tests.limits import limits

LOSSLESS = {
    "png": {},
    "bmp": {},
    "ppm": {},
    "tiff": {"compression": "tiff_lzw"},
    "webp": {"lossless": True},
    "gif": {},
}


@pytest.fixture
def drawn() -> np.ndarray:
    """Random pixels, uint8 [32, 32, 3], in 64 colours."""
    return np.random.default_rng(2).integers(0, 4, (32, 32, 3), np.uint8) * 85


@pytest.fixture
def read(tmp_path):
    """Read an image with the content given."""

    def read_content(content: bytes) -> np.ndarray:
        (tmp_path / "image").write_bytes(content)
        return read_image(file_at(tmp_path / "image"))[0]

    return read_content


@pytest.fixture
def refused(tmp_path, read):
    """Reading the content given raises a `DataError` of one line that names the file and says each of `words`."""

    def check(content: bytes, *words: str) -> None:
        with pytest.raises(DataError) as caught:
            read(content)
        message = str(caught.value)
        assert str(tmp_path / "image") in message
        assert all(word in message for word in words), message
        assert len(message.splitlines()) == 1

    return check


def saved(pixels: np.ndarray | Image.Image, kind: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def png(samples: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Write a PNG of [height, width, channels] samples, uint8 or uint16, by the format's specification."""
    height, width = samples.shape[:2]
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, colour, 0, 0, 0)
    every = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in every
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(samples: np.ndarray) -> bytes:
    """Write a TIFF of [height, width, 3] samples of 16 bits, by the format's specification."""
    height, width, channels = samples.shape
    data = samples.astype("<u2").tobytes()
    tags = [  # (tag, type: 3 is 16 bits, 4 is 32 bits, count, value or place)
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, 8), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 14), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 14 + len(data)) + struct.pack("<3H", 16, 16, 16) + data + directory


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_lossless_format_gives_the_pixels(read, drawn, kind):
    image = Image.fromarray(drawn)
    if kind == "gif":
        image = image.quantize(64)
    np.testing.assert_array_equal(read(saved(image, kind, **LOSSLESS[kind])), drawn)


def test_grey_becomes_rgb(read, drawn):
    grey = drawn[..., 0]
    for content in (saved(grey), saved(grey, "ppm"), saved(grey, "jpeg", quality=100)):
        assert read(content).shape == (32, 32, 3)
    np.testing.assert_array_equal(read(saved(grey)), grey[..., None].repeat(3, 2))
    np.testing.assert_array_equal(read(saved(grey > 127)), ((grey > 127) * np.uint8(255))[..., None].repeat(3, 2))


def test_first_frame_of_an_animation_is_read(read, drawn):
    frames = [Image.fromarray(pixels).quantize(64) for pixels in (drawn, 255 - drawn)]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read(file.getvalue()), drawn)


def test_photo_of_a_phone_with_several_pictures_is_read(read):
    colours = [Image.new("RGB", (32, 32), (level, level, level)) for level in (120, 30)]
    file = io.BytesIO()
    colours[0].save(file, "mpo", save_all=True, append_images=colours[1:])
    assert (read(file.getvalue()) == 120).all()


def test_pipe_that_the_user_names_is_read(tmp_path, drawn):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[saved(drawn)])
    writer.start()
    np.testing.assert_array_equal(read_image(file_at(tmp_path / "pipe", may_be_pipe=True))[0], drawn)
    writer.join()


def test_images_of_another_size_are_cropped_to_a_square_and_resized(tmp_path, drawn):
    stripes = np.zeros((32, 96, 3), np.uint8)
    stripes[:, 32:64] = drawn
    (tmp_path / "0").write_bytes(saved(stripes))
    quarters = np.kron([[10, 80], [150, 220]], np.ones((50, 50)))[..., None].repeat(3, 2).astype(np.uint8)
    (tmp_path / "1").write_bytes(saved(quarters))
    (tmp_path / "2").write_bytes(saved(drawn))
    with pytest.warns(Note, match="2 of 3 images were not 32x32"):
        images, _ = read_images(enumerate(file_at(tmp_path / str(row)) for row in range(3)), 3)
    np.testing.assert_array_equal(images[0], drawn)
    np.testing.assert_array_equal(images[2], drawn)
    assert images[1][[0, 0, 31, 31], [0, 31, 0, 31], 1].tolist() == [10, 80, 150, 220]


# --- orientation -------------------------------------------------------------------------------------------------

# Of stored pixels to upright ones, by the Exif standard: the place of the 0th row and of the 0th column.
UPRIGHT = {
    1: lambda stored: stored,  # top, left
    2: lambda stored: stored[:, ::-1],  # top, right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.swapaxes(0, 1),  # left, top
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda stored: stored.swapaxes(0, 1)[::-1],  # left, bottom
}


def exif(orientation: int) -> bytes:
    """Metadata with one entry, the orientation, by the Exif standard."""
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("tiff", {}), ("webp", {"lossless": True})])
def test_images_are_turned_upright(read, drawn, orientation, kind, options):
    content = saved(drawn, kind, exif=exif(orientation), **options)
    np.testing.assert_array_equal(read(content), UPRIGHT[orientation](drawn))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photos_are_turned_before_they_are_cropped(read, orientation):
    photo = np.zeros((96, 64, 3), np.uint8)
    photo[:48, :, 0], photo[:, :32, 1] = 200, 200  # red above, green at the left
    stored = next(turn(photo) for turn in UPRIGHT.values() if np.array_equal(UPRIGHT[orientation](turn(photo)), photo))
    shown = read(saved(np.ascontiguousarray(stored), "jpeg", quality=100, subsampling=0, exif=exif(orientation)))
    corners = shown[[2, 2, 29, 29], [2, 29, 2, 29]] > 100
    assert corners.tolist() == [[True, True, False], [True, False, False], [False, True, False], [False] * 3]


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0" + b"\xff" * 40, exif(9), exif(6)[:-8]]
)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_damaged_metadata_does_not_make_an_image_unreadable(read, drawn, damage, kind):
    plain = saved(drawn, kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(read(saved(drawn, kind, exif=damage)), read(plain))
    assert not caught


# --- transparency ------------------------------------------------------------------------------------------------


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


def test_transparent_pixels_are_composited_over_white(read, drawn):
    rng = np.random.default_rng(3)
    alpha = rng.integers(0, 256, (32, 32), np.uint8)
    alpha[0], alpha[1] = 0, 255
    for content in (
        saved(np.dstack([drawn, alpha])),
        saved(np.dstack([drawn, alpha]), "webp", lossless=True, exact=True),
    ):
        np.testing.assert_array_equal(read(content), over_white(drawn, alpha))
    grey = drawn[..., :1].repeat(3, 2)
    np.testing.assert_array_equal(read(saved(np.dstack([drawn[..., 0], alpha]))), over_white(grey, alpha))


def test_transparent_colours_of_a_palette_are_composited_over_white(read):
    rng = np.random.default_rng(4)
    indices, palette = rng.integers(0, 16, (32, 32), np.uint8), rng.integers(0, 255, (16, 3), np.uint8)
    alpha = rng.integers(0, 256, 16, np.uint8)
    content = png(indices[..., None], 3, (b"PLTE", palette.tobytes()), (b"tRNS", alpha.tobytes()))
    np.testing.assert_array_equal(read(content), over_white(palette[indices], alpha[indices]))


def test_transparent_colour_is_composited_over_white(read, drawn):
    key = drawn[5, 5]
    expected = np.where((drawn == key).all(2, keepdims=True), np.uint8(255), drawn)
    np.testing.assert_array_equal(read(png(drawn, 2, (b"tRNS", struct.pack(">3H", *key.tolist())))), expected)
    grey, value = drawn[..., :1], int(drawn[5, 5, 0])
    expected = np.where(grey == value, np.uint8(255), grey).repeat(3, 2)
    np.testing.assert_array_equal(read(png(grey, 0, (b"tRNS", struct.pack(">H", value)))), expected)


def test_transparent_colour_of_a_gif_is_composited_over_white(read, drawn):
    image = Image.fromarray(drawn).quantize(64)
    indices = np.asarray(image)
    expected = np.where((indices == indices[7, 7])[..., None], np.uint8(255), drawn)
    np.testing.assert_array_equal(read(saved(image, "gif", transparency=int(indices[7, 7]))), expected)


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_grey_image_of_more_than_8_bits_a_channel_is_refused(refused, dtype):
    gradient = np.linspace(0, 60_000, 1024).reshape(32, 32).astype(dtype)
    refused(saved(gradient, "tiff"), "more than 8 bits per channel", "Save it with 8")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_a_channel_is_refused(refused, read, channels):
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    samples = np.random.default_rng(5).integers(0, 1 << 16, (32, 32, channels), np.uint16)
    refused(png(samples, colour), "more than 8 bits per channel", "Save it with 8")
    assert read(png((samples >> 8).astype(np.uint8), colour)).shape == (32, 32, 3)


def test_tiff_of_16_bits_a_channel_is_refused(refused):
    samples = np.random.default_rng(6).integers(0, 1 << 16, (32, 32, 3), np.uint16)
    with Image.open(io.BytesIO(tiff(samples))) as image:  # Pillow reads it, and keeps the high bytes
        np.testing.assert_array_equal(np.asarray(image), samples >> 8)
    refused(tiff(samples), "more than 8 bits per channel")


@pytest.mark.parametrize("maximum", [256, 1023, 65535])
@pytest.mark.parametrize("head", ["P6 32 32 {}\n", "P6\n# made by\n32 # width\n32\n{}\n"])
def test_ppm_of_over_8_bits_a_channel_is_refused(refused, read, head, maximum):
    samples = np.random.default_rng(7).integers(0, 256, (32, 32, 3), np.uint16)
    refused(head.format(maximum).encode() + samples.astype(">u2").tobytes(), "more than 8 bits per channel")
    refused(f"P3 32 32 {maximum} ".encode() + " ".join(map(str, samples.flat)).encode(), "more than 8 bits")
    np.testing.assert_array_equal(read(head.format(255).encode() + samples.astype(np.uint8).tobytes()), samples)


def test_postscript_is_refused_and_no_program_is_started(refused, monkeypatch):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "EPS"  # Pillow itself would run Ghostscript to load it
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    refused(content, "is a PostScript document")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"text", "is text that begins 'text'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is an HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a picture in HEIF or AVIF format: save it as PNG or JPEG"),
        (b"\0\1\2\3" * 9, "unknown format"),
        (saved(np.zeros((32, 32, 3), np.uint8))[:60], "cannot be read as an image"),
    ],
)
def test_file_that_is_no_image_is_described(refused, content, words):
    refused(content, words)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_image_that_claims_a_huge_size_is_refused_before_it_is_decoded(refused, drawn, side):
    whole = saved(drawn)
    header = b"IHDR" + struct.pack(">II", side, side) + whole[24:29]
    refused(
        whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:],
        "pixels",
        "Scale it down",
    )


# --- claims beyond the file --------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def blank_png(side: int, colour: int = 2, *chunks: bytes) -> bytes:
    """A PNG of black pixels, with `chunks` before them."""
    packer, row = zlib.compressobj(1), bytes(1 + side * {0: 1, 2: 3, 6: 4}[colour])
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def grey_tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """The header of a TIFF of 64x64 grey pixels with more tags: (tag, type, count, value or place)."""
    every = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), *tags]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in every)
    return b"II*\0" + struct.pack("<IH", 8, len(every)) + entries + bytes(4)


def with_before(content: bytes, mark: bytes, inserted: bytes) -> bytes:
    place = content.rindex(mark)
    return content[:place] + inserted + content[place:]


BLANK = np.zeros((32, 32), np.uint8)
TEXTS = [chunk(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(1 << 20))) for n in range(63)]
WIDE = ("\U0001f600" + "a" * ((1 << 20) - 4)).encode()  # four bytes of memory for each character
TEXTS_WIDE = [chunk(b"iTXt", b"k%d\0\1\0\0\0" % n + zlib.compress(WIDE)) for n in range(63)]
RLE = (lambda bmp: bmp[:30] + struct.pack("<I", 1) + bmp[34:])(saved(Image.new("P", (32, 32)), "bmp"))
CANVAS = (16382).to_bytes(3, "little") * 2
EXCESSES = {
    "pixels of a PNG": (lambda: blank_png(4096), "too many pixels"),
    "pixels in a row": (lambda: saved(Image.new("1", (70_000, 8))), "too many pixels"),
    "pixels of a WebP": (lambda: b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + CANVAS + bytes(80), "too many pixels"),
    "scans of a JPEG": (lambda: jpeg_of_scans(3000), "scans"),
    "scans of a JPEG in a TIFF": (lambda: grey_tiff((259, 3, 1, 7)) + b"\xff\xda" * 3000, "scans"),
    "Exif of a JPEG": (lambda: jpeg_with_exif(60), "parts of Exif"),
    "segments of a JPEG": (lambda: saved(BLANK, "jpeg")[:2] + b"\xff\xfe\0\2" * 100_000, "metadata without end"),
    "chunks of a PNG": (lambda: blank_png(32, 2, chunk(b"IDAT", b"") * 100_000), "chunks"),
    "strips of a TIFF": (lambda: grey_tiff((273, 4, 1 << 20, 200)) + bytes(4 << 20), "values in one tag"),
    "strips of bytes": (lambda: grey_tiff((273, 1, 4 << 20, 200)) + bytes(4 << 20), "values in one tag"),
    "numbers for a profile": (lambda: grey_tiff((34675, 4, 1 << 20, 200)) + bytes(4 << 20), "values in one tag"),
    "tile of a TIFF": (
        lambda: grey_tiff((322, 3, 1, 20_000), (323, 3, 1, 20_000), (324, 4, 1, 200), (325, 4, 1, 9)) + bytes(200),
        "too many pixels",
    ),
    "comments of a GIF": (
        lambda: with_before(saved(BLANK, "gif"), b",", b"!\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0"),
        "metadata without end",
    ),
    "comment of a PPM": (lambda: b"P6\n#" + b"a" * (1 << 20) + b"\n32 32 255\n" + bytes(3072), "metadata without end"),
    "comments of a PPM": (lambda: b"P3 32 32 255\n" + b"#\n" * (1 << 20) + b"0 " * 3072, "comments"),
    "pixels of a plain PPM": (lambda: b"P3 2048 1024 255\n" + b"0 " * (6 << 20), "too many pixels"),
    "runs of a BMP": (lambda: RLE + bytes(4 << 20), "bytes for 1,024 pixels"),
}


def jpeg_of_scans(count: int) -> bytes:
    content = saved(BLANK, "jpeg", progressive=True)
    return with_before(content, b"\xff\xd9", content[content.rindex(b"\xff\xda") : -2] * count)


def jpeg_with_exif(segments: int) -> bytes:
    """A JPEG with a horizontal resolution of many numbers."""
    numbers = 8000 * segments
    resolution, unit = struct.pack("<HHII", 282, 5, numbers, 38), struct.pack("<HHII", 296, 3, 1, 2)
    data = b"II*\0\x08\0\0\0\2\0" + resolution + unit + bytes(4) + b"\7\0\0\0\3\0\0\0" * numbers
    parts = [data[start : start + 65_000] for start in range(0, len(data), 65_000)]
    exifs = (b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)
    content = saved(BLANK, "jpeg")
    return content[:2] + b"".join(exifs) + content[20:]  # without JFIF, which has a resolution


def test_large_profile_of_a_jpeg_is_read(read):
    content = saved(BLANK, "jpeg", icc_profile=bytes(6 << 20))
    with limits(len(content), seconds=2):
        assert (read(content) == 0).all()


@pytest.mark.parametrize(("make", "words"), EXCESSES.values(), ids=EXCESSES)
def test_image_that_would_take_much_more_than_its_size_is_refused(refused, make, words):
    content = make()
    with limits(len(content), seconds=2):
        refused(content, words)


@pytest.mark.parametrize("packing", ["raw", "packbits"])
def test_tiff_whose_colour_has_the_bytes_of_a_scan_of_a_jpeg_is_read(read, packing):
    peach = Image.new("RGB", (32, 32), (0xFF, 0xDA, 0xB9))
    np.testing.assert_array_equal(read(saved(peach, "tiff", compression=packing)), np.asarray(peach))


@pytest.mark.parametrize("texts", [TEXTS, TEXTS_WIDE], ids=["Latin", "wide"])
def test_texts_of_a_png_are_not_unpacked(read, drawn, texts):
    content = saved(drawn)
    content = content[:33] + b"".join(texts) + content[33:]  # after the header
    with limits(len(content)):
        np.testing.assert_array_equal(read(content), drawn)


LONG_EXIF = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x112, 3, 3 << 20, 26) + bytes(4) + b"\6\1" * (3 << 20)


def test_texts_of_exif_in_a_png_are_unpacked_once(read, drawn):
    content, text = saved(drawn), chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n" * 1_000_000))
    content = content[:33] + text * 2000 + content[33:]
    with limits(len(content), seconds=2):
        np.testing.assert_array_equal(read(content), drawn)


@pytest.mark.parametrize("kind", ["webp", "png", "png at its end"])
def test_long_exif_is_left_out(read, drawn, kind):
    content = saved(drawn, "png")
    if kind == "webp":
        content = saved(drawn, "webp", lossless=True, exif=LONG_EXIF)
    else:
        place = 33 if kind == "png" else len(content) - 12
        content = content[:place] + chunk(b"eXIf", LONG_EXIF) + content[place:]
    with limits(len(content), seconds=2):
        np.testing.assert_array_equal(read(content), drawn)


@pytest.mark.parametrize("packed", [False, True])
def test_orientation_in_a_text_of_a_png_is_applied(read, drawn, packed):
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", 'tiff:Orientation="3"', zip=packed)
    np.testing.assert_array_equal(read(saved(drawn, pnginfo=info)), drawn[::-1, ::-1])


@pytest.mark.parametrize("colour", [2, 6])
def test_large_image_takes_at_most_two_copies(read, colour):
    side = 2880
    turned = chunk(b"eXIf", exif(6)[6:])
    content = blank_png(side, colour, turned)
    with limits(3 * side * side):
        assert (read(content) == (255 if colour == 6 else 0)).all()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_strips_of_a_large_image_give_the_same_pixels(read, monkeypatch, orientation):
    pixels = np.random.default_rng(8).integers(0, 256, (70, 53, 4), np.uint8)
    content = saved(pixels, exif=exif(orientation))
    whole = read(content)
    monkeypatch.setattr("pipelines.images._STRIP", 500)
    np.testing.assert_array_equal(read(content), whole)


def test_file_of_an_image_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "1.png").touch()
    os.truncate(tmp_path / "1.png", 5 << 30)  # sparse: it takes no space
    with limits(64 << 20), pytest.raises(DataError, match=r"1\.png has over 67,108,864 bytes\. Scale the image down"):
        read_image(file_at(tmp_path / "1.png"))


@pytest.mark.parametrize("source_bytes", [None, 1000])
def test_images_that_have_too_many_pixels_in_all_are_refused_and_not_skipped(tmp_path, monkeypatch, source_bytes):
    monkeypatch.setattr("pipelines.image_limits._ALL_PIXELS", 3 << 20)
    monkeypatch.setattr("pipelines.image_limits._ALL_PIXELS_PER_BYTE", 1)
    (tmp_path / "1.png").write_bytes(blank_png(1024))
    files = [(row, file_at(tmp_path / "1.png")) for row in range(12)]
    with pytest.raises(DataError, match="and those before it have too many pixels for their bytes"):
        read_images(files, len(files), skip_unreadable=True, source_bytes=source_bytes)


MARKERS = saved(BLANK, "jpeg")[:2] + b"\xff\xe5\0\2" * 2000
COSTLY = {
    "markers": MARKERS + saved(BLANK, "jpeg")[2:],
    "refused": MARKERS,
    "Exif": jpeg_with_exif(1),
    "strips": grey_tiff((273, 4, 4000, 134), (278, 3, 1, 1), (279, 3, 4000, 134 + 16_000)).replace(
            struct.pack("<HHII", 257, 3, 1, 64), struct.pack("<HHII", 257, 3, 1, 4000)
        )
        + struct.pack("<I", 8) * 4000 + struct.pack("<H", 1) * 4000,
}  # fmt: skip


@pytest.mark.parametrize("content", COSTLY.values(), ids=COSTLY)
def test_effort_of_parts_and_strips_is_limited(tmp_path, content):
    (tmp_path / "1").write_bytes(content)
    files = [(row, file_at(tmp_path / "1")) for row in range(400)]
    with pytest.raises(DataError, match="and those before it have too many pixels for their bytes"):
        read_images(files, len(files), skip_unreadable=True, source_bytes=0)


@pytest.mark.parametrize("kind", [*LOSSLESS, "jpeg"])
def test_mutated_image_gives_pixels_or_data_error(read, drawn, kind):
    image = Image.fromarray(drawn) if kind != "gif" else Image.fromarray(drawn).quantize(64)
    whole, rng, refusals = (
        saved(image, kind, exif=exif(6)) if kind != "bmp" else saved(image, kind),
        random.Random(6),
        0,
    )
    for _ in range(150):
        place = rng.randrange(min(len(whole), 400))
        changed = whole[:place] if rng.random() < 0.3 else whole[:place] + rng.randbytes(1) + whole[place + 1 :]
        try:
            assert read(changed).shape == (32, 32, 3)
        except DataError:
            refusals += 1
    assert refusals > 20


# --- many images -------------------------------------------------------------------------------------------------


@pytest.fixture
def some_unreadable(tmp_path, drawn):
    """Ten images of which rows 3, 5, 6, 8 and 9 cannot be read."""
    for row in range(10):
        (tmp_path / f"{row}.png").write_bytes(b"text" if row in (3, 5, 6, 8, 9) else saved(drawn ^ np.uint8(row)))
    return [(row, file_at(tmp_path / f"{row}.png")) for row in range(10)]


def test_first_unreadable_image_is_named_and_others_are_counted(tmp_path, some_unreadable):
    with pytest.raises(DataError) as caught:
        read_images(some_unreadable, 10)
    assert str(caught.value).startswith(f"{tmp_path}/3.png is text that begins 'text'")
    assert str(caught.value).endswith(
        " Others that cannot be read: 4. prepare and predict --skip-unreadable leave such images out."
    )


def test_unreadable_images_are_skipped_and_listed(tmp_path, some_unreadable, drawn):
    with pytest.warns(Note) as notes:
        images, is_read = read_images(some_unreadable, 10, skip_unreadable=True)
    (note,) = map(str, (note.message for note in notes))
    names = ", ".join(f"{tmp_path}/{row}.png" for row in (3, 5, 6))
    assert note == f"5 of 10 images cannot be read and were skipped: {names} and 2 more."
    assert np.flatnonzero(is_read).tolist() == [0, 1, 2, 4, 7]
    np.testing.assert_array_equal(images[is_read], [drawn ^ np.uint8(row) for row in (0, 1, 2, 4, 7)])


def test_missing_file_is_unreadable(tmp_path):
    (tmp_path / "link.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"link\.png cannot be read: No such file or directory\.$"):
        read_images([(0, file_at(tmp_path / "link.png"))], 1)
