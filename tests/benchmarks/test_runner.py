"""Worker processes measured in turns: failures, interruption, and the load from other processes."""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from benchmarks import roofline, runner
from benchmarks.runner import Case, OtherLoad, Work, Worker, _busy_seconds, _own_seconds
from pipelines.errors import Note, RunError

# --- load from other processes ----------------------------------------------------------------------------------------


BURN = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"


def test_own_seconds_include_child_processes():
    def seconds():
        """Return own processor time as counted by this program and by Python, which leaves out running children."""
        times = os.times()
        python = times.user + times.system + times.children_user + times.children_system
        return _own_seconds(), python

    before = seconds()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    ended = seconds()
    assert ended[0] - before[0] == pytest.approx(ended[1] - before[1], abs=0.05)  # up to five ticks of 10 ms
    with subprocess.Popen([sys.executable, "-c", f"{BURN}\nprint(flush=True); input()"], stdin=-1, stdout=-1) as child:
        child.stdout.readline()
        alive = seconds()
        assert alive[0] - ended[0] >= alive[1] - ended[1] + 0.3 - 0.05  # as above: each figure is rounded to ticks
        child.communicate(b"\n")


def test_busy_seconds_include_own_seconds():
    busy, own = _busy_seconds(), _own_seconds()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert _busy_seconds() - busy >= _own_seconds() - own - 0.02  # the kernel rounds both to ticks


def test_busy_seconds_are_those_of_usable_processors_with_gaps_in_their_numbers(monkeypatch):
    """Fields of proc(5): user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice."""
    stat = "cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 1 2 3 900 900 4 5 6 900 900\ncpu2 9 0 0 0 0 0 0 0 0 0\ncpu7 50 0 0 0 0 0 0\n"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 7})
    monkeypatch.setattr(Path, "read_text", lambda _: stat)
    assert _busy_seconds() == (1 + 2 + 3 + 4 + 5 + 6 + 50) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("others", "threads", "overloaded"), [(0.0, 2, False), (0.97, 1, False), (0.97, 2, True), (1.5, 1, True)]
)
def test_figures_flag_load_above_the_number_of_processors(monkeypatch, others, threads, overloaded):
    clock = iter([100.0, 110.0])
    seconds = iter([5000.0, 5000 + 10 * others])
    monkeypatch.setattr(runner, "usable_processors", lambda: 2)
    monkeypatch.setattr(runner, "_other_seconds", lambda: next(seconds))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    figures = OtherLoad().figures(threads)
    assert figures == {"processors": 2, "other_load": others, "overloaded": overloaded}


def test_busy_machine_is_noted_below_the_tables_and_in_the_file(run, tmp_path, monkeypatch):
    seconds = iter(range(0, 10**7, 10**4))
    monkeypatch.setattr(runner, "_other_seconds", lambda: next(seconds))
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda _: 1e10)
    monkeypatch.setattr(roofline, "matmul_rate", lambda *_: 1e11)
    arguments = ("--models", "resnet20", "--batch-sizes", 2, "--precisions", "fp32", "--backends", "eager")
    code, out, _ = run(
        "bench", "step", *arguments, "--rounds", 1, "--seconds", 0.01, "--threads", 1, "--json", tmp_path / "r.json"
    )
    assert code == 0
    assert "busy machine: others kept" in out
    environment = json.loads((tmp_path / "r.json").read_text())["environment"]
    assert (environment["overloaded"], environment["threads"]) == (True, 1)
    assert "busy machine: others kept" in run("bench", "show", tmp_path / "r.json")[1]


# --- processes in turns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compiles", "start"), [(True, (17, 12)), (False, (17,))])
def test_compilation_time_is_the_excess_of_the_first_batch_over_a_later_one(dataset, monkeypatch, compiles, start):
    """The fake clock gives the opening of a loader 2 s, the first batch 15 s and the second 5 s."""
    clock, seconds = [0.0], iter([15, 5])

    def open_loader(*_):
        clock[0] += 2
        return epoch

    def epoch(_):
        clock[0] += next(seconds)
        yield

    module = types.ModuleType("slow_loader")
    module.open_loader = open_loader
    monkeypatch.setitem(sys.modules, "slow_loader", module)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    case = Case(name="slow", opener="slow_loader:open_loader", compiles=compiles)
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    assert tuple(runner._OpenCase(case, work).open().values()) == start


