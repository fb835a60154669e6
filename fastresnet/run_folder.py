"""Folder of a training run: its files, written and read, its lock, and the state for resuming.

A thread writes the checkpoints of a running training, from copies, one save at a time.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import fcntl
import io
import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn

from fastresnet.callbacks import Callback
from fastresnet.checkpoint import HostCopy, copy_to_host, load_tensors, save_tensors
from fastresnet.config import ENDING, TrainConfig, differences, from_dict, from_toml
from fastresnet.distributed import world_of_torchrun
from fastresnet.text import for_terminal
from pipelines.augment import Normalization
from pipelines.errors import DataError, Note, UsageError, UserError
from pipelines.files import open_file, remove_temporary_folders, write_bytes, write_json
from pipelines.prepare import store_folder
from pipelines.sampling import IMAGE_SIZE
from pipelines.store import Dataset, open_store
from pipelines.texts import read_json, read_text

Row = dict[str, Any]
"""Line of `metrics.csv`: epoch, step, lr, train_loss, train_accuracy, loss and accuracy of the evaluated split, and
overflows: updates that the epoch skipped because gradients overflowed in fp16."""

SAVE_EVERY_S = 10.0
"""Shortest time from one save to the next, except for those that the training waits for."""

# Any of these marks a folder as a run, to be continued or left unchanged.
_RUN_FILES = ("last.ckpt", "previous.ckpt", "best.ckpt", "model.safetensors", "summary.json")
_LOCK = ".lock"

LOG = "train.log"
"""File of a run with the lines that a training prints."""

# A resumed run may change these; the last bits then differ.
_INEXACT_ON_RESUME = {"pipeline", "device", "threads", "precision", "compile", "kernels"}


def run_path(config: TrainConfig, data: str) -> Path:
    """Return `config.out`, else a folder in $FASTRESNET_RUNS or ./runs named after the run; `data` names its data."""
    name = f"{config.recipe}-{config.model}-{data}-seed{config.seed}"
    return config.out or Path(os.path.expanduser(os.environ.get("FASTRESNET_RUNS") or "runs")) / name


@dataclasses.dataclass(slots=True)
class Progress:
    """Position of a run; with the tensors of a checkpoint, the state for resuming."""

    step: int = 0
    """Optimisation steps taken."""
    epoch: int = 0
    """Epochs finished, evaluation included."""
    rows: list[Row] = dataclasses.field(default_factory=list)
    """Lines of metrics.csv so far."""
    best_accuracy: float | None = None
    """Highest accuracy on the evaluated split, percent."""
    train_seconds: float = 0.0
    """Time spent in training steps, over all sessions."""
    total_seconds: float = 0.0
    """Total time, over all sessions."""
    stopped: bool = False
    """End of the run by a callback."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """Contents of last.ckpt."""

    path: Path
    tensors: dict[str, Tensor]
    """Tensors of `TrainStep.state_dict`."""
    progress: Progress
    scaler: dict[str, Any]
    """State of the gradient scaler; empty if the run was not in fp16 so far."""
    config: dict[str, Any]
    """Settings by `TrainConfig.to_dict`."""
    data: str
    data_sha256: str | None

    @contextlib.contextmanager
    def checked(self, total_steps: int, epoch_steps: int) -> Iterator[None]:
        """Raise `DataError` if the position is not in a run of so many steps, or the block cannot load the tensors."""
        step, epoch = self.progress.step, self.progress.epoch
        first, last = (min(number * epoch_steps, total_steps) for number in (epoch, epoch + 1))
        if not first <= step <= last or (epoch - 1) * epoch_steps >= total_steps:
            raise DataError(f"{self.path} is at step {step} of epoch {epoch}, which the run does not have. {_REMEDY}")
        try:
            yield
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{self.path} has other tensors than the run. {_REMEDY}") from None


def inexact_changes(config: TrainConfig, before: TrainConfig) -> list[str]:
    """List the settings in which `config` differs from those of a run so far and that affect the last bits."""
    return [name for name in differences(config.to_dict(), before.to_dict()) if name in _INEXACT_ON_RESUME]


def check_folder(folder: Path) -> None:
    """Raise `UsageError` if run `folder` is a link, or contains a pipe, a device or a link to one.

    A run would write to other places, or wait for them forever. A file in its place is an error too.
    """
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link, which is not followed. Give its target with --out.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Give a folder with --out.")
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except FileNotFoundError:  # another run has removed the folder, as it was empty
        paths = []
    for path in paths:
        if path.name == LOG and (path.is_symlink() or path.is_dir()):
            raise UsageError(f"{path} is a link or a folder. Remove it, or give another folder with --out.")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is a pipe or a device. Remove it, or give another folder with --out.")


def check_unused(folder: Path, *, resume: bool) -> None:
    """Raise `UsageError` if a run exists in `folder` and `resume` is False, or if it has runs of several seeds."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        if "seeds" in read_json(folder / "summary.json"):
            raise UsageError(f"{folder} has the runs of several seeds. Give another folder with --out.")
    if not resume and any((folder / name).exists() for name in _RUN_FILES):
        raise UsageError(f"{folder} already holds a run. Continue it with --resume, or give another folder with --out.")


