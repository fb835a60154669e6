"""Sources of images: the official CIFAR-10 or CIFAR-100 in any archive format, or a folder of images by class.

Nothing is unpacked to disk: `archives.py` reads members into memory.
"""

from __future__ import annotations

import errno
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from .archives import Parts, is_image, list_files
from .cifar import CIFAR_FILES, Member, assemble, read_member
from .contents import recognise
from .errors import DataError, UsageError
from .image_folders import Listing, find_splits, read_image_folders, read_test_folders
from .images import Report
from .store import LONGEST_NAME, MOST_CLASSES, RawData, are_class_names

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
            return _checked(assemble(members, path), path)
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
    kind = recognise(path, "images") or "is not a known data set: it has neither the batches of CIFAR nor images"
    raise DataError(f"{path} {kind}.")


def _damaged(path: Path, reason: str) -> DataError:
    kind = recognise(path, "images")
    return DataError(f"{path} {kind}." if kind else f"{path} is truncated or damaged ({reason}). Fetch it again.")


def _survey(path: Path, report: Report) -> tuple[dict[str, Member], Listing]:
    """Read the files of CIFAR-10 and CIFAR-100 in `path`, by name, and list all others."""
    members: dict[str, Member] = {}
    places: dict[str, Parts] = {}
    files, folders = dict[Parts, None](), []
    for file in list_files(path):
        name = file.parts[-1] if file.parts else ""
        if file.is_folder:
            folders.append(file.parts)
        elif name not in CIFAR_FILES or (member := read_member(file, path)) is None:
            files[file.parts] = None
        elif places.setdefault(name, file.parts) != file.parts:
            places_text = " and ".join("/".join(place) for place in (places[name], file.parts))
            raise DataError(f"{path} has two files {name}: {places_text}. Keep one.")
        else:
            members[name] = member
            report("reading", len(members), CIFAR_FILES[name])
    return members, Listing(list(files), folders)


def check_exists(path: Path) -> None:
    """Raise `DataError` unless the source `path` is a folder or a file, which can be read more than once."""
    if not path.exists():
        raise DataError(f"{path} does not exist. --source takes a CIFAR-10 archive or folder, or a folder of images.")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is a pipe or a device. Save its content as a file, and give that.")


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
