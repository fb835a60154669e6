"""Weights to evaluate: this program's own files, and state dicts of other repositories.

Supported are chenyaofo/pytorch-cifar-models, akamaster/pytorch_resnet_cifar10, the many derivatives of
kuangliu/pytorch-cifar, and `torch.compile`d or data-parallel variants of them.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastresnet.checkpoint import load_tensors, take_prefix
from fastresnet.models import MODELS, create_model, list_models
from pipelines.errors import DataError, check_choice
from pipelines.sampling import NormalizationMode
from pipelines.sources import CIFAR10_CLASSES
from pipelines.store import Dataset

# Of CIFAR-10's training images, from exact counts of their pixel values.
CIFAR10_MEAN = (0.49139967861519596, 0.4821584083946079, 0.4465309144454657)
CIFAR10_STD = (0.24703223246328201, 0.24348512800005553, 0.2615878417279645)

# Those of `device.DTYPES`. That module needs libraries that `torch.hub` should not require.
_PRECISIONS = ("fp32", "bf16", "fp16")

_WRAPPERS = ("net", "state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_RENAMED = ((re.compile(r"^linear\."), "fc."), (re.compile(r"\.shortcut\."), ".downsample."))


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """Network with its trained weights, and the known facts of its training."""

    model: nn.Module
    name: str
    shortcut: str
    num_classes: int
    training: dict[str, Any] | None
    """Settings of the training by `TrainConfig.to_dict()`; None for foreign files."""
    classes: tuple[str, ...]
    """Names of the classes; of foreign files CIFAR-10's if there are ten, numbers otherwise."""
    mean: Tensor
    """Mean [3, 1, 1], or [3, 32, 32] for one of each pixel: the input is (image - mean) / std of images in 0..1. If the
    file has none, it is CIFAR-10's."""
    std: Tensor
    """Standard deviation [3, 1, 1]."""
    data_sha256: str | None = None
    """Digest of the training's data set, if the file has it."""

    @property
    def normalization(self) -> NormalizationMode:
        """Name, in `pipelines.Augmentation`, of the training's normalisation; of foreign files `channel`."""
        return (self.training or {}).get("normalization", "channel")

    def as_in_training(self, dataset: Dataset) -> Dataset:
        """Return `dataset` with the mean and standard deviation that normalised the training's images.

        It is unchanged if they are unknown or its own.
        """
        if self.training is None:
            return dataset
        if self.normalization == "pixel":
            constants: dict[str, Any] = {"pixel_mean": self.mean.permute(1, 2, 0).numpy()}
        else:
            constants = {"mean": tuple(self.mean.flatten().tolist()), "std": tuple(self.std.flatten().tolist())}
        # The file has them in float32: the data set's own, if they are the same, have the precision of training.
        same = all(np.allclose(theirs, getattr(dataset, name), rtol=1e-6, atol=0) for name, theirs in constants.items())
        return dataset if same else dataclasses.replace(dataset, **constants)


