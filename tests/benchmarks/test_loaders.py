"""The loader benchmark, whole and small: every contestant runs, and the figures agree with one another."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import contestant, loaders
from benchmarks.__main__ import main
from benchmarks.contestant import Contestant, Entry, Work
from benchmarks.measurement import ratio, spread
from benchmarks.report import print_report
from fastresnet import cli, terminal
from pipelines.errors import Note, RunError
from pipelines.store import open_store

OURS = ["resident", "dali", "ffcv", "torchvision"]
PEERS = ["peer:torchvision-w0", "peer:torchvision-wN", "peer:dali", "peer:ffcv"]


@pytest.fixture(scope="module")
def report(quick_contestants, data_root, tmp_path_factory):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("ffcv")
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRESNET_DATA", str(data_root))
        small = ["--data", "shapes10", "--batch-size", "64", "--rounds", "3", "--seconds", "0.05"]
        files = ["--json", str(folder / "report.json"), "--chart", str(folder / "chart.png")]
        assert terminal.guarded(main, ["loaders", *small, "--precision", "fp32", *files]) == 0
    return json.loads((folder / "report.json").read_text()), folder / "chart.png"


def test_every_pipeline_and_every_peer_takes_part(report):
    figures, _ = report
    assert (figures["schema"], figures["benchmark"]) == (1, "loaders")
    assert [row["name"] for row in figures["rows"]] == OURS + PEERS
    for row in figures["rows"]:
        assert row["kind"] == ("ours" if row["name"] in OURS else "peer")
        assert row["rounds"] == 3
        assert 0 < row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert row["first_batch_s"] > 0
        assert row["peak_memory_mb"] > 0
        assert ("compile_s" in row) == ("ffcv" in row["name"])
    assert {"device", "threads", "versions", "commit", "command", "started"} <= figures["environment"].keys()
    assert {"ffcv", "torch", "numpy"} <= figures["environment"]["versions"].keys()
    assert figures["environment"]["data"] == "shapes10"


def test_processes_and_threads_are_those_of_the_loader(report):
    """A `DataLoader` without workers is one process; with one for each core, as many more."""
    rows = {row["name"]: row for row in report[0]["rows"]}
    assert rows["peer:torchvision-w0"]["processes"] == 1
    assert rows["peer:torchvision-wN"]["processes"] > 1
    assert all(row["threads"] >= row["processes"] for row in rows.values())


@pytest.mark.parametrize(("compiles", "start"), [(True, (17, 12)), (False, (17,))])
def test_the_compilation_is_what_the_first_batch_takes_longer_than_a_later_one(dataset, monkeypatch, compiles, start):
    """By a clock that stands still but while a loader is opened, 2 s, and makes its batches, the first in 15 s."""
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
    monkeypatch.setattr(contestant, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    entry = Entry(name="slow", opener="slow_loader:open_loader", compiles=compiles)
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    assert tuple(contestant._Turns(entry, work).start.values()) == start


def test_the_limit_counts_the_bytes_a_batch_must_move(report):
    """fp32: each of the 3,072 values is read as one byte and written as four."""
    figures, _ = report
    limits = figures["limits"]
    assert limits["images_per_s"] == pytest.approx(limits["copy_gb_per_s"] * 1e9 / (3072 * 5))
    for row in figures["rows"]:
        assert row["percent_of_limit"] == pytest.approx(100 * row["images_per_s"] / limits["images_per_s"])


def test_each_pipeline_is_compared_with_each_peer(report):
    figures, _ = report
    assert [(each["name"], each["over"]) for each in figures["ratios"]] == [(a, b) for a in OURS for b in PEERS]
    assert all(0 < each["low"] <= each["median"] <= each["high"] for each in figures["ratios"])


def test_the_chart_is_a_readable_picture(report):
    with Image.open(report[1]) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_ratios_are_taken_round_by_round():
    """A machine that is ten times slower in the second round changes neither contestant's merit."""
    assert ratio("a", [20.0, 2.0, 30.0], "b", [10.0, 1.0, 10.0]) == {
        "name": "a",
        "over": "b",
        "median": 2.0,
        "low": 2.0,
        "high": 3.0,
    }
    assert spread([3.0, 1.0, 2.0], "x") == {"x": 2.0, "x_low": 1.0, "x_high": 3.0}