def check_usable(folder: Path, *, resume: bool) -> None:
    """Raise the errors that a training in `folder` would begin with: before the work for it, which may take minutes.

    Of several ranks, only the main one checks: it may have begun the run when another one comes here.
    """
    if world_of_torchrun().is_main:
        with RunFolder(folder).locked():
            check_unused(folder, resume=resume)


class RunFolder:
    """Files of one run. Of several ranks, only the main one `writes` them."""

    def __init__(self, path: Path, *, writes: bool = True, callbacks: Sequence[Callback] = ()) -> None:
        self.path, self.writes, self._callbacks = path, writes, callbacks
        self._description: dict[str, Any] = {}
        self._writer = ThreadPoolExecutor(1, "saving")
        self._saving: Future[None] | None = None
        self._next_save = 0.0  # on the clock of `time.monotonic`
        self._best: HostCopy | None = None  # until a save writes it
        self._written_rows = 0
        self._unwritten: list[str] = []  # lines of train.log, until the run begins

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Lock the folder against other trainings. It is created and, if it stays empty, removed again.

        The last save is complete after the block. Raises the error of `check_folder`, `UsageError` if another process
        holds the lock, and `OSError` if the last save has failed.
        """
        check_folder(self.path)
        if not self.writes:
            yield self
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            with _lock(self.path / _LOCK), self._writer:
                remove_temporary_folders(self.path)
                try:
                    yield self
                except UserError as error:
                    if not _is_stderr(self.path / LOG):
                        self.log(f"fastresnet: {error}")
                    raise
                finally:
                    self._finish_save()  # its error came before one of the block
        finally:
            with contextlib.suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()

    # --- resuming ------------------------------------------------------------------------------------------------

    def read_checkpoint(self, *, resume: bool) -> Checkpoint | None:
        """Read last.ckpt or, if it is damaged or missing, previous.ckpt; return None if no run has started.

        Raises `UsageError` if a run exists and `resume` is False, or if the folder has runs of several seeds. Raises
        `DataError` if neither file is intact.
        """
        check_unused(self.path, resume=resume)
        last, previous = (self.path / name for name in ("last.ckpt", "previous.ckpt"))
        if not last.exists() and not previous.exists():
            return None
        try:
            return _load_checkpoint(last)
        except DataError as error:
            if not previous.exists():
                raise
            reason = str(error)
        checkpoint = _load_checkpoint(previous)
        repeated = f"the steps after {checkpoint.progress.step:,} are repeated"
        warnings.warn(f"{reason} Continuing from {previous}, the checkpoint before: {repeated}.", Note, stacklevel=2)
        return checkpoint

    def continued(
        self, config: TrainConfig, checkpoint: Checkpoint, dataset: Dataset, *, threads_matter: bool
    ) -> tuple[TrainConfig, TrainConfig]:
        """Return `config` with what the run has measured and read by itself, and the settings of the run so far.

        Raises `DataError` on another data set, and `UsageError` on settings that must not change.
        """
        if checkpoint.data_sha256 != dataset.digest:
            raise DataError(
                f"{self.path} was trained on another data set {checkpoint.data!r} than the one in {dataset.folder}. "
                "Point --data or --root to that one, give another folder with --out, or continue with: "
                f"{self._command_to_continue()}"
            )
        # Older versions, without a setting, behaved like its default, but with PyTorch's number of threads and, on a
        # GPU, its kernels.
        older = {
            "threads": torch.get_num_threads() if threads_matter else "auto",
            "kernels": "torch" if checkpoint.config.get("device") == "cuda" else "auto",
        }
        settings = {**older, **checkpoint.config}
        saved = from_dict(settings, f"the checkpoint in {self.path}")
        for name in ("compile", "kernels") if config.device == saved.device else ():
            if getattr(config, name) == "auto":
                config = dataclasses.replace(config, **{name: getattr(saved, name)})  # as measured, for the same bits
        if config.threads == "auto" and threads_matter:
            config = dataclasses.replace(config, threads=saved.threads)
        if config.init_sha256 is None:
            config = dataclasses.replace(config, init_sha256=saved.init_sha256)
        free = {"data"} | _INEXACT_ON_RESUME | ENDING
        if decisive := [name for name in differences(config.to_dict(), saved.to_dict()) if name not in free]:
            raise UsageError(
                f"{self.path} was started with other settings: {', '.join(decisive)}. Repeat them, or continue with: "
                f"{self._command_to_continue()}"
            )
        return config, saved

    def _command_to_continue(self) -> str:
        options = ["--config", str(self.path / "config.toml"), "--out", str(self.path), "--resume"]
        return f"fastresnet train {shlex.join(options)}"

    def read_summary(self) -> dict[str, Any] | None:
        """Read summary.json; None if it is missing or unreadable: then the end of the run is repeated."""
        with contextlib.suppress(DataError):
            return read_summary(self.path / "summary.json")
        return None

    # --- writing -------------------------------------------------------------------------------------------------

    def begin(self, config: TrainConfig, asked: TrainConfig, dataset: Dataset, epoch: int) -> None:
        """Write config.toml, and describe `config` and `dataset` in all weights and checkpoints that follow.

        config.toml has what was `asked` of the machine, such as `auto`, to repeat the run on others. The summary of a
        finished run that goes on after `epoch` gets its number, as do its weights.
        """
        constants = Normalization.of(config.normalization, dataset)
        self._description = {
            "config": config.to_dict(),
            "data": dataset.name,
            "data_sha256": dataset.digest,
            "classes": list(dataset.classes),
            "mean": (constants.mean / 255).tolist(),
            "std": (1 / (255 * constants.scale)).tolist(),
        }
        config = dataclasses.replace(config, **{name: getattr(asked, name) for name in _INEXACT_ON_RESUME})
        if config.root is not None:
            config = dataclasses.replace(config, root=dataset.folder.parent.absolute())
        if dataset.folder == Path(config.data):
            config = dataclasses.replace(config, data=str(dataset.folder.absolute()))
        if self.writes:
            if self.read_summary() is not None:  # it was finished
                for name, ending in (("summary", "json"), ("model", "safetensors")):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(self.path / f"{name}.{ending}", self.path / f"{name}-{epoch}.{ending}")
            write_bytes(self.path / "config.toml", config.to_toml().encode())
        lines, self._unwritten = self._unwritten, []
        self.log(*lines)

    def log(self, *lines: str) -> None:
        """Append `lines` to train.log, once the run has begun: one that is refused leaves nothing."""
        if not self._description:
            self._unwritten += lines
        elif self.writes and lines:
            with contextlib.suppress(OSError), open(self.path / LOG, "a", encoding="utf-8", opener=open_file) as file:
                file.writelines(f"{for_terminal(line)}\n" for line in lines)

    def keep_best(self, model: nn.Module) -> None:
        """Keep a copy of the weights of `model`, which the next save writes to best.ckpt."""
        if self.writes:
            self._best = copy_to_host(model.state_dict())

    def save(self, tensors: dict[str, Tensor], progress: Progress, scaler: dict[str, Any], *, wait: bool) -> None:
        """Save the state of the run in the background, unless the last save began less than `SAVE_EVERY_S` ago.

        With `wait`, save it in any case, and return when it is complete. Raises the `OSError` of this save, or without
        `wait` of the one before.
        """
        if not self.writes or (time.monotonic() < self._next_save and not wait):
            return
        with contextlib.suppress(*[OSError] * wait):  # this save replaces the one before
            self._finish_save()
        self._next_save = time.monotonic() + SAVE_EVERY_S
        description = {**self._description, "progress": dataclasses.asdict(progress), "scaler": scaler}
        self._saving = self._writer.submit(self._save, self._best, copy_to_host(tensors), description)
        self._best = None
        if wait:
            self._finish_save()

    def _save(self, best: HostCopy | None, last: HostCopy, description: dict[str, Any]) -> None:
        """Write best.ckpt, last.ckpt and metrics.csv; rename the last.ckpt before to previous.ckpt.

        After a kill in between, best.ckpt may be ahead, and the resumed run repeats its epoch. metrics.csv may be
        behind, and the resumed run writes it.
        """
        if best is not None:
            save_tensors(self.path / "best.ckpt", best(), self._description)
        save_tensors(self.path / "last.ckpt", last(), description, previous=self.path / "previous.ckpt")
        self.write_metrics(description["progress"]["rows"])
        for callback in self._callbacks:
            callback.checkpoint(self.path / "last.ckpt")

    def _finish_save(self) -> None:
        """Wait for the save in progress, if any. Raises its `OSError`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Write the weights of `model` to file `name`."""
        if self.writes:
            tensors = copy_to_host(model.state_dict())  # safetensors does not store shared memory
            save_tensors(self.path / name, tensors(), self._description)

    def load_weights(self, name: str, model: nn.Module) -> nn.Module:
        """Return a copy of `model` with the weights in file `name`."""
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(load_tensors(self.path / name)[0])
        return loaded

    def write_metrics(self, rows: list[Row]) -> None:
        """Write metrics.csv, if there are new rows."""
        if len(rows) > self._written_rows and self.writes:
            self._written_rows = len(rows)
            text = io.StringIO()
            writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_bytes(self.path / "metrics.csv", text.getvalue().encode())

    def draw_curves(self, rows: list[Row]) -> None:
        """Draw curves.png, if there are rows."""
        if rows and self.writes:
            from fastresnet.plotting import curves, save_figure  # matplotlib takes half a second to load

            run = Run(self.path, rows, None, from_dict(self._description["config"], "the run"))
            save_figure(curves({run.title: run}), self.path / "curves.png")

    def write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, which ends the run, and return it."""
        if self.writes:
            write_json(self.path / "summary.json", summary)
            more = "".join(f", with {name} {accuracy:.2f} %" for name, accuracy in tta_accuracies(summary))
            self.log(f"finished: test accuracy {summary['test_accuracy']:.2f} %{more}")
        return summary

    def saved_state(self) -> str:
        """Return a clause on the saved state of a failed run. Waits for the save in progress."""
        self._finish_save()
        if (self.path / "last.ckpt").exists():
            return "last.ckpt holds the last saved state"
        return "no checkpoint had been written yet"


