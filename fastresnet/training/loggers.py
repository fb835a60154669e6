"""Loggers of a run: the terminal and, if requested, TensorBoard, Weights & Biases, MLflow and a user's callbacks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from fastresnet.callbacks import Callback, StopTraining
from fastresnet.config import TrainConfig
from fastresnet.console import PlainConsole
from fastresnet.run_folder import Row, RunFolder
from fastresnet.text import as_utf8, for_figure, for_terminal
from fastresnet.training.step import TrainStep, shrunk
from pipelines.augment import Normalization, denormalize
from pipelines.base import Pipeline
from pipelines.errors import UsageError, note
from pipelines.sampling import IMAGE_SIZE
from pipelines.store import Dataset

if TYPE_CHECKING:
    from fastresnet.figures import Figure

_FINAL = ("test_accuracy", "test_accuracy_mirror", "test_accuracy_shift", "best_accuracy", "images_per_s")
"""Figures of `summary.json` that are logged at the end, under `final/`."""
_SHOWN_IMAGES = 24


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


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Numbers of test images by true class (rows) and predicted class (columns)."""

    title: str
    classes: tuple[str, ...]
    counts: np.ndarray
    """Numbers, int64 [C, C]."""

    @functools.cached_property
    def picture(self) -> Image.Image:
        """Confusion matrix as a picture."""
        from fastresnet.plotting import confusion  # matplotlib takes half a second to load

        true, predicted = (
            np.repeat(numbers, self.counts.ravel()) for numbers in np.indices(self.counts.shape).reshape(2, -1)
        )
        return _picture(confusion(true, predicted, self.classes, self.title))

    def table(self) -> dict[str, list[Any]]:
        """List the cells that are not 0, as a table of `columns` and `data`."""
        names = list(map(as_utf8, self.classes))
        rows = [
            [names[true], names[predicted], int(self.counts[true, predicted])]
            for true, predicted in np.argwhere(self.counts)
        ]
        return {"columns": ["true class", "predicted class", "images"], "data": rows}


class Logger:
    """Receiver of a run's events, in order; it ignores those that a subclass does not define."""

    def begin(self, first_batch: Image.Image) -> None:
        """Receive a picture of the first batch, before the first step of a run, but not if the run is resumed."""

    def status(self, status: Status) -> None:
        """Receive the position within an epoch, at intervals."""

    def epoch(self, row: Row, status: Status) -> None:
        """Receive the metrics of an epoch, after its evaluation."""

    def finish(self, summary: dict[str, Any], confusion: Confusion | None) -> None:
        """Receive the contents of `summary.json`, and the confusion matrix of the final evaluation on the test set.

        Of very many classes there is no matrix.
        """

    def close(self) -> None:
        """Close the log; the run may have failed."""


class LibraryLogger(Logger):
    """Logger of a library. A failure after it has been opened ends its log, with a note, and not the run."""

    option: str
    """Flag that requests it."""


_LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_NO_REPORTS = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
"""Variables that keep the libraries from reporting to their makers, unless the user has set them."""


@contextlib.contextmanager
def open_loggers(
    config: TrainConfig,
    run: RunFolder,
    console: PlainConsole,
    total_steps: int,
    start_step: int,
    callbacks: Sequence[Callback] = (),
) -> Iterator[list[Logger]]:
    """Open the loggers that `config` requests, a progress bar on a terminal, or else plain lines, and `callbacks`.

    `train.log` in the folder of the run has plain lines too.

    Of several ranks, only the main one has any. Raises `UsageError` if a library is missing or has no destination.
    """
    with contextlib.ExitStack() as resources:
        loggers = list[Logger]()
        for logger in _create_loggers(config, run, console, total_steps, start_step) if run.writes else ():
            resources.callback(_report, [logger], lambda logger: logger.close())
            loggers.append(logger)
        yield [*loggers, *map(CallbackLogger, callbacks if run.writes else ())]


