"""One worker in a process of its own, measured from within: its speed, its memory, its threads, its start.

In one process the workers would share memory, thread pools and imported libraries, and none could be told what it
costs. The parent gives them turns; one that has no turn waits, with its read-ahead full.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import Failures, in_one_line
from fastresnet import terminal
from fastresnet.config import DEVICES, PRECISIONS
from fastresnet.threads import Threads, check_threads
from pipelines import Pipeline, usable_processors
from pipelines.errors import RunError, UsageError, UserError, check_choice
from pipelines.store import Dataset

if TYPE_CHECKING:
    import torch


_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_TOLERATED = 0.1
"""Processors: what a machine does anyway."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every worker does."""

    folder: Path
    """The store."""
    batch_size: int
    device: str
    precision: str
    """fp32, bf16 or fp16."""
    threads: int
    """Threads that PyTorch computes with on a CPU, in each worker."""

    def open_pipeline(self, name: str) -> Pipeline:
        """A pipeline of this program, for training with the usual augmentation."""
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What every race can be told. Raises `UsageError` on impossible values."""

    data: str = "cifar10"
    """Name or folder of the data set."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    batch_size: int = 128
    """Images per batch."""
    rounds: int = 7
    """Turns that each worker gets."""
    seconds: float = 2.0
    """Length of a turn."""
    quick: bool = False
    """3 short rounds, for a first look; compiles nothing on a CPU."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: Threads = "auto"
    """Threads that PyTorch computes with on a CPU, in all workers: a number, or auto, for which a few trial steps
    decide; loaders, which have no steps, take PyTorch's default."""
    precision: str = "auto"
    """Of this program: auto, fp32, bf16 or fp16."""
    json: Path | None = None
    """Write the figures to this file, after every round."""
    chart: Path | None = None
    """Draw them in this file (.png, .svg or .pdf)."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_choice("precision", self.precision, PRECISIONS)
        check_threads(self.threads)
        terminal.check_output("--json", self.json)
        terminal.check_output("--chart", self.chart)
        if self.chart is not None:
            check_choice("kind of chart", self.chart.suffix, (".png", ".svg", ".pdf"))
        if self.rounds < 1 or not 0 < self.seconds < math.inf or self.batch_size < 1:
            raise UsageError(
                f"--rounds {self.rounds} --seconds {self.seconds} --batch-size {self.batch_size}: there is nothing to "
                "measure."
            )


def describe_work(options: WorkerOptions) -> tuple[Dataset, torch.device, Work]:
    """Data set and device that `options` stand for, and the work they make.

    Raises `UsageError` and `DataError` where they do not exist or do not fit together.
    """
    import torch

    from fastresnet.device import resolve_device, resolve_precision

    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    dataset = terminal.find_dataset(options.data, options.root)
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


Epochs = Callable[[int], Iterable[Any]]
"""Begins an epoch: its items are units of work, a batch delivered or a step taken."""


class WaitTimer:
    """Measures how long a loop waits for its batches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, timed."""
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Who takes part."""

    name: str
    """`peer:` begins that of a peer."""
    opener: str
    """`module:function`, called with the `Work`, a `WaitTimer` to use or not, and the options; returns `Epochs`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiles: bool = False
    """Whether the first batch waits for a compiler, which is then told apart."""
    needed: bool = False
    """Nothing can be compared without it."""

    @property
    def kind(self) -> str:
        return "peer" if self.name.startswith("peer:") else "ours"


def run_rounds(
    cases: Sequence[Case], work: Work, *, rounds: int, seconds: float
) -> Iterator[tuple[list[Worker], Failures]]:
    """Measure all `cases` for about `seconds` in each round, one after the other.

    Yields, after every round, the workers that have measured in each, and the reasons why others have not. Raises
    `RunError` where a case fails that is needed, or all of this program's own.
    """
    failures, workers = Failures(), [Worker(case, work) for case in cases]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.stop)
        # All import at the same time, for seconds; then each is opened by itself, so that its first batch is timed.
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
    """A process that measures a case, seen from its parent. Its methods raise `RunError` where the process fails."""

    def __init__(self, case: Case, work: Work) -> None:
        self.case = case
        self.opening: dict[str, float] = {}
        """Seconds to the first batch; empty before it."""
        self.images_per_s: list[float] = []
        """Of every turn."""
        self.used: dict[str, int | float] = {}
        """Memory, processes, threads and share of waiting, so far."""
        self._connection, self._theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(self._theirs, case, work))

    def start(self) -> None:
        """Start the process, which imports what every case needs."""
        with self._theirs, _delayed_interruptions():
            self._process.start()

    def wait(self) -> None:
        """Wait until the process has imported what it needs."""
        self._answer()

    def open(self) -> None:
        """Open the case and take its first batch."""
        self.opening = self._ask("open")

    def measure(self, seconds: float) -> None:
        """Deliver batches for about `seconds`, after a third of that untimed, which uses up what was read ahead."""
        images_per_s, self.used = self._ask("measure", seconds)
        self.images_per_s.append(images_per_s)

    def stop(self) -> None:
        """End the process: at once unless it is open."""
        self._connection.close()
        if self._process.pid is not None:
            self._process.join(5 if self.opening else 0)
            self._process.kill()
            self._process.join(5)

    def _ask(self, *message: Any) -> Any:
        with contextlib.suppress(ConnectionError):  # of a process that has died, as `_answer` tells
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
    """A Ctrl-C, which a terminal sends to all processes, arrives after the block; those begun in it never see one."""
    resource_tracker.ensure_running()  # the first process begun would begin it, and Python 3.11 then lets signals in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, case: Case, work: Work) -> None:
    with contextlib.suppress(ConnectionError):  # the parent listens no more
        _answer_messages(connection, case, work)
    os._exit(0)  # the libraries' threads and processes have nothing left to save


def _answer_messages(connection: Connection, case: Case, work: Work) -> None:
    """Tell that this process is ready, then call the methods of the case that the parent names."""
    try:
        import torch  # before the clock starts: every case needs it

        from fastresnet.device import explained_failures

        multiprocessing.set_start_method(None, force=True)  # that of a program by itself, for the loaders' own workers
        torch.set_num_threads(work.threads)
        torch.zeros(1, device=work.device)  # so is the GPU's context
        connection.send(None)
        with explained_failures("give a smaller --batch-size"):
            opened = _OpenCase(case, work)
            for method, *arguments in _messages(connection):
                connection.send(getattr(opened, method)(*arguments))
    except UserError as error:
        connection.send(str(error))
    except Exception as error:  # noqa: BLE001  told to the parent
        connection.send(in_one_line(error))
    finally:
        connection.close()


def _messages(connection: Connection) -> Iterator[Any]:
    """What arrives until the other end is closed."""
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


class _OpenCase:
    """A case in its process: opened by its module, and measured from within."""

    def __init__(self, case: Case, work: Work) -> None:
        self._case, self._work, self._timer = case, work, WaitTimer()
        self._waited = self._worked = 0.0
        self._baseline = self._peak = 0
        self._batches: Iterator[Any] = iter(())

    def open(self) -> dict[str, float]:
        """Take the first batch; return how long it took, and how much of that a compiler."""
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
        """Begin with the epochs, and return the seconds from `started` to the first batch."""
        self._batches = _endless(start_epoch)
        self.deliver(0)
        return time.perf_counter() - started

    def measure(self, seconds: float) -> tuple[float, dict[str, int | float]]:
        """A turn: images per second, and what has been used so far."""
        self.deliver(seconds / 3)
        waited, started = self._timer.seconds, time.perf_counter()
        images_per_s = self.deliver(seconds)
        self._waited += self._timer.seconds - waited
        self._worked += time.perf_counter() - started
        return images_per_s, self._used()

    def deliver(self, seconds: float) -> float:
        """Images per second over at least `seconds` and one batch."""
        import torch

        started, batches = time.perf_counter(), 0
        while time.perf_counter() - started < seconds or not batches:
            next(self._batches)
            batches += 1
        if self._work.device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        self._peak = max(self._peak, _memory())
        return batches * self._work.batch_size / elapsed

    def _used(self) -> dict[str, int | float]:
        """Memory beyond PyTorch's own at its highest, processes and threads now, share of the turns spent waiting."""
        import torch

        processes = process_tree()
        used = {
            "peak_memory_mb": (self._peak - self._baseline) / 1e6,
            "processes": len(processes),
            "threads": sum(len(os.listdir(f"/proc/{process}/task")) for process in processes),
        }
        if self._timer.seconds:
            used["waiting_percent"] = 100 * self._waited / self._worked
        if self._work.device == "cuda":  # PyTorch's share: what DALI takes of the GPU by itself is not in it
            used["gpu_memory_mb"] = torch.cuda.max_memory_reserved() / 1e6
        return used


