"""Files of SVHN, written by SciPy, and damaged ones."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest

from pipelines.errors import UsageError, UserError
from tests.limits import limits

matlab = pytest.importorskip("scipy.io")


def digits(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw images [N, 32, 32, 3] and their digits [N]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10


def mat(count: int = 12, seed: int = 0, compress: bool = True, **changes) -> bytes:
    """The file of drawn digits; `changes` replace variables."""
    images, labels = digits(count, seed)
    content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
    file = io.BytesIO()
    matlab.savemat(file, {**content, **changes}, do_compression=compress)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Write files into the folder of a source."""

    def write(**members):
        path = tmp_path / "data"
        path.mkdir(exist_ok=True)
        for name, content in members.items():
            (path / f"{name}_32x32.mat").write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("packing", ["folder", "zip", "tar"])
def test_digits_are_read_and_the_label_10_is_digit_0(tmp_path, folder, helpers, read, packing, compress):
    members = {"train_32x32.mat": mat(30, 1, compress), "test_32x32.mat": mat(10, 2, compress)}
    if packing == "folder":
        path = folder(train=members["train_32x32.mat"], test=members["test_32x32.mat"])
    else:
        path = (helpers.make_zip if packing == "zip" else helpers.make_tar)(tmp_path / f"data.{packing}", members)
    data, notes = read(path)
    assert notes == []
    assert data.classes == tuple("0123456789")
    for (images, labels), (count, seed) in zip(data.splits().values(), ((30, 1), (10, 2)), strict=True):
        np.testing.assert_array_equal(images, digits(count, seed)[0])
        np.testing.assert_array_equal(labels, digits(count, seed)[1])
        assert labels.dtype == np.int64


def test_files_of_other_byte_orders_are_read(folder, read):
    """MATLAB once wrote big-endian files on some machines: a tag's size, type and numbers have the other order."""
    images, labels = digits(2)

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    def array(name: bytes, shape: tuple[int, ...], content: bytes) -> bytes:
        parts = (struct.pack(">II", 9, 0), struct.pack(f">{len(shape)}i", *shape), name, content)
        return element(14, b"".join(element(kind, part) for kind, part in zip((6, 5, 1, 2), parts, strict=True)))

    content = mat()[:126] + b"MI" + array(b"X", (32, 32, 3, 2), images.transpose(1, 2, 3, 0).tobytes(order="F"))
    data, _ = read(folder(train=content + array(b"y", (2, 1), bytes([10, 1])), test=mat()))
    np.testing.assert_array_equal(data.train_images, images)
    assert data.train_labels.tolist() == labels.tolist()


def test_labels_may_be_doubles(folder, read):
    labels = np.arange(1, 11, dtype=np.float64)[:, None]
    data, _ = read(folder(train=mat(10, y=labels), test=mat(10)))
    assert data.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_agrees_with_torchvision(folder, read, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    path = folder(train=mat(30, 1), test=mat(10, 2))
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True, raising=False)
    for name, (images, labels) in read(path)[0].splits().items():
        expected = datasets.SVHN(path, split=name)
        np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), expected.data)
        np.testing.assert_array_equal(labels, expected.labels)


def test_extra_images_are_left_out_with_a_note(folder, read):
    data, (note,) = read(folder(train=mat(10), test=mat(10), extra=b"not read"))
    assert len(data.train_images) == 10
    assert note == "left out extra_32x32.mat: the images to train on are those of train_32x32.mat."


def test_single_file_is_divided(folder, read, refused):
    path = folder(train=mat(60)) / "train_32x32.mat"
    refused(path, "has no test images. --split 0.2")
    data, _ = read(path, split=0.4)
    assert len(data.train_images) + len(data.test_images) == 60
    assert 8 < len(data.test_images) < 40


def test_images_to_test_on_need_no_others(folder, read):
    data, _ = read(folder(test=mat(10)), only_test=True)
    assert (len(data.train_labels), len(data.test_labels)) == (0, 10)


def test_images_to_test_on_are_not_divided(folder, read):
    with pytest.raises(UsageError, match=r"--split 0\.5: .* has test images already, in test_32x32\.mat"):
        read(folder(train=mat(), test=mat()), split=0.5)


def test_file_to_train_on_is_missing(folder, refused):
    for split in (None, 0.5):
        refused(folder(test=mat()), "is not a complete SVHN: train_32x32.mat missing", split=split)


def test_two_copies_are_refused(folder, refused):
    path = folder(train=mat(), test=mat())
    (path / "copy").mkdir()
    (path / "copy" / "train_32x32.mat").write_bytes(mat())
    refused(path, "has two files train_32x32.mat")


