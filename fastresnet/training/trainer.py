"""The training loop: from a config to a trained network in a run folder, resumable at every step."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import io
import json
import os
import resource
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastresnet.checkpoint import load_tensors, save_tensors, take_prefix, with_prefix
from fastresnet.config import COMPILE, TrainConfig, differences, from_dict
from fastresnet.device import (
    DTYPES,
    environment,
    explained_failures,
    resolve_compile,
    resolve_device,
    resolve_precision,
)
from fastresnet.distributed import ALONE, Ranks, connected
from fastresnet.evaluation import Evaluation, evaluate, open_evaluation
from fastresnet.models import MODELS, create_model
from fastresnet.models.batchnorm import synchronize_batch_norms
from fastresnet.models.resnet9 import PatchWhitening
from fastresnet.models.stochastic_depth import seed_stochastic_depth
from fastresnet.models.summary import flops_per_image
from fastresnet.recipes import RECIPES
from fastresnet.threads import fastest_threads, use_threads
from fastresnet.training.engine import Engine, faster_backend
from fastresnet.training.loggers import Logger, Row, Status, create_loggers
from fastresnet.training.optimizer import create_optimizers, load_optimizer_state, optimizer_state
from fastresnet.training.regularization import Mixer
from fastresnet.training.schedule import lr_factor
from fastresnet.training.step import TrainStep
from pipelines import Batch, Pipeline, choose_pipeline, open_pipeline
from pipelines.augment import Normalization, normalize
from pipelines.errors import DataError, Note, RunError, UsageError, UserError, check_choice
from pipelines.files import write_bytes, write_json
from pipelines.store import Dataset

# Reading the metrics waits for a GPU, which then idles; on a CPU it costs nothing.
STATUS_EVERY = {"cpu": 1, "cuda": 100}
"""Steps between readings of the metrics."""

# A resumed run may change these, at the price of the last bits.
_INEXACT_ON_RESUME = {"pipeline", "device", "threads", "precision", "compile"}

_REHEARSED_STEPS = 20

_WHITENED_FROM = 5000  # images, as in cifar10-airbench

# Any of these makes a folder a run's, to be continued or left alone.
_RUN_FILES = ("last.ckpt", "previous.ckpt", "best.ckpt", "model.safetensors", "summary.json")


class StoppedError(UserError):
    """A signal ended the run after it had been saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclasses.dataclass(slots=True)
class Progress:
    """Where the run stands; with the tensors, all that resuming needs."""

    step: int = 0
    """Optimisation steps taken."""
    epoch: int = 0
    """Epochs finished, evaluation included."""
    rows: list[Row] = dataclasses.field(default_factory=list)
    """metrics.csv so far."""
    best_accuracy: float | None = None
    """Highest accuracy on the evaluated split, percent."""
    train_seconds: float = 0.0
    """Time spent in training steps, over all sessions."""
    total_seconds: float = 0.0
    """All time, over all sessions."""


def train(
    config: TrainConfig, dataset: Dataset, console: Console, cold_start: dict[str, float] | None = None
) -> dict[str, Any]:
    """Run `config` on `dataset` and return the contents of `summary.json`.

    `cold_start` is what it took to come here, in seconds: `import` and `data`. Both are told with what follows.
    Raises `StoppedError` after a signal, `RunError` where loss or gradients are not finite or memory runs out,
    `UsageError` where the config does not fit the machine or the run folder.
    """
    batch_size = f"--batch-size {max(config.batch_size // 2, 1)} (and another --out, if the run has begun)"
    remedy = f"--batch-size {config.batch_size} is too much; try {batch_size}"
    with (
        explained_failures(remedy),
        connected(resolve_device(config.device)) as ranks,
        contextlib.closing(Trainer(config, dataset, console, cold_start, ranks)) as trainer,
    ):
        return trainer.run()


def rehearse(config: TrainConfig, dataset: Dataset, console: Console) -> dict[str, float]:
    """Take some steps of the run that `config` describes, write nothing, and return what to expect of it.

    `train_seconds`, `evaluation_seconds`, `memory_bytes` (of the GPU, or of this process). Raises as `train` does.
    """
    with (
        explained_failures("a smaller --batch-size takes less"),
        contextlib.closing(Trainer(config, dataset, console)) as trainer,
    ):
        return trainer.rehearse()


def run_folder(config: TrainConfig, dataset: Dataset) -> Path:
    """`config.out`, else a folder in $FASTRESNET_RUNS or ./runs named after the run."""
    name = f"{config.recipe}-{config.model}-{dataset.name}-seed{config.seed}"
    return config.out or Path(os.environ.get("FASTRESNET_RUNS") or "runs") / name


class Trainer:
    """One run. `run` does everything; `close` lets go of files and processes.

    Of several `ranks`, all go through the same lines, and the first alone writes files.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        console: Console,
        cold_start: dict[str, float] | None = None,
        ranks: Ranks = ALONE,
        *,
        lr_factors: Sequence[float] | None = None,
    ) -> None:
        """`lr_factors` stand in for the schedule of `config`, one for each step."""
        self._mark = time.perf_counter()
        check_choice("recipe", config.recipe, RECIPES)
        self.cold_start = {"import": 0.0, "data": 0.0, **(cold_start or {})}
        """Seconds up to the end of the first step, by cause."""
        self.device, self.ranks = resolve_device(config.device), ranks
        pipeline, self.pipeline_reason = self._choose_pipeline(config, dataset)
        self.config = config = dataclasses.replace(
            config,
            device=self.device.type,
            precision=resolve_precision(config.precision, self.device),
            compile=resolve_compile(config.compile, self.device, alone=ranks.alone),
            pipeline=pipeline,
        )
        self._environment = {**environment(self.device), "ranks": ranks.world_size}
        self.console, self.dataset, self.folder = console, dataset, run_folder(config, dataset)
        training, self.evaluated_on, evaluated = dataset, "test", dataset
        if config.val_split:
            (training, evaluated), self.evaluated_on = dataset.hold_out(config.val_split), "val"

        with contextlib.ExitStack() as resources:
            resources.callback(torch.set_num_threads, torch.get_num_threads())
            if config.threads != "auto":
                use_threads(config.threads)
            self.pipeline = open_pipeline(
                config.pipeline,
                training,
                train=True,
                batch_size=config.batch_size,
                device=self.device,
                dtype=DTYPES[config.precision],
                seed=config.seed,
                augmentation=config.augmentation,
                decode=config.decode,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
            resources.callback(self.pipeline.close)
            self._evaluated = self._open_evaluation(evaluated)
            resources.callback(self._evaluated.close)
            self._resources = resources.pop_all()
        self.total_steps = config.total_steps(len(self.pipeline))

        torch.manual_seed(config.seed)
        self.model = self._create_model()
        _fit_whitening(self.model, training, config.normalization)
        self.model.to(self.device).to(memory_format=torch.channels_last)
        if config.sync_bn and not ranks.alone:
            synchronize_batch_norms(self.model)
        self.optimizers = create_optimizers(self.model, config)
        self.step = TrainStep(
            self.model,
            self.optimizers,
            lr_factors
            or [config.lr_scale * lr_factor(config, step, self.total_steps) for step in range(self.total_steps)],
            precision=config.precision,
            device=self.device,
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay,
            label_smoothing=config.label_smoothing,
            mixer=self._create_mixer(),
            ranks=ranks,
            batch_size=config.batch_size,
        )
        seed_stochastic_depth(self.model, config.seed, self.step.count, self._rows.start)
        self.progress = Progress()
        self._loggers: list[Logger] = []
        self._signals = _StopSignals()

    def _choose_pipeline(self, config: TrainConfig, dataset: Dataset) -> tuple[str, str]:
        """What `auto` stands for, and why, in brackets."""
        if config.pipeline != "auto":
            return config.pipeline, ""
        if config.decode == "jpeg":
            return "dali", ""
        name, reason = choose_pipeline(dataset, self.device)
        return name, f" ({reason})"

    @property
    def _rows(self) -> slice:
        """This rank's part of a batch."""
        return self.ranks.rows(self.config.batch_size)

    def _create_model(self) -> nn.Module:
        config = self.config
        return create_model(
            config.model,
            num_classes=len(self.dataset.classes),
            shortcut=config.shortcut,
            drop_path=config.drop_path,
            zero_init_residual=config.zero_init_residual,
        )

    def _create_mixer(self) -> Mixer | None:
        config, rows = self.config, self._rows
        if not config.mixup and not config.cutmix:
            return None
        if rows.start % 2 or rows.stop % 2:
            raise UsageError(
                f"--batch-size {config.batch_size}: mixup and CutMix mix pairs; give each of "
                f"{self.ranks.world_size} processes an even number."
            )
        return Mixer(
            mixup=config.mixup, cutmix=config.cutmix, seed=config.seed, device=self.device, first_row=rows.start
        )

    def _last_lr(self) -> float:
        """Learning rate of the step before."""
        return self.config.lr * self.config.lr_scale * lr_factor(self.config, self.progress.step - 1, self.total_steps)

    def _open_evaluation(self, dataset: Dataset) -> Pipeline:
        return open_evaluation(
            dataset,
            self.config.normalization,
            pipeline=self.config.pipeline,
            precision=self.config.precision,
            device=self.device,
            ranks=self.ranks,
        )

    def close(self) -> None:
        self._resources.close()

    # --- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end, or to a signal."""
        if finished := self._take_up():
            return finished
        self.progress.total_seconds += self.cold_start["import"] + self.cold_start["data"]  # from before the clock ran
        self._announce()
        self._prepare_engine()
        self._open_loggers()
        self._write_config()
        with self._signals:
            while self.progress.step < self.total_steps or self.progress.epoch * len(self.pipeline) < self.total_steps:
                self._train_epoch()
                self._finish_epoch()
            return self._finish_run()

    def rehearse(self) -> dict[str, float]:
        """See the function of this name."""
        self._announce()
        self._prepare_engine()
        with self.step.undone():
            count = min(_REHEARSED_STEPS, len(self.pipeline), self.total_steps)
            steps = self._engine.steps(0, 0, count)
            seconds = statistics.median(self._seconds(lambda: next(steps)) for _ in range(count))
        evaluation = self._seconds(lambda: self._evaluate(self.model, self._evaluated))
        epochs = -(-self.total_steps // len(self.pipeline))
        on_gpu = self.device.type == "cuda"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "train_seconds": seconds * self.total_steps,
            "evaluation_seconds": evaluation * (epochs + 2),  # the last one is with mirrored views
            "memory_bytes": torch.cuda.max_memory_reserved() if on_gpu else peak,
        }

    def losses(self) -> Iterator[float]:
        """Train without evaluating or writing anything; the mean loss of each step, for which the device is waited."""
        self._prepare_engine()
        for start in range(0, self.total_steps, len(self.pipeline)):
            count = min(len(self.pipeline), self.total_steps - start)
            for _ in self._engine.steps(start // len(self.pipeline), 0, count):
                yield self.step.metrics()[0]
                self.step.reset()

    def _seconds(self, work: Callable[[], object]) -> float:
        """Time that `work` takes, that of the device included."""
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _train_epoch(self) -> None:
        """The rest of the current epoch, up to the end of the run."""
        self._add_time(training=False)
        self.model.train()
        progress = self.progress
        start = progress.step - progress.epoch * len(self.pipeline)  # batches of this epoch that are taken
        count = min(len(self.pipeline) - start, self.total_steps - progress.step)
        status_every, checkpoint_every = STATUS_EVERY[self.device.type], self.config.checkpoint_steps
        for _ in self._engine.steps(progress.epoch, start, count):
            progress.step += 1
            if "first_step" not in self.cold_start:
                self._tell_cold_start()
            if progress.step % status_every == 0:
                self._check_loss()
                self._log_status()
            if checkpoint_every and progress.step % checkpoint_every == 0:
                self._save()
            if self.ranks.alone or progress.step % status_every == 0:  # to agree, several ranks have to wait
                self._stop_if_asked()
        self._check_loss()
        self._add_time(training=True)

    def _finish_epoch(self) -> None:
        """Evaluate, record, and save."""
        progress = self.progress
        self.ranks.broadcast(self._best_weights.buffers())  # statistics of batch norm, which each rank has of its own
        result = self._evaluate(self._best_weights, self._evaluated)
        self.ranks.sum(self.step.totals)
        loss, accuracy = self.step.metrics()
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": self._last_lr(),
            "train_loss": loss,
            "train_accuracy": accuracy,
            f"{self.evaluated_on}_loss": result.loss,
            f"{self.evaluated_on}_accuracy": result.accuracy,
            "overflows": int(self.step.overflows[0]),
        }
        progress.rows.append(row)
        progress.epoch += 1
        self.step.reset()
        if progress.best_accuracy is None or result.accuracy > progress.best_accuracy:
            progress.best_accuracy = result.accuracy
            self._save_weights("best.ckpt")
        self._save()
        self._write_metrics()
        for logger in self._loggers:
            logger.epoch(row, self._status(loss, accuracy))

    @property
    def _best_weights(self) -> nn.Module:
        """The network to evaluate and to save: the average where one is kept."""
        return self.model if self.step.averaged is None else self.step.averaged

    def _evaluate(self, model: nn.Module, pipeline: Pipeline, *, mirror: bool = False) -> Evaluation:
        return evaluate(
            model,
            pipeline,
            self.dataset.classes,
            precision=self.config.precision,
            device=self.device,
            mirror=mirror,
            after_batch=self._stop_if_asked,
            ranks=self.ranks,
        )

    def _finish_run(self) -> dict[str, Any]:
        self._save_weights("model.safetensors")
        self._plot()
        summary = self._summary()
        if self.ranks.first:
            write_json(self.folder / "summary.json", summary)
        return summary

    def _summary(self) -> dict[str, Any]:
        progress, config = self.progress, self.config
        with contextlib.closing(self._open_evaluation(self.dataset)) as pipeline:
            last = self._evaluate(self._best_weights, pipeline, mirror=True)
            best_accuracy = progress.best_accuracy
            if self.evaluated_on != "test":  # the test set is looked at once, when all is decided
                best = copy.deepcopy(self._best_weights)
                best.load_state_dict(load_tensors(self.folder / "best.ckpt")[0])
                best_accuracy = self._evaluate(best, pipeline).accuracy
        self._add_time(training=False)
        return {
            "schema": 1,
            "recipe": config.recipe,
            "model": config.model,
            "data": self.dataset.name,
            "seed": config.seed,
            "epochs": progress.epoch,
            "steps": progress.step,
            "test_accuracy": last.accuracy,
            "test_accuracy_mirror": last.mirror_accuracy,
            "best_accuracy": best_accuracy,
            "best_chosen_on": {"val": "validation", "test": "test"}[self.evaluated_on],
            "images_per_s": progress.step * config.batch_size / progress.train_seconds,
            "train_seconds": progress.train_seconds,
            "total_seconds": progress.total_seconds,
            "cold_start": self.cold_start,
            "flops": flops_per_image(self._create_model(), training=True) * config.batch_size * progress.step,
            "settings": config.to_dict(),
            "environment": {**self._environment, "threads": torch.get_num_threads()},
        }

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _take_up(self) -> dict[str, Any] | None:
        """Continue the run in the run folder, if there is one and that is wanted; its summary if it is finished."""
        if self.folder.is_symlink():
            raise UsageError(f"{self.folder} is a link, and what it points to is not written to. Name that with --out.")
        if not self.config.resume and any((self.folder / name).exists() for name in _RUN_FILES):
            raise UsageError(
                f"{self.folder} already holds a run. Continue it with --resume, or give another folder with --out."
            )
        if (checkpoint := self._read_checkpoint()) is not None:
            self._restore(*checkpoint)
            with contextlib.suppress(FileNotFoundError, ValueError):  # without a readable summary the end is run again
                return json.loads((self.folder / "summary.json").read_bytes())
        return None

    def _write_config(self) -> None:
        if not self.ranks.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        if config.root is not None:
            config = dataclasses.replace(config, root=self.dataset.folder.parent.absolute())
        if self.dataset.folder == Path(config.data):
            config = dataclasses.replace(config, data=str(self.dataset.folder.absolute()))
        write_bytes(self.folder / "config.toml", config.to_toml().encode())

    def _read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and description of last.ckpt, or where it is damaged or missing, of the one before; None at the
        start.
        """
        last, previous = (self.folder / name for name in ("last.ckpt", "previous.ckpt"))
        if last.exists() or not previous.exists():
            try:
                return _load_checkpoint(last) if last.exists() else None
            except DataError as error:
                if not previous.exists():
                    raise
                reason = str(error)
        else:
            reason = f"{last} is missing."
        tensors, description = _load_checkpoint(previous)
        step = description["progress"]["step"]
        what_next = f"Going on from {previous}, the checkpoint before: the steps after {step:,} are taken again."
        warnings.warn(f"{reason} {what_next}", Note, stacklevel=2)
        return tensors, description

    def _restore(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        if description.get("data_sha256") != self.dataset.digest:
            raise DataError(
                f"{self.folder} was trained on another data set {description['data']!r} than the one in "
                f"{self.dataset.folder}. Point --data or --root to that one, or give another folder with --out."
            )
        # A version that did not yet have a setting did what it does by default; threads were PyTorch's number.
        chooses_threads = self.device.type == "cpu" and self.ranks.alone
        settings = {"threads": torch.get_num_threads() if chooses_threads else "auto", **description["config"]}
        begun_with = from_dict(settings, f"the checkpoint in {self.folder}")
        if self.config.compile == "auto" and begun_with.compile != "graph":
            self.config = dataclasses.replace(self.config, compile=begun_with.compile)  # as measured, for the same bits
        if self.config.threads == "auto" and begun_with.threads != "auto" and chooses_threads:
            self.config = dataclasses.replace(self.config, threads=begun_with.threads)
            use_threads(begun_with.threads)
        changed = [n for n in differences(self.config.to_dict(), begun_with.to_dict()) if n != "data"]
        if decisive := [name for name in changed if name not in _INEXACT_ON_RESUME]:
            raise UsageError(
                f"{self.folder} was started with other settings: {', '.join(decisive)}. Repeat them, or continue with: "
                f"fastresnet train --config {self.folder / 'config.toml'} --out {self.folder} --resume"
            )
        if changed:
            self.console.print(f"Note: {', '.join(changed)} differ from the run's; the last bits will too.")
        self.model.load_state_dict(take_prefix("model", tensors))
        load_optimizer_state(self.optimizers, self.model, take_prefix("optimizer", tensors))
        if self.step.averaged is not None:
            self.step.averaged.load_state_dict(take_prefix("averaged", tensors))
        self.step.totals.copy_(tensors["totals"] if self.ranks.first else torch.zeros(()))
        self.step.overflows.copy_(tensors["overflows"])
        if self.step.scaler.is_enabled() and description["scaler"]:  # empty where the run was not in fp16 so far
            self.step.scaler.load_state_dict(description["scaler"])
        self.progress = Progress(**description["progress"])
        self.step.count.fill_(self.progress.step)
        self._write_metrics()  # a kill may have come between the checkpoint and this

    def _save(self) -> None:
        """Write last.ckpt: everything that continuing needs. Never after a failed step."""
        self._check_loss()  # waits for the device, so the time up to here is the steps'
        self._add_time(training=self.model.training)
        totals = self.ranks.sum(self.step.totals.clone())
        if not self.ranks.first:
            return
        tensors = {
            **with_prefix("model", self.model.state_dict()),
            **with_prefix("optimizer", optimizer_state(self.optimizers, self.model)),
            "totals": totals,
            "overflows": self.step.overflows,
        }
        if self.step.averaged is not None:
            tensors |= with_prefix("averaged", self.step.averaged.state_dict())
        description = {"progress": dataclasses.asdict(self.progress), "scaler": self.step.scaler.state_dict()}
        save_tensors(
            self.folder / "last.ckpt",
            tensors,
            {**self._description(), **description},
            previous=self.folder / "previous.ckpt",
        )
        self._add_time(training=False)

    def _write_metrics(self) -> None:
        if self.progress.rows and self.ranks.first:
            write_bytes(self.folder / "metrics.csv", _csv(self.progress.rows))

    def _save_weights(self, name: str) -> None:
        if self.ranks.first:
            save_tensors(self.folder / name, self._best_weights.state_dict(), self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "data": self.dataset.name,
            "data_sha256": self.dataset.digest,
            "classes": list(self.dataset.classes),
            **self._normalization(),
        }

    def _normalization(self) -> dict[str, Any]:
        """Mean (for each channel, or for each pixel) and standard deviation that the network's images have."""
        constants = Normalization.of(self.config.normalization, self.dataset)
        return {"mean": (constants.mean / 255).tolist(), "std": (1 / (255 * constants.scale)).tolist()}

    # --- telling, checking, stopping -----------------------------------------------------------------------------

    def _announce(self) -> None:
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        shortcut = f", shortcut {config.shortcut}" if MODELS[config.model].uses_shortcut else ""
        rows, each = self._rows, ""
        if not self.ranks.alone:
            each = f" ({rows.stop - rows.start} on each of {self.ranks.world_size} processes)"
        scaled = f"learning rate {config.lr:g} x {config.lr_scale:g}; " if config.lr_batch_size else ""
        self.console.print(
            f"{config.model} ({parameters:,} parameters{shortcut}) on {self.dataset.name}, recipe {config.recipe}: "
            f"{self.total_steps:,} steps of {config.batch_size} images{each}; {scaled}"
            f"{config.pipeline} pipeline{self.pipeline_reason}, {config.precision} on {config.device}; "
            f"run folder {self.folder}",
            highlight=False,
            soft_wrap=True,
        )
        if self.progress.step:
            self.console.print(f"resuming after step {self.progress.step:,}", highlight=False)

    def _prepare_engine(self) -> None:
        """Settle how steps are executed, and compile."""
        self.model.train()
        batch = next(self.pipeline.epoch(self.progress.epoch))
        self.cold_start["data"] += time.perf_counter() - self._mark
        self._settle_threads(batch)
        began, reason = time.perf_counter(), ""
        if self.config.compile == "auto":
            backend, reason = faster_backend(self.step, batch, self.total_steps - self.progress.step)
            compile_ = {backend: value for value, backend in COMPILE.items()}[backend]
            self.config = dataclasses.replace(self.config, compile=compile_)
            reason = f": {reason}"
        self._engine = Engine(self.step, self.pipeline, COMPILE[self.config.compile])
        if self.progress.step < self.total_steps:  # a run may have been stopped after its last step
            self._engine.prepare(batch)
        self.cold_start["compile"] = time.perf_counter() - began
        self.console.print(f"backend {self._engine.backend}{reason}", highlight=False, soft_wrap=True)

    def _settle_threads(self, batch: Batch) -> None:
        """Choose with how many threads a CPU computes, where that is left to be chosen."""
        steps = self.total_steps - self.progress.step
        if self.config.threads != "auto" or self.device.type != "cpu" or not self.ranks.alone or not steps:
            return

        began = time.perf_counter()
        threads, reason = fastest_threads(
            lambda images: self.step.trial(batch.images[:images], batch.labels[:images]), len(batch.labels), steps
        )
        use_threads(threads)
        self.config = dataclasses.replace(self.config, threads=threads)
        self.cold_start["threads"] = time.perf_counter() - began
        if reason:
            self.console.print(reason, highlight=False, soft_wrap=True)

    def _tell_cold_start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.cold_start["first_step"] = time.perf_counter() - self._mark
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in self.cold_start.items())
        self.console.print(f"cold start: {parts}", highlight=False, soft_wrap=True)

    def _open_loggers(self) -> None:
        if not self.ranks.first:
            return
        self._loggers = create_loggers(
            self.config, self.folder, self.console, total_steps=self.total_steps, start_step=self.progress.step
        )
        for logger in self._loggers:
            self._resources.callback(logger.close)

    def _log_status(self) -> None:
        metrics = self.step.metrics()
        self._add_time(training=True)
        status = self._status(*metrics)
        for logger in self._loggers:
            logger.status(status)

    def _status(self, loss: float, accuracy: float) -> Status:
        progress = self.progress
        seconds_per_step = progress.train_seconds / progress.step
        return Status(
            epoch=min(progress.epoch + 1, -(-self.total_steps // len(self.pipeline))),
            step=progress.step,
            loss=loss,
            accuracy=accuracy,
            lr=self._last_lr(),
            images_per_s=self.config.batch_size / seconds_per_step,
            eta_s=(self.total_steps - progress.step) * seconds_per_step,
        )

    def _add_time(self, *, training: bool) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.progress.total_seconds += now - self._mark
        if training:
            self.progress.train_seconds += now - self._mark
        self._mark = now

    def _check_loss(self) -> None:
        if (step := self.step.failed_at()) is not None:
            saved = (self.folder / "last.ckpt").exists()
            kept = "last.ckpt holds the last good state" if saved else "no checkpoint had been written yet"
            raise RunError(
                f"the loss or its gradients were not finite at step {step + 1} (epoch "
                f"{step // len(self.pipeline) + 1}); the weights were not updated with it, and {kept} ({self.folder}). "
                "Try a lower --lr with another --out, or --precision fp32."
            )

    def _stop_if_asked(self) -> None:
        signum = self.ranks.highest(self._signals.received, self.device)
        if not signum:
            return
        self._save()
        self._plot()
        self.ranks.wait()  # when one process leaves, torchrun stops the others
        if not self.ranks.first:
            raise SystemExit(128 + signum)
        raise StoppedError(
            signum,
            f"stopped by {signal.Signals(signum).name} after step {self.progress.step}; saved "
            f"{self.folder / 'last.ckpt'}. Repeat the command with --resume to continue.",
        )

    def _plot(self) -> None:
        if self.progress.rows and self.ranks.first:
            from fastresnet.plotting import curves, save_figure  # matplotlib takes half a second to load

            title = f"{self.config.model} on {self.dataset.name}, recipe {self.config.recipe}, seed {self.config.seed}"
            save_figure(curves({title: (self.progress.rows, self.evaluated_on)}), self.folder / "curves.png")


def _fit_whitening(model: nn.Module, dataset: Dataset, normalization: str) -> None:
    """Set the filters of the layers that whiten from the first of the training images."""
    for layer in model.modules():
        if isinstance(layer, PatchWhitening):
            images = dataset.train.images[dataset.train.ids[:_WHITENED_FROM]]
            constants = Normalization.of(normalization, dataset)
            layer.fit(normalize(torch.as_tensor(images), constants, torch.float32))


def _load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, description = load_tensors(path)
    if description is None or "progress" not in description:
        raise DataError(f"{path} is no checkpoint of a run. Remove it, or give another folder with --out.")
    return tensors, description


class _StopSignals:
    """Notes SIGTERM and SIGINT instead of dying of them. A second SIGINT has its usual effect; a second SIGTERM has
    none, since a scheduler and torchrun may each send one.
    """

    def __init__(self) -> None:
        self.received = 0
        """The last signal, 0 for none."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        if signum == signal.SIGINT:
            signal.signal(signum, self._previous[signum])

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