def report_first_batch(
    loggers: list[Logger], config: TrainConfig, dataset: Dataset, pipeline: Pipeline, step: TrainStep
) -> None:
    """Hand a picture of the images of the first step, as the network sees them, to the loggers of libraries.

    There is none after resuming.
    """
    if int(step.count) or not any(isinstance(logger, LibraryLogger) for logger in loggers):
        return
    from fastresnet.plotting import image_grid  # matplotlib takes half a second to load

    batch = next(pipeline.epoch(0))
    pixels = denormalize(batch.images, Normalization.of(config.normalization, dataset, batch.images.device))
    others, shares = batch.labels, torch.ones(len(batch.labels))
    if step.mixer is not None:
        pixels, others, shares = step.mixer(pixels, batch.labels, step.count)
    images = shrunk(pixels[:_SHOWN_IMAGES], config.side(0, config.total_steps(len(pipeline))))
    shown = images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    mixtures = zip(*(column[:_SHOWN_IMAGES].tolist() for column in (batch.labels, others, shares)), strict=True)
    titles = [_mixture(dataset.classes, *mixture) for mixture in mixtures]
    picture = _picture(image_grid(shown, titles, f"{len(shown)} of the {len(pixels)} images of the first step"))
    _report(loggers, lambda logger: logger.begin(picture))


def report_status(loggers: list[Logger], status: Status) -> None:
    """Hand the position within an epoch to all `loggers`."""
    _report(loggers, lambda logger: logger.status(status))


def report_epoch(loggers: list[Logger], row: Row, status: Status) -> bool:
    """Hand the metrics of an epoch to all `loggers`; return True if a callback asks to stop."""
    return _report(loggers, lambda logger: logger.epoch(row, status))


def report_end(
    loggers: list[Logger], summary: dict[str, Any], classes: tuple[str, ...], counts: np.ndarray | None
) -> dict[str, Any]:
    """Hand the written `summary` and the confusion matrix `counts` to all `loggers`; return the summary."""
    title = f"{summary['model']} on {summary['data']}: {summary['test_accuracy']:.2f} %"
    confusion = None if counts is None else Confusion(f"{title} of {counts.sum():,} images", classes, counts)
    _report(loggers, lambda logger: logger.finish(summary, confusion))
    return summary


def _report(loggers: list[Logger], event: Callable[[Logger], None]) -> bool:
    """Hand an event to all `loggers`, without those of libraries that fail; return True if a callback asks to stop."""
    stopped = False
    for logger in list(loggers):
        try:
            event(logger)
        except StopTraining:
            stopped = True
        except Exception as error:  # a library may raise anything
            if not isinstance(logger, LibraryLogger):
                raise
            loggers.remove(logger)
            note(f"{logger.option}: {_first_sentence(error)}. This log ends here; the run does not need it.")
    return stopped


def _mixture(classes: tuple[str, ...], label: int, other: int, share: float) -> str:
    """Name the class of an image, or the classes mixed in it."""
    if share == 1 or label == other:
        return for_figure(classes[label], 20)
    return f"{100 * share:.0f} % {for_figure(classes[label], 14)}\n{for_figure(classes[other], 20)}"


def _picture(figure: Figure) -> Image.Image:
    from fastresnet.plotting import rendered

    return Image.open(io.BytesIO(rendered(figure, "png"))).convert("RGB")


def _create_loggers(
    config: TrainConfig, run: RunFolder, console: PlainConsole, total_steps: int, start_step: int
) -> Iterator[Logger]:
    folder = run.path
    for name, value in _NO_REPORTS.items():
        os.environ.setdefault(name, value)
    _check_libraries(config, folder)
    if config.mlflow:
        yield MlflowLogger(config, folder)
    if config.wandb:
        yield WandbLogger(config, folder)
    if config.tensorboard:  # it writes into the run folder
        yield TensorBoardLogger(config, folder, start_step)
    yield PlainLogger(run.log, total_steps)
    if console.is_terminal:
        yield TerminalLogger(console, total_steps)
    else:
        yield PlainLogger(functools.partial(console.print, soft_wrap=True), total_steps)


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

    def __init__(self, write: Callable[[str], None], total_steps: int) -> None:
        self._write, self._total_steps = write, total_steps
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
        self._write(line)


