"""Trainings with several seeds, as real processes."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.accuracy import RESULTS
from fastresnet import seeds
from fastresnet.seeds import parse_seeds
from pipelines.errors import DataError, UsageError

SMALL = ["smoke", "--data", "shapes10", "--batch-size", "32", "--precision", "fp32", "--iterations", "2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("0-1,7", [0, 1, 7]), (" 5 , 2-3", [5, 2, 3]), ("4-4", [4])],
)
def test_seeds_are_numbers_and_ranges(text, expected):
    assert parse_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "0-99999999", "1.5", "0-3,2"])
def test_invalid_seeds_are_refused(text):
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.usefixtures("quick_processes")
def test_each_seed_is_trained_in_its_folder_and_the_table_has_mean_and_spread(run, tmp_path):
    code, out, _ = run("train", *SMALL, "--seeds", "3-4", "--out", tmp_path / "runs")
    assert code == 0
    assert "2 trainings, one after the other, on the CPU" in out
    accuracies = []
    for seed in (3, 4):
        folder = tmp_path / "runs" / f"seed{seed}"
        assert "epoch   1" in (folder / "train.log").read_text()
        assert json.loads((folder / "summary.json").read_text())["seed"] == seed
        accuracies.append(float((folder / "metrics.csv").read_text().split(",")[-2]))
    assert run("train", *SMALL, "--seed", 4, "--out", tmp_path / "alone")[0] == 0
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "alone" / "metrics.csv").read_bytes()
    assert f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %" in out


@pytest.mark.usefixtures("quick_processes")
def test_failed_training_is_reported_and_the_others_continue(run, tmp_path):
    (tmp_path / "seed1").mkdir()
    (tmp_path / "seed1" / "last.ckpt").touch()
    code, _, err = run("train", *SMALL, "--seeds", "1-2", "--out", tmp_path)
    assert code == 1
    assert f"1 of 2 trainings failed; see {tmp_path / 'seed1' / 'train.log'} (exit code 2)" in err
    assert "already holds a run" in (tmp_path / "seed1" / "train.log").read_text()
    assert (tmp_path / "seed2" / "summary.json").exists()


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_signals_stop_the_running_training_and_start_no_other(tmp_path, data_root, name, code):
    """A terminal that closes, and schedulers, may send several."""
    command = [sys.executable, "-m", "fastresnet", "train", *SMALL[:-2], "--epochs", "500"]
    command += ["--seeds", "1-2", "--out", tmp_path]
    process = subprocess.Popen(command, env={**os.environ, "FASTRESNET_DATA": str(data_root)})
    log = tmp_path / "seed1" / "train.log"
    while not log.exists() or "epoch   1" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.2)
    for _ in range(3):
        process.send_signal(getattr(signal, name))
        time.sleep(0.02)
    assert process.wait(timeout=60) == code
    assert "stopped by SIGTERM after step" in log.read_text()
    assert not (tmp_path / "seed2" / "train.log").exists()


@pytest.mark.parametrize("per_gpu", [1, 2, 3])
def test_as_many_trainings_as_requested_run_on_each_gpu(tmp_path, monkeypatch, per_gpu):
    """A stand-in for the training waits until all places are taken, and records its GPU and how many run."""
    program, summary = tmp_path / "python", next(RESULTS.glob("*.json"))
    program.write_text(
        "#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\n"  # the folder is the last argument
        f'touch "$1/running"; echo "$CUDA_VISIBLE_DEVICES" > "$1/seen"; cp {summary} "$1/summary.json"\n'
        f'until [ "$(ls {tmp_path}/*/seen | wc -l)" -ge {2 * per_gpu} ]; do sleep 0.05; done\n'
        f'ls {tmp_path}/*/running | wc -l > "$1/together"; rm "$1/running"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(seeds.sys, "executable", str(program))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    folders = {seed: tmp_path / str(seed) for seed in range(2 * per_gpu + 2)}
    assert seeds.train_seeds([], folders, gpus=2, per_gpu=per_gpu) == [json.loads(summary.read_text())] * len(folders)
    first = [(folders[seed] / "seen").read_text().strip() for seed in range(2 * per_gpu)]
    assert sorted(first) == ["4"] * per_gpu + ["6"] * per_gpu
    assert max(int((folder / "together").read_text()) for folder in folders.values()) <= 2 * per_gpu


def test_training_without_a_readable_summary_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds.sys, "executable", "true")
    with pytest.raises(DataError, match="is not a finished run"):
        seeds.train_seeds([], {1: tmp_path / "seed1"}, gpus=0)
    (tmp_path / "seed1" / "summary.json").write_text('{"schema": 1}')
    with pytest.raises(DataError, match="damaged: recipe is not a text: null"):
        seeds.train_seeds([], {1: tmp_path / "seed1"}, gpus=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "3 trainings, 2 in parallel, one on each GPU; each logs"),
        (("--per-gpu", 4), "3 trainings, 3 in parallel, up to 4 on each GPU; each logs"),
        (("--per_gpu=4",), "3 trainings, 3 in parallel, up to 4 on each GPU; each logs"),
    ],
)
def test_trainings_on_each_gpu_are_announced_and_not_an_option_of_theirs(run, tmp_path, monkeypatch, options, message):
    started = []

    def train_seeds(arguments, folders, gpus, per_gpu):
        started.append((arguments, gpus * per_gpu))
        figures = {"test_accuracy": 90.0, "test_accuracy_mirror": 91.0, "train_seconds": 1.0}
        return [{"seed": seed, **figures} for seed in folders]

    monkeypatch.setattr(seeds, "train_seeds", train_seeds)
    monkeypatch.setattr("fastresnet.device.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, out, _ = run("train", *SMALL, "--device", "cuda", "--seeds", "0-2", *options, "--out", tmp_path)
    assert code == 0
    assert message in out
    assert started == [([*SMALL, "--device", "cuda"], 8 if options else 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--seeds", "0-1", "--per-gpu", "2", "--device", "cpu"),
            "one after the other.*Leave --per-gpu out",
        ),
        (("--per-gpu", "2"), "Give --seeds"),
        (("--seeds", "0-1", "--per-gpu", "0"), "--per-gpu 0 is not in 1"),
    ],
    ids=["on a CPU", "without seeds", "too low"],
)
def test_invalid_number_of_trainings_on_a_gpu_is_refused(run, tmp_path, arguments, message):
    code, _, err = run("train", *SMALL, *arguments, "--out", tmp_path / "runs")
    assert code == 2
    assert re.search(message, err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["--seed", "1"], ["--seeds", "x"]], ids=["with --seed", "no numbers"])
def test_conflicting_or_invalid_seed_flags_are_refused(run, tmp_path, arguments):
    code, _, err = run("train", *SMALL, "--seeds", "0-1", *arguments, "--out", tmp_path / "runs")
    assert code == 2
    assert "--seed" in err
    assert not (tmp_path / "runs").exists()
