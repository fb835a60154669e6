"""One contestant in a process of its own, measured from within: its speed, its memory, its threads, its start.

In one process the contestants would share memory, thread pools and imported libraries, and none could be told what it
costs. The parent gives them turns; one that has no turn waits, with its read-ahead full.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipelines.errors import RunError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every contestant does."""

    folder: Path
    """The store."""
    batch_size: int
    device: str
    dtype: str
    """Name of a torch type."""


Epochs = Callable[[int], Iterable[Any]]
"""Begins an epoch: its items are units of work, a batch delivered or a step taken."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Who takes part."""

    name: str
    kind: str
    """`ours` or `peer`."""
    opener: str
    """`module:function`, called with the `Work` and the options; returns `Epochs`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiles: bool = False
    """Whether the first batch waits for a compiler, which is then told apart."""


class Contestant:
    """The parent's end: starts the process and gives it turns. Raises `RunError` where the process fails."""

    def __init__(self, entry: Entry, work: Work) -> None:
        self.entry = entry
        self.images_per_s: list[float] = []
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, entry, work))
        self._process.start()
        theirs.close()
        self.start: dict[str, float] = self._receive()

    def take_turn(self, seconds: float) -> None:
        """Deliver batches for about `seconds`, after a third of that untimed, which uses up what was read ahead."""
        self._connection.send(seconds)
        self.images_per_s.append(self._receive())

    def finish(self) -> dict[str, int | float]:
        """End the process; returns what it used."""
        self._connection.send(None)
        used = self._receive()
        self._process.join()
        return used

    def kill(self) -> None:
        """End the process at once, if it still runs."""
        self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RunError(f"{self.entry.name} died with exit code {self._process.exitcode}.") from None
        if isinstance(answer, str):
            raise RunError(f"{self.entry.name} failed:\n{answer}")
        return answer


def _serve(connection: Connection, entry: Entry, work: Work) -> None:
    try:
        import torch  # before the clock starts: every contestant needs it

        multiprocessing.set_start_method(None, force=True)  # that of a program by itself, for the loaders' own workers
        torch.zeros(1, device=work.device)  # so is the GPU's context
        turns = _Turns(entry, work)
        connection.send(turns.start)
        while (seconds := connection.recv()) is not None:
            turns.deliver(seconds / 3)
            connection.send(turns.deliver(seconds))
        connection.send(turns.used())
    except Exception:  # noqa: BLE001  told to the parent, who ends the run with it
        connection.send(traceback.format_exc())
    finally:
        connection.close()
    os._exit(0)  # the libraries' threads and processes have nothing left to save


class _Turns:
    def __init__(self, entry: Entry, work: Work) -> None:
        self._work = work
        self._baseline = _memory()
        started = time.perf_counter()
        module, _, function = entry.opener.partition(":")
        start_epoch: Epochs = getattr(importlib.import_module(module), function)(work, **entry.options)
        self._batches = _endless(start_epoch)
        self.deliver(0)
        self.start = {"first_batch_s": time.perf_counter() - started}
        self._peak = _memory()
        if entry.compiles:
            started = time.perf_counter()
            self._batches = _endless(start_epoch)
            self.deliver(0)
            self.start["compile_s"] = self.start["first_batch_s"] - (time.perf_counter() - started)

    def deliver(self, seconds: float) -> float:
        """Images per second over at least `seconds` and one batch."""
        import torch

        started, batches = time.perf_counter(), 0
        while time.perf_counter() - started < seconds or not batches:
            next(self._batches)
            batches += 1
        if self._work.device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        self._peak = max(getattr(self, "_peak", 0), _memory())
        return batches * self._work.batch_size / elapsed

    def used(self) -> dict[str, int | float]:
        """Memory beyond PyTorch's own at its highest, processes and threads now."""
        processes = _process_tree()
        return {
            "peak_memory_mb": (self._peak - self._baseline) / 1e6,
            "processes": len(processes),
            "threads": sum(len(os.listdir(f"/proc/{process}/task")) for process in processes),
        }


def _endless(start_epoch: Epochs) -> Iterator[Any]:
    for epoch in itertools.count():
        yield from start_epoch(epoch)


def _process_tree() -> list[int]:
    """This process and all below it."""
    tree = [os.getpid()]
    for process in tree:  # grows while it is read
        tree += map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    return tree


def _memory() -> int:
    """Bytes that this process and those below it hold: pages of their own, and files that this one has in memory.

    Pages that forked processes still share are counted once.
    """
    shared = _fields("/proc/self/smaps_rollup")
    files = shared["Rss"] - shared["Anonymous"] - shared.get("Shmem", 0)
    own = 0
    for process in _process_tree():
        fields = _fields(f"/proc/{process}/smaps_rollup")
        own += fields["Pss_Anon"] + fields["Pss_Shmem"]
    return 1024 * (files + own)


def _fields(path: str) -> dict[str, int]:
    """Figures of a /proc file, kB."""
    lines = (line.split() for line in Path(path).read_text().splitlines()[1:])
    return {words[0].rstrip(":"): int(words[1]) for words in lines}
