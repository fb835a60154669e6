"""End of a run: an early one, and a later one than it was started with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastresnet.config import ENDING, TrainConfig, differences
from fastresnet.run_folder import Progress, Row
from fastresnet.training.optimizer import lr_factors
from pipelines.errors import UsageError


def early_end(config: TrainConfig, rows: list[Row]) -> int | None:
    """Return the epoch, from 1, after which `config.early_stop` ends the run, if it is one of `rows`."""
    best, best_epoch = -1.0, 0
    for epoch, row in enumerate(rows if config.early_stop else (), 1):
        if row["val_accuracy"] > best:
            best, best_epoch = row["val_accuracy"], epoch
        elif epoch - best_epoch >= config.early_stop:
            return epoch
    return None


def has_ended(config: TrainConfig, progress: Progress, epoch_steps: int) -> bool:
    """Return True if the run has taken its last step and been evaluated, or has stopped early."""
    total_steps = config.total_steps(epoch_steps)
    is_complete = progress.step >= total_steps and progress.epoch * epoch_steps >= total_steps
    return is_complete or progress.stopped or early_end(config, progress.rows) is not None


def extends(config: TrainConfig, before: TrainConfig) -> bool:
    """Return True if a resumed run has another end than by its settings so far, `before`."""
    return any(name in ENDING for name in differences(config.to_dict(), before.to_dict()))


def check_extension(path: Path, before: TrainConfig, config: TrainConfig, progress: Progress, epoch_steps: int) -> None:
    """Raise `UsageError` unless the run in `path`, by the settings `before` so far, can go on by `config`.

    It can if learning rates and image sizes of its steps would have been the same. The extended run is then, bit for
    bit, the one that `config` describes. A callback's stop no longer holds for it.
    """
    progress.stopped &= not extends(config, before)
    done, old, new = progress.step, before.total_steps(epoch_steps), config.total_steps(epoch_steps)
    if new < done:
        raise UsageError(f"{path} has taken {done:,} steps, and these settings allow {new:,}. Give more --epochs.")
    if (end := early_end(config, progress.rows)) is not None and end * epoch_steps < done:
        raise UsageError(f"{path} would have ended after epoch {end} with --early-stop {config.early_stop}. Give more.")
    anew = f"Start another run from its weights: --init-from {path / 'last.ckpt'} and another --out."
    if progress.epoch * epoch_steps > done < new:
        raise UsageError(f"{path} has ended in mid-epoch, and cannot go on from there. {anew}")
    taken = _course(before, done, old)
    if _course(config, done, new) == taken:
        return
    kept, advice = _with_old_milestones(config, before, old / new), anew
    if kept is not None and _course(kept, done, new) == taken:
        warmup = f" --warmup {kept.warmup:g}" if kept.warmup else ""
        milestones = " ".join(map(str, kept.milestones))
        advice = f"To keep the milestones where they were, add --milestones {milestones}{warmup}."
    raise UsageError(
        f"{path} cannot go on to {new:,} steps: in a run of so many, the {done:,} taken would have had other learning "
        f"rates (--schedule {config.schedule}) or image sizes. {advice}"
    )


def _course(config: TrainConfig, steps: int, total_steps: int) -> list[tuple[float, int]]:
    """List learning rate and image size of the first `steps` of a run."""
    return list(zip(lr_factors(config, total_steps)[:steps], config.sides(total_steps)[:steps], strict=True))


def _with_old_milestones(config: TrainConfig, before: TrainConfig, ratio: float) -> TrainConfig | None:
    """Return `config` with milestones and warm-up at the same steps as `before`, which has `ratio` times the steps."""
    milestones = tuple(round(fraction * ratio, 6) for fraction in before.milestones)
    if config.schedule != "step" or not all(0 < fraction < 1 for fraction in milestones):
        return None
    return dataclasses.replace(config, milestones=milestones, warmup=round(before.warmup * ratio, 6))
