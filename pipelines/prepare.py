"""Preparation of a verified store from a source, once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from . import __version__
from .cifar import CIFAR10_CLASSES, CIFARS, verify
from .downloads import download
from .errors import DataError, Note, UsageError, check_choice, nearest
from .files import is_temporary, remove_temporary_folders
from .formats import JpegSettings, open_derived, read_manifest, write_shard, writing_derived
from .shapes10 import draw_shapes10
from .sources import Report, check_exists, read_source
from .store import (
    BUILT_IN,
    CIFAR10,
    DERIVED_FILES,
    SHAPES10,
    STORE_FILES,
    Dataset,
    RawData,
    Split,
    is_name,
    open_store,
    write_store,
)

FORMATS = ("raw", *DERIVED_FILES)
DEFAULT_JPEG = JpegSettings()


def data_root(root: Path | None) -> Path:
    """Return the folder of all stores: `root`, else $FASTRESNET_DATA, else ./data. `~` is the home folder."""
    return Path(os.path.expanduser(root or os.environ.get("FASTRESNET_DATA") or "data"))


def store_folder(data: str, root: Path | None) -> Path:
    """Return the folder of the data set named `data` in `root` (see `data_root`), or `data` if that is a store."""
    folder = Path(os.path.expanduser(data))
    is_place = folder.name != data or (folder / "meta.json").exists()
    return folder if is_place else data_root(root) / data


def find_dataset(data: str, root: Path | None, report: Report = lambda *_: None) -> Dataset:
    """Open the data set named `data` in `root` (see `data_root`), or the store in folder `data`.

    If missing, `cifar10` and `cifar100` are downloaded and `shapes10` is drawn. Raises the same errors as `prepare`.
    """
    folder = store_folder(data, root)
    if not (folder / "meta.json").exists():
        if data in BUILT_IN:
            return prepare(data, data_root(root), report)[0]
        _check_name_known(data, data_root(root))
    return open_store(folder)


def prepare(
    name: str,
    root: Path,
    report: Report,
    *,
    source: Path | None = None,
    split: float | None = None,
    resize: bool = False,
    skip_unreadable: bool = False,
    train_images: int = 50_000,
    test_images: int = 10_000,
    formats: Sequence[str] = ("raw",),
    jpeg: JpegSettings = DEFAULT_JPEG,
) -> tuple[Dataset, bool]:
    """Create the store `root`/`name` unless it exists and is intact; return it, and True if anything was created.

    Without `source`, `cifar10` and `cifar100` are downloaded, and `shapes10` is drawn with `train_images` and
    `test_images` images. Images in `source` that come without test images are divided by `split`, the fraction to test
    on. `resize` crops images of another size to a square and resizes them, which are refused without it.
    `skip_unreadable` leaves out images that cannot be read, with a `Note`.
    `formats` other than `raw`, the store itself, are derived from it if missing or damaged. A second process that
    prepares the same store waits for the first. Raises `DataError` on an invalid source, or other files in place of
    the store. Raises `UsageError` on an invalid name or a missing library of a format.
    """
    for kind in formats:
        check_choice("format", kind, FORMATS)
    if "beton" in formats:
        from . import ffcv  # noqa: F401  fails before the work, not after it, if missing
    if split is not None and not 0 < split < 1:
        raise UsageError(f"--split {split} is not between 0 and 1.")
    if split is not None and source is None:
        raise UsageError("--split divides the images of a --source.")
    if resize and source is None:
        raise UsageError("--resize changes the images of a --source.")
    if not is_name(name):
        raise UsageError(f"{name!r} is not a name for a data set: use letters, digits and dashes.")
    if source is not None and name == SHAPES10:
        raise UsageError("shapes10 is drawn and takes no --source; give your data another name: --data NAME")
    if source is not None:
        check_exists(source)
    folder = root / name
    remove_temporary_folders(root)
    derived = [kind for kind in formats if kind != "raw"]
    if (existing := _existing(folder)) is not None and not derived:
        return existing, False
    if existing is None and source is None and name not in BUILT_IN:
        if (folder / "meta.json").exists():
            raise DataError(f"{folder} is damaged; prepare it from its files again: --source PATH")
        _check_name_known(name, root)
        raise DataError(f"there is no data set {name!r} in {root}; prepare it from its files: --source PATH")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        dataset = _existing(folder)  # another process may have created it meanwhile
        if made := dataset is None:
            if name == SHAPES10:
                data, origin = draw_shapes10(train_images, test_images, report), "drawn"
            elif source is None:
                data, origin = _download(name, root, report), "download"
            else:
                data = read_source(source, report, split=split, resize=resize, skip_unreadable=skip_unreadable)
                data = _check_known(name, data, source)
                options = {f"split {split}": split is not None, "resize": resize}
                origin = ", ".join([source.name, *(text for text, is_given in options.items() if is_given)])
            report("writing", 0, 1)
            write_store(folder, data, source=origin, version=__version__)
            report("writing", 1, 1)
            dataset = open_store(folder)
            _note_constant_channels(data)
        for kind in derived:
            made |= _derive(dataset, kind, jpeg, report)
        return dataset, made


def find_test_data(data: str, root: Path | None, report: Report = lambda *_: None) -> Dataset:
    """Open the data set to test on: as `find_dataset` does, or that of the files in the folder or archive `data`.

    Of images in CLASS/ all are for testing. Raises `DataError` as `find_dataset` and `read_source` do.
    """
    path = Path(os.path.expanduser(data))
    is_store = data in BUILT_IN or (store_folder(data, root) / "meta.json").exists()
    if is_store or not path.exists() or any(path.glob("*/meta.json")):
        return find_dataset(data, root, report)
    return Dataset.of_test_images(path.resolve().name, read_source(path, report, only_test=True), path)


def _check_name_known(data: str, root: Path) -> None:
    """Raise `DataError` if `data`, which is not a store, resembles the name of one."""
    names = {*BUILT_IN, *(meta.parent.name for meta in root.glob("*/meta.json"))}
    if Path(data).parent == Path() and (near := nearest(data, names, similarity=0.8)):
        raise DataError(
            f"there is no data set {data!r} in {root}: did you mean {near!r}? If not, prepare it from its files: "
            f"fastresnet prepare --data {Path(data).name} --source PATH"
        )


def _note_constant_channels(data: RawData) -> None:
    """Warn with a `Note` if a colour channel of the training images has the same value everywhere."""
    for channel, name in enumerate(("red", "green", "blue")):
        values = data.train_images[..., channel]
        if (value := values.flat[0]) == values.min() == values.max():
            warnings.warn(
                f"the {name} channel is {value} in every pixel of every training image; normalisation only centres it.",
                Note,
                stacklevel=3,
            )


def _derive(dataset: Dataset, kind: str, jpeg: JpegSettings, report: Report) -> bool:
    """Create the files of format `kind` unless they exist and are intact; return True if they were created."""
    settings = dataclasses.asdict(jpeg) if kind == "jpeg" else {}
    try:
        for split in ("train", "test"):
            open_derived(dataset, kind, split)
        if read_manifest(dataset, kind)["settings"] == settings:
            return False
    except DataError:
        pass  # missing or damaged: created below

    def write_split(split: Split, paths: dict[str, Path]) -> dict[str, float]:
        def show(done: int) -> None:
            report(f"{kind} ({split.name})", done, len(split))

        if kind == "jpeg":
            return write_shard(split, paths[f"{split.name}.tar"], paths[f"{split.name}.idx"], jpeg, show)
        from .ffcv import write_beton

        write_beton(split, paths[f"{split.name}.beton"], show)
        return {}

    with writing_derived(dataset, kind, settings) as (paths, facts):
        facts.update({split.name: write_split(split, paths) for split in (dataset.train, dataset.test)})
    return True


def _existing(folder: Path) -> Dataset | None:
    """Open the store in `folder`; return None if it must be created. Raises `DataError` if other files exist there."""
    if (folder / "meta.json").exists():
        try:
            return open_store(folder)
        except DataError as error:
            names = {entry.name for entry in folder.iterdir() if not is_temporary(entry.name)}
            if foreign := sorted(names - STORE_FILES):
                raise DataError(
                    f"cannot replace {folder}: it also contains {foreign[0]}. Move it, or give --data another name."
                ) from None
            warnings.warn(f"preparing {folder} again: {error}", Note, stacklevel=3)
            return None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"cannot replace {folder}: it is not a data set. Move it, or give --data another name.")
    return None


def _check_known(name: str, data: RawData, source: Path) -> RawData:
    """Return `data`, verified if `name` is CIFAR's. Raises `UsageError` or `DataError` if they are others.

    Classes of CIFAR-10 that have only numbers, as in Keras' arrays, get their names.
    """
    if name not in CIFARS:
        return data
    if name == CIFAR10 and data.classes == tuple(map(str, range(len(CIFAR10_CLASSES)))):
        data = dataclasses.replace(data, classes=CIFAR10_CLASSES)
    if name == CIFAR10 and data.classes != CIFAR10_CLASSES:
        raise UsageError(f"{source} is not CIFAR-10; give it another name: --data NAME")
    verify(name, data, source)
    return data


def _download(name: str, root: Path, report: Report) -> RawData:
    archive = download(CIFARS[name].archive, root / "downloads", report)
    data = read_source(archive, report)
    verify(name, data, archive)
    archive.unlink()
    with contextlib.suppress(OSError):  # something else is in it
        archive.parent.rmdir()
    return data
