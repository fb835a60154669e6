"""Loggers of a run: the terminal and, if requested, TensorBoard, Weights & Biases, MLflow and a user's callbacks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from fastresnet.callbacks import Callback, StopTraining
from fastresnet.config import TrainConfig
from fastresnet.console import PlainConsole
from fastresnet.run_folder import Row
from fastresnet.text import as_utf8, for_terminal
from pipelines.errors import UsageError
from pipelines.sampling import IMAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """Position of a run within an epoch."""

    epoch: int
    """Number of the epoch, from 1."""
    step: int
    """Optimisation steps taken since the start of the run."""
    loss: float
    accuracy: float
    """Training accuracy of this epoch so far, percent."""
    lr: float
    """Learning rate of the last step."""
    side: int
    """Side of the last step's images, pixels."""
    images_per_s: float
    """Throughput of this epoch so far: it depends on `side`."""
    eta_s: float


class Logger:
    """Receiver of a run's events, in order; it ignores those that a subclass does not define."""

    def status(self, status: Status) -> None:
        """Receive the position within an epoch, at intervals."""

    def epoch(self, row: Row, status: Status) -> None:
        """Receive the metrics of an epoch, after its evaluation."""

    def close(self) -> None:
        """Close the log; the run may have failed."""


_LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_NO_REPORTS = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
"""Variables that keep the libraries from reporting to their makers, unless the user has set them."""


@contextlib.contextmanager
def open_loggers(
    config: TrainConfig,
    folder: Path,
    console: PlainConsole,
    total_steps: int,
    start_step: int,
    callbacks: Sequence[Callback] = (),
) -> Iterator[list[Logger]]:
    """Open the loggers that `config` requests, a progress bar on a terminal, or else plain lines, and `callbacks`.

    Raises `UsageError` if a library is missing or has no destination.
    """
    with contextlib.ExitStack() as resources:
        loggers = list[Logger]()
        for logger in _create_loggers(config, folder, console, total_steps, start_step):
            resources.callback(logger.close)
            loggers.append(logger)
        yield [*loggers, *map(CallbackLogger, callbacks)]


def report_status(loggers: Sequence[Logger], status: Status) -> None:
    """Hand the position within an epoch to all `loggers`."""
    for logger in loggers:
        logger.status(status)


def report_epoch(loggers: Sequence[Logger], row: Row, status: Status) -> bool:
    """Hand the metrics of an epoch to all `loggers`; return True if a callback asks to stop."""
    stopped = False
    for logger in loggers:
        try:
            logger.epoch(row, status)
        except StopTraining:
            stopped = True
    return stopped


def _create_loggers(
    config: TrainConfig, folder: Path, console: PlainConsole, total_steps: int, start_step: int
) -> Iterator[Logger]:
    for name, value in _NO_REPORTS.items():
        os.environ.setdefault(name, value)
    _check_libraries(config, folder)
    if config.mlflow:
        yield MlflowLogger(config, folder)
    if config.wandb:
        yield WandbLogger(config, folder)
    if config.tensorboard:  # it writes into the run folder
        yield TensorBoardLogger(folder, start_step)
    yield TerminalLogger(console, total_steps) if console.is_terminal else PlainLogger(console, total_steps)


def _check_libraries(config: TrainConfig, folder: Path) -> None:
    for option, library in _LIBRARIES.items():
        if not getattr(config, option):
            continue
        if as_utf8(name := str(folder.absolute())) != name:
            raise UsageError(
                f"--{option} takes no run folder whose name is not UTF-8: {name}. Give another with --out."
            )
        try:
            importlib.import_module(library)
        except ImportError:
            raise UsageError(f"--{option} needs an extra: pip install 'fastresnet[{option}]'") from None


