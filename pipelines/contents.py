"""Recognition of files by their content: those that people give by mistake, and the remedy.

It reads the first and the last 64 KiB only, and unpacks at most 64 KiB, so that a hostile file costs nothing.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .archives import is_image

Wanted = Literal["images", "image", "weights"]
"""Kind of file that a reader needs: a data set of images, one image, or the weights of a network."""

WINDOW = 64 << 10
"""Bytes of the beginning and of the end of a file that tell its kind."""

_GIVE = {
    "image": "give an image, or a folder of images",
    "images": "give the folder or archive of a data set",
    "weights": "give a checkpoint, or a file of weights (.safetensors)",
}
_SAVE = {
    "image": "save it as PNG or JPEG",
    "images": "save its images as PNG files in folders train/CLASS and test/CLASS",
    "weights": "save the network's state dict with torch.save, or as .safetensors",
}
_UNPACK = "unpack it, and give the folder or file that is needed"

# Kinds by a pattern of their first bytes, with the remedy where it is always the same.
_NOT_THE_FILE = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    rb"\s*<(?i:!doctype html|html|head|body)\b": "an HTML page, not the file itself: the download failed or needs a "
    "login; fetch it again",
    rb"\s*<\?xml": "an XML document, not the file itself: if it was downloaded, fetch it again",
}
_PACKED = {
    rb"7z\xbc\xaf\x27\x1c": f"a 7z archive: {_UNPACK}",
    rb"Rar!\x1a\x07": f"a RAR archive: {_UNPACK}",
    rb"\x28\xb5\x2f\xfd": f"compressed with Zstandard: {_UNPACK}",
}
_WEIGHTS = {
    rb"\x80[\x02-\x05]": "a pickle, of weights or of one batch of CIFAR-10",
    rb'.{3}[\x00-\x06]\x00{4}\{"': "a file of weights (safetensors)",
}
_IMAGES = {
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\x00|MM\x00\*|P[1-6]\s|BM.{4}\x00{4}": "a single image",
}
_OTHERS = {
    rb"\x08[\x01-\x40](?:\x12.[ -~]{2}|\x3a[\x80-\xff]*[\x00-\x7f][\x0a\x12])": "a network in ONNX format",
    rb".{4}TFL3": "a network of TensorFlow Lite",
    rb"GGUF": "a GGUF file",
    rb"MATLAB 7\.3 MAT-file": "a MATLAB file (.mat, version 7.3)",
    rb"MATLAB 5\.0 MAT-file": "a MATLAB file (.mat, version 5)",
    rb"(?:.{512})?\x89HDF\r\n\x1a\n": "an HDF5 file (.h5, as Keras writes)",
    rb"PAR1": "a Parquet file",
    rb"\x93NUMPY": "a NumPy array (.npy)",
    rb"\x00\x00[\x08-\x0e][\x01-\x04]\x00": "an IDX file (as MNIST's)",
    rb"%PDF-": "a PDF document",
    rb"%!PS": "a PostScript document",
    rb".{4}ftyp(?:hei|hev|mif|msf|avi)": "a picture in HEIF or AVIF format",
}
_READ = {
    "a Parquet file": "give it a name that ends in .parquet",
    "a NumPy array (.npy)": "save x_train, y_train, x_test and y_test in one .npz by numpy.savez",
    "a MATLAB file (.mat, version 5)": "of those only SVHN's train_32x32.mat and test_32x32.mat are read",
}
"""Remedies for kinds that are read as images under the right names."""

_CHECKPOINT_ENTRIES = ("data.pkl", "constants.pkl", "serialization_id")


def recognise(path: Path, wanted: Wanted) -> str | None:
    """Return the end of an error about `path`: "is" some kind of file, and the remedy, without a period.

    Return None for unknown content, and for kinds that a reader of `wanted` should read: those are damaged.
    """
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(WINDOW)
        file.seek(max(0, os.fstat(file.fileno()).st_size - WINDOW))
        return describe(head, file.read(WINDOW), wanted)


def describe(head: bytes, tail: bytes, wanted: Wanted) -> str | None:
    """Do as `recognise` does for a file by its first and last `WINDOW` bytes."""
    if not head:
        return "is empty: copy or fetch it again"
    head = _unpack(head)
    if names := _zip_names(head, tail) if head.startswith(b"PK") else _tar_names(head):
        phrase = _describe_archive(names, wanted)
    elif kind := _find(_WEIGHTS, head):
        phrase = None if wanted == "weights" else f"{kind}: {_GIVE[wanted]}"
    elif kind := _find(_IMAGES, head):
        phrase = None if wanted == "image" else f"{kind}: {_GIVE[wanted]}"
    elif kind := _find(_OTHERS, head):
        phrase = f"{kind}: {(wanted == 'images' and _READ.get(kind)) or _SAVE[wanted]}"
    else:
        phrase = _find(_NOT_THE_FILE | _PACKED, head) or _describe_text(head)
    return f"is {phrase}" if phrase else None


def _find(kinds: dict[bytes, str], head: bytes) -> str | None:
    start = head.removeprefix(codecs.BOM_UTF8)
    return next((kind for pattern, kind in kinds.items() if re.match(pattern, start, re.DOTALL)), None)


def _describe_text(head: bytes) -> str | None:
    """Describe text: the index of weights in several files, JSON, or its first words."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    if not text or re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text):
        return None
    if '"weight_map"' in text:
        return "only the index of weights in several files: load these, and save all tensors in one file"
    line = text.strip().partition("\n")[0]
    kind = "a JSON file" if line.startswith(("{", "[")) else f"text that begins {line[:30]!r}"
    return f"{kind}: fetch it again, or give another file"


