"""Whole runs on the small drawn data set, in this process."""

import contextlib
import copy
import csv
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sysconfig
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import one_hot
from torch.nn.utils import parameters_to_vector
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import resize

from fastresnet import cli, plotting, run_folder
from fastresnet.checkpoint import load_tensors, save_tensors, take_prefix
from fastresnet.config import from_toml
from fastresnet.models import create_model
from fastresnet.models.speednet import PatchWhitening
from fastresnet.models.stochastic_depth import seed_stochastic_depth
from fastresnet.recipes import RECIPES
from fastresnet.training import loop
from fastresnet.training.loggers import Logger
from fastresnet.training.loop import train
from fastresnet.training.mixing import Mixer
from fastresnet.training.step import TrainStep
from fastresnet.weights import Normalized, load_weights
from pipelines import Augmentation, open_pipeline
from pipelines.base import is_installed
from pipelines.errors import UserError
from pipelines.prepare import prepare
from pipelines.store import RawData, write_store

SMALL = ("smoke", "--data", "shapes10", "--batch-size", 32, "--precision", "fp32", "--threads", 1)


pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module", autouse=True)
def _curves(draw_curves):
    """Here the curves of all runs are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "draw_curves", draw_curves)
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """But only those of `trained` become a picture, which takes longest."""
    monkeypatch.setattr(plotting, "rendered", lambda *_: b"a picture")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root, small_runs):
    """The folder of a run of two epochs, which must not be changed, and what was printed."""
    folder, out = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("FASTRESNET_DATA", str(data_root))
        assert cli.main([str(argument) for argument in ("train", *SMALL, "--epochs", 2, "--out", folder)]) == 0
    return folder, out.getvalue()


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of that folder, and what was printed."""
    return shutil.copytree(trained[0], tmp_path / "run"), trained[1]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_run_writes_all_its_files_and_they_agree(finished):
    folder, out = finished
    assert sorted(file.name for file in folder.iterdir()) == [
        "best.ckpt",
        "config.toml",
        "curves.png",
        "last.ckpt",
        "metrics.csv",
        "model.safetensors",
        "previous.ckpt",
        "summary.json",
        "train.log",
    ]
    rows = read_csv(folder / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "5"), ("2", "10")]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1, 0.001], rel=1e-12)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy"] == float(rows[-1]["test_accuracy"])
    assert summary["best_accuracy"] == max(float(row["test_accuracy"]) for row in rows)
    assert summary["best_chosen_on"] == "test"
    assert "chosen on the test set itself" in out
    assert (summary["recipe"], summary["data"], summary["seed"]) == ("smoke", "shapes10", 0)
    asked, chosen = from_toml(folder / "config.toml").to_dict(), summary["settings"]
    assert {name: chosen[name] for name in asked if asked[name] != chosen[name]} == {
        "device": "cpu",
        "compile": "off",
        "pipeline": "resident",
    }
    assert {asked[name] for name in ("device", "compile", "pipeline", "kernels")} == {"auto"}
    log = (folder / "train.log").read_text()
    assert all(line in out for line in log.splitlines()[:-1])
    assert log.count("epoch   ") == 2
    assert log.splitlines()[-1].startswith(f"finished: test accuracy {summary['test_accuracy']:.2f} %")
    assert (summary["settings"]["batch_size"], summary["settings"]["epochs"]) == (32, 2)
    # Multiply-adds forward; twice that backward, less the first convolution's gradient with respect to the images.
    first = 3 * 16 * 9 * 1024
    blocks = 2 * 16 * 16 * 9 * 1024 + (16 + 32) * 32 * 9 * 256 + 16 * 32 * 256 + (32 + 64) * 64 * 9 * 64 + 32 * 64 * 64
    per_image = 2 * (3 * (first + blocks + 640) - first)
    assert summary["flops"] == per_image * 32 * 10
    assert {"device", "threads", "versions", "commit", "command", "started"} <= summary["environment"].keys()
    last = take_prefix("model", load_tensors(folder / "last.ckpt")[0])
    final = load_file(folder / "model.safetensors")
    assert last.keys() == final.keys()
    assert all(torch.equal(last[name], final[name]) for name in final)


def test_the_curves_are_a_readable_picture(finished):
    with Image.open(finished[0] / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_config_toml_reproduces_the_run_bit_exactly(finished, run, tmp_path):
    folder, _ = finished
    code, _, err = run("train", "--config", folder / "config.toml", "--out", tmp_path / "again")
    assert (code, err) == (0, "")
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "again" / "metrics.csv").read_bytes()