_REMEDY = "Remove it, or give another folder with --out."
_NEEDED = {"epoch", "step", "lr", "train_loss", "train_accuracy"}


def _load_checkpoint(path: Path) -> Checkpoint:
    tensors, description = load_tensors(path)
    try:
        if description is None:
            raise TypeError
        if not isinstance(description["config"], dict) or not isinstance(description["scaler"], dict):
            raise TypeError
        return Checkpoint(
            path,
            tensors,
            _checked_progress(**description["progress"]),
            description["scaler"],
            description["config"],
            description["data"],
            description.get("data_sha256"),
        )
    except (KeyError, TypeError):
        raise DataError(f"{path} is no checkpoint of a run. {_REMEDY}") from None


def _checked_progress(**saved: Any) -> Progress:
    """Build the position of a run from a file. Raises `TypeError` if it is none."""
    progress = Progress(**saved)
    counts = (progress.step, progress.epoch)
    seconds = (progress.train_seconds, progress.total_seconds)
    best = () if progress.best_accuracy is None else (progress.best_accuracy,)
    if not all(_is_a(count, int) and 0 <= count < 1 << 53 for count in counts):
        raise TypeError
    if not isinstance(progress.stopped, bool):
        raise TypeError
    if not all(_is_a(figure, int | float) for figure in (*seconds, *best)) or min(seconds) < 0:
        raise TypeError
    rows = progress.rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        raise TypeError
    if not all(type(value) in (int, float) for row in rows for value in row.values()):
        raise TypeError
    if rows and not any(rows[0].keys() >= {*_NEEDED, f"{name}_loss", f"{name}_accuracy"} for name in ("test", "val")):
        raise TypeError
    return progress