class CallbackLogger(Logger):
    """Caller of a user's callback."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def epoch(self, row: Row, status: Status) -> None:
        self._callback.epoch_end(dict(row))


class TerminalLogger(Logger):
    """Live bar over the whole run, and a line for every epoch above it."""

    def __init__(self, console: PlainConsole, total_steps: int) -> None:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            redirect_stderr=sys.stderr.isatty(),  # a file of notes stays one
        )
        self._task = self._progress.add_task("", total=total_steps, epoch="", text="starting")
        self._progress.start()

    def status(self, status: Status) -> None:
        text = f"loss {status.loss:.3f}  acc {status.accuracy:.1f} %  lr {status.lr:.3g}  {_pace(status)}"
        self._progress.update(self._task, completed=status.step, epoch=status.epoch, text=text)

    def epoch(self, row: Row, status: Status) -> None:
        self.status(status)
        self._progress.console.print(epoch_line(row, status))

    def close(self) -> None:
        self._progress.stop()


class PlainLogger(Logger):
    """Log of one line for every epoch, and one every half minute within."""

    interval_s = 30.0

    def __init__(self, console: PlainConsole, total_steps: int) -> None:
        self._console, self._total_steps = console, total_steps
        self._last = time.monotonic()

    def status(self, status: Status) -> None:
        if time.monotonic() - self._last < self.interval_s:
            return
        self._print(
            f"  step {status.step}/{self._total_steps}  loss {status.loss:.3f}  acc {status.accuracy:.1f} %  "
            f"lr {status.lr:.3g}  {_pace(status)}"
        )

    def epoch(self, row: Row, status: Status) -> None:
        self._print(epoch_line(row, status))

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        self._console.print(line, soft_wrap=True)


class TensorBoardLogger(Logger):
    """Scalars for every epoch, by optimisation step."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = start_step + 1 if start_step else None
        suffix = f".{secrets.token_hex(8)}"  # no link waits at a name that cannot be predicted
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix)

    def epoch(self, row: Row, status: Status) -> None:
        for name, value in scalars(row, status).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """Scalars for every epoch, by optimisation step, in a run of Weights & Biases that --resume continues.

    Project, mode and other settings are wandb's own (`WANDB_PROJECT`, `WANDB_MODE=offline`).
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb

        if (place := folder / "wandb").is_symlink():
            remedy = "Remove it, or give another folder with --out."
            raise UsageError(f"--wandb: {place} is a symbolic link, which is not followed. {remedy}")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastresnet"),
                name=for_terminal(folder.absolute().name),
                id=_identity(folder),
                resume="allow",
                dir=str(folder),
                config=config.to_dict(),
            )
        except wandb.Error as error:
            remedy = "Log in with `wandb login`, or set WANDB_MODE=offline."
            raise UsageError(f"--wandb: {_first_sentence(error)}. {remedy}") from None

    def epoch(self, row: Row, status: Status) -> None:
        self._run.log(scalars(row, status), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class MlflowLogger(Logger):
    """Settings, and scalars for every epoch, by optimisation step, in a run of MLflow.

    Server and experiment are MLflow's own settings (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`). A resumed run
    continues the MLflow run that is tagged with its folder.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import mlflow

        self._mlflow = mlflow
        try:
            self._start(config, folder)
        except mlflow.MlflowException as error:
            remedy = (
                "Set MLFLOW_TRACKING_URI to the address of a server, or to a folder (file:/path/to/mlruns) with "
                "MLFLOW_ALLOW_FILE_STORE=true."
            )
            raise UsageError(f"--mlflow: {_first_sentence(error)}. {remedy}") from None

    def _start(self, config: TrainConfig, folder: Path) -> None:
        mlflow, identity = self._mlflow, _identity(folder)
        existing = mlflow.search_runs(filter_string=f"tags.fastresnet = '{identity}'", output_format="list")
        if existing:
            mlflow.start_run(run_id=existing[0].info.run_id)
        else:
            mlflow.start_run(run_name=for_terminal(folder.absolute().name), tags={"fastresnet": identity})
            mlflow.log_params(config.to_dict())

    def epoch(self, row: Row, status: Status) -> None:
        self._mlflow.log_metrics(scalars(row, status), step=row["step"])

    def close(self) -> None:
        self._mlflow.end_run()


def _identity(folder: Path) -> str:
    """Derive a name for the run in `folder` that stays the same when it is resumed."""
    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]


def _first_sentence(error: Exception) -> str:
    """Shorten a library's message to its first sentence."""
    return " ".join(str(error).split()).partition(". ")[0].removesuffix(".")


def scalars(row: Row, status: Status) -> dict[str, float]:
    """Name the scalars of an epoch, such as `loss/train`."""
    values = {}
    for key, value in row.items():
        if "_" in key:
            split, _, what = key.partition("_")
            values[f"{what}/{split}"] = value
    return {**values, "lr": row["lr"], "overflows": row["overflows"], "images_per_s": status.images_per_s}


def epoch_line(row: Row, status: Status) -> str:
    """Describe an epoch in one line."""
    split = "val" if "val_loss" in row else "test"
    overflows = f"{row['overflows']} overflows  " if row["overflows"] else ""
    return (
        f"epoch {row['epoch']:>3}  step {row['step']:>6}  lr {row['lr']:<8.3g}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:6.2f} %  "
        f"{split} loss {row[f'{split}_loss']:.4f} acc {row[f'{split}_accuracy']:6.2f} %  "
        f"{overflows}{_pace(status)}"
    )


def _pace(status: Status) -> str:
    pixels = f"{status.side} px  " if status.side != IMAGE_SIZE else ""
    return f"{pixels}{status.images_per_s:,.0f} images/s  ETA {format_duration(status.eta_s)}"


def format_duration(seconds: float) -> str:
    """Format as h:mm:ss, or m:ss under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
