"""usage: python -m benchmarks.gpu_cases ceilings|steps|candidates --json FILE [--rehearse]

Measure, for gpu_suite.sh, the ceilings of a GPU, training steps on it, and changes that may make them faster.

  ceilings     large copies and matrix products, and the time of the smallest kernel in a CUDA graph
  steps        captured training steps of some recipes: images/s, memory, and the time of each kernel
  candidates   candidate changes, each in turns with the unchanged step

Steps have their recipe's settings, on shapes10. The file is written after each case. With --rehearse turns are short,
and nothing is measured. A rehearsal also runs on a CPU, with small batches, and steps that are not captured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.cases import (
    activities,
    kernels_of,
    memory_held,
    memory_taken,
    step_row,
    steps_in,
    unlimited_compilation,
)
from benchmarks.report import SCHEMA, Result, ratio, short, write_result
from benchmarks.roofline import Limits, seconds_between, stamp
from fastresnet.compilation import torch_compile
from fastresnet.device import DTYPES, recorded, resolve_device, synchronize
from fastresnet.distributed import SINGLE
from fastresnet.models.batchnorm import fuse_batch_norms
from fastresnet.provenance import environment
from fastresnet.recipes import create_config
from fastresnet.terminal import guarded
from fastresnet.training.execution import Execution
from fastresnet.training.kernels import choose_kernels
from fastresnet.training.loop import create_step, open_pipelines, resolve
from fastresnet.training.optimizer import lr_factors
from fastresnet.training.step import TrainStep
from pipelines.errors import UsageError, check_choice
from pipelines.prepare import find_dataset
from pipelines.store import Dataset, open_store


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Size of a full measurement, or of a rehearsal."""

    rehearsal: bool = False
    rounds: int = 7
    seconds: float = 0.4
    """Length of a turn."""
    batch_divisor: int = 1
    """Divisor of batch sizes on a CPU, for which full batches would be too large."""
    profiled_steps: int = 10
    graph_kernels: int = 1000


REHEARSAL = Extent(rehearsal=True, rounds=2, seconds=0.01, batch_divisor=64, profiled_steps=2, graph_kernels=10)


# --- cases --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class RecipeCase:
    """Training of a recipe."""

    recipe: str
    model: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.model}/b{self.batch_size}"


SGD, LARGE, MUON = (
    RecipeCase("baseline", "resnet20", 128),
    RecipeCase("baseline", "resnet20", 1024),
    RecipeCase("fast", "resnet20", 128),
)
CASES = (SGD, LARGE, MUON, RecipeCase("speedrun", "speednet", 1536))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Change of a step that may make it faster."""

    name: str
    case: RecipeCase
    compiled: bool = True
    """Use of Inductor for both passes; else the eager step is captured."""
    own_kernels: bool | None = True
    """Use of this program's kernels; else PyTorch's. None: those that a run would choose."""
    inductor: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of Inductor that differ from its defaults."""
    change: Callable[[TrainStep], None] | None = None
    """Further change, made before the step is compiled and captured."""


def use_own_batch_norm(step: TrainStep) -> None:
    """Use this program's batch norm, beside PyTorch's Muon."""
    fuse_batch_norms(step.model)


COMBINED = {"combo_kernels": True}
# Without force the reductions of batch norm stay plain ones over the pixels, with a block for every few channels: most
# of the GPU would be idle.
COOPERATIVE = {"triton.cooperative_reductions": True, "triton.force_cooperative_reductions": True}

CANDIDATES = (
    *(Candidate(name="PyTorch's kernels", case=case, own_kernels=False) for case in CASES),
    Candidate(name="PyTorch's Muon", case=MUON, own_kernels=False, change=use_own_batch_norm),
    *(Candidate(name="eager graph", case=case, compiled=False) for case in CASES),
    Candidate(name="PyTorch's kernels, eager graph", case=MUON, compiled=False, own_kernels=False),
    Candidate(
        name="combo_kernels and cooperative_reductions", case=SGD, own_kernels=False, inductor=COMBINED | COOPERATIVE
    ),
)


# --- steps -------------------------------------------------------------------------------------------------------


