"""Where a run's progress goes: the terminal, and TensorBoard where it is asked for."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from pipelines.errors import UsageError

Row = dict[str, Any]
"""One line of `metrics.csv`: epoch, step, lr, train_loss, train_accuracy, loss and accuracy of the evaluated split, and
overflows: updates that the epoch left out because gradients overflowed in fp16."""


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands within an epoch."""

    epoch: int
    """From 1."""
    step: int
    """Optimisation steps taken since the start of the run."""
    loss: float
    accuracy: float
    """Of this epoch so far, percent."""
    lr: float
    images_per_s: float
    eta_s: float


class Logger(Protocol):
    """Receives what happens, in order."""

    def status(self, status: Status) -> None:
        """Called now and then within an epoch."""

    def epoch(self, row: Row, status: Status) -> None:
        """Called after the evaluation at the end of an epoch."""

    def close(self) -> None:
        """The run is over, well or not."""


def create_loggers(
    folder: Path, console: Console, *, total_steps: int, tensorboard: bool, start_step: int
) -> list[Logger]:
    """A progress bar on a terminal, plain lines elsewhere, and TensorBoard events in `folder` if asked for."""
    loggers: list[Logger] = [TensorBoardLogger(folder, start_step)] if tensorboard else []
    loggers.append(TerminalLogger(console, total_steps) if console.is_terminal else PlainLogger(console, total_steps))
    return loggers


class TerminalLogger:
    """A live bar over the whole run, and a line for every epoch above it."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=total_steps, epoch="", text="starting")
        self._progress.start()

    def status(self, status: Status) -> None:
        text = (
            f"loss {status.loss:.3f}  acc {status.accuracy:.1f} %  lr {status.lr:g}  "
            f"{status.images_per_s:,.0f} images/s  ETA {format_duration(status.eta_s)}"
        )
        self._progress.update(self._task, completed=status.step, epoch=status.epoch, text=text)

    def epoch(self, row: Row, status: Status) -> None:
        self.status(status)
        self._progress.console.print(epoch_line(row, status), highlight=False)

    def close(self) -> None:
        self._progress.stop()


class PlainLogger:
    """A line for every epoch, and one every half minute within."""

    interval_s = 30.0

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console, self._total_steps = console, total_steps
        self._last = time.monotonic()

    def status(self, status: Status) -> None:
        if time.monotonic() - self._last < self.interval_s:
            return
        self._print(
            f"  step {status.step}/{self._total_steps}  loss {status.loss:.3f}  acc {status.accuracy:.1f} %  "
            f"lr {status.lr:g}  {status.images_per_s:,.0f} images/s  ETA {format_duration(status.eta_s)}"
        )

    def epoch(self, row: Row, status: Status) -> None:
        self._print(epoch_line(row, status))

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class TensorBoardLogger:
    """Scalars for every epoch, by optimisation step."""

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("--tensorboard needs TensorBoard: pip install 'fastresnet[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def status(self, status: Status) -> None:
        pass

    def epoch(self, row: Row, status: Status) -> None:
        for key, value in row.items():
            if "_" in key:
                split, _, what = key.partition("_")
                self._writer.add_scalar(f"{what}/{split}", value, row["step"])
        for key in ("lr", "overflows"):
            self._writer.add_scalar(key, row[key], row["step"])
        self._writer.add_scalar("images_per_s", status.images_per_s, row["step"])

    def close(self) -> None:
        self._writer.close()


def epoch_line(row: Row, status: Status) -> str:
    """One epoch in one line."""
    split = "val" if "val_loss" in row else "test"
    overflows = f"{row['overflows']} overflows  " if row["overflows"] else ""
    return (
        f"epoch {row['epoch']:>3}  step {row['step']:>6}  lr {row['lr']:<6g}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:6.2f} %  "
        f"{split} loss {row[f'{split}_loss']:.4f} acc {row[f'{split}_accuracy']:6.2f} %  "
        f"{overflows}{status.images_per_s:,.0f} images/s  ETA {format_duration(status.eta_s)}"
    )


def format_duration(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