def _endless(start_epoch: Epochs) -> Iterator[Any]:
    for epoch in itertools.count():
        yield from start_epoch(epoch)


def _memory() -> int:
    """Bytes that this process and those below it hold: pages of their own, and files that this one has in memory.

    Pages that forked processes still share are counted once.
    """
    shared = _fields("/proc/self/smaps_rollup")
    files = shared["Rss"] - shared["Anonymous"] - shared.get("Shmem", 0)
    own = 0
    for process in process_tree():
        fields = _fields(f"/proc/{process}/smaps_rollup")
        own += fields["Pss_Anon"] + fields["Pss_Shmem"]
    return 1024 * (files + own)


def _fields(path: str) -> dict[str, int]:
    """Figures of a /proc file, kB."""
    lines = (line.split() for line in Path(path).read_text().splitlines()[1:])
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


class OtherLoad:
    """Counts, from its creation on, how many of the usable processors others keep busy: their processes, and other
    guests of the same host. This process and all below it are left out.
    """

    def __init__(self) -> None:
        self._began, self._ticks = time.monotonic(), _other_ticks()

    def figures(self, threads: int) -> dict[str, Any]:
        """Return the entries of a result where `threads` threads are measured: `other_load`, the mean number of
        processors, and `overloaded`, true where they and the threads are more than the usable `processors`. Empty
        without /proc.
        """
        if self._ticks is None:
            return {}
        ticks = (_other_ticks() or 0) - self._ticks
        others = max(ticks / _TICKS_PER_S / (time.monotonic() - self._began), 0.0)
        overloaded = others + threads > usable_processors() + _TOLERATED
        return {"processors": usable_processors(), "other_load": round(others, 2), "overloaded": overloaded}


def process_tree() -> list[int]:
    """This process and all below it."""
    tree = [os.getpid()]
    for process in tree:  # grows while it is read
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has just ended
                tree += map(int, children.read_text().split())
    return tree


def _other_ticks() -> int | None:
    """Ticks that others have kept the usable processors busy; None where there is no /proc."""
    return _busy_ticks() - _own_ticks() if Path("/proc/stat").exists() else None


def _busy_ticks() -> int:
    """Ticks that the usable processors have been busy, or taken by the host (proc(5), /proc/stat)."""
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    ticks = 0
    for name, *fields in lines:
        if name in usable:
            user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, fields[:8])
            ticks += user + nice + system + sum(interrupts_and_steal)
    return ticks


def _own_ticks() -> int:
    """Ticks of this process, of all below it, and of those among them that have ended (proc(5), /proc/PID/stat)."""
    ticks = 0
    for process in process_tree():
        with contextlib.suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks
