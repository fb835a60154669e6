"""Arrays of NumPy as a source, written by NumPy itself, and hostile ones."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.errors import Note, UsageError
from pipelines.sources import read_source
from tests.limits import limits

KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")


def draw(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([count, *shape]).integers(0, 256, (count, *shape), np.uint8)


def arrays(names=KERAS, shape=(32, 32, 3), **changes) -> dict[str, np.ndarray]:
    """Six training and four test images of three classes; `changes` replace arrays, or with None remove them."""
    images, labels = (draw(6, *shape), draw(4, *shape)), (np.arange(6) % 3, np.arange(4) % 3)
    made = dict(zip(names, (images[0], labels[0], images[1], labels[1]), strict=True)) | changes
    return {name: array for name, array in made.items() if array is not None}


@pytest.fixture
def save(tmp_path):
    """Save arrays as .npz, compressed or not, or as .npy files in a folder."""

    def write(content, packing: str = "npz"):
        path = tmp_path / ("data" if packing == "folder" else "data.npz")
        if packing == "folder":
            path.mkdir()
            for name, array in content.items():
                np.save(path / f"{name}.npy", array)
        else:
            (np.savez_compressed if packing == "compressed" else np.savez)(path, **content)
        return path

    return write


@pytest.fixture
def read(helpers):
    return lambda path, **options: read_source(path, helpers.ignore, **options)


@pytest.mark.parametrize("packing", ["npz", "compressed", "folder"])
@pytest.mark.parametrize("names", [KERAS, MEDMNIST])
@pytest.mark.parametrize("column", [False, True], ids=["[N]", "[N, 1]"])
def test_arrays_of_keras_and_medmnist_are_read(save, read, names, packing, column):
    content = arrays(names)
    stored = {name: a[:, None].astype(np.uint8) if column and a.ndim == 1 else a for name, a in content.items()}
    data = read(save(stored, packing))
    assert data.classes == ("0", "1", "2")
    for (images, labels), (of_images, of_labels) in zip(data.splits().values(), (names[:2], names[2:]), strict=True):
        np.testing.assert_array_equal(images, content[of_images])
        np.testing.assert_array_equal(labels, content[of_labels])
        assert labels.dtype == np.int64


@pytest.mark.parametrize(
    "names", [np.array(["ant", "bee", "kätzchen"]), np.array([b"ant", b"bee", b"k\xc3\xa4tzchen"])]
)
def test_classes_are_those_of_an_array(save, read, names):
    assert read(save(arrays(classes=names))).classes == ("ant", "bee", "kätzchen")


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1)])
def test_grey_images_become_rgb(save, read, shape):
    content = arrays(shape=shape)
    images = read(save(content)).train_images
    assert images.shape == (6, 32, 32, 3)
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel], content["x_train"].reshape(6, 32, 32))


@pytest.mark.parametrize("shape", [(28, 28), (64, 64, 3), (40, 56, 3)])
def test_images_of_another_size_are_resized_only_on_request(save, read, refused, shape):
    content = arrays(shape=shape)
    path = save(content)
    refused(path, f"_train.npy has {shape[1]}x{shape[0]} pixels, not 32x32. --resize crops")
    with pytest.warns(Note, match="10 of 10 images were not 32x32 and have been cropped to a square and resized"):
        data = read(path, resize=True)
    for row, image in enumerate(content["x_test"]):
        expected = ImageOps.fit(Image.fromarray(image).convert("RGB"), (32, 32))
        np.testing.assert_array_equal(data.test_images[row], np.asarray(expected))


def test_other_arrays_are_left_out_with_a_note(save, read):
    with pytest.warns(Note, match="left out arrays .*: val_images, val_labels"):
        read(save(arrays(MEDMNIST, val_images=draw(2, 32, 32, 3), val_labels=np.arange(2))))


def test_images_without_test_images_are_divided(save, read, refused):
    content = arrays(x_train=draw(200, 32, 32, 3), y_train=np.arange(200) % 3, x_test=None, y_test=None)
    path = save(content)
    refused(path, "has no test images. --split 0.2")
    data = read(path, split=0.3)
    assert len(data.train_images) + len(data.test_images) == 200
    assert 30 < len(data.test_images) < 90
    rows = {image.tobytes(): label for image, label in zip(content["x_train"], content["y_train"], strict=True)}
    assert all(
        rows[image.tobytes()] == label
        for images, labels in data.splits().values()
        for image, label in zip(images, labels, strict=True)
    )


def test_images_to_test_on_need_no_others(save, read):
    content = arrays(x_train=None, y_train=None)
    data = read(save(content), only_test=True)
    np.testing.assert_array_equal(data.test_images, content["x_test"])
    assert (len(data.train_labels), data.test_labels.tolist()) == (0, [0, 1, 2, 0])


def test_divided_arrays_are_not_split(save, read):
    with pytest.raises(UsageError, match=r"--split 0\.5: .* has test images already, in x_test"):
        read(save(arrays()), split=0.5)


BAD = {
    "a missing array": (arrays(y_test=None), "lacks array y_test: it has x_test, x_train, y_train"),
    "no known array": ({"a": np.arange(3)}, "lacks array x_train: it has a"),
    "floats": (arrays(x_train=np.zeros((6, 32, 32, 3), np.float32)), "x_train.npy has float32 [6, 32, 32, 3]"),
    "channels first": (arrays(x_train=draw(6, 3, 32, 32)), "x_train.npy has uint8 [6, 3, 32, 32]. Save images as"),
    "four channels": (arrays(x_train=draw(6, 32, 32, 4)), "uint8 [6, 32, 32, 4]"),
    "one row each": (arrays(x_train=draw(6, 3072)), "uint8 [6, 3072]"),
    "a scalar": (arrays(x_train=np.uint8(3)), "shape []"),
    "tiny images": (arrays(shape=(1, 1)), "has images of 1x1 pixels, fewer than 8"),
    "objects": (arrays(y_train=np.array([1, None, 2, 0, 1, 2])), "y_train.npy has objects of Python"),
    "objects as images": (arrays(x_train=np.full(6, None)), "x_train.npy has objects of Python"),
    "labels of floats": (arrays(y_train=np.zeros(6)), "y_train.npy has float64 [6]"),
    "labels of many": (arrays(y_train=np.zeros((6, 14), int)), "y_train.npy has int64 [6, 14]"),
    "fewer labels": (arrays(y_train=np.arange(5)), "has 6 x_train, but 5 y_train"),
    "negative labels": (arrays(y_train=np.arange(6) - 1), "train labels -1..4, but 5 classes"),
    "labels above the classes": (arrays(classes=np.array(["a", "b"])), "train labels 0..2, but 2 classes"),
    "huge labels": (arrays(y_test=np.full(4, 2**40)), "has label 1099511627776, but 32,768 classes are the most"),
    "labels beyond int64": (arrays(y_test=np.full(4, 2**64 - 1, np.uint64)), "test labels -1..-1"),
    "no image": (arrays(x_train=draw(0, 32, 32, 3), y_train=np.arange(0)), "has no train images"),
    "no names": (arrays(classes=np.array([], "U3")), "has no classes"),
    "numbers as names": (arrays(classes=np.arange(3)), "classes.npy has int64 [3]"),
    "names of bytes that are no text": (arrays(classes=np.array([b"\xff", b"b", b"c"])), "that are no texts"),
    "long names": (arrays(classes=np.array(["a" * 5000, "b", "c"])), "classes.npy has <U5000 [3]"),
    "Fortran's order": (arrays(x_train=np.asfortranarray(draw(6, 32, 32, 3))), "numpy.ascontiguousarray"),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_other_arrays_are_refused(save, refused, content, words):
    refused(save(content), words, resize=True)


@pytest.mark.parametrize("packing", ["npz", "compressed"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_truncated_npz_is_refused(save, refused, packing, part):
    path = save(arrays(), packing)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    refused(path, "truncated or damaged")


def header(shape: str, kind: str = "|u1") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header("(1000000000000, 32, 32, 3)"),
        header("(-1, 32, 32, 3)"),
        header("(6, 32, 32, 3)") + bytes(100),
        header("(99999999999999999999, 32, 32, 3)"),
        header("((((1,),),),)"),
        header("(" + "1," * 40 + ")", "V2147483647"),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\x03\x00\x00\x00\x00\x7f",
        b"text",
        b"",
    ],
)
@pytest.mark.parametrize("name", KERAS)
def test_array_that_claims_more_than_it_has_is_refused(tmp_path, refused, name, content):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, array in arrays().items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{inner}.npy", content if inner == name else file.getvalue())
    with limits(1 << 20):
        refused(path, f"{name}.npy")


def test_npz_that_unpacks_to_far_more_is_refused(tmp_path, refused):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x_train.npy", "w") as file:
        file.write(header("(60000, 32, 32, 3)"))
        for _ in range(60):
            file.write(bytes(1000 * 3072))
    with zipfile.ZipFile(path, "a") as archive:
        labels = io.BytesIO()
        np.save(labels, np.zeros(60_000, np.uint8))
        archive.writestr("y_train.npy", labels.getvalue())
    with limits(path.stat().st_size):
        refused(path, "unpacks to more bytes than its size", split=0.2)


def test_large_array_of_an_archive_of_its_size_is_read(tmp_path, read):
    """Its images, like those of PathMNIST, have more bytes than a file of an image may have."""
    path = tmp_path / "data.npz"
    pixels = draw(70, 32, 32, 3)
    np.savez(
        path,
        x_train=np.tile(pixels, (1000, 1, 1, 1)),
        y_train=np.arange(70_000) % 2,
        x_test=pixels,
        y_test=pixels[:, 0, 0, 0] % 2,
    )
    data = read(path)
    np.testing.assert_array_equal(data.train_images[-70:], pixels)


def test_folders_of_archives_and_stores_are_explained(tmp_path, save, refused, helpers, fake):
    path = save(arrays())
    refused(tmp_path, f"has no data set but data.npz: give the file itself, --source {path}")
    store = tmp_path / "store"
    store.mkdir()
    for name in ("meta.json", "train_images.npy", "train_labels.npy"):
        (store / name).touch()
    refused(store, f"is a prepared data set already: use it as --data {store}")