def _is_stderr(path: Path) -> bool:
    """Return True if what this process writes to stderr is in file `path`, as in the trainings of several seeds."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(2))
    except OSError:
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which names this process; create its folder.

    The system releases the lock however the process ends. It locks out processes, not threads: `_HELD` locks out those
    of this process.
    """
    name = Path(os.path.realpath(path.parent), path.name)
    with _HELD_GUARD:
        if name in _HELD:
            raise UsageError(_in_use(path.parent, f"{os.getpid()}, this one"))
        _HELD.add(name)
    try:
        descriptor = _acquire(path)
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)
    finally:
        _HELD.remove(name)


_HELD_GUARD = threading.Lock()
_HELD: set[Path] = set()
"""Lock files that this process holds."""


def _acquire(path: Path) -> int | None:
    """Lock `path` and return its descriptor; return None in a read-only folder, which cannot be damaged."""
    attempts = 1000
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_file(path, os.O_RDWR)
        except (FileNotFoundError, FileExistsError):  # the last holder has removed the folder, or one above it
            if not (attempts := attempts - 1):
                raise
            continue
        except PermissionError:
            if os.path.lexists(path):
                raise UsageError(f"{path} belongs to another user. Give another folder with --out.") from None
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by workers
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(_in_use(path.parent, holder or "unknown")) from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                with contextlib.suppress(OSError):  # a full disk: the holder is only named to others
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)  # the last holder has removed the file