class Normalized(nn.Module):
    """Network that normalises its images itself: its input is in 0..1."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.register_buffer("mean", weights.mean)
        self.register_buffer("std", weights.std)
        self.network = weights.model

    def forward(self, images: Tensor) -> Tensor:
        """Map `images` [N, 3, 32, 32] in 0..1 to logits [N, classes]."""
        return self.network((images - self.mean) / self.std)


def load_weights(path: Path, model: str | None = None) -> Weights:
    """Load a network from `path`; `model` overrides the name read from the file or inferred from the shapes.

    Foreign files are unpickled with `weights_only=True`. Raises `DataError` if the file is missing, damaged or
    matches no network, `UsageError` on an unknown `model`.
    """
    if model is not None:
        check_choice("model", model, list_models())
    state, description = _read(path)
    if description is not None:
        config = description.get("config")
        state = take_prefix("averaged", state) or take_prefix("model", state) or state
        name, shortcut = _described(config, path, model)
    else:
        config = None
        state = _canonical(state)
        name, shortcut = _infer(state, path, model)
    if "fc.weight" not in state:
        raise DataError(f"{path} has no classifier (fc.weight or linear.weight): not the weights of a CIFAR ResNet.")
    num_classes = state["fc.weight"].shape[0] if state["fc.weight"].ndim else 0
    if num_classes == 0:
        raise DataError(f"{path} has a classifier without classes: not the weights of a CIFAR ResNet.")
    network = create_model(name, num_classes=num_classes, shortcut=shortcut)
    _load_state(network, state, path, name)
    facts = description or {}
    return Weights(
        network.eval(),
        name,
        shortcut,
        num_classes,
        config,
        classes=_names(facts.get("classes"), num_classes),
        mean=_planes(facts.get("mean", CIFAR10_MEAN), path),
        std=_planes(facts.get("std", CIFAR10_STD), path),
        data_sha256=facts.get("data_sha256"),
    )


def _planes(values: Any, path: Path) -> Tensor:
    """Rearrange constants of each channel [3] or of each pixel [32, 32, 3], channels first."""
    try:
        constants = torch.tensor(values, dtype=torch.float32).reshape(*([1, 1, 3] if len(values) == 3 else [32, 32, 3]))
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{path} describes a normalisation that matches no image.") from None
    return constants.permute(2, 0, 1)


def _names(given: Any, num_classes: int) -> tuple[str, ...]:
    if isinstance(given, list) and len(given) == num_classes:
        return tuple(map(str, given))
    return CIFAR10_CLASSES if num_classes == len(CIFAR10_CLASSES) else tuple(map(str, range(num_classes)))


def _described(config: Any, path: Path, model: str | None) -> tuple[str, str]:
    """Return model name and shortcut option from a file of this program."""
    config = config if isinstance(config, dict) else {}
    name, shortcut = model or config.get("model"), config.get("shortcut")
    if name not in list_models() or shortcut not in MODELS[name].shortcuts:
        raise DataError(f"{path} describes an unknown network (model {name!r}, shortcut {shortcut!r}).")
    if not isinstance(config.get("data"), str):
        raise DataError(f"{path} describes a training without a data set (data {config.get('data')!r}).")
    for setting, known in (("normalization", get_args(NormalizationMode)), ("precision", _PRECISIONS)):
        if (value := config.get(setting)) not in known:
            raise DataError(f"{path} describes a training of unknown {setting} {value!r}. Known: {', '.join(known)}.")
    return name, shortcut


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise DataError(
            f"{path} is not a readable file ({error.strerror}). --weights takes a checkpoint such as "
            "runs/NAME/best.ckpt."
        ) from None
    if start[8:] == b"{" or path.suffix == ".safetensors":  # eight bytes of length, then a JSON object
        return load_tensors(path)
    try:
        if start.startswith(b"PK"):
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} is damaged, or contains more than tensors (a pickled module?), which is not loaded because it "
            "could run code. Save its state_dict() and load that."
        ) from None
    except Exception as error:  # noqa: BLE001  a damaged file makes torch.load raise anything, OSError included
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path} is damaged or not a PyTorch file: {reason}.") from None
    return _state_dict(content, path), None


def _check_archive(path: Path) -> None:
    """Raise unless every entry matches its CRC-32, which torch.load does not check."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the mapping of names to tensors in `content`, in any wrapper."""
    for _ in range(3):  # some files wrap twice; one that contains itself could loop forever
        if isinstance(content, Mapping):
            content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), content)
    tensors = dict(content) if isinstance(content, Mapping) else {}
    if tensors and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()):
        return tensors
    raise DataError(f"{path} contains no state dict: expected names and tensors, bare or under {', '.join(_WRAPPERS)}.")


def _canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` under this program's parameter names."""
    canonical = {}
    for name, tensor in state.items():
        while name.startswith(_PREFIXES):
            name = name.removeprefix("module.").removeprefix("_orig_mod.")
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        canonical[name] = tensor
    return canonical


def _infer(state: dict[str, Tensor], path: Path, model: str | None) -> tuple[str, str]:
    """Infer model name and shortcut option that fit the names and shapes in `state`."""
    blocks = len({match[1] for name in state if (match := re.match(r"layer1\.(\d+)\.conv1\.weight$", name))})
    shortcut = "B" if any(".downsample." in name for name in state) else "A"
    name = model or f"resnet{6 * blocks + 2}"
    if name not in list_models():
        known = ", ".join(list_models())
        raise DataError(f"{path} matches no known network ({blocks} blocks in layer1). Known: {known}.")
    return name, shortcut


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    expected = network.state_dict()
    # Files from before PyTorch 0.4.1 have no such counters, and evaluation does not use them.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in expected]
    mismatches = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    for what, keys in (("mismatch", mismatches), ("missing", missing), ("unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise DataError(f"{path} does not match {name}: {what}: {'; '.join(keys[:3])}{more}.")
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # tensors without values, sparse or quantised ones
        raise DataError(f"{path} does not match {name}: {str(error).splitlines()[-1].strip()}") from None