def _describe_archive(names: list[str], wanted: Wanted) -> str | None:
    files = [PurePosixPath(name) for name in names if not name.endswith("/")]
    if any(file.name in _CHECKPOINT_ENTRIES for file in files):
        return None if wanted == "weights" else f"a checkpoint of PyTorch: {_GIVE[wanted]}"
    if wanted == "images" or not files:
        return None
    if all(file.suffix == ".npy" for file in files):
        return f"an archive of NumPy arrays (.npz): {_SAVE[wanted]}"
    if any(is_image(file.name) or file.name.startswith("data_batch_") for file in files):
        return "an archive of images: give it to fastresnet prepare --source"
    return f"an archive of files such as {str(files[0])!r}: {_UNPACK}"


def _zip_names(head: bytes, tail: bytes) -> list[str]:
    """List the entries whose headers lie in the first bytes of a zip, or in the last bytes of its directory."""
    names = []
    for part, header in ((head, rb"PK\x03\x04.{22}(..).{2}"), (tail, rb"PK\x01\x02.{24}(..).{16}")):
        for found in re.finditer(header, part, re.DOTALL):
            name = part[found.end() : found.end() + int.from_bytes(found[1], "little")]
            names.append(name.decode(errors="replace"))
    return names


def _tar_names(head: bytes) -> list[str]:
    """List the files whose headers lie in the first bytes of a tar."""
    headers = [head[at : at + 512] for at in range(0, len(head), 512)]
    return [
        header[:100].partition(b"\0")[0].decode(errors="replace")
        for header in headers
        if header[257:262] == b"ustar" and header[156:157] in (b"0", b"\0")
    ]


def _unpack(head: bytes) -> bytes:
    """Unpack at most a window of the beginning of a compressed file; return others unchanged."""
    decompressors: dict[bytes, Callable[[], Any]] = {
        b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
        b"BZh": bz2.BZ2Decompressor,
        b"\xfd7zXZ": lambda: lzma.LZMADecompressor(memlimit=256 << 20),
    }
    for magic, create in decompressors.items():
        if head.startswith(magic):
            try:
                return create().decompress(head, WINDOW)
            except (zlib.error, lzma.LZMAError, OSError, EOFError):
                return b""
    return head
