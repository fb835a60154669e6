"""Training with several seeds: a process for each, one or more at a time on each GPU, and one table."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fastresnet.signals import STOP_SIGNALS, handled
from pipelines.errors import RunError, UsageError
from pipelines.files import open_file

_MAX_SEEDS = 10_000


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


def mean_and_spread(values: Sequence[float]) -> str:
    """Format the mean and, of more than one value, the sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def format_accuracy(runs: Sequence[dict[str, Any]], figure: str) -> str:
    """Format an accuracy of `runs`, named as in their summaries: mean, spread and unit, or – if one run lacks it."""
    values = [run[figure] for run in runs if figure in run]
    return f"{mean_and_spread(values)} %" if len(values) == len(runs) else "–"


def train_seeds(
    arguments: Sequence[str], folders: dict[int, Path], gpus: int, per_gpu: int = 1
) -> list[dict[str, Any]]:
    """Run `fastresnet train ARGUMENTS --seed SEED --out FOLDER` for each seed; return the contents of `summary.json`.

    Each logs to `train.log` in its folder. `per_gpu` run on each GPU at a time. With `gpus` 0 they run on the CPU, one
    after the other, as each uses all cores. If one fails, the others continue; then `RunError` names those that failed.
    On exit, also by Ctrl-C or a stop signal, the trainings still running are signalled to save and stop.
    """
    from fastresnet.run_folder import check_folder, read_summary  # which loads torch

    for folder in folders.values():
        check_folder(folder)
    free: SimpleQueue[int | None] = SimpleQueue()
    places = [*range(gpus)] * per_gpu or [None]
    for gpu in places:
        free.put(gpu)
    stopping = threading.Event()

    def run(seed: int, folder: Path) -> int:
        gpu = free.get()
        try:
            return _train(arguments, seed, folder, gpu, stopping)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(places)) as pool:
        try:
            jobs = {seed: pool.submit(run, seed, folder) for seed, folder in folders.items()}
            codes = {seed: job.result() for seed, job in jobs.items()}
        except BaseException:
            with handled(STOP_SIGNALS, lambda *_: None):  # a second one would end the wait, not the trainings
                stopping.set()
                pool.shutdown()
            raise
    if failed := [seed for seed, code in codes.items() if code]:
        logs = ", ".join(f"{folders[seed] / 'train.log'} (exit code {codes[seed]})" for seed in failed)
        raise RunError(f"{len(failed)} of {len(codes)} trainings failed; see {logs}. --resume continues them.")
    return [read_summary(folder / "summary.json") for folder in folders.values()]


def _train(arguments: Sequence[str], seed: int, folder: Path, gpu: int | None, stopping: threading.Event) -> int:
    """Run one training and return its exit code; stop it, or do not start it, when `stopping` is set."""
    if stopping.is_set():
        return 128 + signal.SIGTERM
    environment = dict(os.environ)
    if gpu is not None:
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    command = [sys.executable, "-m", "fastresnet", "train", *arguments, "--seed", str(seed), "--out", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.log", "a", opener=open_file) as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.2)
            if stopping.is_set():
                process.terminate()
                return process.wait()
