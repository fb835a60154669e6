"""Runs that go on after their end, or end early."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from fastresnet.config import TrainConfig, from_toml
from fastresnet.training.extension import early_end
from fastresnet.training.step import TrainStep
from pipelines.errors import UserError

SMALL = ("smoke", "--data", "shapes10", "--batch-size", 8, "--precision", "fp32", "--threads", 1)
CONSTANT = ("--milestones",)


pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def data_root(tiny_root):
    """Five steps an epoch."""
    return tiny_root


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_network(folder, other):
    first, second = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (("--epochs", 1, *CONSTANT), ("--epochs", 3, *CONSTANT)),
        (("--epochs", 2, "--milestones", 0.5), ("--epochs", 4, "--milestones", 0.25)),
        (("--iterations", 10, "--epochs", 9, *CONSTANT), ("--epochs", 3, *CONSTANT)),
    ],
    ids=["constant rate", "milestone at the same step", "limit in steps"],
)
def test_an_extended_run_is_the_one_of_that_length(run, tmp_path, short, long):
    folder = tmp_path / "run"
    assert run("train", *SMALL, *short, "--out", folder)[0] == 0
    before, summary = rows_of(folder), (folder / "summary.json").read_bytes()
    code, out, err = run("train", *SMALL, *long, "--out", folder, "--resume")
    assert (code, err) == (0, "")
    assert "resuming after step" in out
    assert rows_of(folder)[: len(before)] == before
    assert (folder / f"summary-{len(before)}.json").read_bytes() == summary
    assert json.loads((folder / "summary.json").read_text())["epochs"] == int(long[1])
    assert from_toml(folder / "config.toml").epochs == int(long[1])
    assert run("train", *SMALL, *long, "--out", tmp_path / "long")[0] == 0
    assert_same_network(folder, tmp_path / "long")
    code, out, _ = run("train", *SMALL, *long, "--out", folder, "--resume")
    assert code == 0
    assert out.startswith(f"{folder} is finished after {long[1]} epochs.")


def test_an_interrupted_extension_goes_on(run, tmp_path, monkeypatch):
    """The rest of the epoch in which it stopped is trained once."""
    folder, arguments = tmp_path / "run", ("train", *SMALL, *CONSTANT, "--epochs")
    assert run(*arguments, 1, "--out", folder)[0] == 0
    original, steps = TrainStep.__call__, []

    def failing(self, *batch):
        steps.append(1)
        if len(steps) > 3:
            raise UserError("a failure")
        original(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", failing)
        code, _, err = run(*arguments, 3, "--out", folder, "--resume", "--checkpoint-steps", 1)
        assert (code, "a failure" in err) == (1, True)
    assert not (folder / "summary.json").exists()
    assert run(*arguments, 3, "--out", folder, "--resume")[0] == 0
    assert run(*arguments, 3, "--out", tmp_path / "long")[0] == 0
    assert_same_network(folder, tmp_path / "long")


@pytest.mark.parametrize(
    ("short", "long", "message"),
    [
        (
            ("--epochs", 2, "--schedule", "linear"),
            ("--epochs", 3, "--schedule", "linear"),
            "cannot go on to 15 steps: in a run of so many, the 10 taken would have had other learning rates "
            "(--schedule linear) or image sizes. Start another run from its weights: --init-from",
        ),
        (
            ("--epochs", 2, "--schedule", "cosine"),
            ("--epochs", 3, "--schedule", "cosine"),
            "other learning rates (--schedule cosine)",
        ),
        (
            ("--epochs", 2),
            ("--epochs", 4),
            "(--schedule step) or image sizes. To keep the milestones where they were, add --milestones 0.25 0.375.",
        ),
        (
            ("--epochs", 2, "--warmup", 0.2),
            ("--epochs", 4, "--warmup", 0.2),
            "add --milestones 0.25 0.375 --warmup 0.1.",
        ),
        (
            ("--epochs", 2, "--resolutions", 16, 32, *CONSTANT),
            ("--epochs", 4, "--resolutions", 16, 32, *CONSTANT),
            "or image sizes. Start another run from its weights",
        ),
        (("--epochs", 2, *CONSTANT), ("--epochs", 1, *CONSTANT), "has taken 10 steps, and these settings allow 5."),
        (
            ("--iterations", 7, "--epochs", 9, *CONSTANT),
            ("--epochs", 3, *CONSTANT),
            "has ended in mid-epoch, and cannot go on from there.",
        ),
    ],
    ids=["linear", "cosine", "milestones", "warm-up", "image sizes", "fewer", "mid-epoch"],
)
def test_an_extension_that_the_schedule_forbids_changes_nothing(run, tmp_path, short, long, message):
    folder = tmp_path / "run"
    assert run("train", *SMALL, *short, "--out", folder)[0] == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, _, err = run("train", *SMALL, *long, "--out", folder, "--resume")
    assert code == 2
    assert message in " ".join(err.split())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    if "--milestones" in message:  # the advice works
        advice = message.partition("add ")[2].removesuffix(".").split()
        assert run("train", *SMALL, *long, *advice, "--out", folder, "--resume")[0] == 0


def test_epochs_without_a_better_accuracy_end_a_run(run, tmp_path):
    """At a learning rate of 0 only the statistics of batch norm change."""
    arguments = ("train", *SMALL, "--lr", 0, "--val-split", 8, "--epochs", 30, "--out", tmp_path / "run")
    code, out, _ = run(*arguments, "--early-stop", 2)
    assert code == 0
    rows = [float(row["val_accuracy"]) for row in rows_of(tmp_path / "run")]
    assert len(rows) == rows.index(max(rows)) + 3 < 30
    assert f"stopped after epoch {len(rows)}, by --early-stop" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == len(rows)
    assert run(*arguments, "--early-stop", 2, "--resume")[1].startswith(f"{tmp_path / 'run'} is finished")
    assert run(*arguments, "--early-stop", 4, "--resume")[0] == 0
    assert len(rows_of(tmp_path / "run")) >= len(rows) + 2


@pytest.mark.parametrize(
    ("accuracies", "patience", "epoch"),
    [
        ([], 1, None),
        ([0.0], 1, None),
        ([50.0, 50.0], 1, 2),
        ([50.0, 60.0], 1, None),
        ([50.0, 60.0, 55.0], 2, None),
        ([50.0, 60.0, 55.0, 60.0], 2, 4),
        ([50.0, 60.0, 55.0, 60.0, 70.0], 2, 4),
        ([50.0, 60.0, 55.0, 60.0], 0, None),
    ],
)
def test_early_stop_counts_the_epochs_since_the_best_one(accuracies, patience, epoch):
    config = TrainConfig(val_split=10, early_stop=patience)
    assert early_end(config, [{"val_accuracy": accuracy} for accuracy in accuracies]) == epoch


def test_an_early_stop_in_the_past_is_refused(run, tmp_path):
    """At a learning rate of 0 the accuracy hardly changes: the run would have ended."""
    arguments = ("train", *SMALL, "--lr", 0, "--val-split", 8, "--epochs", 9, "--out", tmp_path / "run")
    assert run(*arguments)[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    code, _, err = run(*arguments, "--early-stop", 1, "--resume")
    assert code == 2
    assert "with --early-stop 1. Give more." in err
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_a_shorter_end_is_kept_and_may_be_extended_again(run, tmp_path, monkeypatch):
    """A run of six epochs is stopped after three, ended there, and extended to six after all."""
    folder, arguments = tmp_path / "run", ("train", *SMALL, *CONSTANT, "--checkpoint-steps", 1, "--epochs")
    original = TrainStep.__call__

    def failing(self, *batch):
        if int(self.count) == 15:
            raise UserError("a failure")
        original(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", failing)
        assert run(*arguments, 6, "--out", folder)[0] == 1
    assert run(*arguments, 3, "--out", folder, "--resume")[0] == 0
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 3
    assert run(*arguments, 6, "--out", folder, "--resume")[0] == 0
    assert run(*arguments, 6, "--out", tmp_path / "long")[0] == 0
    assert_same_network(folder, tmp_path / "long")
