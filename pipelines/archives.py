"""Files of a folder, a zip or a tar by one interface: the names, and a function that opens each.

Nothing is unpacked to disk. Members are read into memory, so paths in an archive, and its links, have no effect. No
claim in an archive is trusted: the size of its file bounds what it may list and unpack.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import DataError
from .texts import open_regular

Parts = tuple[str, ...]
"""Names of the folders above a file, from the top of the source, and its own name."""


def join_parts(parts: Parts) -> str:
    """Join names to a path, as messages show it."""
    return "/".join(parts)


MEMBER_LIMIT = 192 << 20
"""Largest file that is read of an archive, or twice the archive's size: the training batch of CIFAR-100 has 155 MB."""

# An archive may list and unpack so much, and so much more by its size. A file with its image takes over 128 bytes of
# it, and drawn images without compression, which a tar pads, shrink to a hundredth at most.
_FILES, _BYTES_PER_FILE = 10_000, 128
_ZIP_FILES, _BYTES_PER_ZIP_FILE = 20_000, 256  # zipfile takes 700 bytes of memory for each, and a listing 250
_BYTES_OF_NAMES = 256  # of memory; longer ones count as more files
_UNPACKED, _RATIO = 8 << 20, 100

_BYTES_OF_ZIP_ENTRIES, _BYTES_A_ZIP_ENTRY = 1 << 20, 512

_HEADER_LIMIT = 1 << 20  # of the names and attributes of a member of a tar: they take some KB
_PATH_LIMIT, _DEPTH_LIMIT = 4096, 64  # Linux has no longer paths
_VISITS = 100  # of one folder by way of links, which may lead from a few folders to each other in billions of ways

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files: those of torchvision's ImageFolder, and .gif (its first frame)."""

_REFUSED_SUFFIXES = (".avif", ".heic", ".heif", ".jp2", ".jxl")
_DEBRIS = {"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini"}
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile bounds the memory of these two only
_ZIP_ENTRY = b"PK\x01\x02"
_ZIP_UTF8, _ZIP_WINDOWS = 0x800, 0
_XZ = b"\xfd7zXZ"
_XZ_MEMORY = 66 << 20  # of xz -9
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_SPARSE = (b"GNU.sparse.map", b"GNU.sparse.numblocks", b"GNU.sparse.major", b"GNU.sparse.name")
_RECORDS = (b"path", b"size", *_SPARSE)
_TAR_HEADERS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class ArchiveError(DataError):
    """Claim of an archive that its size does not allow; no file of it is to be read."""


