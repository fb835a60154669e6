"""Fork server for Python processes: imports take seconds, and some tests start dozens of processes.

`python -m tests.forks FOLDER` makes the program `FOLDER/python`, which hands its arguments, environment, folder and
open files to a process that is forked here, and exits with its exit code. The forked process is killed when the
program ends. PARENT in its environment is the process id of the parent that it would have without the server.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.process
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


# --- the program, which imports next to nothing ------------------------------------------------------------------


def run_through_server(path: str, arguments: list[str]) -> int:
    """Return the exit code of `python ARGUMENTS` in a fork of the server at `path`; pass signals on to it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    files = [file for file in files if file < 3 or _is_inherited(file)]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"."], files)
        job = [arguments, {**os.environ, "PARENT": str(os.getppid())}, os.getcwd(), files]
        with connection.makefile("rw") as messages:
            print(json.dumps(job), file=messages, flush=True)
            process = int(messages.readline())

            def pass_on(number: int, _: FrameType | None) -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

            for number in PASSED_ON:
                signal.signal(number, pass_on)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            for file in files:  # so that a reader of its output sees the end of file
                os.close(file)
            return int(messages.readline())


def _is_inherited(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:  # that of the list itself
        return False


def exit_as(code: int) -> None:
    """Exit with this exit code of `subprocess`: by a signal if it is negative."""
    if -code in PASSED_ON:
        signal.signal(-code, signal.SIG_DFL)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


# --- the server --------------------------------------------------------------------------------------------------

EVERYTHING = (
    *("matplotlib.backends.backend_agg", "PIL.JpegImagePlugin", "torch._dynamo", "torch.distributed.run"),
    *("fastresnet.commands.train", "fastresnet.plotting", "fastresnet.recipes", "fastresnet.training.loop"),
    *("pipelines.prepare", "pipelines.resident"),
)
"""Modules that a training imports. None may start a thread."""
COMPILED = ("fastresnet.models.batchnorm._kernels", "pipelines.augment._load")
"""Functions that compile and load C files, and do it once in a process."""


def serve(folder: Path) -> Callable[[], object]:
    """Fork for every connection. Returns in the forked processes only, with the function that they run."""
    for module in EVERYTHING:
        importlib.import_module(module)
    for name in COMPILED:
        pkgutil.resolve_name(name)()
    gc.freeze()
    for number in PASSED_ON:  # `nohup` and background jobs ignore some, and the forked processes would, too
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, reap)  # so that their processor time counts as ours
    program = folder / "python"
    with socket.create_server(f"{folder}/socket", family=socket.AF_UNIX) as listener:
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{folder}/socket" "$@"\n')
        program.chmod(0o755)
        sys.executable = str(program)
        print(flush=True)  # ready
        while True:
            connection, _ = listener.accept()
            with connection:
                if not os.fork():
                    return handle_connection(connection)


def reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def handle_connection(connection: socket.socket) -> Callable[[], object]:
    """Fork again, and send the program the new process id and its exit code; returns in the new process only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, received, _, _ = socket.recv_fds(connection, 1, 50)
    with connection.makefile("r") as messages:
        arguments, environment, folder, files = json.loads(messages.readline())
    if not (process := os.fork()):
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        multiprocessing.process.ORIGINAL_DIR = folder  # that of the import, in which it starts processes
        return lambda: run_as_python(arguments, dict(zip(files, received, strict=True)))
    for file in {0, 1, 2, *received}:
        os.close(file)
    connection.sendall(b"%d\n" % process)
    ended = os.pidfd_open(process)
    if ended not in select.select([connection, ended], [], [])[0]:
        os.kill(process, signal.SIGKILL)  # the program has ended
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"%d\n" % code)
    os._exit(0)


def run_as_python(arguments: list[str], files: dict[int, int]) -> None:
    """Run `python ARGUMENTS` in this process, with these open files under the numbers of the program."""
    free = max(files) + 1  # above all numbers of the program: no duplicate is overwritten
    for number, file in [(number, fcntl.fcntl(file, fcntl.F_DUPFD, free)) for number, file in files.items()]:
        os.dup2(file, number)
        os.close(file)
    while arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        del arguments[0]  # -u, -B
    sys.path[1:1] = [folder for folder in os.environ.get("PYTHONPATH", "").split(":") if folder not in sys.path]
    kind, *rest = arguments
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(rest[0], main.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, ""
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def run_and_exit(work: Callable[[], object]) -> None:
    """Do `work` and exit as Python does, but without freeing modules and their objects.

    Freeing them would first copy the memory shared with the server, which takes longer than most of this work.
    """
    code = 0
    try:
        work()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise
        code = int(stop.code or 0)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if __spec__:  # -m
        run_and_exit(serve(Path(sys.argv[1])))
    else:
        exit_as(run_through_server(sys.argv[1], sys.argv[2:]))
