"""Runs that start from weights, and train all of them or the linear layer alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastresnet
from fastresnet.checkpoint import load_tensors, take_prefix
from fastresnet.config import from_toml
from fastresnet.models import create_model
from fastresnet.training.network import use_training_mode
from pipelines.files import sha256
from pipelines.store import RawData, open_store, write_store

SMALL = ("smoke", "--data", "shapes10", "--batch-size", 32, "--precision", "fp32", "--threads", 1)


pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def trained(small_runs, data_root, tmp_path_factory):
    """The folder of a finished run, which must not be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = {"batch_size": 32, "precision": "fp32", "threads": 1, "iterations": 2}
    fastresnet.train("smoke", data="shapes10", root=data_root, out=folder, quiet=True, **settings)
    return folder


@pytest.fixture
def first(trained, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(trained, tmp_path / "first")


@pytest.fixture
def two_classes(tmp_path, dataset):
    """A data set of the first two of the drawn classes."""
    splits = [(split.images, split.labels) for split in (dataset.train, dataset.test)]
    chosen = [array[labels < 2] for images, labels in splits for array in (images, labels)]
    write_store(tmp_path / "two", RawData(dataset.classes[:2], *chosen), source="a test", version="0")
    return open_store(tmp_path / "two")


def test_a_run_starts_from_the_weights_of_another(first, run, tmp_path):
    """At a learning rate of 0 they stay as they are, but for the statistics of batch norm."""
    weights = first / "model.safetensors"
    code, out, err = run("train", *SMALL, "--lr", 0, "--iterations", 1, "--init-from", weights, "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    assert f"from {weights}" in out
    before, after = load_file(weights), load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    settings = json.loads((tmp_path / "b" / "summary.json").read_text())["settings"]
    assert (settings["init_from"], settings["init_sha256"]) == (str(weights), sha256(weights))


@pytest.mark.parametrize("file", ["last.ckpt", "foreign.pt"])
def test_any_file_that_eval_reads_is_a_start(first, run, tmp_path, file):
    torch.save({"state_dict": dict(load_file(first / "model.safetensors"))}, first / "foreign.pt")
    arguments = ("--lr", 0, "--iterations", 1, "--init-from", first / file, "--out", tmp_path / "b")
    assert run("train", *SMALL, *arguments)[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "b"))
    assert torch.equal(before["layer3.0.conv2.weight"], after["layer3.0.conv2.weight"])
    assert torch.equal(before["fc.weight"], after["fc.weight"])


def test_other_classes_get_a_new_linear_layer_with_a_note(first, run, tmp_path, two_classes):
    weights, fresh, started = first / "model.safetensors", tmp_path / "fresh", tmp_path / "started"
    arguments = ("train", *SMALL, "--data", two_classes.folder, "--lr", 0, "--batch-size", 8, "--iterations", 1)
    assert run(*arguments, "--out", fresh)[0] == 0
    code, _, err = run(*arguments, "--init-from", weights, "--out", started)
    assert code == 0
    assert f"the linear layer of {weights} is for 10 classes, not 2: a new one is trained" in err
    before, new, after = (
        load_file(weights),
        load_file(fresh / "model.safetensors"),
        load_file(started / "model.safetensors"),
    )
    assert torch.equal(after["conv1.weight"], before["conv1.weight"])
    assert torch.equal(after["fc.weight"], new["fc.weight"])


def test_as_many_classes_of_other_names_get_a_new_linear_layer(first, run, tmp_path, dataset):
    splits = [array for split in (dataset.train, dataset.test) for array in (split.images, split.labels)]
    write_store(tmp_path / "x", RawData(tuple("abcdefghij"), *splits), source="a test", version="0")
    arguments = ("--data", tmp_path / "x", "--lr", 0, "--iterations", 1, "--init-from", first / "model.safetensors")
    code, _, err = run("train", *SMALL, *arguments, "--out", tmp_path / "b")
    assert code == 0
    assert "is for other classes (circle, ring, square and 7 more): a new one is trained" in err
    assert not torch.equal(
        load_file(tmp_path / "b" / "model.safetensors")["fc.weight"],
        load_file(first / "model.safetensors")["fc.weight"],
    )


def test_a_frozen_backbone_keeps_all_its_bits(first, run, tmp_path):
    """Also the statistics of batch norm, which otherwise follow the images; only the forward pass counts as work."""
    weights = first / "model.safetensors"
    arguments = ("--init-from", weights, "--freeze-backbone", "--epochs", 2, "--out", tmp_path / "b")
    for optimizer in ("sgd", "muon"):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        code, out, _ = run("train", *SMALL, *arguments, "--optimizer", optimizer)
        assert code == 0
        assert "650 of them trained" in out
        before, after = load_file(weights), load_file(tmp_path / "b" / "model.safetensors")
        assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    forward = 3 * 16 * 9 * 1024 + 2 * 16 * 16 * 9 * 1024 + (16 + 32) * 32 * 9 * 256 + 16 * 32 * 256
    forward += (32 + 64) * 64 * 9 * 64 + 32 * 64 * 64 + 640
    assert summary["flops"] == 2 * (forward + 640) * 32 * 10  # the linear layer's weights need as many again


def test_the_linear_layer_of_a_frozen_backbone_is_trained_as_on_fixed_features(first, run, tmp_path, dataset):
    """The reference is a step of SGD on features of the network in evaluation mode."""
    weights = first / "model.safetensors"
    arguments = ("--init-from", weights, "--freeze-backbone", "--iterations", 1, "--milestones", "0.9")
    plain = ("--crop-padding", 0, "--flip", "none", "--weight-decay", 0, "--batch-size", 141, "--val-split", 0)
    assert run("train", *SMALL, *arguments, *plain, "--batch-size", len(dataset.train), "--out", tmp_path / "b")[0] == 0
    network = create_model("resnet20")
    network.load_state_dict(load_file(weights))
    network.eval()
    images = (torch.from_numpy(dataset.train.images.copy()).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    loss = torch.nn.functional.cross_entropy(network(images), torch.from_numpy(dataset.train.labels.copy()))
    (gradient,) = torch.autograd.grad(loss, network.fc.weight)
    found = load_file(tmp_path / "b" / "model.safetensors")["fc.weight"]
    torch.testing.assert_close(found, network.fc.weight.data - 0.1 * gradient, rtol=1e-4, atol=1e-5)


def test_a_started_run_resumes_without_the_weights_and_repeats_with_them(first, run, tmp_path):
    weights, folder = first / "model.safetensors", tmp_path / "b"
    arguments = ("train", *SMALL, "--epochs", 1, "--init-from", weights, "--out", folder)
    assert run(*arguments)[0] == 0
    state = load_file(folder / "model.safetensors")
    assert run("train", "--config", folder / "config.toml", "--out", tmp_path / "again")[0] == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(state[name], again[name]) for name in state)
    (folder / "summary.json").unlink()
    weights.rename(tmp_path / "moved")
    assert run(*arguments, "--resume")[0] == 0
    assert all(torch.equal(state[name], value) for name, value in load_file(folder / "model.safetensors").items())

    save_file({name: value + 1 for name, value in state.items() if value.is_floating_point()}, weights)
    code, _, err = run("train", "--config", folder / "config.toml", "--out", tmp_path / "third")
    assert code == 3
    assert "is another file than the run started from" in err
    code, _, err = run(
        "train", "--config", folder / "config.toml", "--init-from", tmp_path / "moved", "--out", tmp_path / "4"
    )
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--model", "preresnet20"), 2, "has the weights of another network. Use --model resnet20."),
        (("--model", "plain20"), 2, "has the weights of another network. Use --model resnet20."),
        (("--shortcut", "A"), 2, "has the weights of another network. Use --shortcut B."),
        (("--init-from", "resnet20"), 2, "Did you mean pretrained:resnet20?"),
        (("--init-from", "nowhere.pt"), 3, "nowhere.pt is not a readable file (No such file or directory)"),
        (("--init-from", "pretrained:nothing"), 2, "unknown pretrained network 'nothing'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_leave_nothing(first, run, tmp_path, options, code, message):
    arguments = ("train", *SMALL, "--init-from", first / "model.safetensors", *options, "--out", tmp_path / "b")
    found, _, err = run(*arguments)
    assert found == code
    assert message in err
    assert not (tmp_path / "b").exists()


def test_another_normalisation_is_noted(first, run, tmp_path):
    arguments = ("--normalization", "pixel", "--iterations", 1, "--init-from", first / "model.safetensors")
    _, _, err = run("train", *SMALL, *arguments, "--out", tmp_path / "b")
    assert "was trained on images of --normalization half, which it needs for its accuracy; this run has pixel" in err


def test_dry_run_and_range_test_start_from_the_weights(first, run, tmp_path, monkeypatch):
    arguments = ("train", *SMALL, "--iterations", 2, "--init-from", first / "model.safetensors")
    assert run(*arguments, "--dry-run")[0] == 0
    assert run(*arguments, "--model", "plain20", "--dry-run")[0] == 2


def test_layers_whose_weights_are_frozen_stay_in_evaluation_mode():
    network = create_model("resnet20")
    network.layer1.requires_grad_(False)
    use_training_mode(network)
    modes = {name: module.training for name, module in network.named_modules() if not list(module.children())}
    assert {mode for name, mode in modes.items() if name.startswith("layer1.")} == {False}
    assert {mode for name, mode in modes.items() if not name.startswith("layer1.")} == {True}


def test_averages_and_checkpoints_of_a_frozen_run(first, run, tmp_path):
    arguments = ("--init-from", first / "model.safetensors", "--freeze-backbone", "--ema-decay", 0.5, "--iterations", 3)
    assert run("train", *SMALL, *arguments, "--out", tmp_path / "b")[0] == 0
    state, _ = load_tensors(tmp_path / "b" / "last.ckpt")
    assert {name.rpartition(".")[0] for name in take_prefix("optimizer", state)} == {"fc.weight", "fc.bias"}
    assert from_toml(tmp_path / "b" / "config.toml").freeze_backbone