def test_peers_have_a_worker_for_each_usable_processor(dataset, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)))
    monkeypatch.setattr(loaders, "is_installed", lambda _: False)
    with pytest.warns(Note, match="takes no part"):
        entries = {entry.name: entry for entry in loaders._available(dataset, "cpu")}
    assert [entries[f"peer:torchvision-w{n}"].options["workers"] for n in "0N"] == [0, 77]


def test_the_data_set_may_be_the_current_folder(dataset, need, monkeypatch):
    need("ffcv")
    monkeypatch.chdir(dataset.folder)
    assert "peer:ffcv" in [entry.name for entry in loaders._available(open_store(Path()), "cpu")]


def test_a_contestant_that_fails_ends_the_run_with_its_own_error(quick_contestants, dataset):
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    with pytest.raises(RunError, match=r"^broken failed: ModuleNotFoundError: .*no_such_peer.* \(.*\.py:\d+\)$"):
        Contestant(Entry(name="broken", opener="benchmarks.peers.no_such_peer:open"), work)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loadrs"], "did you mean 'loaders'?"),
        (["loaders", "--precision", "bf61"], "did you mean 'bf16'?"),
        (["loaders", "--data", "shapes10", "--batch-size", "999"], "batch size 999"),
        (["loaders", "--data", "shapes10", "--rounds", "0"], "--rounds 0"),
        (["loaders", "--data", "shapes10", "--seconds", "nan"], "--seconds nan"),
        (["loaders", "--json", "no/such/folder/f.json"], "there is no folder no/such/folder"),
        (["loaders", "--chart", "chart.doc"], "unknown kind of chart '.doc'"),
    ],
)
@pytest.mark.parametrize("command", ["fastresnet bench", "python -m benchmarks"])
def test_wrong_arguments_exit_with_2(data_root, monkeypatch, capsys, command, arguments, message):
    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))
    code = cli.main(["bench", *arguments]) if command == "fastresnet bench" else terminal.guarded(main, arguments)
    assert code == 2
    assert message in capsys.readouterr().err


RACE = """
import signal
import sys
from pathlib import Path
from benchmarks.contestant import Entry, Work, race
from fastresnet import terminal

def main(arguments):
    entries = [Entry(name="slow", opener=f"test_loaders:{arguments[0]}")]
    work = Work(folder=Path(), batch_size=1, device="cpu", precision="fp32", threads=1)
    for _ in race(entries, work, rounds=1, seconds=0.01):
        pass
    return 0

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell starts with & would ignore
    sys.exit(terminal.guarded(main, sys.argv[1:]))
"""


def opens_slowly(*_):
    print("working", flush=True)
    time.sleep(3600)


def works_until_told(*_):
    """The first batch is there at once; those of a turn come when there is a file `go`."""

    def epoch(_):
        yield
        print("working", flush=True)
        while not Path("go").exists():
            time.sleep(0.01)
        yield from itertools.repeat(None)

    return epoch


