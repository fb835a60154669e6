"""A Python that has imported everything before it starts: that takes seconds, and some tests start dozens of processes.

`python -m tests.forks SOCKET` listens there and forks for whoever connects. `python tests/forks.py SOCKET ...` stands
for `python ...`: it hands arguments, environment, folder and standard files over, and ends as the forked process does,
which in turn does not outlive it. There, PARENT in the environment is what the parent of the process would be.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT)


# --- the client, which imports next to nothing -------------------------------------------------------------------


def run_there(path: str, arguments: list[str]) -> int:
    """Exit code of `python ARGUMENTS` in a process that the server at `path` forks; signals are passed on to it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"."], [0, 1, 2])
        job = [arguments, {**os.environ, "PARENT": str(os.getppid())}, os.getcwd()]
        with connection.makefile("rw") as messages:
            print(json.dumps(job), file=messages, flush=True)
            process = int(messages.readline())

            def pass_on(number: int, _: FrameType | None) -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

            for number in PASSED_ON:
                signal.signal(number, pass_on)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            return int(messages.readline())


def end(code: int) -> None:
    """End as a process with this exit code of `subprocess` has ended: by a signal, if that is negative."""
    if -code in PASSED_ON:
        signal.signal(-code, signal.SIG_DFL)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


# --- the server --------------------------------------------------------------------------------------------------

EVERYTHING = (
    *("matplotlib.backends.backend_agg", "PIL.JpegImagePlugin", "torch._dynamo", "torch.distributed.run"),
    *("torch.utils.flop_counter", "fastresnet.commands.train", "fastresnet.plotting", "fastresnet.recipes"),
    *("fastresnet.training.trainer", "pipelines.convert"),
)
"""What a training imports. No thread may be started by it."""


def serve(path: str) -> Callable[[], object]:
    """Fork for every connection. Returns in the forked processes only: with what they have to do."""
    signal.signal(signal.SIGCHLD, reap)  # so that their processor time counts as ours
    with socket.create_server(path, family=socket.AF_UNIX) as listener:
        print(flush=True)  # ready
        while True:
            connection, _ = listener.accept()
            with connection:
                if not os.fork():
                    return answer(connection)


def reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(connection: socket.socket) -> Callable[[], object]:
    """Fork again, and tell the client the new process and its exit code; returns in that process only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("r") as messages:
        arguments, environment, folder = json.loads(messages.readline())
    if not (process := os.fork()):
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        return lambda: run_here(arguments)
    connection.sendall(b"%d\n" % process)
    ended = os.pidfd_open(process)
    if ended not in select.select([connection, ended], [], [])[0]:
        os.kill(process, signal.SIGKILL)  # the client has been
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"%d\n" % code)
    os._exit(0)


def run_here(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does."""
    kind, *rest = arguments
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(rest[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, ""
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if __spec__:  # -m
        for module in EVERYTHING:
            importlib.import_module(module)
        gc.freeze()
        serve(sys.argv[1])()
    else:
        end(run_there(sys.argv[1], sys.argv[2:]))
