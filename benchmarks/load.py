"""The load that others put on the processors beside the processes that are measured."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from pipelines import usable_processors

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_TOLERATED = 0.1
"""Processors: what a machine does anyway."""


class OtherLoad:
    """Counts, from its creation on, how many of the usable processors others keep busy: their processes, and other
    guests of the same host. This process and all below it are left out.
    """

    def __init__(self) -> None:
        self._began, self._ticks = time.monotonic(), _other_ticks()

    def figures(self, threads: int) -> dict[str, Any]:
        """Return the entries of a result where `threads` threads are measured: `other_load`, the mean number of
        processors, and `overloaded`, true where they and the threads are more than the usable `processors`. Empty
        without /proc.
        """
        if self._ticks is None:
            return {}
        ticks = (_other_ticks() or 0) - self._ticks
        others = max(ticks / _TICKS_PER_S / (time.monotonic() - self._began), 0.0)
        overloaded = others + threads > usable_processors() + _TOLERATED
        return {"processors": usable_processors(), "other_load": round(others, 2), "overloaded": overloaded}


def process_tree() -> list[int]:
    """This process and all below it."""
    tree = [os.getpid()]
    for process in tree:  # grows while it is read
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has just ended
                tree += map(int, children.read_text().split())
    return tree


def _other_ticks() -> int | None:
    """Ticks that others have kept the usable processors busy; None where there is no /proc."""
    return _busy_ticks() - _own_ticks() if Path("/proc/stat").exists() else None


def _busy_ticks() -> int:
    """Ticks that the usable processors have been busy, or taken by the host (proc(5), /proc/stat)."""
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    ticks = 0
    for name, *fields in lines:
        if name in usable:
            user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, fields[:8])
            ticks += user + nice + system + sum(interrupts_and_steal)
    return ticks


def _own_ticks() -> int:
    """Ticks of this process, of all below it, and of those among them that have ended (proc(5), /proc/PID/stat)."""
    ticks = 0
    for process in process_tree():
        with contextlib.suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks
