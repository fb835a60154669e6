"""Cases in separate processes, measured from within, in turns.

In one process they would share memory, thread pools and imported libraries, and their costs could not be separated. A
worker waits between its turns, with its prefetch queue full.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import math
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.report import CHARTS, SCHEMA, Result, row_of, show_result, write_result
from fastresnet import terminal
from fastresnet.config import Device, Precision
from fastresnet.threads import Threads, check_threads
from pipelines.base import Pipeline, usable_processors
from pipelines.errors import Note, RunError, UsageError, UserError, check_literals
from pipelines.prepare import find_dataset
from pipelines.store import Dataset

if TYPE_CHECKING:
    import torch

Epochs = Callable[[int], Iterable[Any]]
"""Function that begins an epoch: its items are batches delivered, or steps taken."""

_END_OF_EPOCH = object()
"""Marker after the last batch of an epoch."""

_TOLERATED = 0.1
"""Background load of a machine, in processors."""


# --- options -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Options of every benchmark. Raises `UsageError` on invalid values."""

    device: Device = "auto"
    """Device to compute on."""
    threads: Threads = "auto"
    """Number of CPU threads of PyTorch, or auto: the fastest in a few trial steps; PyTorch's default for loaders."""
    quick: bool = False
    """Take a first look: 3 short rounds, and few of the steps; compiles nothing on a CPU."""

    def __post_init__(self) -> None:
        check_literals(self)
        check_threads(self.threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(MachineOptions):
    """Options of a single benchmark."""

    rounds: int = 7
    """Turns of each case."""
    seconds: float = 2.0
    """Length of a turn."""
    json: Path | None = None
    """Write the figures to this file, updated during the measurement."""
    chart: Path | None = None
    """Draw them in this file (.png, .svg or .pdf)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        terminal.check_output("--json", self.json)
        terminal.check_output("--chart", self.chart, CHARTS)
        if self.rounds < 1 or not 0 < self.seconds < math.inf:
            raise UsageError(f"--rounds {self.rounds} --seconds {self.seconds}: give finite numbers above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerOptions(BenchmarkOptions):
    """Options of a benchmark that runs workers."""

    data: str = "cifar10"
    """Name or folder of the data set."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    batch_size: int = 128
    """Images per batch."""
    precision: Precision = "auto"
    """Precision of this program: auto, fp32, bf16 or fp16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: give 1 or more.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Conditions that all cases share."""

    folder: Path
    """Folder of the store."""
    batch_size: int
    device: str
    precision: str
    """fp32, bf16 or fp16."""
    threads: int
    """Number of CPU threads of PyTorch in each worker."""

    def open_pipeline(self, name: str) -> Pipeline:
        """Open a pipeline of this program, for training with the usual augmentation."""
        import torch

        from fastresnet.device import DTYPES
        from pipelines import Augmentation, open_pipeline
        from pipelines.store import open_store

        return open_pipeline(
            name,
            open_store(self.folder),
            train=True,
            batch_size=self.batch_size,
            device=torch.device(self.device),
            dtype=DTYPES[self.precision],
            seed=0,
            augmentation=Augmentation(),
        )


def describe_work(options: WorkerOptions) -> tuple[Dataset, torch.device, Work]:
    """Open the data set and find the device that `options` name; return both and the work.

    Raises `UsageError` and `DataError` if they do not exist or do not match.
    """
    import torch

    from fastresnet.device import resolve_device, resolve_precision

    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    dataset = find_dataset(options.data, options.root)
    if options.batch_size > len(dataset.train):
        raise UsageError(f"batch size {options.batch_size} is larger than the training set, {len(dataset.train)}.")
    work = Work(
        folder=dataset.folder.absolute(),
        batch_size=options.batch_size,
        device=device.type,
        precision=precision,
        threads=torch.get_num_threads() if options.threads == "auto" else options.threads,
    )
    return dataset, device, work


class WaitTimer:
    """Timer of a loop's waits for its batches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the same batches, and time the waits."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield batch


# --- rounds ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Loader or loop to measure."""

    name: str
    """Name of its row; that of a peer begins with `peer:`."""
    opener: str
    """Function `module:name` of the `Work`, an optional `WaitTimer`, and the options; it returns `Epochs`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiles: bool = False
    """Compilation before the first batch, whose time is then reported separately."""
    whole_epochs: bool = False
    """Turns of whole epochs, for a loader that prepares an epoch at its first batch."""
    needed: bool = False
    """Need for this case: without it, nothing can be compared."""

    @property
    def kind(self) -> str:
        return "peer" if self.name.startswith("peer:") else "ours"


class Failures(dict[str, str]):
    """Reasons of failures by the name of the case: `failed` in a result."""

    @contextlib.contextmanager
    def left_out(self, name: str, *, needed: bool = False) -> Iterator[None]:
        """Leave `name` out, with a `Note`, if the block raises an error; raise the error if the case is `needed`."""
        try:
            yield
        except Exception as error:  # PyTorch and the libraries of peers raise anything
            if needed:
                raise
            self[name] = str(error) if isinstance(error, UserError) else f"{name} failed: {in_one_line(error)}"
            warnings.warn(f"left out: {self[name]}", Note, stacklevel=1)


def in_one_line(error: Exception) -> str:
    """Describe `error` and the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if not frame.filename.startswith("<")][-1]  # those of the import system
    reason = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    return f"{type(error).__name__}: {reason} ({Path(frame.filename).name}:{frame.lineno})"


def measure_workers(
    options: WorkerOptions,
    quick_seconds: float,
    cases: Sequence[Case],
    work: Work,
    facts: dict[str, Any],
    summarize: Callable[[list[Worker]], Result],
) -> None:
    """Measure `cases` in rounds, write the result of `summarize` after each round, and show the last one.

    The environment of the result has `facts`, and those of the machine and the `work`; `versions` are joined.
    """
    import torch

    from fastresnet.provenance import environment

    shared = {"threads": work.threads, "precision": work.precision, "batch_size": work.batch_size}
    machine = environment(torch.device(work.device))
    facts = {**machine, **shared, **facts, "versions": machine["versions"] | facts.get("versions", {})}
    load, rounds, seconds = OtherLoad(), options.rounds, options.seconds
    if options.quick:
        rounds, seconds = 3, quick_seconds
    for workers, failures in run_rounds(cases, work, rounds=rounds, seconds=seconds):
        facts |= load.figures(work.threads if work.device == "cpu" else 1)
        result = {"schema": SCHEMA, "environment": facts, "failed": failures, **summarize(workers)}
        write_result(result, options.json)
    show_result(result, options.chart)


def run_rounds(
    cases: Sequence[Case], work: Work, *, rounds: int, seconds: float
) -> Iterator[tuple[list[Worker], Failures]]:
    """Measure all `cases` for about `seconds` in each round, one after the other.

    Yields, after every round, the remaining workers and the failures of the others. Raises `RunError` if a needed case
    fails, or all of this program's own.
    """
    failures, workers = Failures(), [Worker(case, work) for case in cases]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.stop)
        # All import at the same time, for seconds. Then each is opened alone, so that its first batch is timed.
        for action in (Worker.start, Worker.wait, Worker.open):
            workers = _in_turns(workers, failures, action)
        for _ in range(rounds):
            workers = _in_turns(workers, failures, lambda worker: worker.measure(seconds))
            yield workers, failures


def _in_turns(workers: list[Worker], failures: Failures, action: Callable[[Worker], None]) -> list[Worker]:
    """Apply `action` to one worker after the other, and return those that have not failed."""
    for worker in workers:
        with failures.left_out(worker.case.name, needed=worker.case.needed):
            action(worker)
    remaining = [worker for worker in workers if worker.case.name not in failures]
    if not any(worker.case.kind == "ours" for worker in remaining):
        raise RunError("all of this program's own cases have failed: nothing is left to compare.")
    return remaining


