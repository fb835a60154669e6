"""Files replaced as a whole: by several writers at once, after kills, and where links and pipes lie."""

import errno
import fcntl
import os
import shutil
import signal
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines import files
from pipelines.files import is_temporary, replacing, temporary_folder, write_bytes

LEFTOVER = ".fastresnet-0123456789abcdef.tmp"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def other_process(work):
    """Fork a process that runs `work`, given a function to call when it is ready; kill it in the end."""
    reader, writer = os.pipe()
    if not (process := os.fork()):
        try:
            work(lambda: os.write(writer, b"."))
        finally:
            os._exit(0)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"."
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)


def write_forever(path, *, forks=False):
    def work(ready):
        with replacing(path) as new:
            new.write_bytes(b"half")
            (new.parent / ".tmp1a2b").write_bytes(b"a library's own")
            if forks and not os.fork():  # a worker, which outlives its parent
                signal.alarm(10)
                signal.pause()
            ready()
            signal.pause()

    return work


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a worker that outlives it"])
def test_files_of_a_killed_writer_are_removed_by_the_next_and_those_of_a_live_one_are_not(tmp_path, forks):
    with other_process(write_forever(tmp_path / "a", forks=forks)):
        (left,) = names(tmp_path)
        write_bytes(tmp_path / "b", b"new")
        assert names(tmp_path) == [left, "b"]
        assert (tmp_path / left / "a").read_bytes() == b"half"
    write_bytes(tmp_path / "b", b"newer")
    assert names(tmp_path) == ["b"]


def test_several_processes_and_threads_write_one_file_at_once(tmp_path):
    """Each write is complete, whoever comes last."""
    path, size = tmp_path / "same", 100_000

    def write(letter):
        for _ in range(30):
            write_bytes(path, letter * size)

    def in_threads(letters):
        with ThreadPoolExecutor(len(letters)) as pool:
            list(pool.map(write, letters))

    def in_another(ready):
        ready()
        in_threads([b"a", b"b"])
        ready()
        signal.pause()

    write(b"0")
    with other_process(in_another), ThreadPoolExecutor(1) as pool:
        done = pool.submit(in_threads, [b"c", b"d"])
        while not done.done():
            content = path.read_bytes()
            assert content == content[:1] * size
        done.result()
    write(b"0")
    assert names(tmp_path) == ["same"]


@pytest.mark.parametrize("cleaner", ["has removed the folder", "holds its lock", "has replaced its lock"])
def test_a_folder_taken_before_it_was_locked_is_given_up_for_another(tmp_path, monkeypatch, cleaner):
    lock, taken = files._lock, []

    def lock_late(folder):
        if taken:
            return lock(folder)
        taken.append(folder)
        if cleaner == "has removed the folder":
            shutil.rmtree(folder)
            return lock(folder)
        if cleaner == "has replaced its lock":
            with monkeypatch.context() as patch:
                patch.setattr(fcntl, "lockf", lambda *_: (folder / folder.name).unlink())
                return lock(folder)

        def hold(ready):
            files._lock(folder)
            ready()
            signal.pause()

        monkeypatch.setattr(files, "_lock", lock)
        with other_process(hold):
            return lock(folder)

    monkeypatch.setattr(files, "_lock", lock_late)
    with temporary_folder(tmp_path) as folder:
        assert folder.is_dir()
        assert folder not in taken
    write_bytes(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]


def test_a_lock_that_fails_for_another_reason_ends_the_write(tmp_path, monkeypatch):
    """Without a lock, the next writer would remove the files of this one."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "lockf", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "a", b"new")
    assert names(tmp_path) == []


def test_a_pipe_that_becomes_a_link_or_a_file_is_not_written(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(files, "_is_stream", lambda _: True)  # as it was a moment ago
    for name in ("precious", "link"):
        with pytest.raises(OSError):  # noqa: PT011  the link's error is the system's
            write_bytes(tmp_path / name, b"new")
    assert (tmp_path / "precious").read_text() == "text"


def test_a_file_system_without_locks_is_written_and_nothing_on_it_removed(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / LEFTOVER).mkdir()
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    write_bytes(tmp_path / "a", b"new")
    assert names(tmp_path) == [LEFTOVER, "a"]
    monkeypatch.undo()
    write_bytes(tmp_path / "a", b"newer")
    assert names(tmp_path) == ["a"]


def test_a_writer_may_replace_its_file_and_write_others_beside_it(tmp_path):
    """Libraries do, with a temporary name of their own."""
    with replacing(tmp_path / "a") as new:
        new.write_bytes(b"first")
        (new.parent / "part").write_bytes(b"whole")
        os.replace(new.parent / "part", new)
        (new.parent / "weights").write_bytes(b"more")
        with other_process(lambda ready: (write_bytes(tmp_path / "b", b""), ready())):
            pass
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "a", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


# --- links, pipes and devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["file", "pipe", "missing", "/dev/full"])
def test_a_link_is_replaced_and_its_target_unchanged(tmp_path, target):
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "a").symlink_to(tmp_path / target)
    write_bytes(tmp_path / "a", b"new")
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "missing").exists()


def test_links_and_files_named_as_temporary_folders_are_left_alone(tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    (others / "precious").touch()
    place = tmp_path / "place"
    place.mkdir()
    (place / LEFTOVER).symlink_to(others)
    (place / LEFTOVER.replace("0", "1")).touch()
    assert all(map(is_temporary, names(place)))
    (place / ".fastresnet-notes.tmp").mkdir()
    before = names(place)
    write_bytes(place / "a", b"new")
    assert names(place) == sorted([*before, "a"])
    assert names(others) == ["precious"]


def test_a_link_in_a_killed_writers_folder_is_removed_without_its_target(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / LEFTOVER / "deep").mkdir(parents=True)
    for folder in (tmp_path / LEFTOVER, tmp_path / LEFTOVER / "deep"):
        (folder / "file").symlink_to(tmp_path / "precious")
        (folder / "folder").symlink_to(tmp_path)
    write_bytes(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a", "precious"]
    (tmp_path / LEFTOVER).mkdir()
    (tmp_path / LEFTOVER / LEFTOVER).symlink_to(tmp_path / "missing")  # in the place of the lock
    write_bytes(tmp_path / "a", b"new")
    assert not (tmp_path / "missing").exists()


def test_a_folder_too_deep_to_be_removed_does_not_stop_a_writer(tmp_path):
    before = os.getcwd()
    (tmp_path / LEFTOVER).mkdir()
    os.chdir(tmp_path / LEFTOVER)
    for _ in range(2 * sys.getrecursionlimit()):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(before)
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    os.system(f"rm -r {tmp_path / LEFTOVER}")  # pytest cannot


@pytest.mark.parametrize("name", ["/dev/fd/1", "/proc/self/fd/1", "/dev/stdout"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_the_systems_names_for_an_open_file_are_written(tmp_path, name, kind):
    """Process substitution gives such names; standard output may lead to a file."""
    (tmp_path / "file").touch()
    reader, writer = os.pipe() if kind == "pipe" else (os.open(tmp_path / "file", os.O_RDWR) for _ in range(2))

    def write(ready):
        os.replace = os.rename = None  # the machine's own /dev/stdout would be replaced
        os.dup2(writer, 1)
        write_bytes(Path(name), b"text")
        ready()

    with other_process(write):
        assert os.read(reader, 100) == b"text"
    os.close(reader)
    os.close(writer)


def test_a_users_pipe_is_written_and_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a pipe or a device"), replacing(pipe):
        pass
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(pipe.read_text)
        write_bytes(pipe, b"text")
    assert text.result() == "text"
    assert pipe.is_fifo()
