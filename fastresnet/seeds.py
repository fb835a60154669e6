"""Training with several seeds: a process for each, one or more at a time on each GPU, and a summary of all."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fastresnet.signals import recorded_stops
from pipelines.errors import DataError, RunError, UsageError
from pipelines.files import open_file
from pipelines.texts import open_regular

_MAX_SEEDS = 10_000
_LONGEST_NAME = 255  # bytes
_POLL_S = 0.2


def parse_seeds(text: str) -> list[int]:
    """Parse seeds such as `0-9`, `3` or `0-4,7`, each once, in this order. Raises `UsageError`."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + _MAX_SEEDS:
            raise UsageError(f"--seeds {text}: give numbers and ranges, such as 0-9 or 0-4,7.")
        seeds += range(first, last + 1)
    if len(set(seeds)) != len(seeds):
        raise UsageError(f"--seeds {text} names a seed twice.")
    return seeds


def format_seeds(seeds: Sequence[int]) -> str:
    """Format seeds in ascending order, as `parse_seeds` takes them: 0-4,7."""
    ranges: list[list[int]] = []
    for seed in sorted(seeds):
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1][1:] = [seed]
        else:
            ranges.append([seed])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def mean_and_spread(values: Sequence[float]) -> str:
    """Format the mean and, of more than one value, the sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def format_accuracy(runs: Sequence[dict[str, Any]], figure: str) -> str:
    """Format an accuracy of `runs`, named as in their summaries: mean, spread and unit, or – if one run lacks it."""
    values = [run[figure] for run in runs if figure in run]
    return f"{mean_and_spread(values)} %" if len(values) == len(runs) else "–"


def common_summary_path(out: Path | None, folders: dict[int, Path]) -> Path:
    """Return the place of the summary of all runs: beside their `folders`, which are in `out`, if given.

    Raises `UsageError` if `out` is the folder of a run, whose own summary it would replace, or the name is too long.
    """
    if out is not None:
        if (out / "config.toml").exists():
            raise UsageError(f"{out} holds a run. Give another folder for those of --seeds with --out.")
        return out / "summary.json"
    seed, folder = next(iter(folders.items()))
    name = f"{folder.name.removesuffix(str(seed))}s{format_seeds([*folders])}.json"  # ...-seed0 -> ...-seeds0-9.json
    if len(name.encode()) > _LONGEST_NAME:
        raise UsageError(f"--seeds: so many ranges make the name of the summary too long: {name:.60}... Give --out.")
    return folder.with_name(name)


def finished_seeds(folders: dict[int, Path], steps: int) -> list[int]:
    """Return the seeds whose run is finished, after `steps` steps."""
    from fastresnet.run_folder import read_summary

    finished = []
    for seed, folder in folders.items():
        with contextlib.suppress(DataError):
            if read_summary(folder / "summary.json")["steps"] == steps:
                finished.append(seed)
    return finished


def summarize(summaries: Sequence[dict[str, Any]], folders: dict[int, Path], command: str) -> dict[str, Any]:
    """Return the contents of the common summary of the runs of `command`, from their own.

    `settings` and `environment` have what all runs share, and for each run the rest. Figures that one run lacks, as
    older ones do, are left out.
    """
    from fastresnet.run_folder import TTA

    names = ("test_accuracy", *TTA, "train_seconds", "images_per_s")
    names = tuple(name for name in names if all(name in run for run in summaries))
    settings, own_settings = _shared([run.get("settings", {}) for run in summaries])
    environment, own_environments = _shared([run["environment"] for run in summaries])
    runs = zip(folders.items(), summaries, own_settings, own_environments, strict=True)
    return {
        "schema": 1,
        **{name: summaries[0][name] for name in ("recipe", "model", "data", "epochs", "steps")},
        "seeds": list(folders),
        "figures": {name: _statistics([run[name] for run in summaries]) for name in names},
        "runs": [
            {"seed": seed, "folder": folder.name}
            | {name: run[name] for name in names}
            | {"settings": settings_left, "environment": environment_left}
            for (seed, folder), run, settings_left, environment_left in runs
        ],
        "command": command,
        "settings": settings,
        "environment": environment,
    }


def _shared(tables: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Split `tables` into the entries that all of them have, and the rest of each."""
    shared = {name: value for name, value in tables[0].items() if all(table.get(name) == value for table in tables)}
    return shared, [{name: value for name, value in table.items() if name not in shared} for table in tables]