@dataclass(frozen=True, slots=True)
class File:
    """File of a source, or a folder in it."""

    parts: Parts
    name: str
    """Path for messages, in one line."""
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

    Raises `ArchiveError`, and many others if an archive is damaged.
    """
    if path.is_dir():
        yield from _list_folder(path)
        return
    for file in _list_zip(path) if zipfile.is_zipfile(path) else _list_tar(path):
        if not any(map(is_debris, file.parts)):
            yield file


def file_at(path: Path, *, may_be_pipe: bool = False) -> File:
    """Return the file at `path`; it `may_be_pipe` only if the user names it."""
    content = functools.partial(_open_path, path, may_be_pipe=may_be_pipe)
    return File((path.name,), _in_one_line(str(path)), content)


def _open_path(path: str | Path, *, may_be_pipe: bool = False) -> IO[bytes]:
    try:
        return open(path, "rb") if may_be_pipe else open_regular(path)
    except OSError as error:
        raise DataError(f"{_in_one_line(str(path))} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise DataError(f"{_in_one_line(str(path))} is a pipe or a device. Give a file.") from None


def _list_folder(path: Path) -> Iterator[File]:
    """Yield what is below a folder; links are followed, but not into a folder above them."""
    pending: list[tuple[Parts, str, frozenset[str]]] = [((), os.path.realpath(path), frozenset())]
    visits = Counter[str]()
    while pending:
        parts, real, above = pending.pop()
        above |= {real}
        visits[real] += 1
        if visits[real] > _VISITS:
            raise DataError(f"{path.joinpath(*parts)} is reached in over {_VISITS} ways, through links. Remove some.")
        with os.scandir(path.joinpath(*parts)) as entries:
            for entry in entries:
                inner = (*parts, entry.name)
                if is_debris(entry.name):
                    continue
                if entry.is_dir():
                    target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                    if target not in above:
                        _check_path("/".join(inner), path)
                        pending.append((inner, target, above))
                        yield File(
                            inner, _in_one_line(entry.path), functools.partial(_open_path, entry.path), is_folder=True
                        )
                elif entry.is_file() or entry.is_symlink():  # one that is broken or leads to a pipe is refused
                    yield File(inner, _in_one_line(entry.path), functools.partial(_open_path, entry.path))


def _parts(name: str, path: Path) -> Parts:
    _check_path(name, path)
    return tuple(part for part in name.split("/") if part not in ("", ".", ".."))


def _check_path(name: str, path: Path) -> None:
    if len(name) > _PATH_LIMIT or name.count("/") > _DEPTH_LIMIT:
        raise DataError(
            f"{path} has a file in too many folders, or with too long a name: {_in_one_line(name[:60])}... Rename it."
        )


def _in_one_line(name: str) -> str:
    return name.replace("\n", r"\n")


def most_files(size: int) -> int:
    """Return how many files, or images, a file of `size` bytes may have."""
    return _FILES + size // _BYTES_PER_FILE


def most_unpacked(size: int) -> int:
    """Return to how many bytes a file of `size` bytes may unpack."""
    return _UNPACKED + _RATIO * size


class _Allowance:
    """Files that an archive may still list, and bytes that it may still unpack to."""

    def __init__(self, file: IO[bytes]) -> None:
        self._name, self.size = file.name, os.fstat(file.fileno()).st_size
        self.files = most_files(self.size)
        self.unpacked = most_unpacked(self.size)

    def take(self, *, files: int = 0, unpacked: int = 0) -> None:
        self.files -= files
        self.unpacked -= unpacked
        if self.files < 0:
            self.refuse("lists more files")
        if self.unpacked < 0:
            self.refuse("unpacks to more bytes")

    def check_member(self, name: str, size: int) -> None:
        """Raise `DataError` if a file in the archive is too large to be read into memory."""
        if size > (limit := max(MEMBER_LIMIT, 2 * self.size)):
            raise DataError(f"{name} claims {size:,} bytes, over {limit:,}: too many for this archive. Leave it out.")

    def refuse(self, excess: str) -> NoReturn:
        raise ArchiveError(
            f"{self._name} {excess} than its size of {self.size:,} bytes allows. If you trust it, unpack it and give "
            "the folder."
        )


# --- zip ---------------------------------------------------------------------------------------------------------


def open_zip(file: IO[bytes]) -> zipfile.ZipFile:
    """Open the zip in `file`. Raises `ArchiveError` if it has too many entries, of which zipfile keeps all."""
    return zipfile.ZipFile(_ZipStream(file))  # type: ignore[call-overload, no-any-return]


class _ZipStream:
    """Stream that refuses to read the directory of a zip, which zipfile reads at once, if it is too long."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._allowance = file, _Allowance(file)
        self._most = _ZIP_FILES + self._allowance.size // _BYTES_PER_ZIP_FILE
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if data.count(_ZIP_ENTRY) > self._most:
            self._allowance.refuse("lists more files")
        if data.startswith(_ZIP_ENTRY) and not _has_short_entries(data):
            self._allowance.refuse("lists longer names")
        return data


