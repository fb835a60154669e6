"""Runs of fifteen steps, for tests that start many of them as real processes, and their comparison."""

import dataclasses

import torch

from fastresnet import models, plotting
from fastresnet.checkpoint import load_tensors
from fastresnet.training import loop

ARGUMENTS = [
    "train", "smoke", "--data", "shapes10", "--batch-size", "8", "--epochs", "3", "--precision", "fp32",
    "--threads", "1", "--checkpoint-steps", "2",
]  # fmt: skip


def shorten_runs():
    """Give ResNet-20 one block in each stage, draw no curves and count no FLOPs: a third of the time."""
    models.MODELS["resnet20"] = dataclasses.replace(models.MODELS["resnet20"], depth=8)
    plotting.curves, plotting.rendered = lambda _: None, lambda *_: b"a picture"
    loop.flops_per_image = lambda *_, **__: 0


def assert_same_run(folder, uninterrupted):
    """Assert that weights, momentum and metrics equal those of the uninterrupted run, bit by bit."""
    for name in ("model.safetensors", "last.ckpt", "best.ckpt"):
        tensors, expected = load_tensors(folder / name)[0], load_tensors(uninterrupted / name)[0]
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert (folder / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
