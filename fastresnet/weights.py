"""Weights to evaluate: this program's own files, and state dicts of the repositories that people have.

Understood are chenyaofo/pytorch-cifar-models, akamaster/pytorch_resnet_cifar10, the many descendants of
kuangliu/pytorch-cifar, and `torch.compile`d or data-parallel variants of them.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastresnet.checkpoint import load_tensors, take_prefix
from fastresnet.models import create_model, list_models
from pipelines.errors import DataError, check_choice

_WRAPPERS = ("net", "state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_RENAMED = ((re.compile(r"^linear\."), "fc."), (re.compile(r"\.shortcut\."), ".downsample."))


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """A network with its trained weights, and what is known of its training."""

    model: nn.Module
    name: str
    shortcut: str
    num_classes: int
    training: dict[str, Any] | None
    """For files of this program: the training's `TrainConfig.to_dict()`; None for foreign ones."""


def load_weights(path: Path, model: str | None = None) -> Weights:
    """Load a network from `path`; `model` overrides the name read from the file or inferred from the shapes.

    Foreign files are unpickled with `weights_only=True`. Raises `DataError` where the file is missing, damaged or fits
    no network, `UsageError` on an unknown `model`.
    """
    if model is not None:
        check_choice("model", model, list_models())
    state, description = _read(path)
    if description is not None:
        config = description["config"]
        state = take_prefix("model", state) or state
        name, shortcut = model or config["model"], config["shortcut"]
    else:
        config = None
        state = _canonical(state)
        name, shortcut = _infer(state, path, model)
    if "fc.weight" not in state:
        raise DataError(f"{path} has no classifier (fc.weight or linear.weight): not the weights of a CIFAR ResNet.")
    num_classes = len(state["fc.weight"])
    network = create_model(name, num_classes=num_classes, shortcut=shortcut)
    _load_state(network, state, path, name)
    return Weights(network.eval(), name, shortcut, num_classes, config)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path} is no file. --weights takes a checkpoint such as runs/NAME/best.ckpt.") from None
    if start[8:] == b"{":  # safetensors: eight bytes of length, then a JSON object
        return load_tensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} is damaged, or holds more than tensors (a pickled module?), which is not loaded because it could "
            "run code. Save its state_dict() and load that."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged or no PyTorch file: {str(error).splitlines()[0]}") from None
    return _state_dict(content, path), None


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in `content`, out of whatever wrapper it came in."""
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                return _state_dict(content[wrapper], path)
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
    raise DataError(f"{path} holds no state dict: expected names and tensors, bare or under {', '.join(_WRAPPERS)}.")


def _canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under this program's parameter names."""
    canonical = {}
    for name, tensor in state.items():
        while name.startswith(_PREFIXES):
            name = name.removeprefix("module.").removeprefix("_orig_mod.")
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        canonical[name] = tensor
    return canonical


def _infer(state: dict[str, Tensor], path: Path, model: str | None) -> tuple[str, str]:
    """Model name and shortcut option that fit the names and shapes in `state`."""
    blocks = len({match[1] for name in state if (match := re.match(r"layer1\.(\d+)\.conv1\.weight$", name))})
    shortcut = "B" if any(".downsample." in name for name in state) else "A"
    name = model or f"resnet{6 * blocks + 2}"
    if name not in list_models():
        raise DataError(f"{path} fits no network known here ({blocks} blocks in layer1). Known: {_depths()}.")
    return name, shortcut


def _depths() -> str:
    return ", ".join(list_models())


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    expected = network.state_dict()
    # Files from before PyTorch 0.4.1 have no such counters, and evaluation does not use them.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in expected]
    misfits = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    for what, keys in (("misfit", misfits), ("missing", missing), ("unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise DataError(f"{path} does not fit {name}: {what}: {'; '.join(keys[:3])}{more}.")
    network.load_state_dict(state, strict=False)