def _has_short_entries(directory: bytes) -> bool:
    """Return True if what zipfile keeps of the entries of a zip's directory is some hundred bytes each, in the mean."""
    memory = entries = start = 0
    while start + 46 <= len(directory):
        name, extra, comment = struct.unpack_from("<3H", directory, start + 28)
        text = directory[start + 46 : start + 46 + name]
        if not text.isascii():
            is_utf8 = int.from_bytes(directory[start + 8 : start + 10], "little") & _ZIP_UTF8
            name_memory = sys.getsizeof(text.decode("utf-8" if is_utf8 else "cp437", "replace"))
        else:
            name_memory = name
        memory += name_memory * (2 if b"\0" in text else 1) + comment + extra
        memory += extra * extra // 1024  # zipfile searches extra fields in quadratic time
        entries += 1
        start += 46 + name + extra + comment
    return memory <= _BYTES_OF_ZIP_ENTRIES + _BYTES_A_ZIP_ENTRY * entries


def _list_zip(path: Path) -> Iterator[File]:
    with open(path, "rb") as file, open_zip(file) as archive:
        allowance = _Allowance(file)
        for entry in archive.infolist():
            inner = _zip_name(entry)
            name = f"{path}: {_in_one_line(inner)}"
            content = functools.partial(_open_zip_entry, archive, entry, name, allowance)
            yield File(_parts(inner, path), name, content, is_folder=inner.endswith("/"))


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """Return the name of an entry as its writer meant it, with slashes.

    Some programs write UTF-8 without its flag, which zipfile reads as code page 437, or, on Windows, backslashes.
    """
    name = entry.filename
    if not entry.flag_bits & _ZIP_UTF8:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/") if entry.create_system == _ZIP_WINDOWS else name


def _open_zip_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, allowance: _Allowance) -> IO[bytes]:
    allowance.check_member(name, entry.file_size)
    allowance.take(unpacked=entry.file_size)  # many entries may share their data
    if entry.compress_type not in _ZIP_METHODS:
        raise DataError(f"{name} is packed by method {entry.compress_type}. Pack it again with deflate, method 8.")
    try:
        with archive.open(entry) as stream:
            return io.BytesIO(stream.read(entry.file_size + 1))  # with a size: it may unpack to more than it claims
    except ArchiveError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(f"{name} is damaged or encrypted ({error}).") from None  # RuntimeError: encrypted


# --- tar ---------------------------------------------------------------------------------------------------------


