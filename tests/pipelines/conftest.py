"""Fake CIFAR-10s and CIFAR-100s with random pixels in every official packing, and the batches of a pipeline.

NumPy computes these image by image.
"""

from __future__ import annotations

import io
import pickle
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import Augmentation, open_pipeline
from pipelines.base import Pipeline
from pipelines.errors import DataError, Note
from pipelines.prng import Stream, permutation, stream_key
from pipelines.sampling import draw
from pipelines.sources import read_source
from pipelines.store import Dataset

ROWS, TEST_ROWS = 7, 6


class FakeCifar:
    """Five training batches and a test batch of random pixels, and the arrays that a reader must deliver."""

    def __init__(self, classes: tuple[str, ...], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.classes = classes
        self.names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        rows = [ROWS] * 5 + [TEST_ROWS]
        self.images = [rng.integers(0, 256, (count, 32, 32, 3), np.uint8) for count in rows]
        self.labels = [rng.integers(0, len(classes), count) for count in rows]
        self.train_images, self.train_labels = np.concatenate(self.images[:5]), np.concatenate(self.labels[:5])
        self.test_images, self.test_labels = self.images[5], self.labels[5]

    def planes(self, batch: int) -> np.ndarray:
        """The red, green and blue planes of a batch, uint8 [rows, 3072]."""
        channels = [self.images[batch][..., channel].reshape(-1, 1024) for channel in range(3)]
        return np.concatenate(channels, axis=1)

    def python(self, dump: Callable[[Any], bytes] | None = None) -> dict[str, bytes]:
        """The members of the python version, as Python 2 wrote them, or as `dump` does."""
        dump = dump or pickle_like_python2
        members = {
            name: dump(
                {
                    b"batch_label": b"batch of " + name.encode(),
                    b"labels": self.labels[row].tolist(),
                    b"data": self.planes(row),
                    b"filenames": [b"image_%d.png" % i for i in range(len(self.labels[row]))],
                }
            )
            for row, name in enumerate(self.names)
        }
        labels = {b"num_cases_per_batch": ROWS, b"label_names": [name.encode() for name in self.classes]}
        return {**members, "batches.meta": dump(labels)}

    def binary(self) -> dict[str, bytes]:
        """The members of the binary version: a label byte and 3,072 pixel bytes for each image."""
        members = {}
        for row, name in enumerate(self.names):
            records = np.concatenate([self.labels[row][:, None].astype(np.uint8), self.planes(row)], axis=1)
            members[f"{name}.bin"] = records.tobytes()
        return {**members, "batches.meta.txt": "\n".join([*self.classes, "", ""]).encode()}


class FakeCifar100(FakeCifar):
    """Those of seven batches as one: a training and a test file, with fine and coarse labels."""

    def python(self, dump: Callable[[Any], bytes] | None = None) -> dict[str, bytes]:
        dump = dump or pickle_like_python2
        batches = super().python(pickle.dumps)
        members = {}
        for name, rows in (("train", self.names[:-1]), ("test", self.names[-1:])):
            parts = [pickle.loads(batches[row]) for row in rows]
            labels = [label for part in parts for label in part[b"labels"]]
            members[name] = dump(
                {
                    b"filenames": [file for part in parts for file in part[b"filenames"]],
                    b"batch_label": b"training batch 1 of 1",
                    b"fine_labels": labels,
                    b"coarse_labels": [label // 2 for label in labels],
                    b"data": np.concatenate([part[b"data"] for part in parts]),
                }
            )
        names = {
            b"fine_label_names": [name.encode() for name in self.classes],
            b"coarse_label_names": [b"animals", b"plants"],
        }
        return {**members, "meta": dump(names)}


def pickle_like_python2(value: Any) -> bytes:
    """Protocol 2 as CPython 2.7 wrote it: strings are byte strings, arrays come from numpy.core.multiarray."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, bytes):
        short = len(value) < 256
        return (b"U" if short else b"T") + len(value).to_bytes(1 if short else 4, "little") + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + value.to_bytes(4, "little", signed=True)
    assert isinstance(value, np.ndarray)
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nq\x03U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = _python2(value.shape[0]) + _python2(value.shape[1]) + b"\x86"
    return array + b"(K\x01" + shape + dtype + b"\x89" + _python2(value.tobytes()) + b"tb"


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """A tar of regular files."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    """A deflated zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_folder(path: Path, members: dict[str, bytes]) -> Path:
    """A folder of files."""
    path.mkdir(parents=True)
    for name, data in members.items():
        (path / name).write_bytes(data)
    return path


def pack(folder: Path, packing: str, members: dict[str, bytes]) -> Path:
    """`members` and a file that is none, shuffled, in `packing` under `folder`."""
    inner = "cifar-10-batches-bin" if "batches.meta.txt" in members else "cifar-10-batches-py"
    members = {**members, "readme.html": b"<p>not data</p>"}
    order = random.Random(1).sample(sorted(members), len(members))
    inside = {f"{inner}/{name}": members[name] for name in order}
    if packing == "folder":
        return make_folder(folder / "unpacked", members)
    if packing == "folder above":
        make_folder(folder / "above" / inner, members)
        return folder / "above"
    if packing == "zip":
        return make_zip(folder / "fake.zip", inside)
    return make_tar(folder / f"fake.{packing}", inside, f"w:{packing.removeprefix('tar').lstrip('.')}")


def open_small(name: str, dataset: Dataset, **changes: Any) -> Pipeline:
    """Pipeline `name`: bare pixels of the training split, in batches of 28, unless `changes` say otherwise."""
    arguments = {
        "train": True,
        "batch_size": 28,
        "device": torch.device("cpu"),
        "dtype": torch.uint8,
        "seed": 11,
        "augmentation": Augmentation(),
    }
    return open_pipeline(name, dataset, **{**arguments, **changes})


def expected_epoch(
    dataset: Dataset, epoch: int, augmentation: Augmentation, *, seed: int = 11, batch_size: int = 28
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, 32, 32, 3] and labels of a training epoch."""
    ids = dataset.train.ids
    ids = ids[permutation(stream_key(seed, epoch, Stream.ORDER), ids)]
    ids = ids[: len(ids) // batch_size * batch_size]
    draws = draw(seed, epoch, ids, augmentation)
    fill = np.round(np.array(dataset.mean) * 255).astype(np.uint8)
    padding = augmentation.crop_padding
    mode = {"zeros": "constant", "reflect": "reflect"}[augmentation.padding_mode]
    out = []
    for i, sample in enumerate(ids):
        image = np.pad(dataset.train.images[sample], ((padding, padding), (padding, padding), (0, 0)), mode=mode)
        image = image[draws.top[i] : draws.top[i] + 32, draws.left[i] : draws.left[i] + 32]
        image = (image[:, ::-1] if draws.flip[i] else image).copy()
        y, x = np.arange(32) - draws.cutout_top[i], np.arange(32) - draws.cutout_left[i]
        hidden = ((y >= 0) & (y < augmentation.cutout))[:, None] & ((x >= 0) & (x < augmentation.cutout))
        image[hidden] = fill
        out.append(image)
    return np.stack(out), dataset.train.labels[ids]


def collect(pipeline: Pipeline, epoch: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels of the epoch from batch `start` on."""
    batches = list(pipeline.epoch(epoch, start))
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    return images.cpu().numpy(), torch.cat([batch.labels for batch in batches]).cpu().numpy()


class Helpers:
    """The functions above, for test modules, which cannot import this one."""

    FakeCifar = FakeCifar
    FakeCifar100 = FakeCifar100
    pack = staticmethod(pack)
    make_tar = staticmethod(make_tar)
    make_zip = staticmethod(make_zip)
    make_folder = staticmethod(make_folder)
    open_small = staticmethod(open_small)
    expected_epoch = staticmethod(expected_epoch)
    collect = staticmethod(collect)
    pickle_like_python2 = staticmethod(pickle_like_python2)
    pickle_like_python3 = staticmethod(lambda value: pickle.dumps(value, protocol=4))

    @staticmethod
    def ignore(*_: Any) -> None:
        """Ignore a progress report."""

    @staticmethod
    def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
        """Modification time and content of everything under `folder`."""
        return {
            str(path.relative_to(folder)): (path.stat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
            for path in sorted(folder.rglob("*"))
        }

    @staticmethod
    def assert_equal(data: Any, fake: FakeCifar) -> None:
        """`data` holds exactly the images, labels and classes of `fake`."""
        assert data.classes == fake.classes
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            actual, expected = getattr(data, name), getattr(fake, name)
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected, name)


@pytest.fixture(scope="session")
def helpers() -> type[Helpers]:
    return Helpers


@pytest.fixture(scope="session")
def fake100() -> FakeCifar100:
    """A fake CIFAR-100 with five classes."""
    return FakeCifar100(("ant", "bee", "cat", "daisy", "elm"))


@pytest.fixture(scope="session")
def fake() -> FakeCifar:
    """A fake CIFAR-10 with three classes."""
    return FakeCifar(("ant", "bee", "cat"))


@pytest.fixture
def read(helpers):
    """Read a source; return the data, and the texts of all notes."""

    def read_noted(path, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = read_source(path, helpers.ignore, **options)
        assert all(note.category is Note for note in caught)
        return data, [str(note.message) for note in caught]

    return read_noted


@pytest.fixture
def refused(read):
    """Reading `path` raises a `DataError` of one line that names `path` and says each of `words`."""

    def check(path, *words, kind=DataError, **options):
        with pytest.raises(kind) as caught:
            read(path, **options)
        message = str(caught.value)
        assert str(path) in message
        assert all(word in message for word in words), message
        assert len(message.splitlines()) == 1

    return check
