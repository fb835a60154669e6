"""Sources of images: the readers of what people have, in one list that other packages extend.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .archives import Parts, list_files
from .cifar import CIFAR_FILES, Member, assemble, read_member
from .contents import recognise
from .errors import DataError, RunError, UsageError, UserError, list_some, note, reason_of
from .image_folders import find_splits, has_images, read_image_folders
from .image_labels import has_annotations, has_table, read_annotated, read_table
from .images import Report
from .numpy_arrays import has_arrays, read_arrays
from .parquet import has_parquet, read_parquet
from .reading import Listing as Listing
from .reading import ReadOptions as ReadOptions
from .sampling import IMAGE_SIZE
from .store import LONGEST_NAME, MOST_CLASSES, are_class_names
from .store import RawData as RawData
from .svhn import has_svhn, read_svhn


@dataclass(frozen=True, slots=True)
class Source:
    """Kind of files that are read as a data set."""

    title: str
    """Noun in the plural for messages, such as "images"."""
    recognise: Callable[[Listing], bool]
    """Function that tells by the names of all files if they are of this kind."""
    read: Callable[[Listing, ReadOptions], RawData]
    """Reader. Raises `DataError` if the files are damaged."""


SOURCES = (
    Source("NumPy arrays", has_arrays, read_arrays),
    Source("Parquet files", has_parquet, read_parquet),
    Source("files of SVHN", has_svhn, read_svhn),
    Source("images", has_table, read_table),
    Source("images", has_annotations, read_annotated),
    Source("images", has_images, read_image_folders),
)
"""Kinds of files, besides CIFAR's own. The first of several with one title is used."""

PLUGINS = "fastresnet.sources"
"""Group of entry points under which other packages have a `Source`. These are asked first."""

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
    resize: bool = False,
    skip_unreadable: bool = False,
    only_test: bool = False,
) -> RawData:
    """Read the data set at `path`: CIFAR's files or those of a `Source`, as a file, a folder, a zip or a tar.

    A tar may be packed by gzip, xz or bzip2, and other folders may be around the files. Images that come without test
    images are divided by `split`; with `only_test` all are for testing, and others for training may be left out. Images
    of another size are resized with `resize` or `only_test`. Raises `DataError` that names the file and the problem,
    `UsageError` if `split` is out of place or a library is missing, `RunError` if a source of another package fails.
    """
    check_exists(path)
    options = ReadOptions(
        report=report,
        split=split,
        resize=resize or only_test,
        skip_unreadable=skip_unreadable,
        only_test=only_test,
    )
    splits = ("test",) if only_test else ("train", "test")
    try:
        listing = Listing(path, [(path.name,)], [], is_file=True)
        source = _find_source(listing) if path.is_file() else None
        if source is None:
            members, listing = _survey(path, report)
            if members and not find_splits(listing):
                if split is not None:
                    raise UsageError(f"--split {split}: {path} has test images already.")
                return _checked(assemble(members, path), path, splits)
            source = _find_source(listing)
        if source is not None:
            return _checked(source.read(listing, options), path, splits)
    except _DAMAGE_ERRORS as error:
        reason = str(error).split("\n", 1)[0].rstrip(":") or type(error).__name__
        raise _damaged(path, reason) from None
    except OSError as error:
        # Damage is an OSError without an errno from gzip and tarfile, and EINVAL from a zipfile that seeks outside the
        # file. Real I/O errors have another errno.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise _damaged(path, str(error)) from None
    raise DataError(f"{path} {recognise(path, 'images') or _unknown(path)}.")


def _unknown(path: Path) -> str:
    """Return the end of an error about a source that nothing recognises, as `recognise` does."""
    if (path / "meta.json").exists() and (path / "train_images.npy").exists():
        return f"is a prepared data set already: use it as --data {path}"
    if packed := sorted(file.name for file in path.glob("*.npz")):
        return f"has no data set but {list_some(packed)}: give the file itself, --source {path / packed[0]}"
    *titles, last = dict.fromkeys(("the batches of CIFAR", *(source.title for source in SOURCES)))
    return f"is not a known data set: it has neither {', '.join(titles)} nor {last}"


