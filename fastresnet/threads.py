"""Number of CPU threads: as requested, or that with which trial steps are fastest.

PyTorch uses one for each core, the best choice on an idle machine. Beside a busy process every parallel region waits
for the busy core: 31 images/s with 2 threads and 589 with 1 (steps of ResNet-20 on 2 cores, one of them busy).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pipelines.base import usable_processors
from pipelines.errors import Note, UsageError

if TYPE_CHECKING:
    import torch

Threads = int | Literal["auto"]

MOST_THREADS = 1024

TRIAL_SECONDS, TRIAL_SHARE = 2.0, 0.02
"""Limits of a trial: seconds, or share of the work that follows, whichever is more."""

_TIMED = 3  # steps with each number of threads, after an untimed one
_ABORT_FACTOR = 2.0  # times the fastest step so far: a longer step is aborted


class _TooSlowError(Exception):
    """Abort of a trial step that takes too long."""


def check_threads(threads: Threads) -> None:
    """Raise `UsageError` if `threads` is invalid."""
    if threads != "auto" and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        raise UsageError(f"--threads {threads} is neither auto nor in 1..{MOST_THREADS}.")


@contextlib.contextmanager
def settled_threads(
    threads: Threads, device: torch.device, work: Callable[[int], object], images: int, repetitions: int
) -> Iterator[str]:
    """Compute with `threads` threads in the block; yield their number and the reason, or "" if nothing was chosen.

    `auto` chooses on a CPU (see `fastest_threads`), and changes nothing with a GPU.
    """
    import torch

    before, reason = torch.get_num_threads(), ""
    try:
        if threads != "auto":
            use_threads(threads)
        elif device.type == "cpu":
            chosen, reason = fastest_threads(work, images, repetitions)
            use_threads(chosen)
        yield reason
    finally:
        torch.set_num_threads(before)


def use_threads(threads: int) -> None:
    """Compute with `threads` threads from here on; warn with a `Note` if there are fewer processors."""
    import torch

    if threads > (processors := usable_processors()):
        message = f"{threads} threads are more than the usable processors ({processors}), and slow; see --threads."
        warnings.warn(message, Note, stacklevel=2)
    torch.set_num_threads(threads)


def fastest_threads(
    work: Callable[[int], object], images: int, repetitions: int, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[int, str]:
    """Return the number of threads with which `work` is fastest, of 1, half and all usable processors, and the reason.

    `work(n)` must compute `n` images and restore the state; `repetitions` times `images` of them follow. The trial
    takes about 2 s or 2 % of that, whichever is more. If steps are too long for a trial, it is one thread. PyTorch's
    default is kept if $OMP_NUM_THREADS is set, as schedulers do, and for a single batch.
    """
    import torch

    before, processors = torch.get_num_threads(), usable_processors()
    if "OMP_NUM_THREADS" in os.environ:
        return before, f"threads {before}: PyTorch's default, as OMP_NUM_THREADS is set"
    if processors == 1 or repetitions <= 1:
        return before, ""
    step = functools.partial(_timed_step, work, clock)
    numbers, seconds = sorted({1, processors // 2, processors}), dict[int, float]()
    try:
        affordable = _affordable_images(step, images, repetitions, len(numbers) * (1 + _TIMED) + 2)
        if not affordable:
            return (
                1,
                "threads 1: trial steps would take too long, as beside other work, which slows several threads most",
            )
        for threads in numbers:
            torch.set_num_threads(threads)
            seconds[threads] = _median(step, affordable, _ABORT_FACTOR * min(seconds.values(), default=math.inf))
    finally:
        torch.set_num_threads(before)
    chosen = min(seconds, key=seconds.__getitem__)
    rates = ", ".join(
        f"too slow with {threads}" if math.isinf(took) else f"{affordable / took:,.0f} images/s with {threads}"
        for threads, took in seconds.items()
    )
    return chosen, f"threads {chosen}: trial steps reach {rates}"


def _affordable_images(step: Callable[[int], float], images: int, repetitions: int, steps: int) -> int:
    """Return the images with which `steps` steps of one thread stay within the limits; 0 if two take too long."""
    import torch

    torch.set_num_threads(1)
    count = min(images, 2)
    step(count)
    while True:
        seconds = step(count)
        budget = max(TRIAL_SECONDS, TRIAL_SHARE * repetitions * images / count * seconds)
        if seconds > budget / steps:
            return 0
        if 2 * seconds > budget / steps or count == images:
            return count
        count = min(2 * count, images)


def _median(step: Callable[[int, float], float], images: int, limit: float) -> float:
    """Return the median time of a step; infinite if one takes more than `limit` seconds."""
    try:
        step(images, limit)  # the first one includes setup
        return statistics.median(step(images, limit) for _ in range(_TIMED))
    except _TooSlowError:
        return math.inf


def _timed_step(
    work: Callable[[int], object], clock: Callable[[], float], images: int, limit: float = math.inf
) -> float:
    """Return the seconds of a step on `images` images. Raises `_TooSlowError` after `limit` of them."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    began = clock()

    def abort_if_slow(*_: Any) -> None:
        if clock() > began + limit:
            raise _TooSlowError

    hook = register_module_forward_pre_hook(abort_if_slow)
    try:
        work(images)
    finally:
        hook.remove()
    if (seconds := clock() - began) > limit:
        raise _TooSlowError
    return seconds