def test_turns_of_whole_epochs_contain_each_start(dataset, monkeypatch):
    """An epoch of 10 batches takes 10 s before its first batch, and 1 s for every batch: 20 s in all."""
    clock = [0.0]

    def epoch(_):
        clock[0] += 10
        for _ in range(10):
            clock[0] += 1
            yield

    module = types.ModuleType("bursty_loader")
    module.open_loader = lambda *_: epoch
    monkeypatch.setitem(sys.modules, "bursty_loader", module)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    for whole_epochs, batches_per_s in [(False, 1.0), (True, 0.5)]:
        case = runner._OpenCase(Case(name="b", opener="bursty_loader:open_loader", whole_epochs=whole_epochs), work)
        case.open()
        assert case.measure(3)[0] == 64 * batches_per_s


def test_a_process_that_ends_while_it_is_measured_does_not_count(monkeypatch):
    """Loaders that start their workers again for each epoch: one has ended, another waits to be reaped."""
    zombie = os.posix_spawn("/bin/true", ["true"], os.environ)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    ended = psutil.Process(os.posix_spawn("/bin/true", ["true"], os.environ))
    os.waitpid(ended.pid, 0)
    work = Work(folder=Path(), batch_size=64, device="cpu", precision="fp32", threads=1)
    monkeypatch.setattr(runner, "process_tree", lambda: [psutil.Process(), psutil.Process(zombie), ended])
    assert runner._memory() > 0
    assert runner._OpenCase(Case(name="x", opener=""), work)._used()["threads"] >= 1
    os.waitpid(zombie, 0)


def opened(case, work):
    worker = Worker(case, work)
    worker.start()
    worker.wait()
    worker.open()


def test_a_worker_that_fails_ends_the_run_with_its_own_error(quick_workers, dataset):
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    with pytest.raises(RunError, match=r"^broken failed: ModuleNotFoundError: .*no_such_peer.* \(.*\.py:\d+\)$"):
        opened(Case(name="broken", opener="benchmarks.peers.no_such_peer:open"), work)


PROGRAM = """
import os
import signal
import sys
from pathlib import Path
from benchmarks.runner import Case, Work, run_rounds
from fastresnet import terminal

def main(arguments):
    cases = [Case(name="slow", opener=f"test_runner:{arguments[0]}")]
    work = Work(folder=Path(), batch_size=1, device="cpu", precision="fp32", threads=1)
    for _ in run_rounds(cases, work, rounds=1, seconds=0.01):
        pass
    return 0

if __name__ == "__main__":
    print(os.getpid(), flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    sys.exit(terminal.guarded(main, sys.argv[1:]))
"""


def start_child():
    """Start a process that does not notice the end of its parent, as some loaders' workers."""
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,), daemon=True).start()


def opens_slowly(*_):
    start_child()
    print("working", flush=True)
    time.sleep(3600)


def works_until_released(*_):
    """Yield the first batch at once, and those of a turn once the file `go` exists."""
    start_child()

    def epoch(_):
        yield
        print("working", flush=True)
        while not Path("go").exists():
            time.sleep(0.01)
        yield from itertools.repeat(None)

    return epoch


