"""Runs of fifteen steps, for what starts many of them as real processes, and their comparison."""

import torch

from fastresnet.checkpoint import load_tensors

ARGUMENTS = [
    "train", "smoke", "--data", "shapes10", "--batch-size", "16", "--epochs", "3", "--precision", "fp32",
    "--checkpoint-steps", "2",
]  # fmt: skip


def assert_same_run(folder, unbroken):
    """Weights, momentum and metrics are those of the unbroken run, to the bit."""
    for name in ("model.safetensors", "last.ckpt", "best.ckpt"):
        tensors, expected = load_tensors(folder / name)[0], load_tensors(unbroken / name)[0]
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert (folder / "metrics.csv").read_bytes() == (unbroken / "metrics.csv").read_bytes()
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
