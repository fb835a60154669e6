"""usage: python -m tests.faults.kills [--kills N] [--seed N] [--scenarios 'NAME;...'] [--json FILE]

Kill `fastresnet` at random moments, repeat the command until it ends, and compare the result with an undisturbed run.
Some scenarios start a command twice at once.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from fastresnet.checkpoint import load_tensors
from fastresnet.provenance import environment
from pipelines.files import write_json
from pipelines.store import open_store

INTERVAL = 2
"""Steps between the checkpoints of a training: the most that a kill may cost."""

WAYS = {"event": 0.6, "alone": 0.2, "all": 0.2}
"""Probability of each way to kill: at an event; at a random time one alone, or all with their children."""

# --- scenarios ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """Commands that are started at once in a folder, killed, and repeated until they end."""

    commands: tuple[str, ...]
    before: tuple[str, ...]
    """Commands that prepare the folder, undisturbed."""
    result: Callable[[Path], Any]
    """Function that reads from the folder what kills may not change."""
    check: Callable[[Path], int]
    """Function that checks the folder after a kill, and returns the steps of the training that are saved."""
    refusal: str | None = None
    """Message with which a command may end while another one runs."""


def contents(folder: Path) -> dict[str, str | None]:
    """SHA-256 of each file, hidden ones included, by name; None for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


def check_data(root: Path) -> int:
    """Check that the data set is complete or absent."""
    if (root / "shapes10").exists():
        open_store(root / "shapes10")
    return 0


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


def saved_steps(root: Path) -> int:
    """Return the steps of the training that are saved; its checkpoints must be undamaged."""
    saved = 0
    for name in ("previous.ckpt", "last.ckpt"):
        if (file := root / "run" / name).exists():
            saved = load_tensors(file)[1]["progress"]["step"]
    return saved


def evaluation_result(root: Path) -> dict[str, Any]:
    """Read the figures that `eval` wrote, which are complete, without those of time; add the list of files."""
    figures = json.loads((root / "result.json").read_bytes())
    return {
        **{name: figures[name] for name in ("test_accuracy", "loss", "per_class")},
        "files": sorted(f.name for f in root.iterdir()),
    }


def check_evaluation(root: Path) -> int:
    """Check that the figures are complete or absent."""
    if (root / "result.json").exists():
        evaluation_result(root)
    return 0


PREPARE = "prepare --data shapes10 --train-images 80 --test-images 30"
TRAIN = f"train smoke --data shapes10 --batch-size 16 --epochs 3 --checkpoint-steps {INTERVAL} --out run --resume"
EVAL = "eval --weights run/model.safetensors --data shapes10 --device cpu --json result.json"


def training(options: str, *, times: int = 1, formats: str = "raw") -> Scenario:
    """Create the scenario of a training that is started `times` times at once."""
    return Scenario(
        commands=(f"{TRAIN} {options}",) * times,
        before=(f"{PREPARE} --formats {formats}",),
        result=lambda root: training_result(root / "run"),
        check=saved_steps,
        refusal="is in use by another training" if times > 1 else None,
    )


SCENARIOS = {
    "prepare": Scenario((f"{PREPARE} --formats raw,beton,jpeg",), (), contents, check_data),
    "prepare, twice at once": Scenario((f"{PREPARE} --formats raw,jpeg",) * 2, (), contents, check_data),
    "train, resident": training("--precision fp32 --pipeline resident"),
    "train, dali": training("--precision fp32 --pipeline dali"),
    "train, ffcv": training("--precision fp32 --pipeline ffcv", formats="raw,beton"),
    "train, torchvision": training("--precision fp32 --pipeline torchvision"),
    "train, fp16": training("--precision fp16"),
    "train, twice at once": training("--precision fp32", times=2),
    "train --seeds 0-1": Scenario(
        (f"{TRAIN} --precision fp32 --seeds 0-1",),
        (PREPARE,),
        lambda root: [training_result(root / "run" / f"seed{seed}") for seed in (0, 1)],
        lambda _: 0,  # trainings may be left that run on
        "(exit code 2)",
    ),
    "eval --json, twice at once": Scenario(
        (EVAL,) * 2, (PREPARE, f"{TRAIN} --precision fp32"), evaluation_result, check_evaluation
    ),
}

# --- running and killing -----------------------------------------------------------------------------------------

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


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    """Time and way of a kill."""

    way: str = "none"
    """One of `WAYS`, or `none`."""
    victim: int = 0
    """Number of the command that is killed alone."""
    event: int = 0
    """Number of the event at which a process kills itself: each that comes so far, of several."""
    after: float = 300.0
    """Seconds after which processes are killed from outside."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a command."""

    code: int
    errors: str
    events: list[str]
    """Kinds of the events that began; empty after a kill from outside."""
    steps: int
    """Training steps taken; 0 if that is not known."""

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def run_commands(commands: tuple[str, ...], root: Path, kill: Kill = Kill()) -> list[Outcome]:
    """Run commands at once in the folder `root`, and kill as `kill` says; wait until all have ended."""
    notes = [root.with_name(f"{root.name}-{number}") for number in range(len(commands))]
    processes = []
    for command, note in zip(commands, notes, strict=True):
        note.with_suffix(".json").unlink(missing_ok=True)
        with open(note.with_suffix(".err"), "wb") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(kill.event), note.with_suffix(".json"), *command.split()],
                    cwd=root,
                    env={**os.environ, "FASTRESNET_DATA": ".", "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE},
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,
                )
            )
    deadline = time.monotonic() + kill.after
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    if kill.way == "alone":
        processes[kill.victim].kill()
    else:
        kill_families([process.pid for process in processes if process.poll() is None])
    outcomes = []
    for process, note in zip(processes, notes, strict=True):
        code, left = process.wait(timeout=300), note.with_suffix(".json")
        events, steps = json.loads(left.read_text()) if left.exists() else ([], 0)
        outcomes.append(Outcome(code, note.with_suffix(".err").read_text(), events, steps))
    return outcomes


