"""Files made from a store for libraries with formats of their own, beside it and bound to its contents.

    <root>/<name>/beton.json   train.beton  test.beton                     (FFCV; `pipelines/ffcv.py`)
                  jpeg.json    train.tar  train.idx  test.tar  test.idx    (JPEG shards; `pipelines/shards.py`)

The JSON names the store it was made from, the settings, and the size and SHA-256 of each file. Written last, it says
that the files are complete.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import replacing, sha256, write_json
from .store import DERIVED_FILES, Dataset, prepare_command

SCHEMA = 1

FACTS: dict[str, set[str]] = {"beton": set(), "jpeg": {"psnr_db", "exact_pixels"}}
"""What a manifest tells of each split, as numbers."""

WriteFiles = Callable[[dict[str, Path]], dict[str, dict[str, float]]]
"""Writes the files of a format under the given paths, by name; returns the `FACTS` of each split."""


def write_derived(dataset: Dataset, kind: str, settings: dict[str, Any], write: WriteFiles) -> None:
    """Make the files of format `kind` anew, all of them or none. Raises what `write` raises, and `OSError`."""
    manifest = _manifest_path(dataset, kind)
    manifest.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        paths = {name: stack.enter_context(replacing(dataset.folder / name)) for name in DERIVED_FILES[kind]}
        facts = write(paths)
        files = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}
    contents = {
        "schema": SCHEMA,
        "data_sha256": dataset.digest,
        "settings": settings,
        "facts": facts,
        "files": files,
    }
    write_json(manifest, contents)


def read_manifest(dataset: Dataset, kind: str) -> dict[str, Any]:
    """The manifest of format `kind`. Raises `DataError` where it is missing, damaged or of another data set."""
    path, remedy = _manifest_path(dataset, kind), _remedy(dataset, kind)
    try:
        manifest = json.loads(path.read_bytes())
        expected = {name: manifest["files"][name] for name in DERIVED_FILES[kind]}
        facts = [manifest["facts"][split] for split in ("train", "test")]
        sound = (
            manifest["schema"] == SCHEMA
            and all({"bytes", "sha256"} <= entry.keys() for entry in expected.values())
            and all(isinstance(entry[name], float) for entry in facts for name in FACTS[kind])
        )
        origin, _ = manifest["data_sha256"], manifest["settings"]
    except FileNotFoundError:
        raise DataError(f"{dataset.folder} has no {kind} files. {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{path} is damaged. {remedy}")
    if origin != dataset.digest:
        raise DataError(f"{path} was made from another data set than the one in {dataset.folder}. {remedy}")
    return manifest


def open_derived(dataset: Dataset, kind: str, split: str) -> list[Path]:
    """The files of format `kind` for split `train` or `test`, verified.

    Raises `DataError`, with the remedy, where they are missing, damaged or made from another data set.
    """
    files, remedy = read_manifest(dataset, kind)["files"], _remedy(dataset, kind)
    paths = [dataset.folder / name for name in DERIVED_FILES[kind] if name.startswith(f"{split}.")]
    for path in paths:
        expected = files[path.name]
        if not path.is_file():
            raise DataError(f"{path} is missing. {remedy}")
        if path.stat().st_size != expected["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}. {remedy}")
        if sha256(path) != expected["sha256"]:
            raise DataError(f"{path} is damaged: its SHA-256 is not the one in {kind}.json. {remedy}")
    return paths


def _manifest_path(dataset: Dataset, kind: str) -> Path:
    return dataset.folder / f"{kind}.json"


def _remedy(dataset: Dataset, kind: str) -> str:
    return f"Make them: {prepare_command(dataset.folder)} --formats {kind}"