def _find_source(listing: Listing) -> Source | None:
    """Find the source of a listing. Raises `DataError` if there are files of several."""
    for sources in (_plugins(), SOURCES):
        found = [source for source in sources if source.recognise(listing)]
        if len(titles := list(dict.fromkeys(source.title for source in found))) > 1:
            raise DataError(f"{listing.path} has both {titles[0]} and {titles[1]}. Give the place of one of them.")
        if found:
            return found[0]
    return None


def _plugins() -> list[Source]:
    """Load the sources of other packages. Raises `RunError` that names one which fails."""
    sources = []
    for entry in metadata.entry_points(group=PLUGINS):
        package = entry.dist.name if entry.dist else "unknown"
        name = f"source {entry.name!r} of package {package}"
        source: Source = _guarded(name, entry.load, Source)()
        sources.append(
            Source(
                f"{source.title} (read by package {package})",
                _guarded(name, source.recognise, bool),
                _guarded(name, source.read, RawData),
            )
        )
    return sources


def _guarded(name: str, function: Callable[..., Any], kind: type) -> Callable[..., Any]:
    """Return `function` of another package, whose failures become `RunError`, as do results not of `kind`."""

    def call(*arguments: Any) -> Any:
        remedy = "Update or uninstall that package"
        try:
            result = function(*arguments)
        except UserError:
            raise
        except Exception as error:
            raise RunError(f"{name} failed: {type(error).__name__}: {reason_of(error)}. {remedy}.") from error
        if not isinstance(result, kind):
            raise RunError(f"{name} gave {type(result).__name__}, not {kind.__name__}. {remedy}.")
        return result

    return call


def _damaged(path: Path, reason: str) -> DataError:
    kind = recognise(path, "images")
    return DataError(f"{path} {kind}." if kind else f"{path} is truncated or damaged ({reason}). Fetch it again.")


def _survey(path: Path, report: Report) -> tuple[dict[str, Member], Listing]:
    """Read the files of CIFAR-10 and CIFAR-100 in `path`, by name, and list all others."""
    members: dict[str, Member] = {}
    places: dict[str, Parts] = {}
    files, folders = dict[Parts, None](), []
    for file in list_files(path):
        if not file.parts:  # as "/" and ".." have in an archive
            continue
        name = file.parts[-1]
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
    return members, Listing(path, list(files), folders)


def check_exists(path: Path) -> None:
    """Raise `DataError` unless the source `path` is a folder or a file, which can be read more than once."""
    if not path.exists():
        raise DataError(f"{path} does not exist. --source takes the folder, archive or file of a data set.")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is a pipe or a device. Save its content as a file, and give that.")


def _checked(data: RawData, path: Path, splits: Sequence[str]) -> RawData:
    """Return `data`. Raises `DataError` unless it is as `RawData` promises, with images in each of `splits`."""
    if not are_class_names(list(data.classes)):
        raise DataError(
            f"{path} has no classes, over {MOST_CLASSES:,} of them, or names of over {LONGEST_NAME:,} letters."
        )
    (name, count), *_ = Counter(data.classes).most_common(1)
    if count > 1:
        raise DataError(f"{path} has several classes called {name!r}. Give each its own name.")
    for split, (images, labels) in data.splits().items():
        count = np.size(labels)
        _check_array(images, np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3), f"{path}: {split} images")
        _check_array(labels, np.int64, (count,), f"{path}: {split} labels")
        if not count:
            if split in splits:
                raise DataError(f"{path} has no {split} images.")
            continue
        if not 0 <= labels.min() <= labels.max() < len(data.classes):
            raise DataError(f"{path}: {split} labels {labels.min()}..{labels.max()}, but {len(data.classes)} classes.")
        counts = np.bincount(labels, minlength=len(data.classes))
        if empty := [name for name, count in zip(data.classes, counts, strict=True) if not count]:
            note(f"no {split} images of {len(empty)} of {len(counts)} classes: {list_some(empty)}.")
    return data


def _check_array(array: np.ndarray, dtype: type, shape: tuple[int, ...], name: str) -> None:
    found = getattr(array, "dtype", type(array).__name__)
    if found != dtype or np.shape(array) != shape:
        raise DataError(
            f"{name} are {found} {list(np.shape(array))}, not {np.dtype(dtype)} {list(shape)}. Their reader is wrong."
        )