def _statistics(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, sample standard deviation (None of one value), minimum and maximum."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": spread, "min": min(values), "max": max(values)}


# --- processes ---------------------------------------------------------------------------------------------------


def train_seeds(
    arguments: Sequence[str], folders: dict[int, Path], gpus: int, per_gpu: int = 1, *, epochs: int, steps: int
) -> list[dict[str, Any]]:
    """Run `fastresnet train ARGUMENTS --seed SEED --out FOLDER` for each seed; return the contents of `summary.json`.

    Each logs to `train.log` in its folder. `per_gpu` run on each GPU at a time. With `gpus` 0 they run on the CPU, one
    after the other, as each uses all cores. Their progress is shown out of `epochs` and `steps` each. If one fails, the
    others continue; then `RunError` names those that failed. After Ctrl-C or a stop signal, and on other errors, the
    trainings still running are signalled to save and stop; `StoppedError` names the finished ones.
    """
    from fastresnet.run_folder import check_folder, read_summary  # which loads torch
    from fastresnet.training.loggers import format_duration

    for folder in folders.values():
        check_folder(folder)
    free: SimpleQueue[int | None] = SimpleQueue()
    places = [*range(gpus)] * per_gpu or [None]
    for gpu in places:
        free.put(gpu)
    stopping = threading.Event()
    display = _Display(len(folders), epochs, steps)

    def run(seed: int, folder: Path) -> int:
        gpu = free.get()
        try:
            display.begin(seed, folder / "train.log")
            return _train(arguments, seed, folder, gpu, stopping)
        finally:
            free.put(gpu)

    with recorded_stops() as signals, ThreadPoolExecutor(len(places)) as pool, display.bars:
        jobs = {pool.submit(run, seed, folder): seed for seed, folder in folders.items()}
        try:
            waiting = set(jobs)
            while waiting and not signals.received:
                ended, waiting = wait(waiting, _POLL_S, FIRST_COMPLETED)
                for job in sorted(ended, key=lambda job: jobs[job]):
                    seed, code = jobs[job], job.result()
                    if code:
                        display.end(seed, f"failed, exit code {code}; see {folders[seed] / 'train.log'}", failed=True)
                        continue
                    summary = read_summary(folders[seed] / "summary.json")
                    duration = format_duration(summary["train_seconds"])
                    display.end(seed, f"test accuracy {summary['test_accuracy']:.2f} %, training time {duration}")
                display.update()
        finally:
            stopping.set()
    _check_finished({seed: job.result() for job, seed in jobs.items()}, folders, signals.received)
    return [read_summary(folder / "summary.json") for folder in folders.values()]


def _check_finished(codes: dict[int, int], folders: dict[int, Path], signum: int) -> None:
    """Raise `StoppedError` or `RunError` unless all exit codes are 0. `signum` is the signal of a stop, or 0."""
    failed = [seed for seed, code in codes.items() if code]
    if failed and signum:
        from fastresnet.training.loop import StoppedError

        finished = [seed for seed, code in codes.items() if not code]
        raise StoppedError(
            signum,
            f"stopped by {signal.Signals(signum).name}. Finished seeds: {format_seeds(finished) or 'none'} "
            f"({len(finished)} of {len(codes)}). The same command with --resume continues the others.",
        )
    if failed:
        logs = ", ".join(f"{folders[seed] / 'train.log'} (exit code {codes[seed]})" for seed in failed)
        raise RunError(f"{len(failed)} of {len(codes)} trainings failed; see {logs}. --resume continues them.")


