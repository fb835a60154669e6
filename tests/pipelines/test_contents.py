"""Recognition of files by content: files written byte by byte, or by the libraries that write them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.contents import recognise


def saved(save) -> bytes:
    """Return the bytes that `save` writes to a file."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def zipped(**entries: bytes) -> bytes:
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    return saved(write)


def image(kind: str) -> bytes:
    return saved(lambda file: Image.new("RGB", (4, 4)).save(file, kind))


def field(number: int, content: bytes) -> bytes:
    """Encode a field of a protocol buffer that has a length."""
    return bytes([number << 3 | 2, len(content)]) + content


GRAPH = field(7, field(1, field(4, b"Relu")) + field(2, b"main"))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
INDEX = json.dumps({"metadata": {"total_size": 9}, "weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}})
SAFETENSORS = struct.pack("<Q", 62) + b'{"fc.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4)
CHECKPOINT = saved(lambda file: torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(700)}, file))
MATLAB = b"MATLAB %s MAT-file, Platform: GLNXA64, Created on: Mon Jan  1 00:00:00 2024".ljust(130)

FOR_BOTH = {
    "empty": (b"", "is empty"),
    "LFS pointer": (POINTER, "is a Git LFS pointer, not the file itself: run git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html>\n<html lang='en'><title>Sign in</title></html>", "is an HTML page"),
    "HTML with a byte order mark": (b"\xef\xbb\xbf<HTML><body>No</body></HTML>", "is an HTML page"),
    "XML of a storage service": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is an XML document"),
    "index": (INDEX.encode(), "is only the index of weights in several files"),
    "JSON": (b' {"error": "gated"}', "is a JSON file"),
    "JSON, cut within a character": (b'["' + "é".encode() * 40_000 + b'"]', "is a JSON file"),
    "text": (b"404: Not Found\n\nLine 2", "is text that begins '404: Not Found': fetch"),
    "blank text": (b" \n\t\n", "is text that begins '': fetch"),
    "7z": (b"7z\xbc\xaf'\x1c\x00\x04" + bytes(30), "is a 7z archive: unpack it"),
    "RAR": (b"Rar!\x1a\x07\x01\x00" + bytes(30), "is a RAR archive: unpack it"),
    "Zstandard": (b"\x28\xb5\x2f\xfd\x04\x00\x09\x00\x00a", "is compressed with Zstandard: unpack it"),
    "ONNX of PyTorch": (b"\x08\x09" + field(2, b"pytorch") + field(3, b"2.4") + GRAPH, "is a network in ONNX format"),
    "ONNX without producer": (b"\x08\x0a" + GRAPH + field(8, b"\x10\x15"), "is a network in ONNX format"),
    "TensorFlow Lite": (b"\x1c\x00\x00\x00TFL3" + bytes(30), "is a network of TensorFlow Lite"),
    "GGUF": (b"GGUF" + struct.pack("<I", 3), "is a GGUF file"),
    "MATLAB 5": (MATLAB % b"5.0", "is a MATLAB file (.mat, version 5)"),
    "MATLAB 7.3": ((MATLAB % b"7.3").ljust(512) + b"\x89HDF\r\n\x1a\n", "is a MATLAB file (.mat, version 7.3)"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\x00\x00", "is an HDF5 file"),
    "HDF5 with a user block": (bytes(512) + b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "Parquet": (b"PAR1\x15\x04\x15" + bytes(30) + b"PAR1", "is a Parquet file"),
    "NumPy": (saved(lambda file: np.save(file, np.arange(3))), "is a NumPy array (.npy)"),
    "MNIST": (gzip.compress(struct.pack(">4I", 0x803, 60_000, 28, 28) + bytes(784)), "is an IDX file"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "is a PDF document"),
    **{kind: (image(kind), "is a single image") for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")},
}


@pytest.fixture
def of(tmp_path):
    """`recognise` of a file with the content given."""

    def recognised(content: bytes, wanted: str) -> str | None:
        (tmp_path / "file").write_bytes(content)
        return recognise(tmp_path / "file", wanted)

    return recognised


@pytest.mark.parametrize("wanted", ["images", "weights"])
@pytest.mark.parametrize(("content", "phrase"), FOR_BOTH.values(), ids=FOR_BOTH)
def test_files_of_other_kinds_are_recognised(of, content, phrase, wanted):
    assert of(content, wanted).startswith(phrase)


WEIGHTS = {
    "safetensors": (SAFETENSORS, "is a file of weights (safetensors)"),
    "checkpoint of many tensors": (CHECKPOINT, "is a checkpoint of PyTorch"),
    "checkpoint of old": (
        saved(lambda file: torch.save({}, file, _use_new_zipfile_serialization=False)),
        "is a pickle, of weights",
    ),
    "pickle": (pickle.dumps({}, 2), "is a pickle, of weights or of one batch"),
}


@pytest.mark.parametrize(("content", "phrase"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_recognised_where_images_are_wanted_and_damaged_otherwise(of, content, phrase):
    assert of(content, "images").startswith(phrase)
    assert of(content, "weights") is None


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress], ids=["tar", "gz", "xz", "bz2"])
def test_tar_is_recognised_where_weights_are_wanted(of, tmp_path, helpers, pack):
    entries = {"flowers/rose/1.JPG": bytes(700_000)}
    tar = pack(helpers.make_tar(tmp_path / "x.tar", entries).read_bytes())
    assert of(tar, "weights") == "is an archive of images: give it to fastresnet prepare --source"
    assert of(tar, "images") is None


def test_zip_is_recognised_where_weights_are_wanted(of):
    assert of(zipped(**{"a/1.png": b""}), "weights").startswith("is an archive of images")
    assert of(zipped(**{"a/": b"", "a/model.pth": b""}), "weights").startswith(
        "is an archive of files such as 'a/model.pth': unpack it"
    )
    assert of(zipped(**{"a/1.png": b""}), "images") is None


def test_archive_of_arrays_is_recognised_where_weights_are_wanted(of):
    npz = saved(lambda file: np.savez(file, x_train=np.arange(3), y_train=np.arange(2)))
    assert of(npz, "weights").startswith("is an archive of NumPy arrays (.npz): save the network's state dict")
    assert of(npz, "images") is None


def test_files_that_are_read_under_other_names_are_told_these(of):
    assert of(FOR_BOTH["Parquet"][0], "images").endswith("give it a name that ends in .parquet")
    assert "only SVHN's train_32x32.mat" in of(FOR_BOTH["MATLAB 5"][0], "images")
    assert "x_train, y_train, x_test and y_test" in of(FOR_BOTH["NumPy"][0], "images")


def test_archive_of_cifar10_is_recognised_where_weights_are_wanted(of, tmp_path, helpers, fake):
    assert of(helpers.pack(tmp_path, "tar.gz", fake.python()).read_bytes(), "weights").startswith("is an archive of im")


@pytest.mark.parametrize("wanted", ["images", "weights"])
def test_unknown_content_is_not_recognised(of, tmp_path, wanted):
    noise = np.random.default_rng(0).bytes(100_000)
    others = (noise, bytes(1000), b"PK\x03\x04", b"\x1f\x8b\x08", b"BZh9" + noise, b"\x7fELF\x02\x01\x01\x00")
    assert [of(content, wanted) for content in others] == [None] * len(others)
    assert recognise(tmp_path, wanted) is None


def test_bomb_is_unpacked_to_a_window_only(of):
    assert of(bz2.compress(b"<html>" + bytes(50 << 20)), "weights").startswith("is an HTML page")


def test_text_is_shown_without_control_characters(of):
    assert "\x1b" not in (of(b"\x1b[31mred", "weights") or "")
    assert of("naïve\u202e\n".encode(), "weights").startswith("is text that begins 'naïve\\u202e'")
