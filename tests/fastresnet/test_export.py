"""Exported files, loaded by their target runtimes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from fastresnet import export, load_pretrained
from fastresnet.pretrained import pretrained_card


@pytest.fixture
def batch():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits(batch):
    """Compute logits of the images in 0..1, normalised as the card says."""
    card = pretrained_card("resnet20")
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))
    with torch.no_grad():
        return load_pretrained("resnet20")((batch - mean) / std)


def normalized(batch):
    card = pretrained_card("resnet20")
    return (batch - torch.tensor(card.mean)[:, None, None]) / torch.tensor(card.std)[:, None, None]


@pytest.fixture(scope="module")
def exported(python, tmp_path_factory):
    """The home folder of a process that has written network.onnx to it, and what the process has printed."""
    pytest.importorskip("onnxruntime")
    home = tmp_path_factory.mktemp("home")
    ours = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [python, "-m", "fastresnet", "export", "--out", home / "network.onnx"]
    done = subprocess.run(
        command, env={**environment, "HOME": str(home)}, check=True, stdout=subprocess.PIPE, text=True
    )
    return home, done.stdout


def test_onnxruntime_computes_the_same_for_any_batch_size(exported, batch, logits):
    import onnxruntime

    home, out = exported
    assert "--normalize" in out
    session, images = onnxruntime.InferenceSession(str(home / "network.onnx")), normalized(batch)
    for size in (1, 5):
        (computed,) = session.run(["logits"], {"images": images[:size].numpy()})
        np.testing.assert_allclose(computed, logits[:size].numpy(), rtol=0, atol=1e-4)


def test_onnxruntime_reports_nothing(exported):
    """Its telemetry keeps the events to send, and an identifier of the machine, in the user's cache."""
    assert not [*exported[0].rglob("*onnxruntime*")]


def test_torch_export_computes_the_same_for_any_batch_size(run, tmp_path, batch, logits):
    """Normalisation included: it is a layer of the exported network, whatever the format."""
    path = tmp_path / "network.pt2"
    code, out, err = run("export", "--format", "torch-export", "--out", path, "--normalize")
    assert code == 0, err
    assert "--normalize" not in out
    program = torch.export.load(path).module()
    for size in (1, 5):
        torch.testing.assert_close(program(batch[:size]), logits[:size], rtol=0, atol=1e-5)


def test_safetensors_are_the_state_dict(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("export", "--format", "safetensors")
    assert code == 0
    assert "resnet20.safetensors" in out
    written, expected = safetensors.torch.load_file("resnet20.safetensors"), load_pretrained("resnet20").state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_export_with_wrong_logits_keeps_the_previous_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FORMATS", {"onnx": lambda network, path: lambda images: network(images) + 0.01})
    (tmp_path / "network.onnx").write_text("the one before")
    code, _, err = run("export", "--out", tmp_path / "network.onnx")
    assert code == 1
    assert "logits of onnx differ from the network's by 0.01" in err
    assert (tmp_path / "network.onnx").read_text() == "the one before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_library_is_named(run, tmp_path, monkeypatch, library):
    for other in {"onnx", "onnxruntime", "onnxscript"} - {library}:
        pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = run("export", "--out", tmp_path / "network.onnx")
    assert code == 2
    assert f"--format onnx needs {library}: pip install 'fastresnet[onnx]'" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "onxx"], 2, "did you mean 'onnx'"),
        (["--out", "no/folder.onnx"], 2, "there is no folder no"),
        (["--format", "safetensors", "--normalize"], 2, "only weights"),
        (["--weights", "nothing.pt"], 3, "nothing.pt is not a readable file"),
    ],
)
def test_invalid_arguments_are_errors(run, arguments, code, message):
    got, _, err = run("export", *arguments)
    assert got == code
    assert message in err
