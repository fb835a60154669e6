"""Scaling model of a step against hand calculations, and tables from synthetic measurements."""

import os

import pytest

from benchmarks import scaling
from benchmarks.scaling import RUNS, Machine, fitted, gradient_bytes, measured_table

MACHINE = Machine(overhead=0.01, per_image=0.001, latency=0.0001, bandwidth=1e9, processors=4)
MB = 1 << 20


def test_exchange_time_is_that_of_a_ring_all_reduce():
    """4 processes: 6 transfers with a latency of 0.1 ms, each of a quarter of 8 MB at 1 GB/s."""
    assert MACHINE.exchange(8_000_000, 4) == pytest.approx(0.0006 + 1.5 * 0.008)
    assert MACHINE.exchange(8_000_000, 1) == 0


def test_single_bucket_does_not_overlap_the_backward_pass():
    assert MACHINE.step(20, 8_000_000, 4) == pytest.approx(0.03 + 0.0126)


def test_earlier_buckets_overlap_the_backward_pass_and_the_last_does_not():
    size, alone = 100 * MB, 0.01 + 300 * 0.001
    last = 6 * 0.0001 + 1.5 * 25 * MB / 1e9
    assert MACHINE.step(300, size, 4) == pytest.approx(alone + last)
    whole = 6 * 0.0001 + 1.5 * 100 * MB / 1e9
    assert MACHINE.step(20, size, 4) == pytest.approx(0.03 + whole - 0.03 * 2 / 3 * 3 / 4)


def test_step_slows_down_when_processes_exceed_processors():
    slow = Machine(overhead=0.01, per_image=0.001, latency=0.0, bandwidth=1e30, processors=2)
    assert slow.step(20, 8, 4) == pytest.approx(2 * 0.03)


def test_fitting_batch_is_the_smallest_that_reaches_the_efficiency():
    """One process takes 0.01 + 0.001 b, four take 0.0126 more: 80 % from 0.0504 on, and so from 41 images on."""
    assert MACHINE.fitting_batch(8_000_000, 4) == 64
    assert MACHINE.fitting_batch(8_000_000, 4, share=0.99) == 2048


def test_processors_are_those_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)))
    monkeypatch.setattr(scaling, "_images_per_s", lambda *_: 1.0)
    monkeypatch.setattr(scaling, "_torchrun", lambda *_: "0.1\n0.2\n")
    assert scaling.measure("cifar10", rounds=1)["processors"] == 77


def test_fit_recovers_the_machine_from_its_own_predictions():
    truth = Machine(overhead=0.02, per_image=0.0016, latency=0.0002, bandwidth=2e9, processors=2)
    size = gradient_bytes("resnet20")
    assert size == 4 * 272_474
    report = {
        "gradient_bytes": size,
        "processors": 2,
        "exchange_s": {"bytes": [1024, size], "seconds": [truth.exchange(1024, 2), truth.exchange(size, 2)]},
        "runs": [{"processes": n, "batch_size": b, "images_per_s": [b / truth.step(b / n, size, n)]} for n, b in RUNS],
    }
    found = fitted(report)
    for name in ("overhead", "per_image", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name))
    lines = measured_table(report).splitlines()
    assert len(lines) == 2 + len(RUNS)
    assert all(line.endswith("1.00 |") for line in lines[2:])
    assert [("fitted" in line) for line in lines[2:]] == [True, True, False, False, False, False]