HERE = str(Path(__file__).parents[2])


def kill_families(numbers: list[int]) -> None:
    """Kill processes and all their descendants, which include the trainings of --seeds."""
    for number in numbers:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(number)
            parent.suspend()  # it starts no more
            for process in (*parent.children(recursive=True), parent):
                process.kill()


class Campaign:
    """Kills in one scenario, whose result is compared with that of its first command, run alone and undisturbed."""

    def __init__(self, scenario: Scenario, folder: Path, choose: random.Random) -> None:
        self._scenario, self._choose = scenario, choose
        self._base, self._root, expected = folder / "base", folder / "root", folder / "expected"
        self._base.mkdir(parents=True)
        for command in scenario.before:
            self._run((command,), self._base)
        shutil.copytree(self._base, expected)
        began = time.monotonic()
        (undisturbed,) = self._run(scenario.commands[:1], expected)
        self._seconds, self._events = time.monotonic() - began, len(undisturbed.events)
        self._expected = scenario.result(expected)
        self.counts: Counter[str] = Counter()
        """Kills by `WAYS`, refusals, and ends that were compared."""
        self.moments: Counter[str] = Counter()
        """Kills by what the program was about to do."""
        self.most_lost_steps = 0

    @property
    def kills(self) -> int:
        return self.moments.total()

    def run(self, kills: int) -> None:
        """Run the scenario to its end, with about so many kills, and compare the result."""
        shutil.copytree(self._base, self._root)
        before = self.kills
        while True:
            kill, began = self._choose_kill() if self.kills < before + kills else Kill(), time.monotonic()
            outcomes = self._run(self._scenario.commands, self._root, kill)
            for outcome in outcomes:
                if outcome.killed:
                    self._count(kill, outcome)
            if not any(outcome.killed for outcome in outcomes) and any(outcome.code == 0 for outcome in outcomes):
                break
        if (result := self._scenario.result(self._root)) != self._expected:
            raise AssertionError(f"{self._scenario.commands} ended differently: {result}, not {self._expected}")
        if self.kills == before:
            self._seconds = time.monotonic() - began  # as the machine is now
        self.counts["ends"] += 1
        shutil.rmtree(self._root)

    def _choose_kill(self) -> Kill:
        (way,) = self._choose.choices(list(WAYS), list(WAYS.values()))
        if way == "event" and self._events:
            return Kill(way, event=self._choose.randint(1, self._events))
        victim = self._choose.randrange(len(self._scenario.commands))
        after = self._seconds * self._choose.uniform(0.3, 1.1)  # until then modules are imported
        return Kill("alone" if way == "event" else way, victim, after=after)

    def _run(self, commands: tuple[str, ...], root: Path, kill: Kill = Kill()) -> list[Outcome]:
        outcomes, refusal = run_commands(commands, root, kill), self._scenario.refusal
        for outcome in outcomes:
            refused = refusal is not None and refusal in outcome.errors
            if outcome.code and not refused and not (outcome.killed and kill.way != "none"):
                raise AssertionError(f"{commands} ended with {outcome.code}:\n{outcome.errors}")
            if refused:
                self.counts["refused"] += 1
        return outcomes

    def _count(self, kill: Kill, outcome: Outcome) -> None:
        """Count a kill, and check the folder after it: no more steps are lost than lie between two checkpoints."""
        self.counts[kill.way] += 1
        self.moments[outcome.events[-1] if outcome.events else "at a random time"] += 1
        lost = outcome.steps - self._scenario.check(self._root)
        self.most_lost_steps = max(self.most_lost_steps, lost)
        if lost > INTERVAL:
            raise AssertionError(f"{self._scenario.commands}: {lost} steps were lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", default=";".join(SCENARIOS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = environment(torch.device("cpu"))
    choose, names = random.Random(options.seed), options.scenarios.split(";")
    campaigns: dict[str, Campaign] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            campaign = campaigns[name] = Campaign(SCENARIOS[name], Path(folder, name), choose)
            share = options.kills * (number + 1) // len(names) - options.kills * number // len(names)
            while campaign.kills < share:
                campaign.run(min(share - campaign.kills, 6))
                print(f"{name}: {dict(campaign.counts)}", flush=True)
            moments = sum((campaign.moments for campaign in campaigns.values()), Counter[str]())
            report = {
                "schema": 2,
                "report": "kills",
                "environment": facts,
                "seed": options.seed,
                "kills": moments.total(),
                "scenarios": {name: dict(campaign.counts) for name, campaign in campaigns.items()},
                "moments": dict(moments),
                "checkpoint_interval": INTERVAL,
                "most_lost_steps": max(campaign.most_lost_steps for campaign in campaigns.values()),
            }
            if options.json is not None:
                write_json(options.json, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