class Worker:
    """Handle of a process that measures a case. Its methods raise `RunError` if the process fails."""

    def __init__(self, case: Case, work: Work) -> None:
        self.case = case
        self.opening: dict[str, float] = {}
        """Seconds to the first batch, and of its compilation; empty before."""
        self.images_per_s: list[float] = []
        """Throughput of every turn."""
        self.used: dict[str, int | float] = {}
        """Memory, processes, threads and share of waiting, so far."""
        self._connection, self._child_end = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(self._child_end, case, work))

    def start(self) -> None:
        """Start the process, which imports the libraries of every case."""
        with self._child_end, _delayed_interruptions():
            self._process.start()

    def wait(self) -> None:
        """Wait until the process has imported them."""
        self._answer()

    def open(self) -> None:
        """Open the case and take its first batch."""
        self.opening = self._ask("open")

    def measure(self, seconds: float) -> None:
        """Deliver batches for about `seconds`.

        An untimed third of that precedes them, to use up prefetched batches.
        """
        images_per_s, self.used = self._ask("measure", seconds)
        self.images_per_s.append(images_per_s)

    def row(self, **figures: float) -> dict[str, Any]:
        """Return the row of a result, with the benchmark's own `figures`."""
        return {**row_of(self.case.name, self.case.kind, self.images_per_s), **figures, **self.opening, **self.used}

    def stop(self) -> None:
        """End the process, immediately if its case is not open yet, and those that it has started."""
        self._connection.close()
        if self._process.pid is not None:
            self._process.join(5 if self.opening else 0)
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                for process in process_tree(self._process.pid) if self._process.is_alive() else ():
                    process.kill()
            self._process.join(5)

    def _ask(self, *message: Any) -> Any:
        with contextlib.suppress(ConnectionError):  # the process has died, and `_answer` reports it
            self._connection.send(message)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            reason = ": perhaps memory ran out; give a smaller --batch-size" if code == -signal.SIGKILL else ""
            raise RunError(f"{self.case.name} died with exit code {code}{reason}.") from None
        if isinstance(answer, str):
            raise RunError(f"{self.case.name} failed: {answer}")
        return answer


@contextlib.contextmanager
def _delayed_interruptions() -> Iterator[None]:
    """Delay a Ctrl-C, which a terminal sends to all processes, to the end of the block.

    Processes that are started in it never receive one.
    """
    resource_tracker.ensure_running()  # else the first process starts it, and Python 3.11 then unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the worker -----------------------------------------------------------------------------------------------


def _serve(connection: Connection, case: Case, work: Work) -> None:
    with contextlib.suppress(ConnectionError):  # the parent no longer listens
        _answer_messages(connection, case, work)
    for process in multiprocessing.active_children():  # those of some libraries do not notice the end of their parent
        process.kill()
    os._exit(0)  # the libraries' threads and processes have nothing left to save


def _answer_messages(connection: Connection, case: Case, work: Work) -> None:
    """Report that this process is ready, then call the methods of the case that the parent names."""
    try:
        import torch  # before the clock starts: every case needs it

        from fastresnet.device import explained_failures

        multiprocessing.set_start_method(None, force=True)  # the default, for the loaders' own workers
        torch.set_num_threads(work.threads)
        torch.zeros(1, device=work.device)  # creates the GPU's context, also before the clock starts
        connection.send(None)
        with explained_failures("give a smaller --batch-size"):
            opened = _OpenCase(case, work)
            for method, *arguments in _messages(connection):
                connection.send(getattr(opened, method)(*arguments))
    except UserError as error:
        connection.send(str(error))
    except Exception as error:  # noqa: BLE001  reported to the parent
        connection.send(in_one_line(error))
    finally:
        connection.close()


def _messages(connection: Connection) -> Iterator[Any]:
    """Yield messages until the other end is closed."""
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


