"""usage: python -m tests.faults.kills [--kills N] [--seed N] [--pipelines NAME,...] [--json FILE]

Kill `fastresnet prepare` and `fastresnet train` at random moments, repeat the command (a training with --resume) until
it ends, and compare the result with an undisturbed run.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fastresnet.checkpoint import load_tensors
from fastresnet.provenance import environment
from pipelines import PIPELINES
from pipelines.errors import DataError
from pipelines.files import write_json
from pipelines.store import open_store

INTERVAL = 2
"""Steps between the checkpoints of a training: the most that a kill may cost."""

PREPARE = ["prepare", "--data", "shapes10", "--train-images", "80", "--test-images", "30"]
TRAIN = [
    "train", "smoke", "--data", "shapes10", "--batch-size", "16", "--epochs", "3", "--precision", "fp32",
    "--checkpoint-steps", str(INTERVAL),
]  # fmt: skip

# The command line, dying of SIGKILL when event number sys.argv[1] begins; where there are fewer, their kinds and the
# steps taken are left in the file sys.argv[2]. A file whose fsync is cut off keeps half of what was written.
PROGRAM = """
import json, os, pathlib, signal, sys
fatal, left = int(sys.argv[1]), pathlib.Path(sys.argv[2])
import torch
from fastresnet.distributed import World
from fastresnet.training.step import TrainStep
from fastresnet import cli
events, steps = [], 0
def die():
    left.write_text(json.dumps([events, steps]))
    os.kill(os.getpid(), signal.SIGKILL)
def armed(owner, name, kind, halve=lambda *_: None):
    original = getattr(owner, name)
    def call(*arguments, **settings):
        events.append(kind)
        if len(events) == fatal:
            halve(*arguments)
            die()
        return original(*arguments, **settings)
    setattr(owner, name, call)