def _in_use(folder: Path, holder: str) -> str:
    message = f"{folder} is in use by another training, process {holder}. Give another folder with --out."
    if os.environ.get("SLURM_NTASKS") not in (None, "", "1") and "RANK" not in os.environ:
        message += " Slurm has started several tasks: start one, with torchrun in it (docs/cluster.md)."
    return message


# --- reading -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """Finished or unfinished run."""

    folder: Path
    rows: list[Row]
    """Lines of metrics.csv, one for each epoch."""
    summary: dict[str, Any] | None
    """Contents of summary.json; None while the run is not finished."""
    config: TrainConfig | None
    """Settings, of a finished run those that `auto` stood for; None if config.toml is missing."""

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def title(self) -> str:
        """Network, data, recipe and seed; the name if the settings are missing."""
        config = self.config
        if config is None:
            return self.name
        data = self.summary["data"] if self.summary else Path(config.data).name
        return f"{config.model} on {data}, recipe {config.recipe}, seed {config.seed}"

    @property
    def evaluated_on(self) -> str:
        """Split evaluated after every epoch, `test` or `val`."""
        return "val" if "val_loss" in self.rows[0] else "test"

    @property
    def size_changes(self) -> list[tuple[float, int]]:
        """Sides of the training images so far, in pixels, each with the epochs before it; none if all are whole."""
        if self.config is None or set(self.config.resolutions) == {IMAGE_SIZE}:
            return []
        sides, epoch_steps = self.config.resolutions, max(int(self.rows[0]["step"]), 1)
        total_steps = self.config.total_steps(epoch_steps)
        starts = [-(-number * total_steps // len(sides)) for number in range(len(sides))]  # as in `TrainConfig.side`
        now = self.rows[-1]["step"]
        return [(start / epoch_steps, side) for start, side in zip(starts, sides, strict=True) if start < now]


@dataclasses.dataclass(frozen=True)
class FinishedRun(Run):
    """Finished run."""

    summary: dict[str, Any]
    """Contents of summary.json."""


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """Name runs for a plot: one by its title, several by their folders, of which those of equal names have the path."""
    if len(runs) == 1:
        return {run.title: run for run in runs}
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.folder): run for run in runs}


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises `DataError` if it is not a run, has no finished epoch, or is damaged."""
    metrics = folder / "metrics.csv"
    if not folder.exists():
        raise DataError(f"{folder} does not exist.")
    if not metrics.exists():
        if (folder / "summary.json").exists():
            read_summary(folder / "summary.json")  # of several seeds: an error that says so
        raise DataError(f"{folder} has no metrics.csv: it is not a run folder, or no epoch of the run is finished.")
    try:
        rows = _read_metrics(read_text(metrics))
        if any(not abs(row[name]) <= _LARGEST for row in rows for name in ("epoch", "step", "lr")):
            raise ValueError("an epoch, step or lr is not a number")
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{metrics} is damaged: {str(error)[:200]}.") from None
    summary = read_summary(path) if (path := folder / "summary.json").exists() else None
    config = from_toml(path) if (path := folder / "config.toml").exists() else None
    return Run(folder, rows, summary, config and _resolved(config, summary))


def _resolved(config: TrainConfig, summary: dict[str, Any] | None) -> TrainConfig:
    """Return the settings in config.toml with what the finished run has chosen for `auto`, if its summary says so."""
    chosen = {name: value for name, value in (summary or {}).get("settings", {}).items() if name in _INEXACT_ON_RESUME}
    return dataclasses.replace(config, **chosen)


def read_finished_run(folder: Path) -> FinishedRun:
    """Read a run folder as `read_run` does. Raises `DataError` if the run is not finished, too."""
    run = read_run(folder)
    return FinishedRun(run.folder, run.rows, read_summary(folder / "summary.json"), run.config)


def _read_metrics(data: bytes) -> list[Row]:
    if data.count(b",") > _MOST_COMMAS:
        raise ValueError("it has very many values")
    lines = csv.DictReader(io.TextIOWrapper(io.BytesIO(data), encoding="ascii", newline=""), strict=True)
    names = set(lines.fieldnames or ())
    evaluated_on = {"val", "test"} & {name.partition("_")[0] for name in names}
    needed = {f"{split}_{what}" for split in ("train", *evaluated_on) for what in ("loss", "accuracy")}
    if not evaluated_on or not names >= {"epoch", "step", "lr", *needed}:
        raise ValueError("columns are missing")
    rows = [{name: float(value) for name, value in row.items()} for row in lines]
    if not rows:
        raise ValueError("it has no rows")
    return rows


_MOST_COMMAS = 400_000  # of 50,000 epochs
_LARGEST = 1e15
"""Larger figures are damage, which plots cannot show."""

_TEXTS = ("recipe", "model", "data", "best_chosen_on")
_COUNTS = ("seed", "epochs", "steps")
_FIGURES = (
    *("test_accuracy", "test_accuracy_mirror", "best_accuracy"),
    *("images_per_s", "train_seconds", "total_seconds"),
)
_TABLES = ("cold_start", "environment")

TTA = {"test_accuracy_mirror": "flip TTA", "test_accuracy_shift": "shift TTA"}
"""Figures of a summary with test-time augmentation, and their names in tables."""


def tta_accuracies(figures: dict[str, Any]) -> list[tuple[str, float]]:
    """List the accuracies with test-time augmentation, in percent, by name. Older runs lack that with shifts."""
    return [(text, figures[name]) for name, text in TTA.items() if name in figures]


def read_summary(path: Path) -> dict[str, Any]:
    """Read summary.json. Raises `DataError` if it is missing or damaged, or lacks a field that this program shows."""
    try:
        summary = read_json(path)
        if not isinstance(summary, dict) or summary.get("schema") != 1:
            raise ValueError("it is not a summary of schema 1")
        if "seeds" in summary:
            raise DataError(f"{path.parent} has the runs of several seeds. Give one of them.")
        for names, kind, expected in (
            (_TEXTS, str, "a text"),
            (_COUNTS, int, "a whole number"),
            (("flops",) if "flops" not in summary or summary["flops"] is not None else (), int, "a whole number"),
            (_FIGURES, int | float, "a number"),
            (TTA.keys() & summary.keys(), int | float, "a number"),
            (_TABLES, dict, "a table"),
        ):
            for name in names:
                if not _is_a(summary.get(name), kind):
                    raise ValueError(f"{name} is not {expected}: {json.dumps(summary.get(name))[:50]}")
        if not isinstance(summary.get("settings", {}), dict):  # older runs have none
            raise ValueError("settings is not a table")
        if not all(_is_a(seconds, int | float) for seconds in summary["cold_start"].values()):
            raise ValueError("cold_start has more than numbers")
    except FileNotFoundError:
        raise DataError(f"{path.parent} is not a finished run: it has no {path.name}.") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}.") from None
    return summary


def _is_a(value: Any, kind: type | UnionType) -> bool:
    """Return True if `value` has this type; numbers are finite, and no bool."""
    if isinstance(value, int | float) and (isinstance(value, bool) or not abs(value) < sys.float_info.max):
        return False
    return isinstance(value, kind)


def root_of_run(weights: Path) -> Path | None:
    """Return the folder of data sets recorded in the run of `weights`, a run folder or a file in one; None if none is.

    Raises `UsageError` if its config.toml is damaged.
    """
    config = (weights if weights.is_dir() else weights.parent) / "config.toml"
    return from_toml(config).root if config.exists() else None


def find_run_data(run: Path, digest: str | None, data: str | None, root: Path | None) -> Dataset:
    """Open the data set of a run, whose `digest` is known unless the run is old: that of its config.toml.

    `data` and `root` are given if it has moved. Nothing is prepared. Raises `DataError` if it is missing, damaged or
    another one.
    """
    config = from_toml(run / "config.toml")
    recorded = config.data if root is None else Path(config.data).name  # it may be a path, which precedes a root
    folder = store_folder(data or recorded, root or config.root)
    remedy = "If it has moved, give its place: --root or --data."
    if not (folder / "meta.json").exists():
        raise DataError(f"{folder}, the data set that {run} was trained on, does not exist. {remedy}")
    dataset = open_store(folder)
    if digest not in (None, dataset.digest):
        raise DataError(
            f"{run} was trained on another data set {config.data!r} (SHA-256 {str(digest)[:12]}...) than the one in "
            f"{folder} ({dataset.digest[:12]}...). {remedy}"
        )
    return dataset