def test_a_config_of_an_unknown_recipe_is_refused_before_training(finished, run, tmp_path):
    of_smoke = (finished[0] / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(of_smoke.replace('recipe = "smoke"', 'recipe = "smok"'))
    code, _, err = run("train", "--config", tmp_path / "config.toml", "--out", tmp_path / "again")
    assert code == 2
    assert "unknown recipe 'smok': did you mean 'smoke'" in err
    assert not (tmp_path / "again").exists()


def test_another_seed_gives_another_network(finished, run, tmp_path):
    run("train", *SMALL, "--epochs", 2, "--seed", 1, "--out", tmp_path / "other")
    first, second = (
        load_file(finished[0] / "model.safetensors"),
        load_file(tmp_path / "other" / "model.safetensors"),
    )
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


# --- pipelines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run of two epochs, three steps of 16 images each, for which all pipelines find their files."""
    root = tmp_path_factory.mktemp("tiny")
    formats = ("raw", "beton", "jpeg") if is_installed("ffcv") else ("raw", "jpeg")
    prepare("shapes10", root, lambda *_: None, train_images=50, test_images=20, formats=formats)
    return (
        "train", "smoke", "--data", "shapes10", "--root", root, "--batch-size", 16, "--epochs", 2,
        "--precision", "fp32", "--threads", 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def resident(tiny, small_runs, tmp_path_factory):
    """The run folder of the resident pipeline."""
    folder = tmp_path_factory.mktemp("resident") / "run"
    assert cli.main([str(argument) for argument in (*tiny, "--pipeline", "resident", "--out", folder)]) == 0
    return folder


def losses(folder):
    """Training and test loss of each epoch."""
    return [float(row[name]) for row in read_csv(folder / "metrics.csv") for name in ("train_loss", "test_loss")]


def assert_same_curve(folder, expected, *used):
    """Assert that the `used` pipelines trained in `folder` what the resident one did.

    The losses are as sensitive as can be: with the last bit of half the pixels turned, those of the first epoch move by
    1e-5 and 4e-3. A tolerance of 1e-6 thus means the same pixels, to the last bit.
    """
    assert len(losses(folder)) == 4
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-6)
    if "dali" not in used:  # it normalises by itself, and may differ in the last bit
        weights, expected_weights = (load_file(run / "model.safetensors") for run in (folder, expected))
        assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


@pytest.mark.parametrize("pipeline", ["dali", "ffcv", "torchvision"])
def test_every_pipeline_trains_the_same_network(tiny, resident, run, tmp_path, need, pipeline):
    code, out, err = run(*tiny, "--pipeline", need(pipeline), "--out", tmp_path)
    assert (code, err) == (0, "")
    assert f"{pipeline} pipeline" in out
    assert_same_curve(tmp_path, resident, pipeline)


@pytest.mark.parametrize(("first", "second"), [("resident", "dali"), ("ffcv", "resident"), ("dali", "torchvision")])
def test_run_resumes_with_another_pipeline_and_prints_a_note(
    tiny, resident, run, tmp_path, need, monkeypatch, first, second
):
    """The first one ends within the second epoch, a step after a checkpoint."""
    original = TrainStep.__call__

    def broken(self, images, labels):
        if int(self.count) == 5:
            raise MemoryError
        original(self, images, labels)

    monkeypatch.setattr(TrainStep, "__call__", broken)
    arguments = (*tiny, "--checkpoint-steps", 4, "--out", tmp_path)
    assert run(*arguments, "--pipeline", need(first))[0] == 1
    monkeypatch.setattr(TrainStep, "__call__", original)
    code, out, err = run(*arguments, "--pipeline", need(second), "--resume")
    assert (code, err) == (0, "")
    assert "Note: changed since the run began: pipeline." in out
    assert "resuming after step 4" in out
    assert f"{second} pipeline" in out
    assert_same_curve(tmp_path, resident, first, second)


def test_decoding_jpeg_changes_losses_slightly_and_is_fixed_for_a_run(tiny, resident, run, tmp_path, need):
    need("dali")
    code, out, err = run(*tiny, "--decode", "jpeg", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "dali pipeline" in out
    lossy, exact = losses(tmp_path), losses(resident)
    assert lossy[0] != exact[0]
    assert lossy[0] == pytest.approx(exact[0], rel=0.05)
    code, _, err = run(*tiny, "--pipeline", "dali", "--out", tmp_path, "--resume")
    assert code == 2
    assert "other settings: decode" in err


# --- the run folder ----------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten(finished, run):
    folder, _ = finished
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, _, err = run("train", *SMALL, "--epochs", 2, "--out", folder)
    assert code == 2
    assert "already holds a run" in err
    assert "--resume" in err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_resuming_a_finished_run_shows_its_result_again(finished, run):
    folder, out = finished
    code, again, _ = run("train", *SMALL, "--epochs", 2, "--out", folder, "--resume")
    assert code == 0
    assert again == f"{folder} is finished after 2 epochs.\n{out[out.index('result') :]}"


def test_compiled_run_stopped_in_its_last_evaluation_completes_on_resume(run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    arguments = ("train", *SMALL, "--iterations", 3, "--compile", "on", "--out", tmp_path / "run")
    run(*arguments)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").unlink()
    code, _, err = run(*arguments, "--resume")
    assert (code, err) == (0, "")
    finished = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert finished["test_accuracy_mirror"] == summary["test_accuracy_mirror"]


def test_total_seconds_include_startup(tmp_path, dataset):
    config = dataclasses.replace(RECIPES["smoke"](), data="shapes10", batch_size=32, iterations=1, out=tmp_path / "run")
    began = time.perf_counter()
    summary = train(config, dataset, Console(quiet=True), {"import": 1000.0, "data": 2000.0})
    assert 3000 < summary["total_seconds"] - summary["train_seconds"] < 3000 + time.perf_counter() - began


def test_advised_command_continues_a_run_whose_folder_needs_quotes(run, tmp_path):
    folder = tmp_path / "a [b] $c 'd'"
    assert run("train", *SMALL, "--iterations", 1, "--out", folder)[0] == 0
    _, _, err = run("train", *SMALL, "--iterations", 1, "--lr", 0.2, "--out", folder, "--resume")
    _, _, advised = err.partition("continue with: fastresnet ")
    assert run(*shlex.split(advised))[0] == 0


def test_resuming_with_other_settings_is_refused_and_names_them(finished, run):
    folder, _ = finished
    code, _, err = run("train", *SMALL, "--epochs", 2, "--lr", 0.2, "--seed", 5, "--out", folder, "--resume")
    assert code == 2
    assert "lr, seed" in err
    assert f"--config {folder / 'config.toml'}" in err


def test_run_older_than_a_setting_resumes_with_its_default(finished, run, tmp_path):
    folder, _ = finished
    tensors, description = load_tensors(folder / "last.ckpt")
    del description["config"]["zero_init_residual"]
    for name in ("summary.json", "metrics.csv"):
        (folder / name).unlink()
    save_tensors(folder / "last.ckpt", tensors, description)
    arguments = (*SMALL, "--epochs", 2, "--out", folder, "--resume")
    code, _, err = run("train", *arguments, "--zero-init-residual")
    assert code == 2
    assert "other settings: zero_init_residual" in err
    code, out, _ = run("train", *arguments)
    assert code == 0
    assert "resuming after step" in out
    assert (folder / "summary.json").exists()


def test_resuming_on_other_data_is_refused(finished, run, tmp_path):
    folder, _ = finished
    run("prepare", "--data", "shapes10", "--root", tmp_path, "--train-images", 171, "--test-images", 51)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, _, err = run("train", *SMALL, "--epochs", 2, "--root", tmp_path, "--out", folder, "--resume")
    assert code == 3
    assert "another data set" in err
    assert str(tmp_path / "shapes10") in err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_resuming_on_the_same_data_at_another_path_is_accepted(finished, run, tmp_path, dataset):
    folder, out = finished
    shutil.copytree(dataset.folder, tmp_path / "shapes10")
    elsewhere = [*SMALL[:2], tmp_path / "shapes10", *SMALL[3:]]
    code, again, _ = run("train", *elsewhere, "--epochs", 2, "--out", folder, "--resume")
    assert code == 0
    assert again[again.index("result") :] == out[out.index("result") :]


@pytest.mark.parametrize("place", ["root", "folder", "relative folder"])
def test_config_toml_records_the_path_of_the_data(run, tmp_path, monkeypatch, dataset, place):
    shutil.copytree(dataset.folder, tmp_path / "elsewhere" / "shapes10")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTRESNET_DATA")
    data = {
        "root": ["shapes10", "--root", "elsewhere"],
        "folder": [tmp_path / "elsewhere" / "shapes10"],
        "relative folder": ["elsewhere/shapes10"],
    }[place]
    code, *_ = run("train", "smoke", "--data", *data, *SMALL[3:], "--iterations", 1, "--out", tmp_path / "run")
    assert code == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("FASTRESNET_DATA", str(tmp_path / "empty"))
    code, _, err = run("train", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again")
    assert (code, err) == (0, "")
    assert not (tmp_path / "empty").exists()


def test_a_run_that_failed_before_its_first_checkpoint_may_be_started_again(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        assert run("train", *SMALL, "--out", tmp_path / "run")[0] == 1
    code, *_ = run("train", *SMALL, "--iterations", 1, "--out", tmp_path / "run")
    assert code == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_run_resumes_in_another_precision_and_prints_a_note(tiny, run, tmp_path, precision):
    small = [*tiny[1:-2], "--out", tmp_path / "run"]
    run("train", *small, "--precision", "fp32", "--checkpoint-steps", 2)
    (tmp_path / "run" / "summary.json").unlink()
    code, out, _ = run("train", *small, "--precision", precision, "--resume")
    assert code == 0
    assert "changed since the run began: precision." in out


def test_training_time_excludes_writing_checkpoints(run, tmp_path, monkeypatch):
    slept = []

    def slow(*arguments, **settings):
        slept.append(0.1)
        time.sleep(0.1)
        save_tensors(*arguments, **settings)

    monkeypatch.setattr(run_folder, "save_tensors", slow)
    run("train", *SMALL, "--epochs", 2, "--checkpoint-steps", 1, "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(slept) > 10
    assert summary["total_seconds"] - summary["train_seconds"] >= sum(slept)


@pytest.mark.parametrize(("end", "steps"), [("signal", 7), ("failure", 6)])
def test_times_of_a_resumed_run(tmp_path, dataset, monkeypatch, end, steps):
    """Only building the step (100 s, in the second session 7 s) and taking it (10 s and 1 s) advance the clock.

    The first session ends in step 7. After a failure that step does not count: the last checkpoint has 6.
    """
    now, costs, taken = [0.0], {"create": 100.0, "step": 10.0}, []
    create_original, step_original = loop.create_step, TrainStep.__call__

    def create(*arguments, **options):
        now[0] += costs["create"]
        return create_original(*arguments, **options)

    def step(self, *arguments):
        step_original(self, *arguments)
        now[0] += costs["step"]
        taken.append(1)
        if len(taken) == 7 and end == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif len(taken) == 7:
            raise MemoryError

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "create_step", create)
    monkeypatch.setattr(TrainStep, "__call__", step)
    config = dataclasses.replace(
        RECIPES["smoke"](), data="shapes10", batch_size=32, epochs=2, checkpoint_steps=3, out=tmp_path, resume=True,
        threads=1,
    )  # fmt: skip
    spent = {"import": 2.0, "data": 1.0}
    with pytest.raises(UserError):
        train(config, dataset, Console(quiet=True), spent)
    costs |= {"create": 7.0, "step": 1.0}
    summary = train(config, dataset, Console(quiet=True), spent)
    assert len(taken) == 7 + 10 - steps
    assert summary["train_seconds"] == 10 * steps + (10 - steps)
    assert summary["images_per_s"] == 32 * 10 / summary["train_seconds"]
    assert summary["total_seconds"] == 3 + 100 + 3 + 7 + summary["train_seconds"]
    last = {"import": 2, "data": 1, "model": 7, "first_step": 1}
    assert summary["cold_start"].items() >= last.items()


def test_iterations_end_a_run_within_an_epoch_and_it_is_evaluated(run, tmp_path):
    code, *_ = run("train", *SMALL, "--epochs", 9, "--iterations", 7, "--out", tmp_path / "run")
    assert code == 0
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == ["5", "7"]


EVERYTHING = {
    "seed": 1, "lr": 0.2, "lr-batch-size": 64, "schedule": "cosine", "warmup": 0.3, "weight-decay": 0.01,
    "clip-norm": 0.5, "ema-decay": 0.8, "label-smoothing": 0.1, "mixup": 0.4, "cutmix": 1.0, "drop-path": 0.3,
    "crop-padding": 2, "padding-mode": "reflect", "flip": "alternating", "cutout": 8, "normalization": "channel",
}  # fmt: skip


def test_run_with_many_settings_matches_a_reference_loop(run, tmp_path, dataset):
    """Seven steps put together by hand: five in the first epoch, two in the second."""
    settings = [text for name, value in EVERYTHING.items() for text in (f"--{name}", value)]
    switches = ("--nesterov", "--no-decay-norms", "--zero-init-residual", "--compile", "off")
    switches += ("--resolutions", 24, 32)
    arguments = (*SMALL, "--epochs", 2, "--iterations", 7, *settings, *switches, "--out", tmp_path / "run")
    assert run("train", *arguments)[0] == 0

    augmentation = Augmentation(
        crop_padding=2, padding_mode="reflect", flip="alternating", cutout=8, normalization="channel"
    )
    cpu, step = torch.device("cpu"), torch.zeros(1, dtype=torch.int64)
    pipeline = open_pipeline(
        "torchvision", dataset, train=True, batch_size=32, device=cpu, dtype=torch.float32, seed=1,
        augmentation=augmentation,
    )  # fmt: skip
    torch.manual_seed(1)
    network = create_model("resnet20", drop_path=0.3, zero_init_residual=True).train()
    names, initial = [name for name, _ in network.named_parameters()], copy.deepcopy(network.state_dict())
    seed_stochastic_depth(network, 1, step, torch.zeros(1, dtype=torch.int64))
    mixer = Mixer(mixup=0.4, cutmix=1.0, seed=1, device=cpu)
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8), use_buffers=True
    )
    average.update_parameters(network)  # the first call copies
    rates = [0.1 / 3, 0.2 / 3, 0.1, 0.0904508497, 0.0654508497, 0.0345491503, 0.0095491503]  # cosine, after two steps
    losses = []
    for (epoch, batch), rate in zip(((e, b) for e in (0, 1) for b in pipeline.epoch(e)), rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, others, share = mixer(batch.images, batch.labels, step)
        if step < 4:  # the first half of seven steps
            images = resize(images, [24, 24], antialias=False)
        pairs = [one_hot(labels, 10) for labels in (batch.labels, others)]
        targets = 0.9 * (share[:, None] * pairs[0] + (1 - share[:, None]) * pairs[1]) + 0.1 / 10
        loss = -(targets * network(images).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        average.update_parameters(network)
        step += 1
        losses.append((epoch, float(loss.detach())))
    pipeline.close()

    rows = read_csv(tmp_path / "run" / "metrics.csv")
    for epoch, row in enumerate(rows):
        expected = np.mean([loss for of_epoch, loss in losses if of_epoch == epoch])
        assert float(row["train_loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(rows[-1]["lr"]) == pytest.approx(rates[-1])
    saved, averaged = load_file(tmp_path / "run" / "model.safetensors"), average.module.eval()
    found, expected, started = (
        parameters_to_vector(state[name] for name in names) for state in (saved, averaged.state_dict(), initial)
    )
    # Rounding grows from step to step; it is small beside the way that the weights have come.
    assert (found - expected).norm() < 0.01 * (expected - started).norm()
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    images = torch.from_numpy(np.array(dataset.test.images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(averaged((images - mean) / std), torch.tensor(dataset.test.labels))
    assert float(rows[-1]["test_loss"]) == pytest.approx(float(loss), rel=1e-3)


def test_a_held_out_split_chooses_the_best_and_the_test_set_is_seen_once(run, tmp_path, monkeypatch, dataset):
    sizes = []
    original = loop.Evaluator.__call__

    def counting(self, *arguments):
        sizes.append(sum(batch.valid for batch in self._pipeline.epoch(0)))
        return original(self, *arguments)

    trained_on = []
    open_original = loop.open_pipeline

    def opened(name, dataset, **settings):
        trained_on.append(dataset.train.ids)
        return open_original(name, dataset, **settings)

    monkeypatch.setattr(loop.Evaluator, "__call__", counting)
    monkeypatch.setattr(loop, "open_pipeline", opened)
    code, out, _ = run("train", *SMALL, "--epochs", 3, "--val-split", 30, "--out", tmp_path / "run")
    assert code == 0
    assert sizes == [30, 30, 30, 50, 50]  # each epoch on the held-out images; last and best weights on the test set
    (ids,) = trained_on
    assert np.array_equal(ids, dataset.hold_out(30)[0].train.ids)
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert rows[0]["step"] == "4"  # 32 of 141 images at a time
    assert "test_accuracy" not in rows[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_chosen_on"] == "validation"
    assert "chosen on the held-out split" in out
    code, _, _ = run("eval", "--weights", tmp_path / "run" / "best.ckpt", "--json", tmp_path / "best.json")
    assert code == 0
    assert json.loads((tmp_path / "best.json").read_text())["test_accuracy"] == summary["best_accuracy"]


def test_averaged_weights_are_saved_and_evaluated(run, tmp_path):
    code, *_ = run("train", *SMALL, "--epochs", 2, "--ema-decay", 0.9, "--out", tmp_path / "run")
    assert code == 0
    saved, (state, _) = load_file(tmp_path / "run" / "model.safetensors"), load_tensors(tmp_path / "run" / "last.ckpt")
    averaged, raw = take_prefix("averaged", state), take_prefix("model", state)
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    assert not torch.equal(saved["conv1.weight"], raw["conv1.weight"])
    for file in ("model.safetensors", "last.ckpt"):
        run("eval", "--weights", tmp_path / "run" / file, "--json", tmp_path / "figures.json")
        figures = json.loads((tmp_path / "figures.json").read_text())
        row = read_csv(tmp_path / "run" / "metrics.csv")[-1]
        assert figures["loss"] == pytest.approx(float(row["test_loss"]), rel=1e-6)


def test_whitening_is_fitted_to_training_images_and_not_trained(run, tmp_path, dataset):
    """Held-out images are not used."""
    arguments = ("--model", "speednet", "--val-split", 30, "--ema-decay", 0.9, "--iterations", 2)
    arguments += ("--out", tmp_path / "run")
    assert run("train", *SMALL, *arguments)[0] == 0
    found = load_file(tmp_path / "run" / "model.safetensors")
    images = dataset.hold_out(30)[0].train
    pixels = (images.images[images.ids] / 255 - 0.5) / 0.5
    layer = PatchWhitening()
    layer.fit(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    torch.testing.assert_close(found["conv1.weight"], layer.weight.data, rtol=1e-4, atol=1e-4)
    assert (found["conv1.bias"] == layer.bias).all()


@pytest.mark.parametrize("file", ["last.ckpt", "best.ckpt", "model.safetensors"])
def test_eval_reproduces_the_accuracy_of_the_run(finished, run, tmp_path, file):
    folder, _ = finished
    code, out, _ = run("eval", "--weights", folder / file, "--json", tmp_path / "figures.json")
    summary = json.loads((folder / "summary.json").read_text())
    figures = json.loads((tmp_path / "figures.json").read_text())
    expected = summary["best_accuracy" if file == "best.ckpt" else "test_accuracy"]
    assert code == 0
    assert figures["test_accuracy"] == expected
    assert f"{expected:.2f} %" in out
    assert figures["schema"] == 1
    assert set(figures["per_class"]) == {"circle", "ring", "square", "diamond", "triangle", "plus", "cross"} | {
        "horizontal_bars",
        "vertical_bars",
        "checkerboard",
    }


@pytest.mark.parametrize("normalization", ["half", "channel", "pixel"])
def test_on_another_data_set_eval_normalises_as_the_training_did(run, tmp_path, dataset, normalization):
    run("train", *SMALL, "--iterations", 3, "--normalization", normalization, "--out", tmp_path / "run")
    darker = RawData(
        dataset.classes,
        *(array for part in (dataset.train, dataset.test) for array in (part.images // 2, np.array(part.labels))),
    )
    write_store(tmp_path / "darker", darker, source="by hand", version="0")
    file, figures = tmp_path / "run" / "model.safetensors", tmp_path / "figures.json"
    code, *_ = run("eval", "--weights", file, "--data", tmp_path / "darker", "--json", figures)
    assert code == 0
    images = torch.from_numpy(darker.test_images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = Normalized(load_weights(file))(images)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(darker.test_labels))
    assert json.loads(figures.read_text())["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    original = TrainStep.__call__

    def poisoned(self, images, labels):
        original(self, images * torch.inf if int(self.count) == 7 else images, labels)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    code, _, err = run("train", *SMALL, "--epochs", 3, "--out", tmp_path / "run")
    assert code == 1
    assert "not finite at step 8 (epoch 2)" in err  # counted from 1, as in all output
    tensors, description = load_tensors(tmp_path / "run" / "last.ckpt")
    assert description["progress"]["step"] == 5
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    monkeypatch.setattr(TrainStep, "__call__", original)
    code, *_ = run("train", *SMALL, "--epochs", 3, "--out", tmp_path / "run", "--resume")
    assert code == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "cudnn", "driver", "numpy"],
)
def test_out_of_memory_names_the_batch_size_and_the_one_to_try(run, tmp_path, monkeypatch, error):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(TrainStep, "__call__", exhausted)
    code, _, err = run("train", *SMALL, "--out", tmp_path / "run")
    assert code == 1
    assert "--batch-size 32" in err
    assert "--accumulate 2" in err
    assert "--batch-size 16" in err


def test_a_killed_worker_process_of_the_pipeline_is_reported(run, tmp_path, monkeypatch):
    def kill_workers(*_, **__):
        for process in multiprocessing.active_children():
            process.kill()
        time.sleep(60)  # PyTorch's handler of SIGCHLD ends the wait

    monkeypatch.setattr(TrainStep, "__call__", kill_workers)
    code, _, err = run("train", *SMALL, "--pipeline", "torchvision", "--out", tmp_path / "run")
    assert code == 1
    assert "a worker process of the torchvision pipeline ended: DataLoader worker" in err
    assert "killed by signal: Killed" in err


@pytest.fixture
def one_block(monkeypatch):
    """Give ResNet-20 a single block, with a convolution in its shortcut: each kernel takes g++ a second."""

    def stages(block, widths, *_):
        return nn.Identity(), nn.Identity(), block(widths[0], widths[-1], 2, None)

    monkeypatch.setattr("fastresnet.models.resnet.create_stages", stages)


@pytest.mark.usefixtures("one_block")
def test_failed_compilation_names_the_compiler_and_compile_off(run, tmp_path, monkeypatch):
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        code, _, err = run("train", *SMALL, "--compile", "on", "--out", tmp_path / "run")
    assert code == 1
    # In a process that has compiled before, the missing compiler shows later, and PyTorch logs it, too.
    (message,) = [line for line in err.splitlines() if line.startswith("fastresnet: ")]
    assert message.startswith("fastresnet: torch.compile failed: ")
    assert "g++" in message
    assert "--compile off" in message


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(run, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(TrainStep, "__call__", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run("train", *SMALL, "--out", tmp_path / "run")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("model", ["resnet20", "plain20"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_run_has_finite_weights(tiny, run, tmp_path, model, precision):
    settings = ("--iterations", 2, "--model", model, "--precision", precision)
    code, *_ = run(*tiny[:-2], *settings, "--out", tmp_path / "run")
    assert code == 0
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model.safetensors").values())


@pytest.mark.skipif(
    not shutil.which("g++") or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs g++ and Python's headers",
)
@pytest.mark.usefixtures("one_block")
def test_compiled_training_matches_eager_losses_up_to_rounding(run, tmp_path):
    settings = ["smoke", "--data", "shapes10", "--batch-size", 48, "--precision", "fp32", "--iterations", 3]
    code, _, err = run("train", *settings, "--compile", "on", "--out", tmp_path / "compiled")
    assert code == 0, err
    run("train", *settings, "--compile", "off", "--out", tmp_path / "eager")
    compiled, eager = (read_csv(tmp_path / name / "metrics.csv")[0] for name in ("compiled", "eager"))
    assert float(compiled["train_loss"]) == pytest.approx(float(eager["train_loss"]), rel=1e-3)


def test_dry_run_prints_estimates_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("train", *SMALL, "--model", "resnet32", "--epochs", 100, "--dry-run")
    assert code == 0
    assert "466,906" in out
    assert re.search(r"training time +│ +\d+:\d\d ", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resolutions", [(32,), (20, 24, 28, 32)])
def test_dry_run_of_a_three_step_run_succeeds_and_measures_each_size(run, monkeypatch, resolutions):
    taken = []

    def note(step, images, labels, original=TrainStep.__call__):
        taken.append(step.side)
        original(step, images, labels)

    monkeypatch.setattr(TrainStep, "__call__", note)
    settings = ("--batch-size", 16, "--iterations", 3, "--resolutions", *resolutions, "--threads", 1)
    code, _, err = run("train", "smoke", "--data", "shapes10", *settings, "--dry-run")
    assert (code, err) == (0, "")
    assert set(taken) == set(resolutions[:3])


def test_flops_of_small_images_are_those_of_pytorchs_counter(run, tmp_path):
    """SpeedNet leaves one pixel of the smallest images, and batch norm needs two values."""
    settings = ("--batch-size", 8, "--iterations", 5, "--threads", 1, "--out", tmp_path / "run")
    code, _, err = run("train", "fast", "--model", "speednet", "--data", "shapes10", *settings)
    assert (code, err) == (0, "")
    with torch.device("meta"):
        network = create_model("speednet")
    with FlopCounterMode(display=False) as counter:
        for side in (16, 20, 24, 28, 32):
            network(torch.empty(8, 3, side, side, device="meta")).sum().backward()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["flops"] == counter.get_total_flops()


def test_dry_run_ignores_a_run_in_the_folder(finished, run):
    folder, _ = finished
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, out, err = run("train", *SMALL, "--epochs", 3, "--out", folder, "--dry-run")
    assert (code, err) == (0, "")
    assert "nothing was written" in out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_expected_time_of_a_run_grows_with_the_pixels_to_come(run, tmp_path, monkeypatch):
    """Steps of 32x32 pixels take four times as long as those of 16x16, of which there are as many."""
    logger, seen, titles = Logger(), [], []
    monkeypatch.setattr(logger, "status", seen.append)
    monkeypatch.setattr(plotting, "rendered", lambda figure, _: titles.append(figure.get_suptitle()) or b"a picture")
    monkeypatch.setattr(loop, "open_loggers", lambda *_: contextlib.nullcontext([logger]))
    code, out, err = run("train", *SMALL, "--iterations", 4, "--resolutions", 16, 32, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "4 steps (--iterations) of 32 images of 16, then 32 pixels (test: 32); " in out
    assert titles == ["resnet20 on shapes10, recipe smoke, seed 0"]
    elapsed = [32 * status.step / status.images_per_s for status in seen]
    rest = [status.eta_s / seconds for status, seconds in zip(seen, elapsed, strict=True)]
    assert rest == pytest.approx([9, 4, 4 / 6, 0])
    assert [status.side for status in seen] == [16, 16, 32, 32]


def test_backend_and_captures_are_for_the_sizes_to_come(run, tmp_path, monkeypatch):
    """Trial steps have the largest images. The run fails after its checkpoint of two steps, and is resumed."""
    chosen, prepared, original = [], [], TrainStep.__call__

    def choose(step, batch, steps, sizes):
        chosen.append((step.side, steps, sizes))
        return "eager", "as told"

    def failing(step, *arguments):
        if int(step.count) == 3:
            raise MemoryError
        original(step, *arguments)

    monkeypatch.setattr(loop, "choose_backend", choose)
    monkeypatch.setattr(loop.Execution, "prepare", lambda execution, batch, done: prepared.append(done))
    arguments = ("train", *SMALL, "--iterations", 4, "--resolutions", 16, 32, "--checkpoint-steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", failing)
        assert run(*arguments, "--out", tmp_path / "run")[0] == 1
    assert run(*arguments, "--out", tmp_path / "run", "--resume")[0] == 0
    assert chosen == [(32, 4, 2)]  # the run goes on with the same backend
    assert prepared == [0, 2]


def test_throughput_is_that_of_the_epoch_or_of_the_whole_run_before_its_first_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock, progress = loop.Stopwatch(), loop.Progress()
    rates = []
    for seconds, steps in ((2.0, 10), (1.0, 10), (0.0, 0)):
        clock.enter("evaluation")
        now += 5
        clock.begin_epoch(progress)
        now += seconds
        progress.step += steps
        clock.update(progress)
        rates.append(clock.steps_per_s(progress))
    assert rates == [5, 10, 20 / 3]


def test_lines_name_the_size_of_small_training_images(run, tmp_path):
    code, out, err = run("train", *SMALL, "--epochs", 2, "--resolutions", 16, 32, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    first, last = (line for line in out.splitlines() if line.startswith("epoch"))
    assert " %  16 px  " in first
    assert " px " not in last


def test_print_config_prints_valid_toml(run, tmp_path):
    code, out, _ = run("train", "paper", "--lr", "0.03", "--print-config")
    assert code == 0
    (tmp_path / "config.toml").write_text(out)
    assert from_toml(tmp_path / "config.toml") == dataclasses.replace(RECIPES["paper"](), lr=0.03)


def test_learning_rates_are_scaled_to_the_batch_with_a_message(run, tmp_path):
    arguments = ["--lr", "0.2", "--lr-batch-size", "64", "--iterations", "1", "--schedule", "linear"]
    code, out, _ = run("train", *SMALL, *arguments, "--out", tmp_path / "run")
    assert code == 0
    assert "learning rate 0.2 x 0.5" in out
    assert float(read_csv(tmp_path / "run" / "metrics.csv")[0]["lr"]) == pytest.approx(0.1)