class TimedRecipe:
    """Steps of a training, ready to be measured: captured on a GPU, not captured on a CPU."""

    def __init__(self, case: RecipeCase, dataset: Dataset, device: torch.device, candidate: Candidate) -> None:
        self.case, self._device = case, device
        config = dataclasses.replace(
            create_config(case.recipe, case.model), batch_size=case.batch_size, pipeline="resident"
        )
        gc.collect()  # earlier cases
        held = memory_held(device)
        began = time.perf_counter()
        config, _ = resolve(config, dataset, device, SINGLE)
        self._resources = contextlib.ExitStack()
        pipeline, _ = self._resources.enter_context(open_pipelines(config, dataset, SINGLE))
        self._total_steps = config.total_steps(len(pipeline))
        self._step = step = create_step(config, dataset, lr_factors(config, self._total_steps), SINGLE)
        batch = next(pipeline.epoch(0))
        if candidate.own_kernels is not None:
            step.use_kernels(candidate.own_kernels)
        elif device.type == "cuda":
            print(f"{case.name}: kernels", *choose_kernels(step, batch, captured=True))
        if candidate.change is not None:
            candidate.change(step)
        if candidate.inductor or device.type != "cuda":
            # Each set of settings has its own compiled function, so that no step reuses another's kernels.
            step._compiled = torch_compile(
                step._loss_and_hits, fullgraph=True, dynamic=False, **_compiler(device, candidate.inductor)
            )
        captured, uncaptured = ("graph", "compile") if candidate.compiled else ("capture", "eager")
        self._execution = Execution(step, pipeline, captured if device.type == "cuda" else uncaptured)
        step.model.train()
        self._execution.prepare(batch)
        self._seconds_per_step = math.inf
        self.measure(0)
        self.prepare_s = time.perf_counter() - began
        """Seconds of compilation and recording; the compiler's caches may have been warm."""
        self._memory = memory_taken(held)

    def measure(self, seconds: float) -> float:
        """Take steps for about `seconds`; return images/s."""
        most = self._total_steps - 1  # each has a learning rate
        steps = self._begin(steps_in(seconds, self._seconds_per_step, most))
        begin = stamp(self._device)
        taken = sum(1 for _ in steps)
        self._seconds_per_step = seconds_between(begin, stamp(self._device)) / taken
        return self.case.batch_size / self._seconds_per_step

    def _begin(self, count: int) -> Iterator[None]:
        """Take a first step, which plans an epoch, and return `count` steps to be taken after it."""
        self._step.count.zero_()
        steps = self._execution.steps(0, 0, count + 1)
        next(steps)
        synchronize(self._device)
        return steps

    def row(self, name: str, images_per_s: list[float]) -> dict[str, Any]:
        """Return the figures of a case: its turns, preparation and memory."""
        return step_row(name, self.case, images_per_s, self.prepare_s) | self._memory

    def kernels(self, count: int) -> dict[str, Any]:
        """Profile `count` steps; return the kernels of one, on a CPU its operators: calls and ms, in total and each."""
        steps = self._begin(count)
        with profile(activities=activities(self._device)) as profiler:
            taken = sum(1 for _ in steps)
            synchronize(self._device)
        kernels = kernels_of(profiler, self._device, taken)
        return {
            "kernels_per_step": {"ms": sum(ms for _, ms, _ in kernels), "calls": sum(calls for *_, calls in kernels)},
            "kernels": [{"name": name[:200], "ms": ms, "calls": calls} for name, ms, calls in kernels],
        }

    def close(self) -> None:
        self._resources.close()


