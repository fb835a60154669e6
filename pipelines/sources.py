"""Sources of images: the official CIFAR-10 in any of its archive formats, or a folder of images by class.

Nothing is unpacked to disk: archive members are read into memory by name, so paths in an archive have no effect.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import io
import lzma
import pickle
import pickletools
import socket
import tarfile
import urllib.error
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .errors import DataError, Note
from .sampling import IMAGE_SIZE
from .store import RawData

Report = Callable[[str, int, int], None]
"""Report of progress, called with (current task, amount done, total amount)."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

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
_MEMBER_LIMIT = 64 << 20  # the largest official member has 31,035,999 bytes
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
"""Suffixes of the image files in a folder."""
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
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    RuntimeError,  # torchvision: the MD5 is wrong
)


def read_source(path: Path, report: Report) -> RawData:
    """Read the data set at `path`: an official archive, its unpacked folder, or a folder of images.

    Archives contain the python or the binary version, as tar, tar.gz, tar.xz or zip. A folder of images has
    `train/<class>/*.png|jpg` and `test/<class>/*.png|jpg`. Raises `DataError` that names the file and the problem.
    """
    check_exists(path)
    if (path / "train").is_dir():
        return _read_image_folder(path, report)
    try:
        return _read_official(path, report)
    except _DAMAGE_ERRORS as error:
        reason = str(error).split("\n", 1)[0].rstrip(":") or type(error).__name__  # tarfile writes a line per method
        raise DataError(f"{path} is truncated or damaged ({reason}). Fetch it again.") from None
    except OSError as error:
        # Damage is an OSError without an errno from gzip and tarfile, and EINVAL from a zipfile that seeks outside the
        # file. Real I/O errors have another errno.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(f"{path} is truncated or damaged ({error}). Fetch it again.") from None


def check_exists(path: Path) -> None:
    """Raise `DataError` unless the source `path` exists."""
    if not path.exists():
        raise DataError(f"{path} does not exist. --source takes a CIFAR-10 archive or folder, or a folder of images.")


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


def download_cifar10(folder: Path) -> Path:
    """Download the official python version into `folder` with torchvision, which checks its MD5; return the archive.

    Raises `DataError` with the address that failed and the alternatives.
    """
    try:
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import download_url
    except ModuleNotFoundError as error:
        raise DataError(
            f"torchvision, which downloads CIFAR-10, is not installed ({error}): pip install torchvision. Without it: "
            "fastresnet prepare --source FILE with a copy of the archive, or --data shapes10 for a drawn stand-in."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / CIFAR10.filename
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # torchvision sets none: a silent server would hang the command
    try:
        download_url(CIFAR10.url, str(folder), CIFAR10.filename, CIFAR10.tgz_md5)
    except BaseException as error:
        archive.unlink(missing_ok=True)
        if not isinstance(error, _NETWORK_ERRORS):
            raise
        raise DataError(
            f"could not download {CIFAR10.url} ({getattr(error, 'reason', error)}). Without a network: fastresnet "
            "prepare --source FILE with a copy of that archive, or --data shapes10 for a drawn stand-in."
        ) from None
    finally:
        socket.setdefaulttimeout(default_timeout)
    return archive


# --- the official archives ---------------------------------------------------------------------------------------


def _read_official(path: Path, report: Report) -> RawData:
    members: dict[str, Any] = {}
    for name, data in _members(path):
        members[name] = _parse_member(name, data, path)
        report("reading", len(members), len(_PYTHON_MEMBERS))
    for names in (_PYTHON_MEMBERS, _BINARY_MEMBERS):
        if members.keys() & set(names):
            missing = [name for name in names if name not in members]
            if missing:
                raise DataError(f"{path} is not a complete CIFAR-10: {', '.join(missing)} missing. Fetch it again.")
            *train, test, classes = (members[name] for name in names)
            return _checked(_join(classes, train, test), path)
    raise DataError(
        f"{path} is not a known data set: it has neither the batches of CIFAR-10 nor train/<class>/*.png folders."
    )


def _join(classes: tuple[str, ...], train: list[tuple], test: tuple) -> RawData:
    return RawData(
        classes, np.concatenate([images for images, _ in train]), np.concatenate([labels for _, labels in train]), *test
    )


def _checked(data: RawData, path: Path) -> RawData:
    for split, (_, labels) in data.splits().items():
        if not len(labels):
            raise DataError(f"{path} has no {split} images.")
        if not 0 <= labels.min() <= labels.max() < len(data.classes):
            raise DataError(f"{path}: {split} labels {labels.min()}..{labels.max()}, but {len(data.classes)} classes.")
    return data


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each known member of a folder, tar or zip archive, in its order."""
    known = {*_PYTHON_MEMBERS, *_BINARY_MEMBERS}
    if path.is_dir():
        for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
            for file in sorted(folder.glob("*")):
                if file.name in known and file.is_file():
                    _check_size(file.name, file.stat().st_size, path)
                    yield file.name, file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = PurePosixPath(entry.filename).name
                if name in known and not entry.is_dir():
                    _check_size(name, entry.file_size, path)
                    yield name, archive.read(entry)
    else:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.size < 0:  # CPython before 3.11.14 would read the same header forever (CVE-2025-8194)
                    raise DataError(f"{path}: {member.name} claims {member.size} bytes.")
                name = PurePosixPath(member.name).name
                if name in known and member.isreg() and (content := tar.extractfile(member)):
                    _check_size(name, member.size, path)
                    yield name, content.read()
            while tar.fileobj.read(1 << 20):  # gzip and xz compare their checksums at the end of the file only
                pass


def _check_size(name: str, size: int, path: Path) -> None:
    if size > _MEMBER_LIMIT:
        raise DataError(f"{path}: {name} claims {size} bytes; no CIFAR-10 file is that large.")


def _parse_member(name: str, data: bytes, path: Path) -> Any:
    """Parse the (images, labels) of a batch, or the class names."""
    try:
        if name == "batches.meta.txt":
            return tuple(data.decode("ascii").split())
        if name.endswith(".bin"):
            return _parse_binary_batch(data)
        _check_program(data)
        content = _CifarUnpickler(io.BytesIO(data)).load()
        if name == "batches.meta":
            return tuple(label.decode("ascii") for label in content[b"label_names"])
        return _parse_python_batch(content)
    except DataError as error:
        raise DataError(f"{path}: {name} {error}") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: {name} is not a CIFAR batch: {error}.") from None
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise nearly anything
        raise DataError(f"{path}: {name} is damaged ({type(error).__name__}: {error}).") from None


def _parse_binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % (_PIXELS + 1):
        raise DataError(f"has {len(data)} bytes, not a multiple of {_PIXELS + 1} above 0: it is truncated.")
    records = np.frombuffer(data, np.uint8).reshape(-1, _PIXELS + 1)
    return _channels_last(records[:, 1:]), records[:, 0].astype(np.int64)


def _parse_python_batch(content: dict) -> tuple[np.ndarray, np.ndarray]:
    images, labels = content[b"data"].array(), np.array(content[b"labels"])
    if labels.ndim != 1 or labels.dtype != np.int64:
        raise DataError("has labels that are not a list of small integers.")
    if images.shape != (len(labels), _PIXELS):
        raise DataError(f"has images of shape {images.shape} for {len(labels)} labels.")
    return _channels_last(images), labels


def _channels_last(planes: np.ndarray) -> np.ndarray:
    """Rearrange red, green and blue planes [N, 3072] to [N, 32, 32, 3]."""
    return np.ascontiguousarray(planes.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 2, 3, 1))


def _check_program(data: bytes) -> None:
    """Refuse pickles that would exhaust the interpreter.

    They have very large memo indices, or tuples nested until hashing one overflows the C stack. Official batches have
    few tuples and consecutive memo indices.
    """
    tuples = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # genops warns of invalid escapes in damaged strings
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            tuples += "TUPLE" in opcode.name
            if tuples > 100 or ("PUT" in opcode.name and isinstance(argument, int) and argument > count):
                raise pickle.UnpicklingError("its structure is not that of a batch")


class _PickledDtype:
    """Stand-in for `numpy.dtype` while unpickling."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _PickledArray:
    """Stand-in for `numpy.ndarray` while unpickling: it keeps the state and allocates nothing."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran_order, self.data = state

    def array(self) -> np.ndarray:
        if self.dtype.code not in (b"u1", "u1") or self.fortran_order:
            raise DataError(f"holds {self.dtype.code!r} pixels, not u1 in C order.")
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


class _CifarUnpickler(pickle.Unpickler):
    """Unpickler that resolves the three names of official batches to harmless stand-ins and refuses all others."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR batch needs") from None