class _OpenCase:
    """Case in its own process: opened by its module, and measured from within."""

    def __init__(self, case: Case, work: Work) -> None:
        self._case, self._work, self._timer = case, work, WaitTimer()
        self._waited = self._worked = 0.0
        self._baseline = self._peak = 0
        self._batches: Iterator[Any] = iter(())

    def open(self) -> dict[str, float]:
        """Take the first batch; return the seconds to it, and of its compilation, if any.

        The compilation is the difference to the first batch of a second start.
        """
        self._baseline = self._peak = _memory()
        started = time.perf_counter()
        module, _, function = self._case.opener.partition(":")
        open_case = getattr(importlib.import_module(module), function)
        start_epoch: Epochs = open_case(self._work, self._timer, **self._case.options)
        first = self._first_batch(start_epoch, started)
        if not self._case.compiles:
            return {"first_batch_s": first}
        return {"first_batch_s": first, "compile_s": first - self._first_batch(start_epoch, time.perf_counter())}

    def _first_batch(self, start_epoch: Epochs, started: float) -> float:
        """Restart the epochs, and return the seconds from `started` to the first batch."""
        epochs = map(start_epoch, itertools.count())
        self._batches = itertools.chain.from_iterable(itertools.chain(epoch, [_END_OF_EPOCH]) for epoch in epochs)
        self._deliver(0, whole_epochs=False)
        return time.perf_counter() - started

    def measure(self, seconds: float) -> tuple[float, dict[str, int | float]]:
        """Return the images/s of a turn, and the memory, processes and waiting so far."""
        self._deliver(seconds / 3, self._case.whole_epochs)
        waited, started = self._timer.seconds, time.perf_counter()
        images_per_s = self._deliver(seconds, self._case.whole_epochs)
        self._waited += self._timer.seconds - waited
        self._worked += time.perf_counter() - started
        return images_per_s, self._used()

    def _deliver(self, seconds: float, whole_epochs: bool) -> float:
        """Return the images/s over at least `seconds` and one batch; with `whole_epochs`, to the end of an epoch."""
        import torch

        started, batches = time.perf_counter(), 0
        for batch in self._batches:
            at_end = batch is _END_OF_EPOCH
            batches += not at_end
            if batches and (at_end or not whole_epochs) and time.perf_counter() - started >= seconds:
                break
        if self._work.device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        self._peak = max(self._peak, _memory())
        return batches * self._work.batch_size / elapsed

    def _used(self) -> dict[str, int | float]:
        """Return the highest memory beyond PyTorch's own, processes and threads now, and the share of waiting."""
        import torch

        threads = []  # of each process
        for process in process_tree():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                threads.append(process.num_threads())
        used = {
            "peak_memory_mb": (self._peak - self._baseline) / 1e6,
            "processes": len(threads),
            "threads": sum(threads),
        }
        if self._timer.seconds:
            used["waiting_percent"] = 100 * self._waited / self._worked
        if self._work.device == "cuda":  # without DALI's own
            used["gpu_memory_mb"] = torch.cuda.max_memory_reserved() / 1e6
        return used


def _memory() -> int:
    """Count the bytes of memory of this process and its descendants.

    These are their own pages, and files that this one has in memory. Pages shared by forked processes count once.
    """
    shared = _fields("/proc/self/smaps_rollup")
    files = shared["Rss"] - shared["Anonymous"] - shared.get("Shmem", 0)
    own = 0
    for process in process_tree():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            fields = _fields(f"/proc/{process.pid}/smaps_rollup")
            own += fields["Pss_Anon"] + fields["Pss_Shmem"]
    return 1024 * (files + own)


def _fields(path: str) -> dict[str, int]:
    """Read the figures of a /proc file, in kB."""
    lines = (line.split() for line in Path(path).read_text().splitlines()[1:])
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


# --- load by others ----------------------------------------------------------------------------------------------


class OtherLoad:
    """Mean number of usable processors that others have kept busy since its creation.

    Others are other processes, and other guests of the same host, but not this process and its descendants.
    """

    def __init__(self) -> None:
        self._began, self._seconds = time.monotonic(), _other_seconds()

    def figures(self, threads: int) -> dict[str, Any]:
        """Return the mean load by others, and `overloaded` if it and `threads` exceed the usable `processors`."""
        others = max((_other_seconds() - self._seconds) / (time.monotonic() - self._began), 0.0)
        overloaded = others + threads > usable_processors() + _TOLERATED
        return {"processors": usable_processors(), "other_load": round(others, 2), "overloaded": overloaded}


def process_tree(pid: int | None = None) -> list[psutil.Process]:
    """List the process `pid`, or this one, and its descendants."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def _other_seconds() -> float:
    return _busy_seconds() - _own_seconds()


def _busy_seconds() -> float:
    """Sum the seconds that the usable processors were busy, or taken by the host."""
    if not hasattr(os, "sched_getaffinity"):  # macOS: all processors are usable
        return sum(psutil.cpu_times()[:3])
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}  # psutil drops the numbers, which may have gaps
    ticks = 0
    for name, *fields in map(str.split, Path("/proc/stat").read_text().splitlines()):
        if name in usable:
            user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, fields[:8])
            ticks += user + nice + system + sum(interrupts_and_steal)
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Sum the seconds of this process and its descendants, including ended ones."""
    seconds = 0.0
    for process in process_tree():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            seconds += sum(process.cpu_times()[:4])
    return seconds
