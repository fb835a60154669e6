"""Network of a run: created by its settings, with fresh weights or those of a file, and with a frozen part."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from fastresnet.checkpoint import load_tensors
from fastresnet.config import TrainConfig
from fastresnet.evaluation import check_logits
from fastresnet.hub import is_repository
from fastresnet.models import create_model
from fastresnet.models.speednet import PatchWhitening
from fastresnet.pretrained import find_weights, is_pretrained, list_pretrained
from fastresnet.weights import Weights, load_weights
from pipelines.augment import Normalization, normalize
from pipelines.errors import DataError, UsageError, list_some, note, reason_of
from pipelines.files import sha256
from pipelines.sampling import IMAGE_SIZE
from pipelines.store import Dataset

_WHITENED_FROM = 5000  # images, as in cifar10-airbench
_KEPT = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16}
_KEPT |= {torch.int32, torch.int64}
"""Types of tensors that checkpoints keep."""
_HEAD = "fc"
"""Name of the linear layer in all networks of this program."""


def create_network(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """Create the network of `config` for the classes of `dataset`, in training mode, with freshly initialised weights.

    With `freeze_backbone`, only the linear layer has weights to train.
    """
    model = create_model(
        config.model,
        num_classes=len(dataset.classes),
        shortcut=config.shortcut,
        drop_path=config.drop_path,
        zero_init_residual=config.zero_init_residual,
    )
    if config.freeze_backbone:
        model.requires_grad_(False).get_submodule(_HEAD).requires_grad_(True)
    use_training_mode(model)
    return model


def checked_network(network: nn.Module, config: TrainConfig, dataset: Dataset) -> nn.Module:
    """Return a user's `network`, on the device of `config` and in training mode.

    Raises `UsageError` unless it has float32 parameters to train, a state that checkpoints can keep, and a logit for
    each class of `dataset`, of images of all sizes.
    """
    name = type(network).__name__
    state = network.state_dict()
    if strange := [key for key, value in state.items() if getattr(value, "dtype", None) not in _KEPT]:
        raise UsageError(f"{name} has a state that checkpoints cannot keep: {list_some(strange)}. Keep real tensors.")
    if empty := [key for key, value in state.items() if value.is_meta]:
        raise UsageError(f"{name} has tensors without values, on device meta: {list_some(empty)}. Initialise them.")
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise UsageError(f"{name} has no parameters to train.")
    if other := {parameter.dtype for parameter in trained} - {torch.float32}:
        raise UsageError(f"{name} has parameters of {list_some(sorted(map(str, other)))}. Convert them: .float().")
    network = network.to(config.device).eval()
    for side in sorted(set(config.resolutions), reverse=True):
        images = torch.zeros(2, 3, side, side, device=config.device)
        try:
            with torch.no_grad():
                logits = network(images)
        except RuntimeError as error:
            remedy = "" if side == IMAGE_SIZE else " (for whole images alone: resolutions=(32,))"
            raise UsageError(f"{name} fails for images {list(images.shape)}{remedy}: {reason_of(error)}") from error
        check_logits(logits, images, dataset.classes)
    use_training_mode(network)
    return network


def load_saved(network: nn.Module, path: Path) -> None:
    """Load the weights in `path`, of a run, into a user's `network`. Raises `DataError` if they are of another."""
    try:
        network.load_state_dict(load_tensors(path)[0])
    except RuntimeError as error:
        raise DataError(f"{path} has the weights of another network: {' '.join(str(error).split())[:300]}") from None


def use_training_mode(model: nn.Module) -> None:
    """Put `model` in training mode, except for layers whose weights are all frozen: their statistics stay too."""
    model.train()
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


def fit_whitening(model: nn.Module, dataset: Dataset, normalization: str) -> None:
    """Fit the filters of whitening layers to the first training images."""
    for layer in model.modules():
        if isinstance(layer, PatchWhitening):
            images = dataset.train.images[dataset.train.ids[:_WHITENED_FROM]]
            constants = Normalization.of(normalization, dataset)
            layer.fit(normalize(torch.as_tensor(images), constants, torch.float32))


