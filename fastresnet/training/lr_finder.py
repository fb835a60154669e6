"""The learning-rate range test (Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

import numpy as np
from rich.console import Console

from fastresnet.config import TrainConfig
from fastresnet.device import explained_failures
from fastresnet.training.trainer import Trainer
from pipelines.errors import RunError, UsageError
from pipelines.sources import Report
from pipelines.store import Dataset

LOWEST, HIGHEST, STEPS = 1e-5, 10.0, 100
_DECAY = 0.9
_RISE = 4
# The first losses say more of their images than of the rate, and are left out of the search; fastai does so too.
_IGNORED = STEPS // 10


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Losses of training steps whose learning rate grows."""

    rates: list[float]
    losses: list[float]
    """Before the update with the rate of the same place."""

    @functools.cached_property
    def smoothed(self) -> np.ndarray:
        """Means of the losses so far, each of which weighs 0.9 of the one after it."""
        weights = _DECAY ** np.arange(len(self.losses))
        return np.convolve(self.losses, weights)[: len(self.losses)] / weights.cumsum()

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest, over the rate's logarithm, on its way to the lowest."""
        slopes = np.gradient(self.smoothed, np.log(self.rates))
        return self.rates[_IGNORED + int(slopes[_IGNORED : self._lowest + 1].argmin())]

    @property
    def tenth_of_lowest(self) -> float:
        """A tenth of the rate at which the smoothed loss is lowest."""
        return self.rates[self._lowest] / 10

    @property
    def _lowest(self) -> int:
        return _IGNORED + int(self.smoothed[_IGNORED:].argmin())


def find_lr(config: TrainConfig, dataset: Dataset, report: Report) -> Sweep:
    """Train as `config` says, but for 100 steps in which --lr grows from 1e-5 to 10 by the same factor from each to the
    next, and the others with it; end where the smoothed loss is above four times its minimum. Writes nothing.

    Raises as `trainer.train` does, `UsageError` where --lr is 0, and `RunError` where the loss rises at once.
    """
    if not config.lr:
        raise UsageError("--lr 0 has no proportion to other rates; give another one for --find-lr.")
    rates = np.geomspace(LOWEST, HIGHEST, STEPS).tolist()
    factors = [config.lr_scale * rate / config.lr for rate in rates]
    config = dataclasses.replace(
        config,
        iterations=STEPS,
        epochs=STEPS,
        compile="off" if config.compile == "auto" else config.compile,
    )
    losses: list[float] = []
    with (
        explained_failures("a smaller --batch-size takes less"),
        contextlib.closing(Trainer(config, dataset, Console(quiet=True), lr_factors=factors)) as trainer,
    ):
        for loss in trainer.losses():
            smoothed = Sweep(rates, [*losses, loss]).smoothed
            if not math.isfinite(loss) or smoothed[-1] > _RISE * smoothed.min():
                break
            losses.append(loss)
            report("sweep", len(losses), STEPS)
    if len(losses) < 2 * _IGNORED:
        raise RunError(f"the loss rose beyond measure at a learning rate of {rates[len(losses)]:.1e} already.")
    return Sweep(rates[: len(losses)], losses)
