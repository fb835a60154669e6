"""Bundled pretrained weights match their cards."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastresnet
from fastresnet import pretrained
from fastresnet.pretrained import list_pretrained, load_pretrained, pretrained_card, pretrained_file
from pipelines.errors import DataError, UsageError
from pipelines.sources import read_source
from pipelines.store import write_store

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Weights and cards that may be damaged."""
    folder = tmp_path / "pretrained"
    shutil.copytree(pretrained._FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(pretrained, "_FOLDER", folder)
    return folder


def test_resnet20_is_bundled():
    assert "resnet20" in list_pretrained()
    assert list_pretrained() == fastresnet.list_pretrained()


@pytest.mark.parametrize("name", list_pretrained())
def test_card_has_provenance_and_checksum_of_the_weights(name):
    card = pretrained_card(name)
    content = pretrained_file(name).read_bytes()
    assert card.model == name
    assert card.sha256 == hashlib.sha256(content).hexdigest()
    assert f"train {card.recipe}" in card.command
    assert not card.commit.endswith("+")
    assert len(content) < 5_000_000  # small enough for a repository


@pytest.mark.parametrize("name", list_pretrained())
def test_pretrained_network_loads_in_evaluation_mode(name):
    network = load_pretrained(name)
    assert not network.training
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "views"),
    [("resnet20", ()), *(pytest.param(name, ("--tta", "shift"), marks=pytest.mark.slow) for name in list_pretrained())],
)
def test_eval_gives_the_figures_of_the_card(run, tmp_path, cifar10_folder, name, views):
    """All test images count; of the training images a store needs some."""
    data, figures = read_source(cifar10_folder, lambda *_: None), tmp_path / "figures.json"
    few = dataclasses.replace(data, train_images=data.train_images[:10], train_labels=data.train_labels[:10])
    write_store(tmp_path / "cifar10", few, source="the original", version="0")
    weights = ("--weights", f"pretrained:{name}", "--device", "cpu")
    code, out, err = run("eval", *weights, "--root", tmp_path, *views, "--json", figures)
    assert code == 0, err
    card, found = pretrained_card(name), json.loads(figures.read_text())
    # Another CPU sums in another order: that may move one image of 10,000 over a boundary.
    for figure in ("test_accuracy", *(("test_accuracy_mirror", "test_accuracy_shift") if views else ())):
        assert found[figure] == pytest.approx(getattr(card, figure), abs=0.011)
        assert f"{found[figure]:.2f} %" in out


@pytest.mark.parametrize("name", ["resnet21", "", "../resnet20", "resnet20.safetensors"])
def test_unknown_name_is_refused_with_the_valid_names(run, name):
    with pytest.raises(UsageError, match=f"unknown pretrained network {name!r}.*resnet20"):
        load_pretrained(name)
    code, _, err = run("eval", "--weights", f"pretrained:{name}")
    assert code == 2
    assert "resnet20" in err


def test_weights_that_do_not_match_their_card_are_refused(copies, run):
    path = copies / "resnet20.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"resnet20\.safetensors does not match its card: the SHA-256 differs"):
        load_pretrained("resnet20")
    code, _, err = run("eval", "--weights", "pretrained:resnet20")
    assert code == 3
    assert "SHA-256" in err


def hub_module():
    spec = importlib.util.spec_from_file_location("hubconf", PROJECT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["resnet20", "se_resnet20"])
def test_torch_hub_builds_networks(model):
    network = torch.hub.load(str(PROJECT), model, source="local", trust_repo=True, num_classes=7)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_torch_hub_loads_pretrained_weights():
    network = torch.hub.load(str(PROJECT), "resnet20", source="local", trust_repo=True, pretrained=True)
    expected = load_pretrained("resnet20").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_torch_hub_needs_the_libraries_that_it_names_and_no_other():
    program = (
        "import sys, torch, torch.hub, numpy\nbefore = set(sys.modules)\n"
        "torch.hub.load('.', 'resnet20', source='local', trust_repo=True, pretrained=True)\n"
        "print(*{name.partition('.')[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    ours = {"fastresnet", "pipelines", "hubconf"}
    assert set(done.stdout.split()) - ours <= set(hub_module().dependencies)


def test_torch_hub_has_the_networks_for_entry_points_and_nothing_else():
    hubconf = hub_module()
    found = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert found == {name.replace("-", "_") for name in fastresnet.list_models()}


@pytest.mark.parametrize(
    "load", [load_pretrained, lambda _, **options: hub_module().resnet20(pretrained=True, **options)]
)
def test_another_number_of_classes_gets_a_new_linear_layer(load):
    torch.manual_seed(3)
    network, trained = load("resnet20", num_classes=7), load_pretrained("resnet20")
    assert not any(module.training for module in network.modules())
    state, expected = network.state_dict(), trained.state_dict()
    assert state["fc.weight"].shape == (7, 64)
    assert state["fc.weight"].std() > 0.01  # drawn
    assert all(torch.equal(state[key], expected[key]) for key in expected if not key.startswith("fc."))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    same = load("resnet20", num_classes=10).state_dict()
    assert all(torch.equal(same[key], expected[key]) for key in expected)


def test_a_file_is_loaded_by_its_name(tmp_path):
    path = tmp_path / "model.pt"
    torch.manual_seed(5)
    torch.save(trained := fastresnet.create_model("resnet20").state_dict(), path)
    for name in (path, str(path)):
        loaded = load_pretrained(name).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in trained.items())
    expected = load_pretrained("resnet20").state_dict()
    assert all(
        torch.equal(value, expected[key]) for key, value in load_pretrained("pretrained:resnet20").state_dict().items()
    )


def test_no_classes_are_refused():
    with pytest.raises(UsageError, match="num_classes 0 is below 1"):
        load_pretrained("resnet20", num_classes=0)