def _list_tar(path: Path) -> Iterator[File]:
    with open(path, "rb") as file:
        allowance = _Allowance(file)
        stream = _TarStream(file, allowance)
        for member in _tar_members(stream):
            allowance.take(files=1 + sum(map(sys.getsizeof, member.name.split("/"))) // _BYTES_OF_NAMES)
            if member.isdir() or member.isreg() or member.islnk() or member.issym():
                name = f"{path}: {_in_one_line(member.name)}"
                content = functools.partial(_open_tar_member, stream, member, name, allowance)
                yield File(_parts(member.name, path), name, content, is_folder=member.isdir())
        stream.finish()


def _open_tar_member(stream: _TarStream, member: tarfile.TarInfo, name: str, allowance: _Allowance) -> IO[bytes]:
    if not member.isreg():
        raise DataError(f"{name} is a link, which is not followed. Pack with tar --dereference --hard-dereference.")
    if member.issparse():
        raise DataError(f"{name} is a sparse file. Pack without tar --sparse.")
    allowance.check_member(name, member.size)
    return io.BytesIO(stream.read(member.size))


def _tar_members(stream: _TarStream) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, with the stream at the content of each, which may be read.

    `tarfile.open` would keep all headers, of any size, and search them in quadratic time.
    """
    while (member := _next_member(stream)) is not None:
        has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
        end = stream.place + (_padded(member.size) if has_content else 0)
        yield member
        stream.skip(end - stream.place)


def _next_member(stream: _TarStream) -> tarfile.TarInfo | None:
    extended: dict[bytes, bytes] = {}
    try:
        while (block := stream.read(tarfile.BLOCKSIZE, may_end=True)).strip(b"\0"):
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if member.type not in _TAR_HEADERS:
                more = 482  # the place that tells if a block of a sparse file's map follows
                while member.type == tarfile.GNUTYPE_SPARSE and block[more]:
                    block, more = stream.read(tarfile.BLOCKSIZE), 504
                _extend(member, extended)
                return member
            extended = _read_header(stream, member) | extended  # the first of several counts
    except (ValueError, OverflowError) as error:  # of numbers
        raise tarfile.ReadError(f"invalid header: {error}") from None
    return None


def _read_header(stream: _TarStream, header: tarfile.TarInfo) -> dict[bytes, bytes]:
    """Read the records of a header that extends the next one. Those for all members are comments."""
    if not 0 <= header.size <= _HEADER_LIMIT:
        raise tarfile.ReadError(f"a header claims {header.size} bytes")
    content = stream.read(_padded(header.size))[: header.size]
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {b"path": content.partition(b"\0")[0]}
    records: dict[bytes, bytes] = {}
    start = 0
    while header.type in _PAX and start < len(content) and content[start]:
        digits = content[start : start + 20].partition(b" ")[0]
        end = start + int(digits)
        if not start + len(digits) < end <= len(content):
            raise tarfile.ReadError("invalid header: a record is longer than its header")
        key, _, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        if key in _RECORDS:
            records[key] = value
        start = end
    return records


def _extend(member: tarfile.TarInfo, records: dict[bytes, bytes]) -> None:
    """Apply the records of extended headers to a member, as POSIX pax and GNU tar define them."""
    path = records.get(b"GNU.sparse.name") or records.get(b"path")
    if path is not None:
        member.name = path.decode("utf-8", "surrogateescape").rstrip("/")
    member.size = int(records.get(b"size", member.size))
    if not 0 <= member.size < 1 << 60:
        raise tarfile.ReadError(f"{member.name[:60]} claims {member.size} bytes")
    if member.type == tarfile.GNUTYPE_SPARSE or not records.keys().isdisjoint(_SPARSE):
        member.sparse = b""


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _TarStream:
    """Content of a tar, which is unpacked as far as it may be, from its first byte to its last."""

    def __init__(self, file: IO[bytes], allowance: _Allowance) -> None:
        head = file.read(6)
        file.seek(0)
        self.place = 0
        self._allowance: _Allowance | None = allowance
        self._stream: Any
        if head.startswith(b"\x1f\x8b"):
            self._stream = gzip.GzipFile(fileobj=file)
        elif head.startswith(b"BZh"):
            self._stream = bz2.BZ2File(file)
        elif head.startswith(_XZ):
            self._stream = io.BufferedReader(_XzStream(file, max(_XZ_MEMORY, os.fstat(file.fileno()).st_size)))
        else:
            self._stream, self._allowance = file, None

    def read(self, size: int, *, may_end: bool = False) -> bytes:
        """Read `size` bytes, or none if the stream `may_end` here. Raises `tarfile.ReadError` if there are fewer."""
        if self._allowance:
            self._allowance.take(unpacked=size)
        data: bytes = self._stream.read(size)
        if len(data) != size and (data or not may_end):
            raise tarfile.ReadError("unexpected end of data")
        self.place += len(data)
        return data

    def skip(self, size: int) -> None:
        """Go on by `size` bytes. Raises `tarfile.ReadError` if there are fewer."""
        if self._allowance is None and size > 1:
            self._stream.seek(size - 1, io.SEEK_CUR)
            self.place += size - 1
            size = 1
        for start in range(0, size, 1 << 20):
            self.read(min(size - start, 1 << 20))

    def finish(self) -> None:
        """Read what is left: gzip and xz compare their checksums at the end of the file only."""
        while self._allowance and (rest := len(self._stream.read(1 << 20))):
            self._allowance.take(unpacked=rest)


class _XzStream(io.RawIOBase):
    """Content of an xz file. `lzma.open` would let all streams after the first claim any memory."""

    def __init__(self, file: IO[bytes], memory: int) -> None:
        self._file, self._memory = file, memory
        self._unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memory)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            packed = b""
            if self._unpacker.eof:
                packed = self._unpacker.unused_data + self._file.read(len(_XZ))
                if not packed.startswith(_XZ):
                    return 0
                self._unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, self._memory)
            elif self._unpacker.needs_input and not (packed := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                raise EOFError("the compressed data end too early")
            data = self._unpacker.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)
