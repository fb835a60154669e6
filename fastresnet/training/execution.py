"""Execution of training steps on a pipeline's batches: eager, compiled, or as one CUDA graph."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastresnet.compilation import torch_compile
from fastresnet.config import CAPTURED
from fastresnet.device import explained_failures, recorded
from fastresnet.training.step import TrainStep
from pipelines.base import Batch, GatheringPipeline, Pipeline
from pipelines.errors import RunError

PAYS_AFTER_STEPS = {"cpu": 5000, "cuda": 60_000}
"""Number of steps for each size of images from which `auto` compiles a run on a GPU, and tries to on a CPU. For
ResNet-20 compiling takes as long as 300 eager steps on a CPU (50 s on 2 cores). On an H100 it takes 27 s, and saves
0.45 ms of a captured step with PyTorch's kernels; with this program's: not measured."""


class Execution:
    """Runner of steps of `step` on batches of `pipeline`; `backend` is one of `config.COMPILE`'s values.

    `graph` records the compiled step once, from gathering the batch to counting the hits, and replays it; `capture`
    does the same with the eager step. At batch 128 a GPU takes less time for a step than the host to launch its
    kernels.
    """

    def __init__(self, step: TrainStep, pipeline: Pipeline, backend: str, sides: Sequence[int] = ()) -> None:
        """Create a runner. `sides` lists the side of the images of each step of the run; without it they stay whole."""
        self.backend = backend
        self.wait_seconds = 0.0
        """Time that the host spent waiting for batches."""
        self._step, self._pipeline = step, pipeline
        step.compiled = backend in ("compile", "graph")
        self._sides = sides
        self._replays: dict[int | None, Callable[[], None]] = {}
        """Recorded steps, by the side of their images."""
        self._images = self._labels = torch.empty(0)  # inputs of a recorded step that does not gather its batch

    def prepare(self, batch: Batch, done: int = 0) -> None:
        """Compile and record in trial steps on `batch`, which restore the state. Otherwise, the first steps would.

        Sizes of images that only the first `done` steps of the run have are left out.
        """
        pool = torch.cuda.graph_pool_handle() if self.backend in CAPTURED else None
        # The largest first: the others fit into its memory.
        sides: Sequence[int | None] = sorted(set(self._sides[done:]), reverse=True) or [None]
        for side in sides:
            self._step.side = side
            if self._step.compiled:
                self._step.trial(batch.images, batch.labels)
            if self.backend in CAPTURED:
                self._replays[side] = self._recorded(batch, pool)

    def steps(self, epoch: int, start: int, count: int) -> Iterator[None]:
        """Take `count` steps from batch `start` of `epoch` on; yield after each, which a GPU may not have finished."""
        first = epoch * len(self._pipeline) + start
        sides: Sequence[int | None] = self._sides[first : first + count] or [None] * count
        if self._replays and isinstance(self._pipeline, GatheringPipeline):
            self._pipeline.load(epoch)
            for side in sides:
                self._replays[side]()
                yield
            return
        batches = itertools.islice(self._pipeline.epoch(epoch, start), count)
        for side, batch in zip(sides, self._timed(batches), strict=True):
            if self._replays:
                self._images.copy_(batch.images, non_blocking=True)
                self._labels.copy_(batch.labels, non_blocking=True)
                self._replays[side]()
            else:
                self._step.side = side
                self._step(batch.images, batch.labels)
            yield

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and add the time of waiting for each to `wait_seconds`."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _recorded(self, batch: Batch, pool: Any) -> Callable[[], None]:
        if not self._images.numel():
            self._images, self._labels = batch.images.clone(), batch.labels.clone()
        step_once: Callable[[], None] = functools.partial(self._step, self._images, self._labels)
        if isinstance(self._pipeline, GatheringPipeline):
            step_once = self._gathering_step(self._pipeline)
        return recorded(step_once, self._step.restored, pool)

    def _gathering_step(self, pipeline: GatheringPipeline) -> Callable[[], None]:
        gather = torch_compile(pipeline.gather, fullgraph=True, dynamic=False)
        return lambda: self._step(*gather(self._step.count % len(pipeline)))


def choose_backend(step: TrainStep, batch: Batch, steps: int, sizes: int = 1) -> tuple[str, str]:
    """Return the backend that finishes `steps` more steps earlier, and the reason.

    `sizes` is the number of sizes of their images: each is compiled.
    On a CPU it is `eager` or `compile`, measured in trial steps, which restore the state. On a GPU it is `capture` or
    `graph`.
    """
    device = step.count.device.type
    plain, compiled = ("eager", "compile") if device == "cpu" else ("capture", "graph")
    if steps < sizes * PAYS_AFTER_STEPS[device]:
        return plain, "the run is too short to pay for compilation"
    if device != "cpu":
        return compiled, "the run is long enough to pay for compilation"

    def seconds(*, compiled: bool) -> float:
        step.compiled = compiled
        with step.restored():
            started = time.perf_counter()
            step(batch.images, batch.labels)
            return time.perf_counter() - started

    try:
        with explained_failures("no memory to compile in"):
            seconds(compiled=False), seconds(compiled=True)  # a first step includes setup
    except RunError as error:
        return "eager", str(error)
    pairs = [(seconds(compiled=False), seconds(compiled=True)) for _ in range(5)]
    ratio = statistics.median(compiled / eager for eager, compiled in pairs)
    return ("compile" if ratio < 1 else "eager"), f"a compiled step takes {ratio:.2f} of the time of an eager one"