# --- folders of images -------------------------------------------------------------------------------------------


def _read_image_folder(path: Path, report: Report) -> RawData:
    classes = tuple(sorted(_class_folders(path / "train")))
    files = {split: _labelled_files(path / split, classes) for split in ("train", "test")}
    total = sum(len(of_split) for of_split in files.values())
    arrays: list[np.ndarray] = []
    done = resized = 0
    for of_split in files.values():
        images = np.empty((len(of_split), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for row, (file, _) in enumerate(of_split):
            images[row], was_resized = read_image(file)
            done, resized = done + 1, resized + was_resized
            report("reading images", done, total)
        arrays += [images, np.array([label for _, label in of_split], np.int64)]
    note_resized(resized, total)
    return _checked(RawData(classes, *arrays), path)


def note_resized(resized: int, total: int) -> None:
    """Warn with a `Note` if some of `total` images were resized."""
    if resized:
        warnings.warn(
            f"{resized} of {total} images were not {IMAGE_SIZE}x{IMAGE_SIZE} and have been cropped to a square "
            "and resized.",
            Note,
            stacklevel=3,
        )


def _class_folders(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


def _labelled_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: a folder of images has train/<class>/ and test/<class>/.")
    found = _class_folders(folder)
    if found != set(classes):
        different = ", ".join(sorted(found ^ set(classes)))
        raise DataError(f"{folder} does not have the same classes as the other split: {different}.")
    return [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]


def read_image(file: Path) -> tuple[np.ndarray, bool]:
    """Read RGB pixels, uint8 [32, 32, 3]; return them, and True if the image was cropped to a square and resized.

    Raises `DataError` if the file is not an image, is too large to decode safely, or has over 8 bits per channel.
    """
    from PIL import Image, ImageOps

    size = (IMAGE_SIZE, IMAGE_SIZE)
    try:
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = stack.enter_context(Image.open(file))
            if image.mode[0] in "IF":  # integers of 16 or 32 bits, and floats: Pillow would clip them at 255
                raise DataError(f"{file} has more than 8 bits per channel (mode {image.mode}). Save it with 8.")
            resized = image.size != size
            rgb = image.convert("RGB")
            return np.asarray(ImageOps.fit(rgb, size) if resized else rgb), resized
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}.") from None
