"""Atomic, durable writes: a reader sees the complete old or new file, even if the writer is interrupted.

Nothing is written through a link: what is written lies in a new folder until it replaces the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it can be written, but not read
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_file(path: str | Path, flags: int, *, folder: int | None = None) -> int:
    """Open file `path`, created if missing, and return its descriptor. `folder` is a descriptor that it is relative to.

    Raises `OSError` if `path` is a link, or no file of its own.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a symbolic link, which is not followed"
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a hard link, a pipe or a device, which is not written", str(path))
    return descriptor


# --- temporary folders -------------------------------------------------------------------------------------------

_TEMPORARY = re.compile(r"\.fastresnet-[0-9a-f]{16}\.tmp")
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LIVE: set[str] = set()
"""Names of the temporary folders of this process: locks are only between processes."""


def is_temporary(name: str) -> bool:
    """Return True if `name` is one of a temporary folder."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`; in the end, remove it with what it then contains.

    Its name is random: no two writers share it, and no link waits there. Those of killed writers are removed first.
    """
    remove_temporary_folders(parent)
    folder, lock = _create(parent)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def remove_temporary_folders(parent: Path) -> None:
    """Remove the temporary folders of killed writers from `parent`: those that can be locked."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:  # it may be unreadable, and yet writable
        for entry in entries:
            if is_temporary(entry.name) and entry.name not in _LIVE and _is_own_folder(entry):
                folder = parent / entry.name
                with contextlib.suppress(OSError):
                    _remove(folder, _lock(folder))


def _is_own_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()


def _create(parent: Path) -> tuple[Path, int | None]:
    """Create a temporary folder and lock it; return both, but no lock on a file system without locks."""
    while True:
        folder = parent / f".fastresnet-{secrets.token_hex(8)}.tmp"
        _LIVE.add(folder.name)
        folder.mkdir(0o700)
        try:
            return folder, _lock(folder)
        except (FileNotFoundError, BlockingIOError):  # another writer found it before it was locked, and removes it
            _LIVE.remove(folder.name)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return folder, None
            _remove(folder, None)
            raise


def _lock(folder: Path) -> int:
    """Lock `folder` and return the lock's descriptor. Raises `OSError` if another process holds it or removes it."""
    name, opened = folder.name, os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW)  # it may have become a link
    try:
        descriptor = open_file(name, os.O_RDWR, folder=opened)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by worker processes
            if not os.path.samestat(os.stat(name, dir_fd=opened), os.fstat(descriptor)):
                raise FileNotFoundError
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    finally:
        os.close(opened)


def _remove(folder: Path, lock: int | None) -> None:
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
    with contextlib.suppress(OSError):
        folder.rmdir()  # again: a network file system kept the open lock
    _LIVE.discard(folder.name)


# --- writing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Yield the name of a new file; on success it replaces `path`, on failure it is removed.

    A link at `path` is replaced, its target unchanged. The old file is renamed to `previous`, if given. Every `OSError`
    names `path`, not the new file.
    """
    try:
        if _is_stream(path):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
        with temporary_folder(path.parent) as folder:
            new = folder / path.name
            yield new
            with open(new, "rb") as file:
                os.fsync(file.fileno())
            if previous is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, previous)
            os.replace(new, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise


def _is_stream(path: Path) -> bool:
    """Return True if `path` is a pipe or a device, or the system's name for an open file, such as /dev/stdout.

    A link to any of these is none: it is replaced. /dev/shm has real files.
    """
    if not os.path.lexists(path):
        return False
    mode = path.lstat().st_mode
    is_special = not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))
    return is_special or _is_of_the_system(path)


def _is_of_the_system(path: Path) -> bool:
    parent = os.path.realpath(path.parent)
    return parent == "/dev" or re.fullmatch(r"/proc/\d+(/task/\d+)?/fd", parent) is not None


def _write_stream(path: Path, data: bytes) -> None:
    if _is_of_the_system(path):
        path.write_bytes(data)
        return
    with open(path, "wb", opener=lambda name, _: os.open(name, os.O_WRONLY | os.O_NOFOLLOW)) as stream:
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # it was a pipe or a device a moment ago
            raise OSError(errno.EAGAIN, "it has become another file", str(path))
        stream.write(data)


def write_bytes(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Write `data` to `path` as `replacing` does, or into it if it is a pipe or a device.

    The old file is renamed to `previous`, if given. Raises `OSError` and leaves `path` unchanged.
    """
    if _is_stream(path):
        _write_stream(path, data)
        return
    with replacing(path, previous=previous) as new:
        new.write_bytes(data)


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