def compressed(element: bytes) -> bytes:
    """A file with one compressed element, after the header of SciPy's."""
    packed = zlib.compress(element)
    return mat()[:128] + struct.pack("<II", 15, len(packed)) + packed


def matrix(name: bytes, shape: tuple[int, ...], content: bytes, kind: int = 9) -> bytes:
    """An array of bytes as MATLAB 5 stores it, whatever its shape."""
    parts = [struct.pack("<4I", 6, 8, kind, 0), struct.pack("<II", 5, 4 * len(shape))]
    parts += [struct.pack(f"<{len(shape)}i", *shape), struct.pack("<II", 1, len(name)), name.ljust(8, b"\0")]
    body = b"".join([*parts, struct.pack("<II", 2, len(content)), content, bytes(-len(content) % 8)])
    return struct.pack("<II", 14, len(body)) + body


Y = matrix(b"y", (6, 1), bytes([1, 2, 3, 4, 5, 10]))
BAD = {
    "no variables": (mat(X=[], y=[]), "has X (float64 [0, 0]), y (float64 [0, 0]). SVHN has X (uint8 [32, 32, 3, N])"),
    "other variables": (mat(X=np.zeros(3), y=np.zeros(3), z=np.zeros(3)), "has X (float64 [1, 3])"),
    "images of floats": (mat(X=np.zeros((32, 32, 3, 12))), "has X (float64 [32, 32, 3, 12])"),
    "images of another size": (mat(X=np.zeros((64, 64, 3, 12), np.uint8)), "has X (uint8 [64, 64, 3, 12])"),
    "fewer labels": (mat(y=np.ones((11, 1), np.uint8)), "y (uint8 [11, 1])"),
    "labels of objects": (mat(y=np.full((12, 1), "a", object)), "cannot be read as a MATLAB file"),
    "label 0": (mat(y=np.zeros((12, 1), np.uint8)), "has labels 0..0, but those of SVHN are 1..10"),
    "label 11": (mat(y=np.full((12, 1), 11, np.uint8)), "has labels 11..11"),
    "labels between digits": (mat(y=np.full((12, 1), 1.5)), "has labels 1.5..1.5"),
    "labels that are no numbers": (mat(y=np.full((12, 1), np.nan)), "has labels nan..nan"),
    "version 7.3": (b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n", "is a MATLAB file (.mat, version 7.3)"),
    "a page of HTML": (b"<!DOCTYPE html><html>", "is an HTML page"),
    "nothing": (b"", "is empty"),
    "noise": (np.random.default_rng(0).bytes(9999), "is no MATLAB file of version 5"),
    "a header only": (mat()[:128], "has no images. SVHN has X"),
    "too many images": (
        mat()[:128] + matrix(b"X", (32, 32, 3, 2**31 - 1), b"") + matrix(b"y", (2**31 - 1, 1), b""),
        "cannot be read as a MATLAB file: X has 0 numbers, and shape [32, 32, 3, 2147483647]",
    ),
    "too few bytes": (mat()[:128] + matrix(b"X", (32, 32, 3, 6), bytes(80)) + Y, "cannot be read as a MATLAB file"),
    "negative images": (
        mat()[:128] + matrix(b"X", (32, 32, 3, -1), b"") + matrix(b"y", (-1, 1), b""),
        "X has 0 numbers, and shape [32, 32, 3, -1]",
    ),
    "a shape of other numbers": (mat()[:128] + matrix(b"X", (32, 32, 3, 7), bytes(15360)) + Y, "X has 15,360 numbers"),
    "another number": (mat()[:128] + matrix(b"X", (32, 32, 3, 5), bytes(15360)) + Y, "y (uint8 [6, 1])"),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_other_files_are_refused(folder, refused, content, words):
    with limits(1 << 20):
        refused(folder(train=content, test=mat()), words)


def test_files_that_unpack_to_far_more_are_refused(folder, refused):
    content = compressed(matrix(b"X", (32, 32, 3, 6), bytes(100 << 20))) + Y
    with limits(len(content)):
        refused(folder(train=content, test=mat()), "cannot be read as a MATLAB file: it claims 104,857,600 bytes")


def test_truncated_and_changed_files_give_data_or_an_error(folder, read):
    content, rng = mat(), random.Random(1)
    messages = []
    for _ in range(80):
        place = rng.choice((rng.randrange(len(content)), rng.randrange(400)))
        changed = content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :]
        try:
            read(folder(train=content[:place] if rng.random() < 0.3 else changed, test=mat()))
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(len(message.splitlines()) == 1 for message in messages)
