"""Live report: the page of runs over HTTP, to this machine only. It renews itself until the runs are finished.

It reads the files of the runs, which a training replaces atomically, in a process of its own: no training knows of it.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastresnet.report import message, page
from fastresnet.run_folder import Run, read_run
from pipelines.errors import DataError, UsageError, UserError

_READ_FILES = ("config.toml", "metrics.csv", "summary.json")
_RENEW = """<script>setInterval(() => fetch("/", {headers: {"If-None-Match": "TAG"}})
  .then(answer => answer.ok && location.reload(), () => {}), 2000)</script></body>"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"


class LivePage:
    """Page of the runs in `folders` as their files are now, made again only if these have changed."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raise `DataError` if a folder has no run that has begun."""
        for folder in folders:
            if not (folder / "config.toml").exists():
                raise DataError(f"{folder} has no config.toml: it is not a run folder, or its training has not begun.")
        self._folders, self._lock = folders, threading.Lock()
        self._tag, self._contents = "", b""

    def current(self) -> tuple[str, bytes]:
        """Return the page in HTML, after a tag that identifies the state of the files."""
        with self._lock:
            files = [_state(folder / name) for folder in self._folders for name in _READ_FILES]
            tag = f'"{hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"'
            if tag != self._tag:
                self._tag, self._contents = tag, self._made(tag).encode()
            return tag, self._contents

    def _made(self, tag: str) -> str:
        try:
            runs = [read_run(folder) for folder in self._folders if (folder / "metrics.csv").exists()]
            made = self._shown(runs)
        except (UserError, OSError) as error:
            runs, made = [], message("The runs cannot be shown", str(error))
        is_finished = len(runs) == len(self._folders) and all(run.summary is not None for run in runs)
        return made if is_finished else made.replace("</body>", _RENEW.replace("TAG", tag.replace('"', r"\"")))

    def _shown(self, runs: Sequence[Run]) -> str:
        read = {run.folder for run in runs}
        waiting = [
            f"{folder}: the first epoch is not finished." if folder.exists() else f"{folder} is gone."
            for folder in self._folders
            if folder not in read
        ]
        if not runs:
            return message("Waiting for the first epoch", " ".join(waiting))
        if len(runs) == 1 and runs[0].summary is not None:
            command = f"fastresnet report {shlex.quote(str(runs[0].folder))}"
            waiting.append(f"Finished. This writes the page with confusion matrix and mistakes: {command}")
        return page(runs, notices=waiting)


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    timeout = 30  # seconds for the request, which some connections of a browser never send

    def do_GET(self) -> None:
        # Another site may give its name the address of this machine, and would read the page ("DNS rebinding").
        if not re.fullmatch(r"(localhost|127\.0\.0\.1)(:\d{1,5})?", self.headers.get("Host", "")):
            self.send_error(403, "the name of the host is not localhost or 127.0.0.1")
        elif self.path != "/":
            self.send_error(404)
        else:
            self._answer(*self.server.page.current())

    def _answer(self, tag: str, contents: bytes) -> None:
        if self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            contents = b""
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(contents)))
            self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        self.wfile.write(contents)

    def log_message(self, *_: object) -> None:
        """Write nothing about requests."""


class LiveServer(ThreadingHTTPServer):
    """HTTP server of the page of the runs in `folders`, on `port` of 127.0.0.1, 0 for a free one."""

    def __init__(self, folders: Sequence[Path], port: int) -> None:
        """Raise `DataError` as `LivePage` does, and `UsageError` if the port cannot be used."""
        self.page = LivePage(folders)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            remedy = "Give another one, or 0 for a free one."
            raise UsageError(f"--serve {port}: this port cannot be used ({error.strerror}). {remedy}") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that has closed its connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"
