"""Atomic, durable writes: a reader sees the old file or the whole new one, whatever interrupts the writer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(name: str) -> str:
    """Return the name under which `replacing` writes the file `name`: fixed, so that a killed writer's is replaced."""
    return f".{name}.tmp"


@contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it becomes `path`, on failure it is removed.

    What was `path` before becomes `previous`, if one is given. Raises `OSError` with the name `path`, whatever was
    being written.
    """
    temporary = path.with_name(temporary_name(path.name))
    temporary.unlink(missing_ok=True)  # it may be a link, which writing would follow
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Write `data` to `path` atomically; what was there becomes `previous`, if one is given.

    Raises `OSError` with `path` untouched.
    """
    with replacing(path, previous=previous) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, contents: Any) -> None:
    """Write `contents` (JSON types) to `path` as `write_bytes` does."""
    write_bytes(path, json.dumps(contents, indent=2).encode())


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
