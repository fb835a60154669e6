"""Load by others during a measurement: its share, and its line in a result."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import load
from benchmarks.load import OtherLoad, _busy_ticks, _own_ticks

BURN = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"


def test_the_work_of_this_process_and_of_those_below_it_is_its_own():
    def seconds():
        """Own work as this program and as Python count it; the latter without children that live."""
        times = os.times()
        python = times.user + times.system + times.children_user + times.children_system
        return _own_ticks() / load._TICKS_PER_S, python

    before = seconds()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    ended = seconds()
    assert ended[0] - before[0] == pytest.approx(ended[1] - before[1], abs=0.05)  # up to five ticks of 10 ms
    with subprocess.Popen([sys.executable, "-c", f"{BURN}\nprint(flush=True); input()"], stdin=-1, stdout=-1) as child:
        child.stdout.readline()
        alive = seconds()
        assert alive[0] - ended[0] >= alive[1] - ended[1] + 0.3 - 0.05  # as above: each figure is rounded to ticks
        child.communicate(b"\n")


def test_all_work_on_the_machine_is_counted_as_somebodys():
    busy, own = _busy_ticks(), _own_ticks()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert _busy_ticks() - busy >= _own_ticks() - own - 2  # the kernel rounds both to ticks


@pytest.mark.parametrize(
    ("others", "threads", "overloaded"), [(0.0, 2, False), (0.97, 1, False), (0.97, 2, True), (1.5, 1, True)]
)
def test_a_result_says_whether_there_was_more_to_do_than_processors(monkeypatch, others, threads, overloaded):
    clock = iter([100.0, 110.0])
    ticks = iter([5000, 5000 + round(10 * others * load._TICKS_PER_S)])
    monkeypatch.setattr(load, "usable_processors", lambda: 2)
    monkeypatch.setattr(load, "_other_ticks", lambda: next(ticks))
    monkeypatch.setattr(load.time, "monotonic", lambda: next(clock))
    figures = OtherLoad().figures(threads)
    assert figures == {"processors": 2, "other_load": others, "overloaded": overloaded}


def test_a_busy_machine_is_told_under_the_tables_and_in_the_file(run, tmp_path, monkeypatch):
    ticks = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(load, "_other_ticks", lambda: next(ticks))
    arguments = ("--models", "resnet20", "--batch-sizes", 2, "--precisions", "fp32", "--backends", "eager")
    code, out, _ = run(
        "bench", "step", *arguments, "--rounds", 1, "--seconds", 0.01, "--threads", 1, "--json", tmp_path / "r.json"
    )
    assert code == 0
    assert "busy machine: others kept" in out
    environment = json.loads((tmp_path / "r.json").read_text())["environment"]
    assert (environment["overloaded"], environment["threads"]) == (True, 1)
    assert "busy machine: others kept" in run("bench", "show", tmp_path / "r.json")[1]
