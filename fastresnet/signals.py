"""Signals that stop a process: their handlers, and the record that a training looks at after every step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals of schedulers (Slurm's `--signal=USR1@60`), and of a terminal that closes."""


@contextlib.contextmanager
def handled(signals: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Call `handler` on `signals` in the block, which gets their handlers from before; only in the main thread.

    A signal that is ignored stays ignored: `nohup` ignores SIGHUP, and a shell without job control ignores SIGINT of
    its jobs in the background. A handler in C stays, too.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in signals}
        before = {signum: kept for signum, kept in before.items() if kept not in (signal.SIG_IGN, None)}
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield before
    finally:
        for signum, kept in before.items():
            signal.signal(signum, kept)


class StopRecord:
    """Last of the signals that ask for a stop, which do not end the process."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 for none."""


@contextlib.contextmanager
def recorded_stops() -> Iterator[StopRecord]:
    """Record stop signals and SIGINT in the block.

    A second SIGINT has its usual effect. A second one of the others has none, since a scheduler and torchrun may each
    send one.
    """
    record = StopRecord()

    def note(signum: int, _: FrameType | None) -> None:
        record.received = signum
        if signum == signal.SIGINT:
            signal.signal(signum, before[signum])

    with handled((*STOP_SIGNALS, signal.SIGINT), note) as before:
        yield record
