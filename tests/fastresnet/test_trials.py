"""Learning-rate sweep: its rates, its end, and its suggestions for known loss curves."""

import dataclasses
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from fastresnet.config import from_toml
from fastresnet.recipes import create_config
from fastresnet.run_folder import read_run
from fastresnet.training import trials
from fastresnet.training.optimizer import lr_factors
from fastresnet.training.step import TrainStep
from fastresnet.training.trials import Sweep

pytestmark = pytest.mark.usefixtures("resnet8")
SMALL = ["--model", "resnet8", "--data", "shapes10", "--batch-size", 8, "--precision", "fp32"]
RATES = [10 ** (-5 + 6 * i / 99) for i in range(100)]


@pytest.fixture
def few_steps(monkeypatch):
    """Sweeps of 20 steps, of which the first 2 are left out of the search."""
    monkeypatch.setattr(trials, "STEPS", 20)
    monkeypatch.setattr(trials, "_IGNORED", 2)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_rates_grow_by_one_factor_and_keep_their_proportion(run, tmp_path, monkeypatch, few_steps, optimizer):
    """--lr-batch-size makes the rates of the optimisers a quarter of --lr. 171 images make four epochs of it.

    All images have the largest of the run's sizes.
    """
    taken, sides = [], set()

    def note(step, images, labels, original=TrainStep.__call__):
        original(step, images, labels)
        sides.add(step.side)
        taken.append([float(group["lr"]) for optimizer in step.optimizers for group in optimizer.param_groups])

    monkeypatch.setattr(TrainStep, "__call__", note)
    monkeypatch.chdir(tmp_path)
    settings = ["--optimizer", optimizer, "--lr", 0.02, "--sgd-lr", 0.06, "--lr-batch-size", 128, "--iterations", 3]
    settings += ["--norm-lr", 0.1, "--batch-size", 32, "--resolutions", 16, 32, "--threads", 1]
    settings += ["--find-lr", "lr.png"]
    code, out, err = run("train", "smoke", *SMALL, *settings)
    assert (code, err) == (0, "")
    factors = {"sgd": (1, 1), "muon": (1, 3, 5)}[optimizer]
    expected = [[1e-5 * 1e6 ** (i / 19) / 4 * factor for factor in factors] for i in range(20)]
    assert np.allclose(taken, expected[: len(taken)], rtol=1e-5, atol=0)
    assert len(taken) == 20 or optimizer == "sgd"
    assert sides == {32}
    noted = "--sgd-lr was 3 times as high; --norm-lr was 5 times as high" in " ".join(out.split())
    assert noted == (optimizer == "muon")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_sweep_writes_only_its_picture_even_beside_a_run(run, tmp_path, monkeypatch, few_steps, suffix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_text("of another run")
    code, out, err = run("train", "fast", *SMALL, "--out", "run", "--find-lr", f"lr{suffix}")
    assert (code, err) == (0, "")
    assert out.endswith(f"lr{suffix}\n")
    shown = dict(re.findall(r"│ (.*?) +│ +(\S+) │", out))
    assert shown["recipe default"] == "0.05"
    assert 1e-6 <= float(shown["a tenth of the rate at the lowest loss"]) <= 1
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "last.ckpt", f"lr{suffix}"}
    if suffix == ".svg":
        assert ElementTree.parse(tmp_path / "lr.svg").getroot().tag.endswith("svg")
    else:
        with Image.open(tmp_path / "lr.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_smoothed_losses_are_weighted_means():
    losses = np.random.default_rng(0).uniform(1, 3, 30).tolist()
    smoothed = Sweep(RATES[:30], losses).smoothed
    for n in (0, 1, 17, 29):
        weights = [0.9 ** (n - i) for i in range(n + 1)]
        assert smoothed[n] == pytest.approx(np.average(losses[: n + 1], weights=weights))


def test_the_steepest_and_lowest_places_of_a_known_curve_are_found():
    """The loss falls around 1e-2, is lowest near 1e-1 and falls once more, faster, after it has risen.

    Smoothing with 0.9 lags by some 9 steps, about half a decade.
    """
    decades = np.log10(RATES)
    losses = 2.3 - 1 / (1 + np.exp(-4 * (decades + 2))) + 3 * np.exp(-(((decades - 0.2) / 0.2) ** 2))
    sweep = Sweep(RATES, losses.tolist())
    assert -2 < math.log10(sweep.steepest) < -1.3
    assert -2.2 < math.log10(sweep.tenth_of_lowest) < -1.2
    slopes = np.diff(sweep.smoothed)
    assert slopes.argmin() > RATES.index(sweep.steepest)


@pytest.mark.parametrize(("worse", "taken"), [(100.0, 50), (math.nan, 50), (math.inf, 50), (3.0, 100)])
def test_sweep_ends_when_the_loss_reaches_four_times_its_minimum(dataset, monkeypatch, worse, taken):
    losses = [2.0] * 50 + [worse] * 50
    monkeypatch.setattr(trials, "step_losses", lambda *_: (loss for loss in losses))
    sweep = trials.find_lr(create_config("smoke"), dataset, lambda *_: None)
    assert len(sweep.losses) == len(sweep.rates) == taken
    assert np.allclose(sweep.rates, RATES[:taken], rtol=1e-9)


def test_a_loss_that_rises_at_once_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "step_losses", lambda *_: (math.nan for _ in range(100)))
    code, _, err = run("train", "smoke", *SMALL, "--find-lr", tmp_path / "lr.png")
    assert code == 1
    assert "diverged already at a learning rate of 1.0e-05" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--find-lr", "lr.bmp"], "ends in .png or .svg"),
        (["--find-lr", "no/lr.png"], "there is no folder no"),
        (["--find-lr=lr.png", "--dry-run"], "--find-lr cannot be combined with"),
        (["--find-lr", "lr.png", "--seeds", "0-1"], "--find-lr cannot be combined with"),
        (["--find-lr", "lr.png", "--lr", "0"], "--lr 0 cannot be scaled"),
        (["--find-lr", "lr.png", "--lr", "x"], "x"),
        (["--find-lr"], "--find-lr"),
    ],
)
def test_invalid_sweep_arguments_are_refused(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "smoke", *SMALL, *arguments)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_sweep_at_the_rates_of_a_run_has_its_losses(run, dataset, tmp_path):
    """Without other rates it has the losses of the run's steps: their mean is in metrics.csv."""
    arguments = ["--iterations", 5, "--compile", "off", "--out", tmp_path / "run"]
    assert run("train", "smoke", *SMALL, *arguments)[0] == 0
    config = dataclasses.replace(from_toml(tmp_path / "run" / "config.toml"), out=tmp_path / "other")
    losses = list(trials.step_losses(config, dataset, lr_factors(config, 5)))
    assert len(losses) == 5
    assert np.mean(losses) == pytest.approx(read_run(tmp_path / "run").rows[0]["train_loss"], rel=1e-12)