def _compiler(device: torch.device, inductor: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return options of `torch.compile`. On a CPU, which only rehearses, nothing is generated."""
    return {"options": inductor or None} if device.type == "cuda" else {"backend": "eager"}


# --- the three commands ------------------------------------------------------------------------------------------


def measure_ceilings(result: Result, path: Path, device: torch.device, extent: Extent) -> None:
    """Copy, multiply matrices, and replay a graph of very small kernels."""
    limits = Limits(device, tuple(DTYPES))
    limits.measure()
    kernel_us = 1e6 * _small_kernel_seconds(device, extent.graph_kernels)
    result["limits"] = {**limits.to_dict(), "kernel_us": kernel_us}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = {
            "capability": [properties.major, properties.minor],
            "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
        }
    write_result(result, path)
    print(result["limits"])


def _small_kernel_seconds(device: torch.device, count: int) -> float:
    """Measure the seconds of an addition of two numbers among `count` like it in a CUDA graph."""
    number = torch.zeros(1, device=device)

    def add() -> None:
        for _ in range(count):
            number.add_(1)

    work = recorded(add) if device.type == "cuda" else add
    work()
    begin = stamp(device)
    for _ in range(10):
        work()
    return seconds_between(begin, stamp(device)) / (10 * count)


def compile_ahead(candidates: Sequence[Candidate], dataset: Dataset, device: torch.device) -> None:
    """Compile all `candidates` for a GPU at once, each in its own process, to fill the compiler's cache.

    One after the other, four take 110 s with an H100 and 16 processors, while the GPU idles. A failed one is retried in
    its turn. A CPU, which only rehearses, has nothing to compile.
    """
    if device.type != "cuda":
        return
    with ProcessPoolExecutor(len(candidates), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_compile, candidate, dataset.folder, device) for candidate in candidates]
        for candidate, future in zip(candidates, futures, strict=True):
            if (error := future.exception()) is not None:
                name = f"{candidate.name} {candidate.case.name}".strip()
                print(f"{name} does not compile: {type(error).__name__}: {str(error).strip()[:500]}")


def _compile(candidate: Candidate, folder: Path, device: torch.device) -> None:
    TimedRecipe(candidate.case, open_store(folder), device, candidate).close()


def measure_cases(result: Result, path: Path, device: torch.device, extent: Extent) -> None:
    """Measure `CASES` one after the other."""
    dataset = find_dataset("shapes10", None)
    compile_ahead([Candidate(name="", case=case) for case in CASES], dataset, device)
    for case in (_sized(case, device, extent) for case in CASES):
        with _recorded_failure(result, path, case.name):
            chosen = Candidate(name="", case=case, compiled=device.type == "cuda", own_kernels=None)
            _measure_case(result, path, TimedRecipe(case, dataset, device, chosen), extent)


def _measure_case(result: Result, path: Path, steps: TimedRecipe, extent: Extent) -> None:
    with contextlib.closing(steps):
        steps.measure(extent.seconds)
        row = steps.row(steps.case.name, [steps.measure(extent.seconds) for _ in range(extent.rounds)])
        result["rows"].append(row)
        write_result(result, path)  # before the profiler, which may not be allowed here
        row |= steps.kernels(extent.profiled_steps)
    print(f"{row['name']}: {short(row['ms_per_step'], 3)} ms a step, {row['images_per_s']:,.0f} images/s")
    for kernel in row["kernels"][:10]:
        print(f"  {kernel['ms']:.4f} ms in {kernel['calls']:.0f} calls of {kernel['name']}")


def measure_candidates(result: Result, path: Path, device: torch.device, extent: Extent) -> None:
    """Measure each of `CANDIDATES` in turns with the unchanged step."""
    dataset = find_dataset("shapes10", None)
    unchanged: dict[RecipeCase, TimedRecipe] = {}
    baselines = [Candidate(name="", case=case) for case in {candidate.case for candidate in CANDIDATES}]
    recompiled = [candidate for candidate in CANDIDATES if candidate.compiled]
    compile_ahead([*baselines, *recompiled], dataset, device)
    for candidate in CANDIDATES:
        case = _sized(candidate.case, device, extent)
        name = f"{candidate.name}: {case.name}"
        with _recorded_failure(result, path, name):
            if case not in unchanged:
                unchanged[case] = TimedRecipe(case, dataset, device, Candidate(name="unchanged", case=case))
            _compare(result, name, unchanged[case], TimedRecipe(case, dataset, device, candidate), extent)


def _compare(result: Result, name: str, off: TimedRecipe, on: TimedRecipe, extent: Extent) -> None:
    with contextlib.closing(on):
        off.measure(extent.seconds), on.measure(extent.seconds)
        pairs = [(off.measure(extent.seconds), on.measure(extent.seconds)) for _ in range(extent.rounds)]
    of_off, of_on = (list(turns) for turns in zip(*pairs, strict=True))
    result["rows"] += [off.row(f"{name}, off", of_off), on.row(f"{name}, on", of_on)]
    result["ratios"].append(compared := ratio(f"{name}, on", of_on, f"{name}, off", of_off))
    median, low, high = (short(compared[key], 3) for key in ("median", "low", "high"))
    print(f"{name}: {median} times as fast ({low}–{high})")


def _sized(case: RecipeCase, device: torch.device, extent: Extent) -> RecipeCase:
    divisor = extent.batch_divisor if device.type == "cpu" else 1
    return dataclasses.replace(case, batch_size=case.batch_size // divisor)


@contextlib.contextmanager
def _recorded_failure(result: Result, path: Path, name: str) -> Iterator[None]:
    """Write the result after the block; if measuring `name` fails, record the reason and continue."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  compiler, driver and GPU may raise anything
        result["failed"][name] = f"{type(error).__name__}: {str(error).strip()[:500]}"
        print(f"{name}: failed")
        traceback.print_exc()
    finally:
        write_result(result, path)
        sys.stdout.flush()


COMMANDS = {"ceilings": measure_ceilings, "steps": measure_cases, "candidates": measure_candidates}


def main(arguments: list[str]) -> int:
    """Run a command line; return 1 if something failed."""
    match arguments:
        case [command, "--json", file, *rest] if rest in ([], ["--rehearse"]):
            check_choice("command", command, COMMANDS)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    device, extent = resolve_device("auto"), REHEARSAL if rest else Extent()
    if device.type != "cuda" and not extent.rehearsal:
        raise UsageError("PyTorch sees no GPU here. --rehearse runs the same steps on a CPU.")
    result: Result = {
        "schema": SCHEMA,
        "benchmark": f"gpu-{command}",
        "environment": {**environment(device), "data": "shapes10", "rehearsal": extent.rehearsal},
        "limits": {},
        "rows": [],
        "ratios": [],
        "failed": {},
    }
    with unlimited_compilation():
        COMMANDS[command](result, Path(file), device, extent)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
