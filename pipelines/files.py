"""Atomic, durable writes: a reader sees the complete old or new file, even if the writer is interrupted."""

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
    """Return the temporary name of file `name`: fixed, so that the next writer replaces a killed writer's file."""
    return f".{name}.tmp"


@contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; on success that file replaces `path`, on failure it is removed.

    The old file is renamed to `previous`, if given. Every `OSError` names `path`, not the temporary file. Devices and
    pipes, such as /dev/null and /dev/stdout, are written themselves.
    """
    if _is_stream(path):
        yield path
        return
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


def _is_stream(path: Path) -> bool:
    """Return True if `path` is not a file of its own: replacing it would remove a device. /dev/shm has real files."""
    return path.exists() and (not path.is_file() or str(path.absolute().parent) in ("/dev", "/dev/fd"))


def write_bytes(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Write `data` to `path` atomically; rename the old file to `previous`, if given.

    Raises `OSError` and leaves `path` unchanged.
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