@pytest.fixture
def race(tmp_path, monkeypatch):
    """Start a race of one contestant in a session of its own, and wait until that is at work."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "race.py").write_text(RACE)
    started = []

    def start(opener):
        command = [sys.executable, "race.py", opener]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes))
        assert started[0].stdout.readline() == "working\n"
        return started[0]

    yield start
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started[0].pid, signal.SIGKILL)
    started[0].communicate()


STOPS = {
    "Ctrl-C": (lambda pid: os.killpg(pid, signal.SIGINT), 130, "fastresnet: interrupted.\n"),
    "SIGTERM": (lambda pid: os.kill(pid, signal.SIGTERM), 143, ""),
    "SIGTERM to all": (lambda pid: os.killpg(pid, signal.SIGTERM), 143, ""),
    "SIGKILL": (lambda pid: os.kill(pid, signal.SIGKILL), -9, ""),
}


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM to all"])
def test_a_race_that_is_stopped_while_a_contestant_starts_ends_without_it(race, stop):
    process, (send, code, words) = race("opens_slowly"), STOPS[stop]
    send(process.pid)
    assert process.communicate(timeout=60) == ("", words)  # all that hold the pipes have ended
    assert process.returncode == code


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_contestant_that_nobody_waits_for_ends_in_silence(race, tmp_path, stop):
    process, (send, code, words) = race("works_until_told"), STOPS[stop]
    send(process.pid)
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
def test_a_contestant_without_memory_is_told_in_one_line(quick_contestants, dataset, monkeypatch, opener, message):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)
    with pytest.raises(RunError, match=message) as caught:
        Contestant(Entry(name="broken", opener=f"test_loaders:{opener}"), work)
    assert len(str(caught.value).splitlines()) == 1


def works(*_):
    return lambda _: itertools.repeat(None)


def fails_in_its_second_turn(*_):
    """The first batch, then a turn of two parts of one batch each; more is too much."""

    def epoch(_):
        yield from (None, None, None)
        raise ValueError("no more\nthan this")

    return epoch


@pytest.fixture
def race_of(dataset, monkeypatch):
    """The rounds of a race: who took part, and why the others did not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    work = Work(folder=dataset.folder, batch_size=64, device="cpu", precision="fp32", threads=1)

    def rounds(count=1, needed=(), **openers):
        entries = [
            Entry(name=name.replace("_", ":"), opener=f"test_loaders:{opener}", needed=name in needed)
            for name, opener in openers.items()
        ]
        for contestants, failures in contestant.race(entries, work, rounds=count, seconds=1e-9):
            yield [(each.entry.name, len(each.images_per_s)) for each in contestants], dict(failures)

    return rounds


def test_who_fails_is_left_out_and_the_others_go_on(race_of):
    with pytest.warns(Note) as notes:
        first, second = race_of(
            2, resident="works", peer_early="out_of_memory", peer_late="fails_in_its_second_turn", peer_plain="works"
        )
    early = {"peer:early": "peer:early failed: out of memory: give a smaller --batch-size."}
    assert first == ([("resident", 1), ("peer:late", 1), ("peer:plain", 1)], early)
    left, failures = second
    assert left == [("resident", 2), ("peer:plain", 2)]
    assert failures.keys() == {"peer:early", "peer:late"}
    assert "peer:late failed: ValueError: no more (test_loaders.py:" in failures["peer:late"]
    assert [str(note.message) for note in notes] == [f"left out: {reason}" for reason in failures.values()]


def test_a_race_without_any_of_ours_or_without_one_that_is_needed_is_a_failure(race_of):
    with pytest.warns(Note), pytest.raises(RunError, match="nothing is left to compare"):
        list(race_of(resident="out_of_memory", peer_plain="works"))
    with pytest.raises(RunError, match=r"^resident died with exit code -9"):
        list(race_of(needed=["resident"], resident="killed", dali="works"))


def test_tables_tell_of_those_left_out_and_of_the_memory_of_a_gpu(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {"name": "resident", "images_per_s": 2e6, "images_per_s_low": 1e6, "images_per_s_high": 3e6}
    row |= {"percent_of_limit": 9.0, "first_batch_s": 1.0, "peak_memory_mb": 1234.0, "processes": 1, "threads": 20}
    report = {
        "environment": {"data": "cifar10", "batch_size": 512, "precision": "bf16", "device": "GPU", "data_mb": 184.0},
        "limits": {"images_per_s": 1e7, "copy_gb_per_s": 3000.0},
        "rows": [row],
        "ratios": [],
    }
    print_report(loaders.tables(report), loaders.notes(report))
    assert "left out" not in (without := capsys.readouterr().out)
    assert "GPU" not in without.replace("bf16, GPU", "")
    report["rows"] = [row | {"gpu_memory_mb": 5678.0}]
    report["failed"] = {"peer:dali": "peer:dali failed: no DALI"}
    print_report(loaders.tables(report), loaders.notes(report))
    out = capsys.readouterr().out
    assert "MB host/GPU" in out
    assert "1,234/5,678" in out
    assert "left out: peer:dali failed: no DALI" in out
    assert "1,234/5,678" in loaders.markdown_table(report)