@pytest.fixture
def start(python, tmp_path, monkeypatch):
    """Start the rounds of one worker in a new session, and wait until the worker is running.

    Returns the program that has started them, and their process id.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "rounds.py").write_text(PROGRAM)
    started = []

    def start_rounds(opener):
        command = [python, "rounds.py", opener]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        program = subprocess.Popen(command, cwd=tmp_path, **pipes)
        started.extend([program, int(program.stdout.readline())])
        assert program.stdout.readline() == "working\n"
        return started

    yield start_rounds
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started[1], signal.SIGKILL)
    started[0].communicate()


STOPS = {
    "Ctrl-C": (lambda pid: os.killpg(pid, signal.SIGINT), 130, "fastresnet: interrupted.\n"),
    "SIGTERM": (lambda pid: os.kill(pid, signal.SIGTERM), 143, ""),
    "SIGTERM to all": (lambda pid: os.killpg(pid, signal.SIGTERM), 143, ""),
    "SIGKILL": (lambda pid: os.kill(pid, signal.SIGKILL), -9, ""),
}


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM to all"])
def test_signal_while_a_worker_opens_ends_rounds_and_worker(start, stop):
    (process, pid), (send, code, words) = start("opens_slowly"), STOPS[stop]
    send(pid)
    assert process.communicate(timeout=60) == ("", words)  # all that hold the pipes have ended
    assert process.returncode == code


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_abandoned_worker_exits_without_output(start, tmp_path, stop):
    (process, pid), (send, code, words) = start("works_until_released"), STOPS[stop]
    send(pid)
    if stop == "SIGKILL":
        process.wait()
    (tmp_path / "go").touch()
    assert process.communicate(timeout=60) == ("", words)
    assert process.returncode == code


def out_of_memory(*_):
    raise MemoryError


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("opener", "message"),
    [("out_of_memory", "broken failed: out of memory: give a smaller"), ("killed", "broken died with exit code -9")],
)
def test_out_of_memory_or_killed_worker_is_a_one_line_error(quick_workers, dataset, monkeypatch, opener, message):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    with pytest.raises(RunError, match=message) as caught:
        opened(Case(name="broken", opener=f"test_runner:{opener}"), work)
    assert len(str(caught.value).splitlines()) == 1


def works(*_):
    return lambda _: itertools.repeat(None)


def fails_in_its_second_turn(*_):
    """Yield the first batch and a turn of two parts of one batch each, then fail."""

    def epoch(_):
        yield from (None, None, None)
        raise ValueError("no more\nthan this")

    return epoch


@pytest.fixture
def rounds_of(dataset, monkeypatch):
    """Yield the remaining workers of each round, and the errors of those that failed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)

    def rounds(count=1, needed=(), **openers):
        cases = [
            Case(name=name.replace("_", ":"), opener=f"test_runner:{opener}", needed=name in needed)
            for name, opener in openers.items()
        ]
        for workers, failures in runner.run_rounds(cases, work, rounds=count, seconds=1e-9):
            yield [(each.case.name, len(each.images_per_s)) for each in workers], dict(failures)

    return rounds


class StartBarrier:
    """Folder that a worker receives only once `workers` processes have started."""

    def __init__(self, folder, workers):
        self.arguments = folder, workers

    def __reduce__(self):
        return wait_for_workers, self.arguments


def wait_for_workers(folder, workers):
    (folder / str(os.getpid())).touch()
    end = time.monotonic() + 30
    while len(list(folder.iterdir())) < workers:
        assert time.monotonic() < end, "the others have not begun"
        time.sleep(0.01)
    return folder


def opens_alone(*_, folder):
    (folder / "open").touch(exist_ok=False)
    time.sleep(0.2)
    (folder / "open").unlink()
    return works()


def test_workers_start_together_and_open_one_after_the_other(dataset, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    barrier = importlib.import_module("test_runner").StartBarrier(tmp_path, 3)  # as the workers will import it
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    cases = [Case(name=f"{n}", opener="test_runner:opens_alone", options={"folder": barrier}) for n in range(3)]
    ((workers, failures),) = runner.run_rounds(cases, work, rounds=1, seconds=1e-9)
    assert [worker.case.name for worker in workers] == ["0", "1", "2"]
    assert failures == {}
    assert all(worker.opening["first_batch_s"] >= 0.2 for worker in workers)


def test_failed_worker_is_left_out_and_the_others_continue(rounds_of):
    with pytest.warns(Note) as notes:
        first, second = rounds_of(
            2, resident="works", peer_early="out_of_memory", peer_late="fails_in_its_second_turn", peer_plain="works"
        )
    early = {"peer:early": "peer:early failed: out of memory: give a smaller --batch-size."}
    assert first == ([("resident", 1), ("peer:late", 1), ("peer:plain", 1)], early)
    left, failures = second
    assert left == [("resident", 2), ("peer:plain", 2)]
    assert failures.keys() == {"peer:early", "peer:late"}
    assert "peer:late failed: ValueError: no more (test_runner.py:" in failures["peer:late"]
    assert [str(note.message) for note in notes] == [f"left out: {reason}" for reason in failures.values()]


def test_rounds_fail_without_any_own_pipeline_or_a_needed_worker(rounds_of):
    with pytest.warns(Note), pytest.raises(RunError, match="nothing is left to compare"):
        list(rounds_of(resident="out_of_memory", peer_plain="works"))
    with pytest.raises(RunError, match=r"^resident died with exit code -9"):
        list(rounds_of(needed=["resident"], resident="killed", dali="works"))