class TensorBoardLogger(LibraryLogger):
    """Settings, pictures, and scalars for every epoch, by optimisation step."""

    option = "--tensorboard"

    def __init__(self, config: TrainConfig, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge_step = start_step + 1 if start_step else None
        suffix = f".{secrets.token_hex(8)}"  # no link waits at a name that cannot be predicted
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix)
        # `SummaryWriter.add_hparams` would begin another run, in a folder of its own.
        settings = {
            name: value if isinstance(value, int | float) else str(value) for name, value in config.to_dict().items()
        }
        *start, self._end = hparams(settings, dict.fromkeys(f"final/{name}" for name in _FINAL))
        for record in start:
            self._add_summary(record)

    def begin(self, first_batch: Image.Image) -> None:
        self._add_image("first_batch", first_batch, 0)

    def epoch(self, row: Row, status: Status) -> None:
        self._add_scalars(scalars(row, status), row["step"])

    def finish(self, summary: dict[str, Any], confusion: Confusion | None) -> None:
        self._add_scalars(final_scalars(summary), summary["steps"])
        self._add_summary(self._end)
        if confusion is not None:
            self._add_image("confusion", confusion.picture, summary["steps"])

    def _add_summary(self, record: Any) -> None:
        self._writer._get_file_writer().add_summary(record)

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _add_image(self, name: str, picture: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbLogger(LibraryLogger):
    """Settings, pictures, and scalars for every epoch, by optimisation step, in a run of Weights & Biases.

    Project, mode and other settings are wandb's own (`WANDB_PROJECT`, `WANDB_MODE=offline`). --resume continues its
    run.
    """

    option = "--wandb"

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb

        self._exit_code = 1  # of a run that fails or is stopped
        self._wandb = wandb
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

    def begin(self, first_batch: Image.Image) -> None:
        self._run.log({"first_batch": self._wandb.Image(first_batch)}, step=0)

    def epoch(self, row: Row, status: Status) -> None:
        self._run.log(scalars(row, status), step=row["step"])

    def finish(self, summary: dict[str, Any], confusion: Confusion | None) -> None:
        values: dict[str, Any] = {**final_scalars(summary)}
        if confusion is not None:
            values["confusion"] = self._wandb.Image(confusion.picture)
            values["confusion_table"] = self._wandb.Table(**confusion.table())
        self._run.log(values)  # with the last epoch; a resumed run would refuse its step, which an earlier one has sent

        self._exit_code = 0

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)


class MlflowLogger(LibraryLogger):
    """Settings, pictures, and scalars for every epoch, by optimisation step, in a run of MLflow.

    Server and experiment are MLflow's own settings (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`). A resumed run
    continues the MLflow run that is tagged with its folder.
    """

    option = "--mlflow"

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import mlflow

        self._status = "FAILED"  # of a run that fails or is stopped
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

    def begin(self, first_batch: Image.Image) -> None:
        self._mlflow.log_image(first_batch, "first_batch.png")

    def epoch(self, row: Row, status: Status) -> None:
        self._mlflow.log_metrics(scalars(row, status), step=row["step"])

    def finish(self, summary: dict[str, Any], confusion: Confusion | None) -> None:
        self._mlflow.log_metrics(final_scalars(summary), step=summary["steps"])
        if confusion is not None:
            self._mlflow.log_image(confusion.picture, "confusion.png")
            self._mlflow.log_dict(confusion.table(), "confusion_table.json")

        self._status = "FINISHED"

    def close(self) -> None:
        self._mlflow.end_run(self._status)


def _identity(folder: Path) -> str:
    """Derive a name for the run in `folder` that stays the same when it is resumed."""
    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]


def _first_sentence(error: Exception) -> str:
    """Shorten a library's message to its first sentence; without one, take the name of the error."""
    return " ".join(str(error).split()).partition(". ")[0].removesuffix(".") or type(error).__name__


def scalars(row: Row, status: Status) -> dict[str, float]:
    """Name the scalars of an epoch, such as `loss/train`."""
    values = {}
    for key, value in row.items():
        if "_" in key:
            split, _, what = key.partition("_")
            values[f"{what}/{split}"] = value
    return {**values, "lr": row["lr"], "overflows": row["overflows"], "images_per_s": status.images_per_s}


def final_scalars(summary: dict[str, Any]) -> dict[str, float]:
    """Name the final figures of a run, such as `final/test_accuracy`."""
    return {f"final/{name}": summary[name] for name in _FINAL if summary[name] is not None}


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
