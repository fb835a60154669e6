"""Trial runs, which write nothing: the dry run and the learning-rate range test.

The range test is from Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import resource
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch

from fastresnet.config import TrainConfig
from fastresnet.console import PlainConsole
from fastresnet.device import explained_failures, resolve_device, synchronize
from fastresnet.distributed import SINGLE
from fastresnet.evaluation import evaluate
from fastresnet.run_folder import Progress
from fastresnet.training.execution import Execution
from fastresnet.training.loop import Stopwatch, announcement, create_execution, create_step, open_pipelines, resolve
from fastresnet.training.network import use_training_mode
from fastresnet.training.optimizer import lr_factors
from fastresnet.training.step import TrainStep
from pipelines.base import Pipeline
from pipelines.errors import RunError, UsageError
from pipelines.sources import Report
from pipelines.store import Dataset

_DRY_STEPS = 20


@contextlib.contextmanager
def _prepared(
    config: TrainConfig, dataset: Dataset, log: Callable[[str], None], factors: Sequence[float] | None = None
) -> Iterator[tuple[TrainConfig, Execution, TrainStep, Pipeline, Pipeline]]:
    """Open a training that is ready for its first step. `factors` replace the schedule of `config`."""
    config, pipeline_reason = resolve(config, dataset, resolve_device(config.device), SINGLE)
    with (
        explained_failures("use a smaller --batch-size"),
        open_pipelines(config, dataset, SINGLE) as (pipeline, evaluated),
    ):
        total_steps = config.total_steps(len(pipeline))
        step = create_step(config, dataset, factors or lr_factors(config, total_steps), SINGLE)
        log(announcement(config, step.model, dataset, SINGLE, total_steps, pipeline_reason))
        config, execution = create_execution(config, step, pipeline, Progress(), SINGLE, log, Stopwatch())
        use_training_mode(step.model)
        yield config, execution, step, pipeline, evaluated


def dry_run(config: TrainConfig, dataset: Dataset, console: PlainConsole) -> dict[str, float]:
    """Take some steps of the run that `config` describes, write nothing, and return its expected cost.

    It has `train_seconds`, `evaluation_seconds` and `memory_bytes` (of the GPU, or of this process). Raises the same
    errors as `loop.train`.
    """
    log = functools.partial(console.print, soft_wrap=True)
    with _prepared(config, dataset, log) as (config, execution, step, pipeline, evaluated):
        device = torch.device(config.device)

        def seconds(work: Callable[[], object]) -> float:
            began = time.perf_counter()
            work()
            synchronize(device)
            return time.perf_counter() - began

        def evaluation() -> None:
            evaluate(step.model, evaluated, dataset.classes, precision=config.precision, device=device)

        total_steps = config.total_steps(len(pipeline))

        def step_seconds(first: int, end: int) -> float:
            epoch, start = divmod(first, len(pipeline))
            count = min(_DRY_STEPS, len(pipeline) - start, end - first)
            steps = execution.steps(epoch, start, count)
            with step.restored():
                step.count.fill_(first)
                return statistics.median(seconds(lambda: next(steps)) for _ in range(count))

        # Parts of the run may have images of different sizes.
        sides = config.sides(total_steps)
        starts = [step for step in range(total_steps) if step == 0 or sides[step] != sides[step - 1]]
        ends = [*starts[1:], total_steps]
        train_seconds = sum(step_seconds(*part) * (part[1] - part[0]) for part in zip(starts, ends, strict=True))
        epochs = -(-total_steps // len(pipeline))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "train_seconds": train_seconds,
            "evaluation_seconds": seconds(evaluation) * (epochs + 6),  # after the last one, six views
            "memory_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else peak,
        }


# --- the learning-rate range test --------------------------------------------------------------------------------

LOWEST, HIGHEST, STEPS = 1e-5, 10.0, 100
_DECAY = 0.9
_RISE = 4
# The first losses depend more on their images than on the rate, and the search ignores them, as in fastai.
_IGNORED = STEPS // 10


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Losses of training steps whose learning rate grows."""

    rates: list[float]
    losses: list[float]
    """Losses, each before the update with the rate at the same index."""

    @functools.cached_property
    def smoothed(self) -> np.ndarray:
        """Means of the losses so far, each with 0.9 times the weight of the next."""
        weights = _DECAY ** np.arange(len(self.losses))
        return np.convolve(self.losses, weights)[: len(self.losses)] / weights.cumsum()

    @property
    def steepest(self) -> float:
        """Rate before the minimum at which the smoothed loss falls fastest over the logarithm of the rate."""
        slopes = np.gradient(self.smoothed, np.log(self.rates))
        return self.rates[_IGNORED + int(slopes[_IGNORED : self._lowest + 1].argmin())]

    @property
    def tenth_of_lowest(self) -> float:
        """Tenth of the rate at which the smoothed loss is lowest."""
        return self.rates[self._lowest] / 10

    @property
    def _lowest(self) -> int:
        return _IGNORED + int(self.smoothed[_IGNORED:].argmin())


def find_lr(config: TrainConfig, dataset: Dataset, report: Report) -> Sweep:
    """Run the range test of the learning rates: train by `config` for 100 steps and write nothing.

    --lr grows by a constant factor per step, from 1e-5 to 10, and the other rates in proportion. The test ends when the
    smoothed loss is above four times its minimum. Raises the same errors as `loop.train`, `UsageError` if --lr is 0,
    and `RunError` if the loss diverges at once.
    """
    if not config.lr:
        raise UsageError("--lr 0 cannot be scaled to other rates; give another one for --find-lr.")
    rates = np.geomspace(LOWEST, HIGHEST, STEPS).tolist()
    factors = [config.lr_scale * rate / config.lr for rate in rates]
    config = dataclasses.replace(
        config,
        iterations=STEPS,
        epochs=STEPS,
        compile="off" if config.compile == "auto" else config.compile,
        resolutions=(max(config.resolutions),),
    )
    losses: list[float] = []
    with contextlib.closing(step_losses(config, dataset, factors)) as steps:
        for loss in steps:
            smoothed = Sweep(rates, [*losses, loss]).smoothed
            if not math.isfinite(loss) or smoothed[-1] > _RISE * smoothed.min():
                break
            losses.append(loss)
            report("sweep", len(losses), STEPS)
    if len(losses) < 2 * _IGNORED:
        raise RunError(f"the loss diverged already at a learning rate of {rates[len(losses)]:.1e}.")
    return Sweep(rates[: len(losses)], losses)


def step_losses(config: TrainConfig, dataset: Dataset, factors: Sequence[float]) -> Generator[float]:
    """Train with learning rates by `factors`; yield the mean loss of each step. Waits for the device."""
    with _prepared(config, dataset, lambda _: None, factors) as (config, execution, step, pipeline, _):
        total_steps = config.total_steps(len(pipeline))
        for start in range(0, total_steps, len(pipeline)):
            for _ in execution.steps(start // len(pipeline), 0, min(len(pipeline), total_steps - start)):
                yield step.metrics()[0]
                step.reset()
