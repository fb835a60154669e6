"""Downloads: the choice among servers, those that break off, and those that are wrong."""

import contextlib
import hashlib
import http.server
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from pipelines import downloads
from pipelines.cifar import CIFARS
from pipelines.downloads import Archive, download
from pipelines.errors import DataError, Note, UsageError

BODY = bytes(range(251)) * 40  # 10,040 bytes; those at one place are not those at another
OTHER = BODY[:-1] + b"?"


class Server(http.server.ThreadingHTTPServer):
    """A server of `body` that keeps the requests. It may be slow, break off, lie, and know no ranges.

    `cut` is the number of bytes of a connection after which it ends; `pause` is in seconds, before each 500 bytes. From
    the request after `lives` on it is overloaded.
    """

    daemon_threads = True

    def __init__(self, body=BODY, *, status=200, cut=None, pause=0.0, length=None, ranges=True, said=None, lives=99):
        super().__init__(("127.0.0.1", 0), Answer)
        self.body, self.status, self.cut, self.pause = body, status, cut, pause
        self.length, self.ranges, self.said, self.lives = length, ranges, said, lives
        self.requests = []
        self.folder = f"http://127.0.0.1:{self.server_port}/some/folder"

    def handle_error(self, *_):
        pass  # a client that has found a faster server hangs up


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.requests.append((self.path, asked))
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        body = server.body[start:]
        overloaded = len(server.requests) > server.lives
        self.send_response(503 if overloaded else 206 if start and server.status == 200 else server.status)
        if start:
            self.send_header("Content-Range", server.said or f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        if server.length != "none":
            self.send_header("Content-Length", str(server.length or len(body)))
        self.end_headers()
        for first in range(0, len(body[: server.cut]), 500):
            time.sleep(server.pause)
            self.wfile.write(body[: server.cut][first : first + 500])

    def log_message(self, *_):
        pass


@pytest.fixture
def start(monkeypatch):
    """Start a `Server`; all stop in the end. Samples are of 2,000 bytes, and silence is of half a second."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("FASTRESNET_MIRROR", raising=False)
    monkeypatch.setattr(downloads, "_SAMPLE", 2000)
    monkeypatch.setattr(downloads, "_CHUNK", 300)
    monkeypatch.setattr(downloads, "_SILENCE", 0.5)
    with contextlib.ExitStack() as stack:

        def started(*arguments, **options) -> Server:
            server = stack.enter_context(Server(*arguments, **options))
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield started


@pytest.fixture
def fetch(tmp_path, recwarn):
    """Download a.tar.gz, which is `BODY`, from `folders`; return its bytes and the notes."""

    def fetched(*folders, report=lambda *_: None) -> tuple[bytes, list[str]]:
        recwarn.clear()
        archive = Archive("the archive", "a.tar.gz", len(BODY), hashlib.md5(BODY).hexdigest(), folders)
        content = download(archive, tmp_path / "downloads", report).read_bytes()
        return content, [str(warning.message) for warning in recwarn.list if warning.category is Note]

    return fetched


def kept(tmp_path) -> dict[str, bytes]:
    """Read what is in the folder of downloads."""
    return {path.name: path.read_bytes() for path in (tmp_path / "downloads").iterdir()}


def test_a_download_is_announced_verified_and_not_repeated(start, fetch, tmp_path):
    server, progress = start(), []
    content, (announced,) = fetch(server.folder, report=lambda *done: progress.append(done))
    assert content == BODY
    assert all(text in announced for text in ("the archive", "0 MB", f"{server.folder}/a.tar.gz", "a.tar.gz.part"))
    assert kept(tmp_path) == {"a.tar.gz": BODY}
    assert {what for what, *_ in progress} == {"looking for the fastest of 1 addresses", "a.tar.gz (MB)"}
    assert fetch(server.folder) == (BODY, [])
    assert server.requests == [("/some/folder/a.tar.gz", None)]


def test_the_fastest_server_is_taken(start, fetch):
    slow, silent, fast = start(pause=0.4), start(pause=60), start(pause=0.01)
    content, (announced,) = fetch(slow.folder, silent.folder, fast.folder)
    assert content == BODY
    assert fast.folder in announced


def test_of_slow_servers_that_with_most_bytes_is_taken(start, fetch, monkeypatch):
    monkeypatch.setattr(downloads, "_SAMPLE_SECONDS", 0.5)
    slower, slow = start(pause=0.3), start(pause=0.15)
    content, (announced,) = fetch(slower.folder, slow.folder)
    assert content == BODY
    assert slow.folder in announced


def test_where_one_server_breaks_off_another_goes_on(start, fetch):
    broken, slow = start(cut=4500, lives=1), start(pause=0.1)
    content, (_, broke, going_on) = fetch(broken.folder, slow.folder)
    assert content == BODY
    assert "broke off: it ended after 0 MB" in broke
    assert "from byte 4,500 on" in going_on
    assert slow.requests[-1] == ("/some/folder/a.tar.gz", "bytes=4500-")


def test_a_server_that_breaks_off_again_and_again_delivers_all_in_the_end(start, fetch):
    server = start(cut=2500)
    assert fetch(server.folder)[0] == BODY
    assert [asked for _, asked in server.requests] == [None, *(f"bytes={n}-" for n in (2500, 5000, 7500, 10_000))]


@pytest.mark.parametrize("ranges", [True, False])
def test_the_next_download_goes_on(start, fetch, tmp_path, ranges):
    with pytest.raises(DataError, match=r"are kept: repeat the command to go on\."):
        fetch(start(cut=2500, ranges=False).folder, start(status=404).folder)
    assert kept(tmp_path) == {"a.tar.gz.part": BODY[:2500]}
    server = start(ranges=ranges)
    content, (announced,) = fetch(server.folder)
    assert content == BODY
    assert ("from byte 2,500 on" in announced) == ranges
    assert server.requests == [("/some/folder/a.tar.gz", "bytes=2500-")]
    assert kept(tmp_path) == {"a.tar.gz": BODY}


@pytest.mark.parametrize("part", [OTHER[-5000:], OTHER, BODY + b"?"], ids=["start", "whole", "too long"])
def test_an_earlier_part_of_other_bytes_is_replaced(start, fetch, tmp_path, part):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "a.tar.gz.part").write_bytes(part)
    assert fetch(start().folder)[0] == BODY


@contextlib.contextmanager
def speaking_another_protocol():
    """Yield the address of a server of mail."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ESMTP\r\n" * 3)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


