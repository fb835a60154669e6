"""Limits of time and memory for reading files, however they are made: `with limits(size of the files): read(...)`."""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10
SPARE_BYTES = 48 << 20
"""Memory that a reader may take beyond twice the size of its content: for Python itself and for decoders."""


class Defect(Exception):
    """Outcome that must not happen."""


@contextmanager
def limits(size: int, seconds: float | None = None) -> Iterator[None]:
    """Raise `Defect` if the block takes over `seconds`, by default `SECONDS`, or over twice `size` and `SPARE_BYTES`.

    `size` is that of the content in bytes. It runs in the main thread. A reader may have swallowed the alarm, which
    ends a block that hangs: the time is compared too.
    """
    seconds = SECONDS if seconds is None else seconds

    def too_slow(*_: object) -> None:
        raise Defect(f"not done in {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, too_slow)
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of earlier work would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now (proc(5))
    resident, began = peak_memory(), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        used = peak_memory() - resident
    if time.monotonic() - began > seconds:
        too_slow()
    if used > 2 * size + SPARE_BYTES:
        raise Defect(f"{used:,} bytes of memory for {size:,} of content")


def peak_memory() -> int:
    """Read the peak of this process's resident memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
