"""Number of threads that a CPU computes with: as asked for, or that with which trial steps are fastest.

PyTorch takes one for each core, the best choice on a quiet machine. Beside a busy process every parallel region waits
for the core that is taken: 31 images/s with 2 threads and 589 with 1 (steps of ResNet-20 on 2 cores, one of them busy).
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pipelines import usable_processors
from pipelines.errors import Note, UsageError

if TYPE_CHECKING:
    import torch

Threads = int | Literal["auto"]

MOST_THREADS = 1024

TRIAL_SECONDS, TRIAL_SHARE = 2.0, 0.02
"""Limits of a choice: so many seconds, or this share of the work that follows, whichever is more."""

_TIMED = 3  # steps with each number of threads, after an untimed one
_HOPELESS = 2.0  # times the fastest step so far: a step is not waited for any longer


class _TooSlowError(Exception):
    """Signal that a trial step has taken too long and is given up."""


def check_threads(threads: Threads) -> None:
    """Raise `UsageError` where `threads` is no possible number."""
    if threads != "auto" and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        raise UsageError(f"--threads {threads} is neither auto nor in 1..{MOST_THREADS}.")


@contextlib.contextmanager
def settled_threads(
    threads: Threads, device: torch.device, work: Callable[[int], object], images: int, repetitions: int
) -> Iterator[str]:
    """Compute with `threads` threads inside; yield their number and the reason, or "" where nothing was chosen.

    `auto` chooses on a CPU, see `fastest_threads`, and leaves a GPU's host alone.
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
    """Compute with `threads` threads from here on; a `Note` says so where there are fewer processors."""
    import torch

    if threads > (processors := usable_processors()):
        told = f"{threads} threads are more than the usable processors ({processors}), and slow; see --threads."
        warnings.warn(told, Note, stacklevel=2)
    torch.set_num_threads(threads)


def fastest_threads(
    work: Callable[[int], object], images: int, repetitions: int, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[int, str]:
    """Return the number of threads with which `work` is fastest, of 1, half and all usable processors, and the reason.

    `work(n)` is to compute `n` images without leaving a trace; `repetitions` times `images` of them follow. The trial
    takes about 2 s or 2 % of that, whichever is more. PyTorch's own number stays where $OMP_NUM_THREADS is set, as
    schedulers do. It also stays for a single batch, and where steps are too long for a trial.
    """
    import torch

    before, processors = torch.get_num_threads(), usable_processors()
    if "OMP_NUM_THREADS" in os.environ:
        return before, f"threads {before}: PyTorch's number, as OMP_NUM_THREADS is set"
    if processors == 1 or repetitions <= 1:
        return before, ""
    try:
        numbers = sorted({1, processors // 2, processors})
        trial = _Trial(work, images, repetitions, len(numbers), clock)
        if not trial.images:
            return before, f"threads {before}: PyTorch's number, as trial steps would take too long"
        seconds = {threads: trial.step_seconds(threads) for threads in numbers}
    finally:
        torch.set_num_threads(before)
    chosen = min(seconds, key=seconds.__getitem__)
    rates = ", ".join(
        f"too slow with {threads}" if math.isinf(took) else f"{trial.images / took:,.0f} images/s with {threads}"
        for threads, took in seconds.items()
    )
    return chosen, f"threads {chosen}: trial steps reach {rates}"


class _Trial:
    """Steps with different numbers of threads, on as many images as the time allows."""

    def __init__(
        self, work: Callable[[int], object], images: int, repetitions: int, numbers: int, clock: Callable[[], float]
    ) -> None:
        self._work, self._clock = work, clock
        self._fastest = math.inf
        self.images = self._affordable_images(images, repetitions, numbers * (1 + _TIMED) + 2)
        """Images of a step; 0 where two of them take too long."""

    def step_seconds(self, threads: int) -> float:
        """Return the median time of a step; infinite where it is given up."""
        import torch

        torch.set_num_threads(threads)
        limit = self._fastest * _HOPELESS
        try:
            self._timed(self.images, limit)  # the first one sets up more than those that follow
            seconds = statistics.median(self._timed(self.images, limit) for _ in range(_TIMED))
        except _TooSlowError:
            return math.inf
        self._fastest = min(self._fastest, seconds)
        return seconds

    def _affordable_images(self, images: int, repetitions: int, steps: int) -> int:
        """Return the images with which `steps` steps of one thread stay within the limits; the search takes two."""
        import torch

        torch.set_num_threads(1)
        count = min(images, 2)
        self._timed(count, math.inf)
        while True:
            seconds = self._timed(count, math.inf)
            budget = max(TRIAL_SECONDS, TRIAL_SHARE * repetitions * images / count * seconds)
            if seconds > budget / steps:
                return 0
            if 2 * seconds > budget / steps or count == images:
                return count
            count = min(2 * count, images)

    def _timed(self, images: int, limit: float) -> float:
        """Return the seconds of a step on so many images. Raises `_TooSlowError` after `limit` of them."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        began = self._clock()

        def give_up(*_: Any) -> None:
            if self._clock() > began + limit:
                raise _TooSlowError

        hook = register_module_forward_pre_hook(give_up)
        try:
            self._work(images)
        finally:
            hook.remove()
        seconds = self._clock() - began
        if seconds > limit:
            raise _TooSlowError
        return seconds