WRONG = {
    "404": ({"status": 404}, "404: Not Found"),
    "another size": ({"body": b"<html>moved</html>"}, "its file has 18 bytes instead of 10040"),
    "longer than said": ({"body": BODY * 2, "length": len(BODY)}, None),
    "shorter than said": ({"body": BODY[:1500], "length": len(BODY)}, "it ended after 0 MB"),
    "no length": ({"body": BODY[:1500], "length": "none"}, "it ended after 0 MB"),
    "other bytes": ({"body": OTHER}, f"its bytes are not those of MD5 {hashlib.md5(BODY).hexdigest()}"),
    "silent": ({"pause": 2}, "nothing arrived for 0.5 seconds"),
}


@pytest.mark.parametrize("kind", [*WRONG, "nothing listens", "another protocol"])
def test_a_wrong_server_is_named_with_the_reason_and_another_is_taken(start, fetch, tmp_path, kind):
    options, reason = WRONG.get(kind, ({}, None))
    with contextlib.ExitStack() as stack:
        if kind == "nothing listens":
            folder, reason = "http://127.0.0.1:9", "refused"
        elif kind == "another protocol":
            folder, reason = stack.enter_context(speaking_another_protocol()), "220 mail.example"
        else:
            folder = start(**options).folder
        if reason is None:
            assert fetch(folder)[0] == BODY
            return
        with pytest.raises(DataError) as caught:
            fetch(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert all(text in message for text in (folder, reason, "--source FILE", "shapes10", "$FASTRESNET_MIRROR")), message
    assert len(message.splitlines()) <= 2
    assert kept(tmp_path) == {}
    if kind != "another protocol":
        assert fetch(folder, start(pause=0.05).folder)[0] == BODY


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("bytes 0-99/100", "its file has 100 bytes"),
        ("bytes 7-10039/10040", "from 7 on instead of 2500"),
        ("?", "which"),
    ],
)
def test_a_server_that_sends_another_range_is_refused(start, fetch, tmp_path, said, reason):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "a.tar.gz.part").write_bytes(BODY[:2500])
    with pytest.raises(DataError, match=reason):
        fetch(start(said=said).folder)
    assert kept(tmp_path) == {"a.tar.gz.part": BODY[:2500]}


def test_a_download_ends_after_a_time_and_can_go_on(start, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_LIMIT", 0)
    server = start()
    with pytest.raises(DataError, match=f"gave up after 0 minutes .* are kept. .* than {server.folder}"):
        fetch(server.folder)
    assert BODY.startswith(kept(tmp_path)["a.tar.gz.part"])


def test_links_in_the_places_of_the_files_are_not_followed(start, fetch, tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "downloads").mkdir()
    archive, part = tmp_path / "downloads" / "a.tar.gz", tmp_path / "downloads" / "a.tar.gz.part"
    archive.symlink_to(tmp_path / "precious")
    assert fetch(start().folder)[0] == BODY
    archive.unlink()
    part.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        fetch(start().folder)
    assert (tmp_path / "precious").read_text() == "text"


def test_a_mirror_of_ones_own_is_the_only_address(start, fetch, monkeypatch):
    official, own = start(), start(pause=0.01)
    monkeypatch.setenv("FASTRESNET_MIRROR", f"{own.folder}/")
    assert fetch(official.folder)[0] == BODY
    assert (official.requests, own.requests) == ([], [("/some/folder/a.tar.gz", None)])


@pytest.mark.parametrize("mirror", ["mirror.example", "file:///etc", "ftp://mirror.example", "https://"])
def test_a_mirror_that_is_no_address_is_refused(fetch, tmp_path, monkeypatch, mirror):
    monkeypatch.setenv("FASTRESNET_MIRROR", mirror)
    with pytest.raises(UsageError, match=f"FASTRESNET_MIRROR is '{mirror}'"):
        fetch()
    assert not (tmp_path / "downloads").exists()


def test_a_redirect_is_followed(start, fetch):
    final = start()

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"{final.folder}/a.tar.gz")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Redirect) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert fetch(f"http://127.0.0.1:{server.server_port}")[0] == BODY
        thread.join()


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_the_archives_are_those_of_torchvision(name):
    theirs = getattr(pytest.importorskip("torchvision.datasets"), name)
    archive = CIFARS[name.lower()].archive
    assert (archive.addresses()[0], archive.md5) == (theirs.url, theirs.tgz_md5)
    assert {Path(address).name for address in archive.addresses()} == {theirs.filename}
    files = dict((*theirs.train_list, *theirs.test_list, tuple(theirs.meta.values())[::2]))
    assert CIFARS[name.lower()].files_md5 in ({}, files)