def half_synced(descriptor):
    if os.path.isfile(f"/proc/self/fd/{descriptor}") and (size := os.fstat(descriptor).st_size):
        os.truncate(os.readlink(f"/proc/self/fd/{descriptor}"), size // 2)
armed(os, "fsync", "flushing a file", half_synced)
armed(os, "replace", "renaming a file")
armed(os, "rename", "renaming a folder")
def half_written(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
armed(pathlib.Path, "write_bytes", "writing a file", half_written)
armed(World, "highest", "after a batch")
original_step = TrainStep.__call__
def step(self, *batch):
    global steps
    events.append("before a step")
    if len(events) == fatal:
        die()
    original_step(self, *batch)
    steps = int(self.count)
TrainStep.__call__ = step
code = cli.main(sys.argv[3:])
left.write_text(json.dumps([events, steps]))
sys.exit(code)
"""


@dataclasses.dataclass(slots=True)
class Tally:
    """Count of the outcomes so far."""

    moments: Counter[str] = dataclasses.field(default_factory=Counter)
    """Kills by what the program was about to do."""
    commands: Counter[str] = dataclasses.field(default_factory=Counter)
    runs: Counter[str] = dataclasses.field(default_factory=Counter)
    """Trainings brought to their end, by pipeline."""
    most_lost_steps: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a command."""

    killed: bool
    seconds: float
    events: list[str]
    """Kinds of the events that began; empty where a kill came from outside."""
    steps: int | None
    """Training steps taken, None where that is not known."""


def run_command(arguments: list[str], root: Path, *, fatal: int = 0, after: float = 300.0) -> Outcome:
    """Run a command, killed by itself at event `fatal`, or from outside `after` so many seconds."""
    left = root / ".events"
    left.unlink(missing_ok=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(fatal), str(left), *arguments],
        env={**os.environ, "FASTRESNET_DATA": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = process.communicate(timeout=after)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        errors = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"{arguments} ended with {process.returncode}:\n{errors}")
    events, steps = json.loads(left.read_text()) if left.exists() else ([], None)
    return Outcome(process.returncode != 0, time.monotonic() - began, events, steps)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, hidden ones included; the lock of a data set lies outside of its folder."""
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*")}


def training_result(folder: Path) -> dict[str, Any]:
    """Collect the parts that must not depend on interruptions: all tensors, the metrics, and the list of files."""
    tensors = {
        f"{name}/{key}": hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name in ("last.ckpt", "previous.ckpt", "best.ckpt", "model.safetensors")
        for key, tensor in load_tensors(folder / name)[0].items()
    }
    return {
        **tensors,
        "metrics": (folder / "metrics.csv").read_text(),
        "files": sorted(f.name for f in folder.iterdir()),
    }


class Campaign:
    """Kills for one pipeline, against its own undisturbed run."""

    def __init__(self, pipeline: str, folder: Path, choose: random.Random, tally: Tally) -> None:
        self._choose, self._tally, self._pipeline = choose, tally, pipeline
        self._formats = ["--formats", "raw,beton"] if pipeline == "ffcv" else []
        self._expected_root, self._root = folder / "expected", folder / "root"
        self._expected_root.mkdir(parents=True)
        self._prepared = run_command([*PREPARE, *self._formats], self._expected_root)
        run = self._expected_root / "run"
        self._trained = run_command(self._train(run), self._expected_root)
        self._expected_data = contents(self._expected_root / "shapes10")
        self._expected_run = training_result(run)

    def _train(self, out: Path) -> list[str]:
        return [*TRAIN, "--pipeline", self._pipeline, "--out", str(out), "--resume"]

    def run(self, kills: int) -> int:
        """Kill one preparation and one training at most `kills` times in all; return the number of kills."""
        self._root.mkdir()
        killed = self._until_done([*PREPARE, *self._formats], self._prepared, min(2, kills), self._check_data)
        if contents(self._root / "shapes10") != self._expected_data:
            raise AssertionError(f"{self._pipeline}: the data set differs")
        out = self._root / "run"
        killed += self._until_done(self._train(out), self._trained, kills - killed, self._check_run)
        if training_result(out) != self._expected_run:
            raise AssertionError(f"{self._pipeline}: the training ended differently")
        self._tally.runs[self._pipeline] += 1
        shutil.rmtree(self._root)
        return killed

    def _until_done(self, command: list[str], undisturbed: Outcome, kills: int, check: Any) -> int:
        """Run `command` until it ends, killing it up to `kills` times; return the number of kills.

        Three times in four at an event, else after a random time.
        """
        killed = 0
        while True:
            fault: dict[str, Any] = {}
            if killed < kills and self._choose.random() < 0.75:
                fault = {"fatal": self._choose.randint(1, len(undisturbed.events))}
            elif killed < kills:
                fault = {"after": self._choose.uniform(0, undisturbed.seconds)}
            outcome = run_command(command, self._root, **fault)
            if not outcome.killed:
                return killed
            killed += 1
            self._tally.moments[outcome.events[-1] if outcome.events else "at a random time"] += 1
            self._tally.commands[command[0]] += 1
            check(outcome.steps)

    def _check_data(self, _: int | None) -> None:
        """Check that the data set is complete or absent."""
        try:
            open_store(self._root / "shapes10")
        except DataError as error:
            if "no prepared data set" not in str(error):
                raise

    def _check_run(self, steps: int | None) -> None:
        """Check that no more steps are lost than lie between two checkpoints."""
        saved = 0
        for name in ("previous.ckpt", "last.ckpt"):
            if (file := self._root / "run" / name).exists():
                saved = load_tensors(file)[1]["progress"]["step"]
        lost = 0 if steps is None else steps - saved
        self._tally.most_lost_steps = max(self._tally.most_lost_steps, lost)
        if lost > INTERVAL:
            raise AssertionError(f"{self._pipeline}: {lost} steps were lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipelines", default=",".join(PIPELINES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = environment(torch.device("cpu"))
    names, choose, tally = options.pipelines.split(","), random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            campaign = Campaign(name, Path(folder) / name, choose, tally)
            left = options.kills * (number + 1) // len(names) - options.kills * number // len(names)
            while left:
                left -= campaign.run(min(left, 8))
                print(f"{name}: {tally.commands.total()} kills so far", flush=True)
    report = {
        "schema": 1,
        "report": "kills",
        "environment": facts,
        "seed": options.seed,
        "kills": tally.commands.total(),
        "commands": dict(tally.commands),
        "moments": dict(tally.moments),
        "runs": dict(tally.runs),
        "checkpoint_interval": INTERVAL,
        "most_lost_steps": tally.most_lost_steps,
    }
    print(json.dumps(report, indent=2))
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
