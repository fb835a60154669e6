"""Layers, parameters and multiply-adds, against published figures and PyTorch's counter."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastresnet.config import SMALLEST_IMAGE
from fastresnet.models import MODELS, create_model
from fastresnet.models.summary import flops_per_image, layers
from fastresnet.zoo import read_zoo


@pytest.mark.parametrize(
    ("model", "shortcut", "parameters", "millions"),
    [
        ("resnet20", "A", 269_722, 40.55),
        ("resnet20", "B", 272_474, 40.81),
        ("resnet56", "A", 853_018, 125.49),
        ("resnet110", "B", 1_730_714, 253.15),
    ],
)
def test_totals_match_published_figures(model, shortcut, parameters, millions):
    found = layers(create_model(model, shortcut=shortcut))
    assert sum(layer.parameters for layer in found) == parameters
    assert sum(layer.macs for layer in found) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if MODELS[name].depth in (110, 1202) else name for name in MODELS],
)
def test_parameters_and_multiply_adds_match_pytorch(name):
    with torch.device("meta"):
        model = create_model(name).eval()
    found = layers(model)
    assert sum(layer.parameters for layer in found) == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert 2 * sum(layer.macs for layer in found) == counter.get_total_flops()
    costs = {"parameters": sum(layer.parameters for layer in found), "macs": sum(layer.macs for layer in found)}
    assert costs == read_zoo()["networks"][name], "run: python -m benchmarks.zoo"


@pytest.mark.parametrize("name", ["resnet20", "plain20", "preresnet20", "se-resnet20", "wrn16-2", "speednet"])
def test_flops_of_training_match_pytorch(name):
    with torch.device("meta"):
        model = create_model(name).train()
    for side in (32, 24, SMALLEST_IMAGE):
        with FlopCounterMode(display=False) as counter:  # batch norm needs two of the smallest
            model(torch.empty(2, 3, side, side, device="meta")).sum().backward()
        assert 2 * flops_per_image(model, training=True, side=side) == counter.get_total_flops()


def test_flops_of_training_with_grouped_convolutions():
    """Training takes three times the forward pass, less the gradient of the images.

    PyTorch's counter ignores groups in the gradients of weights.
    """
    model = create_model("resnext29-2x16d")
    macs = [layer.macs for layer in layers(model)]
    assert flops_per_image(model, training=True) == 2 * (3 * sum(macs) - macs[0])


def test_order_and_shapes_of_layers():
    found = {layer.name: layer for layer in layers(create_model("resnet20", num_classes=7))}
    assert next(iter(found)) == "conv1"
    assert list(found)[-1] == "fc"
    assert found["layer2.0.conv1"].kind == "Conv2d 3x3, stride 2"
    assert found["layer2.0.conv1"].output == (32, 16, 16)
    assert found["fc"].output == (7,)
    assert (found["fc"].parameters, found["fc"].macs) == (64 * 7 + 7, 64 * 7)


def test_command_prints_and_writes_layers(run, tmp_path):
    code, out, _ = run("summary", "--model", "resnet32", "--shortcut", "A", "--json", tmp_path / "s.json")
    assert code == 0
    assert "464,154" in out
    written = json.loads((tmp_path / "s.json").read_text())
    assert (written["parameters"], round(written["macs"] / 1e6, 2)) == (464_154, 68.86)
    assert len(written["layers"]) == len(layers(create_model("resnet32", shortcut="A")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet21"], "did you mean"),
        (["--model", "wrn16-2", "--shortcut", "A"], "shortcut A is not defined"),
        (["--classes", "0"], "--classes 0"),
        (["--json", "no/folder.json"], "there is no folder no"),
    ],
)
def test_invalid_arguments_are_errors(run, arguments, message):
    code, _, err = run("summary", *arguments)
    assert code == 2
    assert message in err
