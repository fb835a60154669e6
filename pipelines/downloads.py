"""Downloads of archives: from the fastest of several addresses, resumed after a break, and verified."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import os
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from .errors import DataError, UsageError, note, reason_of
from .files import open_file
from .images import Report

_SILENCE = 30  # seconds without a byte
_LIMIT = 3600  # seconds of a whole download
_SAMPLE = 1 << 20  # bytes by which addresses are compared
_SAMPLE_SECONDS = 10
_CHUNK = 1 << 16
_MIRROR = "FASTRESNET_MIRROR"
_FAILURES = (OSError, http.client.HTTPException, ValueError)  # those of urllib are OSErrors


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive on the web: its file name, size in bytes, MD5, and the addresses of folders that have it."""

    title: str
    name: str
    size: int
    md5: str
    folders: tuple[str, ...]

    def addresses(self) -> list[str]:
        """List the addresses of the archive: that on $FASTRESNET_MIRROR alone, if it is set.

        Raises `UsageError` if that is no address of a folder.
        """
        mirror = os.environ.get(_MIRROR, "")
        if mirror and not re.match("https?://.", mirror):
            raise UsageError(f"${_MIRROR} is {mirror!r}, not the address of a folder: https://... or http://...")
        return [f"{folder.rstrip('/')}/{self.name}" for folder in ((mirror,) if mirror else self.folders)]


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The response of an address, whose bytes begin at `start` in the archive, and the first of them."""

    address: str
    response: http.client.HTTPResponse
    start: int
    sample: bytes


def download(archive: Archive, folder: Path, report: Report) -> Path:
    """Download `archive` into `folder`, unless it is there; return its path. A `Note` announces it.

    All addresses are asked at once, and the fastest is taken. Where it breaks off, the fastest goes on. A file that is
    not finished (.part) is kept, for the next download to go on with. Raises `DataError` after an hour, or with the
    reason of each address that failed.
    """
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    if path.is_file() and path.stat().st_size == archive.size and _md5(path) == archive.md5:
        return path
    addresses = archive.addresses()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(open_file(part, os.O_RDWR), "r+b") as file:
            _complete(file, part, archive, addresses, report)
        os.replace(part, path)
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()
    return path


def _complete(file: BinaryIO, part: Path, archive: Archive, addresses: Sequence[str], report: Report) -> None:
    """Append to `file`, called `part`, what the archive has more, or replace it if it is another."""
    deadline = time.monotonic() + _LIMIT
    failures: dict[str, str] = {}
    sources: set[str] | None = None if file.seek(0, os.SEEK_END) else set()  # none of the first bytes are known
    while True:
        done = file.seek(0, os.SEEK_END)
        if done >= archive.size:
            file.flush()
            if done == archive.size and _md5(part) == archive.md5:
                return
            failures |= dict.fromkeys(sources or (), f"its bytes are not those of MD5 {archive.md5}")
            file.truncate(0)
            sources = set()
            continue
        report(f"looking for the fastest of {len(addresses)} addresses", 0, 1)
        answer = _fastest([address for address in addresses if address not in failures], done, archive, failures)
        report(f"looking for the fastest of {len(addresses)} addresses", 1, 1)
        if answer is None:
            raise DataError(_failed(archive, failures, done))
        going_on = f", from byte {answer.start:,} on" if answer.start else ""
        note(f"downloading {archive.title} ({_mb(archive.size)}) from {answer.address} to {part}{going_on}.")
        if sources is not None:
            sources.add(answer.address)
        if reason := _receive(answer, file, archive, report, deadline):
            note(f"the download broke off: {reason}.")
            if file.seek(0, os.SEEK_END) - done < _SAMPLE:
                failures[answer.address] = reason


def _fastest(addresses: Sequence[str], start: int, archive: Archive, failures: dict[str, str]) -> _Answer | None:
    """Ask all `addresses` for the archive from `start` on; return the first answer with a whole sample, or the longest.

    Adds the reasons of those that fail to `failures`.
    """
    results: queue.SimpleQueue[_Answer | tuple[str, str]] = queue.SimpleQueue()
    decided = threading.Event()

    def ask(address: str) -> None:
        try:
            answer = _ask(address, start, archive, decided)
        except _FAILURES as error:
            results.put((address, _reason(error)))
            return
        if decided.is_set():
            answer.response.close()
        else:
            results.put(answer)

    for address in addresses:
        threading.Thread(target=ask, args=(address,), daemon=True).start()
    best: _Answer | None = None
    try:
        for _ in addresses:
            match results.get():
                case _Answer() as answer:
                    slower, best = sorted((best, answer), key=lambda each: len(each.sample) if each else -1)
                    if slower:
                        slower.response.close()
                    if len(answer.sample) == min(_SAMPLE, archive.size - answer.start):
                        break
                case address, reason:
                    failures[address] = reason
    finally:
        decided.set()
    return best


def _ask(address: str, start: int, archive: Archive, decided: threading.Event) -> _Answer:
    """Ask for the archive from `start` on, and read a sample, a short one from a slow server."""
    headers = {"User-Agent": "fastresnet"} | ({"Range": f"bytes={start}-"} if start else {})  # some refuse urllib's own
    request = urllib.request.Request(address, headers=headers)  # noqa: S310  http or https
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_SILENCE)  # noqa: S310
    try:
        start = _first_byte(response, start, archive.size)
        sample, until = b"", time.monotonic() + _SAMPLE_SECONDS
        while missing := min(_SAMPLE, archive.size - start) - len(sample):
            if decided.is_set() or time.monotonic() > until:
                break
            sample += _read(response, missing, start + len(sample), archive.size)
        return _Answer(address, response, start, sample)
    except BaseException:
        response.close()
        raise


def _first_byte(response: http.client.HTTPResponse, start: int, size: int) -> int:
    """Return where in the archive the bytes of `response` begin: a server may ignore that `start` was asked for.

    Raises `ValueError` if it has a file of another size.
    """
    content = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status == http.HTTPStatus.PARTIAL_CONTENT and content is None:
        raise ValueError("it does not say which bytes it sends")
    first, total = content.groups() if content else (0, response.headers.get("Content-Length", "*"))
    if total not in ("*", str(size)):
        raise ValueError(f"its file has {total} bytes instead of {size}")
    if int(first) not in (0, start):
        raise ValueError(f"it sends bytes from {first} on instead of {start}")
    return int(first)


def _receive(answer: _Answer, file: BinaryIO, archive: Archive, report: Report, deadline: float) -> str:
    """Write to `file` what `answer` delivers; return why it ended early, or nothing."""
    file.seek(answer.start)
    file.write(answer.sample)
    with answer.response:
        while (done := file.tell()) < archive.size:
            report(f"{archive.name} (MB)", done // 10**6, archive.size // 10**6)
            if time.monotonic() > deadline:
                raise DataError(
                    f"gave up after {_LIMIT // 60} minutes with {_mb(done)} of {_mb(archive.size)}; they are kept. "
                    f"Repeat the command to go on, or give another server than {answer.address}: ${_MIRROR}."
                )
            try:
                chunk = _read(answer.response, archive.size - done, done, archive.size)
            except _FAILURES as error:
                return _reason(error)
            file.write(chunk)
    report(f"{archive.name} (MB)", 1, 1)
    return ""


def _read(response: http.client.HTTPResponse, limit: int, done: int, size: int) -> bytes:
    """Read up to `limit` bytes, as many as there are. Raises `ConnectionError` if it has ended."""
    if chunk := response.read1(min(_CHUNK, limit)):
        return chunk
    raise ConnectionError(f"it ended after {_mb(done)} of {_mb(size)}")


def _failed(archive: Archive, failures: dict[str, str], done: int) -> str:
    """Write the error of a download with no address left."""
    tried = "; ".join(f"{address} ({reason})" for address, reason in failures.items())
    kept = f" {_mb(done)} are kept: repeat the command to go on." if done else ""
    return (
        f"could not download {archive.title}: {tried}.{kept} From another server: ${_MIRROR}. Without a network: "
        f"fastresnet prepare --source FILE with a copy of {archive.name}, or --data shapes10 for a drawn stand-in."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"nothing arrived for {_SILENCE} seconds"
    return reason_of(error)


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