# --- weights to start from ----------------------------------------------------------------------------------------


def with_identified_weights(config: TrainConfig, *, started: bool) -> TrainConfig:
    """Return `config` with the absolute path of the weights to start from and, unless `started`, their SHA-256.

    A run that has started no longer reads them. Raises `DataError` if `config` has the SHA-256 of other weights.
    """
    if config.init_from is None:
        return config
    if config.init_from in list_pretrained() and not os.path.exists(config.init_from):
        raise UsageError(f"--init-from {config.init_from}: no such file. Did you mean pretrained:{config.init_from}?")
    if not (is_pretrained(config.init_from) or is_repository(config.init_from)):
        config = dataclasses.replace(config, init_from=os.path.abspath(os.path.expanduser(config.init_from)))
    if started:
        return config
    path = find_weights(str(config.init_from))
    if path.exists() and not path.is_file():
        raise DataError(f"--init-from {path} is a pipe or a device. Save its content as a file, and give that.")
    try:
        digest = sha256(path)
    except OSError as error:
        raise DataError(
            f"--init-from {config.init_from} is not a readable file ({error.strerror}). It takes one such as "
            "runs/NAME/model.safetensors."
        ) from None
    if config.init_sha256 not in (None, digest):
        raise DataError(
            f"--init-from {config.init_from} is another file than the run started from: its SHA-256 is "
            f"{digest[:12]}..., not {str(config.init_sha256)[:12]}... Give that file, or remove init_sha256."
        )
    return dataclasses.replace(config, init_sha256=digest)


def start_from_weights(model: nn.Module, config: TrainConfig, dataset: Dataset) -> None:
    """Load the weights of `config.init_from` into `model`, without a linear layer for other classes, with a note.

    Raises `UsageError` if they are those of another network, and the errors of `load_weights`.
    """
    given = config.init_from or ""
    weights = load_weights(find_weights(given))
    _check_network(weights, model, config)
    if weights.training is not None and weights.normalization != config.normalization:
        note(
            f"{given} was trained on images of --normalization {weights.normalization}, which it needs for its "
            f"accuracy; this run has {config.normalization}"
        )
    state = weights.model.state_dict()
    if reason := _other_classes(weights, dataset):
        state = {name: value for name, value in state.items() if not _is_in_head(name)}
        note(f"the linear layer of {given} is for {reason}: a new one is trained")
    model.load_state_dict(model.state_dict() | state)


def _check_network(weights: Weights, model: nn.Module, config: TrainConfig) -> None:
    """Raise `UsageError` unless `weights` are those of `model`, apart from its linear layer."""
    is_named = weights.training is not None  # the shapes of plain networks are those of residual ones
    if _backbone_shapes(weights.model) == _backbone_shapes(model) and not (is_named and weights.name != config.model):
        return
    settings = {"--model": (weights.name, config.model), "--shortcut": (weights.shortcut, config.shortcut)}
    wrong = " ".join(f"{flag} {theirs}" for flag, (theirs, own) in settings.items() if theirs != own)
    raise UsageError(f"--init-from {config.init_from} has the weights of another network. Use {wrong}.")


def _backbone_shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items() if not _is_in_head(name)}


def _is_in_head(name: str) -> bool:
    return name.startswith(f"{_HEAD}.")


def _other_classes(weights: Weights, dataset: Dataset) -> str:
    """Describe the classes of `weights` if they are not those of `dataset`, in their order; else return nothing."""
    if weights.num_classes != len(dataset.classes):
        return f"{weights.num_classes} classes, not {len(dataset.classes)}"
    if weights.named and weights.classes != dataset.classes:
        return f"other classes ({list_some(weights.classes)})"
    return ""