def _train(arguments: Sequence[str], seed: int, folder: Path, gpu: int | None, stopping: threading.Event) -> int:
    """Run one training and return its exit code; stop it, or do not start it, when `stopping` is set."""
    if stopping.is_set():
        return 128 + signal.SIGTERM
    environment = dict(os.environ)
    if gpu is not None:
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    command = [sys.executable, "-m", "fastresnet", "train", *arguments]
    command += ["--quiet", "--seed", str(seed), "--out", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.log", "a", opener=open_file) as log:  # notes and errors; it writes the rest itself
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=_POLL_S)
            if stopping.is_set():
                process.terminate()
                return process.wait()


# --- progress ----------------------------------------------------------------------------------------------------

_POSITION = re.compile(
    r"^(?:epoch +(?P<epoch>\d+))?  step +(?P<step>\d+)(?:.*  (?P<split>test|val) loss \S+ acc +(?P<accuracy>\S+) %)?",
    re.MULTILINE,
)
"""Lines of train.log that give a position: at the end of an epoch, and every half minute within."""
_READ_AT_ONCE = 1 << 16  # bytes


class _Log:
    """Position of a training, read from the lines that it adds to train.log: metrics.csv may be 10 s behind."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, path.stat().st_size if path.exists() else 0
        self.epoch, self.step, self.accuracy = 0, 0, ""

    def read(self) -> None:
        """Read the lines that are new."""
        with contextlib.suppress(OSError, ValueError), open_regular(self._path) as file:
            file.seek(self._read)
            lines, newline, _ = file.read(_READ_AT_ONCE).rpartition(b"\n")
            self._read += len(lines) + len(newline)
            for found in _POSITION.finditer(lines.decode(errors="replace")):
                self.step = int(found["step"])
                self.epoch = int(found["epoch"] or self.epoch)
                if found["split"]:
                    self.accuracy = f"{found['split']} accuracy {found['accuracy']} %"


class _Display:
    """Progress of the trainings: bars on a terminal, and a line for each that has ended."""

    def __init__(self, count: int, epochs: int, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from fastresnet.console import PlainConsole

        console = PlainConsole()
        self._count, self._epochs, self._steps = count, epochs, steps
        self._ended, self._failed, self._steps_per_s = 0, 0, 0.0
        self._running: dict[int, tuple[_Log, Any]] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=600,  # seconds: an epoch may take minutes
            redirect_stderr=sys.stderr.isatty(),  # a file of notes stays one
        )
        self._all = self.bars.add_task("all", total=count * steps, text="")

    def begin(self, seed: int, log: Path) -> None:
        """Follow the training of `seed`, which is about to start."""
        self._running[seed] = _Log(log), self.bars.add_task(f"seed {seed}", total=self._steps, text="starting")

    def update(self) -> None:
        """Read how far the trainings are."""
        running = list(self._running.values())  # other threads add to it
        for log, bar in running:
            log.read()
            if log.step:
                text = f"epoch {min(log.epoch + 1, self._epochs)}/{self._epochs}  {log.accuracy}"
                self.bars.update(bar, completed=log.step, text=text)
        done = self._ended * self._steps + sum(log.step for log, _ in running)
        text = f"{self._ended - self._failed} of {self._count} finished"
        text += f", {self._failed} failed" if self._failed else ""
        speeds = [task.speed for task in self.bars.tasks if task.id != self._all and task.speed]
        if speeds:
            self._steps_per_s = statistics.mean(speeds) * len(running)
        if self._steps_per_s:
            from fastresnet.training.loggers import format_duration  # which loads torch

            text += f"  ETA {format_duration((self._count * self._steps - done) / self._steps_per_s)}"
        self.bars.update(self._all, completed=done, text=text)

    def end(self, seed: int, result: str, *, failed: bool = False) -> None:
        """Print the result of the training of `seed`."""
        self._ended += 1
        self._failed += failed
        self.bars.remove_task(self._running.pop(seed)[1])
        self.bars.console.print(f"seed {seed}: {result} ({self._ended} of {self._count})", soft_wrap=True)
