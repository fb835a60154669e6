"""Files of a folder, a zip or a tar by one interface: the names, and a function that opens each.

Nothing is unpacked to disk. Members are read into memory, so paths in an archive, and its links, have no effect.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import DataError

Parts = tuple[str, ...]
"""Names of the folders above a file, from the top of the source, and its own name."""

MEMBER_LIMIT = 64 << 20
"""Largest member of an archive that is read: that of CIFAR-10 has 31,035,999 bytes."""
_FILES_LIMIT = 2_000_000  # of an archive: a small one could list any number

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files: those of torchvision's ImageFolder, and .gif (its first frame)."""

_REFUSED_SUFFIXES = (".avif", ".heic", ".heif", ".jp2", ".jxl")
_DEBRIS = {"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini"}
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile bounds the memory of these two only
_ZIP_UTF8, _ZIP_WINDOWS = 0x800, 0
_XZ = b"\xfd7zXZ"
_XZ_MEMORY = 256 << 20  # xz -9 needs 65 MiB
_UNPACK: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, _XZ: lzma.open}


@dataclass(frozen=True, slots=True)
class File:
    """File of a source, or a folder in it."""

    parts: Parts
    name: str
    """Path for messages."""
    open: Callable[[], IO[bytes]]
    """Function that opens a file, or raises `DataError` if it alone cannot be read."""
    is_folder: bool = False


def is_image(name: str) -> bool:
    """Return True if a file called `name` is an image, also one of a format that is refused: none is passed over."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *_REFUSED_SUFFIXES))


def is_debris(name: str) -> bool:
    """Return True if systems leave files or folders called `name` beside the user's own, all hidden ones among them."""
    return name.startswith(".") or name.lower() in _DEBRIS


def list_files(path: Path) -> Iterator[File]:
    """Yield the files and folders of a folder, zip or tar, without debris; open each before asking for the next.

    Raises many errors if an archive is damaged.
    """
    if path.is_dir():
        yield from _list_folder(path)
        return
    names = _list_zip(path) if zipfile.is_zipfile(path) else _list_tar(path)
    for count, file in enumerate(names):
        if count >= _FILES_LIMIT:
            raise DataError(f"{path} has more than {_FILES_LIMIT:,} files.")
        if not any(map(is_debris, file.parts)):
            yield file


def file_at(path: Path) -> File:
    """Return the file at `path`."""
    return File((path.name,), str(path), functools.partial(_open_path, path))


def _open_path(path: str | Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _list_folder(path: Path) -> Iterator[File]:
    """Yield what is below a folder; links are followed, but not into a folder above them."""
    pending: list[tuple[Parts, str, frozenset[str]]] = [((), os.path.realpath(path), frozenset())]
    while pending:
        parts, real, above = pending.pop()
        above |= {real}
        with os.scandir(path.joinpath(*parts)) as entries:
            for entry in entries:
                inner = (*parts, entry.name)
                if is_debris(entry.name):
                    continue
                if entry.is_dir():
                    target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                    if target not in above:
                        pending.append((inner, target, above))
                        yield File(inner, entry.path, functools.partial(_open_path, entry.path), is_folder=True)
                elif entry.is_file() or entry.is_symlink():  # a broken link cannot be read; a pipe would block
                    yield File(inner, entry.path, functools.partial(_open_path, entry.path))


def _list_zip(path: Path) -> Iterator[File]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            inner = _zip_name(entry)
            name = f"{path}: {inner}"
            content = functools.partial(_open_zip_entry, archive, entry, name)
            yield File(_parts(inner), name, content, is_folder=inner.endswith("/"))


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """Return the name of an entry as its writer meant it, with slashes.

    Some programs write UTF-8 without its flag, which zipfile reads as code page 437, or, on Windows, backslashes.
    """
    name = entry.filename
    if not entry.flag_bits & _ZIP_UTF8:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/") if entry.create_system == _ZIP_WINDOWS else name


def _open_zip_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> IO[bytes]:
    _check_size(name, entry.file_size)
    if entry.compress_type not in _ZIP_METHODS:
        raise DataError(f"{name} is packed by method {entry.compress_type}. Pack it again with deflate, method 8.")
    try:
        with archive.open(entry) as stream:
            return io.BytesIO(stream.read(entry.file_size + 1))  # with a size: it may unpack to more than it claims
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # RuntimeError: encrypted
        raise DataError(f"{name} is damaged or encrypted ({error}).") from None


def _list_tar(path: Path) -> Iterator[File]:
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(_XZ):  # which declares the memory that it needs
        lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(head, 1)
    opener = next((opener for start, opener in _UNPACK.items() if head.startswith(start)), _open_path)
    with opener(path) as stream, _Tar(fileobj=_Bounded(stream)) as tar:
        while (member := tar.next()) is not None:
            name = f"{path}: {member.name}"
            if member.isdir() or member.isreg() or member.islnk() or member.issym():
                content = functools.partial(_open_tar_member, tar, member, name)
                yield File(_parts(member.name), name, content, is_folder=member.isdir())
        while stream.read(1 << 20):  # gzip and xz compare their checksums at the end of the file only
            pass


def _open_tar_member(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> IO[bytes]:
    if not member.isreg():
        raise DataError(f"{name} is a link, which is not followed. Pack with tar --dereference --hard-dereference.")
    _check_size(name, member.size)
    content = tar.extractfile(member)
    return io.BytesIO(content.read() if content else b"")


class _Tar(tarfile.TarFile):
    """Tar that keeps no headers, and whose headers can be damaged in any way."""

    def next(self) -> tarfile.TarInfo | None:
        try:
            member = super().next()
        except (ValueError, IndexError, OverflowError) as error:  # of the numbers in headers of sparse files
            raise tarfile.ReadError(f"invalid header: {error}") from None
        if member is not None and member.size < 0:  # CPython before 3.11.14 would read it forever (CVE-2025-8194)
            raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")
        self.members.clear()  # type: ignore[attr-defined]
        return member


class _Bounded(io.RawIOBase):
    """Stream of a tar that refuses to read large headers, which tarfile would hold in memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        if size > MEMBER_LIMIT:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._stream.read(size)


def _parts(name: str) -> Parts:
    return tuple(part for part in name.split("/") if part not in ("", ".", ".."))


def _check_size(name: str, size: int) -> None:
    if size > MEMBER_LIMIT:
        raise DataError(f"{name} claims {size} bytes; up to {MEMBER_LIMIT} are read.")
