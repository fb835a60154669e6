"""Weights to evaluate: this program's own files, and state dicts of other programs.

The names are those of chenyaofo/pytorch-cifar-models, akamaster/pytorch_resnet_cifar10 and the many derivatives of
kuangliu/pytorch-cifar, in any wrapper (`foreign.py`). The network is the one of this program's that they fit.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastresnet.checkpoint import open_tensors, take_prefix
from fastresnet.foreign import open_network, select_network
from fastresnet.models import MODELS, OWN, create_model, list_models
from fastresnet.tensors import StoredTensor
from pipelines.cifar import CIFAR10_CLASSES
from pipelines.contents import recognise
from pipelines.errors import DataError, Note, check_choice, list_some
from pipelines.sampling import IMAGE_SIZE, NormalizationMode
from pipelines.store import CIFAR10, MOST_CLASSES, Dataset, are_class_names

# Of CIFAR-10's training images, from exact counts of their pixel values.
CIFAR10_MEAN = (0.49139967861519596, 0.4821584083946079, 0.4465309144454657)
CIFAR10_STD = (0.24703223246328201, 0.24348512800005553, 0.2615878417279645)
CIFAR100_MEAN, CIFAR100_STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)  # as in chenyaofo's recipes

# Those of `device.DTYPES`. That module needs libraries that `torch.hub` should not require.
_PRECISIONS = ("fp32", "bf16", "fp16")

_LEAST_DEVIATION = 1e-9
"""Least standard deviation of images in 0..1: a division by a smaller one could overflow."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    """Names of the classes. Where the file has none: CIFAR-10's if there are ten and it is foreign, else numbers."""
    named: bool
    """Presence of the names in the file; of its own files of CIFAR-10, this program knows them."""
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

        It is unchanged if they are its own, or unknown; if it has no training images either, it gets CIFAR-10's.
        """
        if self.training is None and len(dataset.train):
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
    """Load a network from `path`; `model` overrides the name read from the file or inferred from names and shapes.

    Nothing in a file runs. Raises `DataError` if the file is missing, damaged or of another kind, fits no network, or
    has values with which no network can compute; `UsageError` on an unknown `model`.
    """
    if model is not None:
        check_choice("model", model, list_models())
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):  # no error for a long name
        raise DataError(f"{path} is a pipe or a device. Save its content as a file, and give that.")
    try:
        with open(path, "rb") as file:
            return _load(file, path, model)
    except OSError as error:
        raise DataError(
            f"{path} is not a readable file ({error.strerror}). Give a run folder, or a file such as "
            "runs/NAME/model.safetensors."
        ) from None


def _load(file: BinaryIO, path: Path, model: str | None) -> Weights:
    state, description = _find(file, path)
    facts = description or {}
    config = facts.get("config")
    if description is not None:
        state = take_prefix("averaged", state) or take_prefix("model", state) or state
        candidates = [_described(config, path, model)]
    else:
        candidates = _candidates(state, [model] if model else list_models())
    num_classes = _count_classes(state, path)
    name, shortcut = _infer(state, candidates, num_classes, path)
    _check_types(state, path)
    network = create_model(name, num_classes=num_classes, shortcut=shortcut)
    _load_state(network, state, path)
    normalization = config["normalization"] if isinstance(config, dict) else "channel"
    assumed, mean, std = _normalization_of(num_classes)
    if description is not None and not facts.keys() >= {"mean", "std"}:
        warnings.warn(f"{path} does not say its normalisation: {assumed}'s is taken", Note, stacklevel=2)
    classes, named = _names(facts, num_classes)
    return Weights(
        network.eval(),
        name,
        shortcut,
        num_classes,
        config,
        classes=classes,
        named=named,
        mean=_planes(facts.get("mean", mean), 1 if normalization != "pixel" else IMAGE_SIZE, path),
        std=_deviations(facts.get("std", std), path),
        data_sha256=facts.get("data_sha256"),
    )


def note_assumptions(weights: Weights, given: object, *, normalized: bool = True) -> None:
    """Say in notes what is assumed of the classes, and if `normalized` of the normalisation, of foreign weights."""
    if weights.training is None and normalized:
        assumed, *_ = _normalization_of(weights.num_classes)
        warnings.warn(f"{given} does not say its normalisation: {assumed}'s mean and std are taken", Note, stacklevel=2)
    if not weights.named:
        shown = "CIFAR-10's are assumed" if weights.classes == CIFAR10_CLASSES else "their numbers are shown"
        warnings.warn(f"{given} does not name its classes: {shown}", Note, stacklevel=2)


def _normalization_of(num_classes: int) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """Return the data set, mean and standard deviation that are assumed for so many classes."""
    if num_classes == 100:
        return "CIFAR-100", CIFAR100_MEAN, CIFAR100_STD
    return "CIFAR-10", CIFAR10_MEAN, CIFAR10_STD


# --- descriptions of this program ---------------------------------------------------------------------------------


def _planes(values: Any, size: int, path: Path) -> Tensor:
    """Rearrange constants of each channel [3], or of each pixel [size, size, 3], channels first."""
    try:
        constants = torch.tensor(values, dtype=torch.float32).reshape(size, size, 3)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DataError(f"{path} describes a normalisation that matches no image.") from None
    if not constants.isfinite().all():
        raise DataError(f"{path} describes a normalisation by numbers that are not finite.")
    return constants.permute(2, 0, 1)


def _deviations(values: Any, path: Path) -> Tensor:
    std = _planes(values, 1, path)
    if not (std >= _LEAST_DEVIATION).all():
        raise DataError(
            f"{path} describes standard deviations {std.flatten().tolist()}: they must be at least {_LEAST_DEVIATION}."
        )
    return std


def _names(facts: dict[str, Any], num_classes: int) -> tuple[tuple[str, ...], bool]:
    """Return the names of the classes, and True if they are known."""
    given, config = facts.get("classes"), facts.get("config")
    if are_class_names(given) and len(given) == num_classes:
        return tuple(given), True
    is_cifar10 = num_classes == len(CIFAR10_CLASSES)
    if is_cifar10 and (config is None or config["data"] == CIFAR10):
        return CIFAR10_CLASSES, config is not None
    return tuple(map(str, range(num_classes))), False


def _described(config: Any, path: Path, model: str | None) -> tuple[str, str]:
    """Return model name and shortcut option from a file of this program."""
    config = config if isinstance(config, dict) else {}
    name, shortcut = model or config.get("model"), config.get("shortcut")
    if isinstance(name, str) and name.startswith(OWN):
        raise DataError(
            f"{path} has the weights of {name:.100}, a network of a Python program. Load them there: "
            "safetensors.torch.load_file."
        )
    if name not in list_models() or shortcut not in MODELS[name].shortcuts:
        raise DataError(f"{path} describes an unknown network (model {name!r:.100}, shortcut {shortcut!r:.100}).")
    if not isinstance(config.get("data"), str):
        raise DataError(f"{path} describes a training without a data set (data {config.get('data')!r:.100}).")
    for setting, known in (("normalization", get_args(NormalizationMode)), ("precision", _PRECISIONS)):
        if (value := config.get(setting)) not in known:
            raise DataError(
                f"{path} describes a training of unknown {setting} {value!r:.100}. Known: {', '.join(known)}."
            )
    return name, shortcut


def _find(file: BinaryIO, path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any] | None]:
    """Find the tensors of a network in `file`, open at `path`, and its description if this program wrote it."""
    if (other := recognise(path, "weights")) is not None:
        raise DataError(f"{path} {other}.")
    if file.read(9)[8:] == b"{" or path.suffix == ".safetensors":  # eight bytes of length, then a JSON object
        tensors, description = open_tensors(file, path)
        return (tensors if description is not None else select_network(tensors, path)), description
    return open_network(file, path), None


# --- the network that fits ----------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


def _count_classes(state: dict[str, StoredTensor], path: Path) -> int:
    if "fc.weight" not in state:
        raise DataError(f"{path} has no classifier (fc.weight or linear.weight): not the weights of a CIFAR ResNet.")
    num_classes = next(iter(state["fc.weight"].shape), 0)
    if not 0 < num_classes <= MOST_CLASSES:
        raise DataError(
            f"{path} has a classifier of {num_classes:,} classes, which are not in 1..{MOST_CLASSES:,}: not the "
            "weights of a CIFAR ResNet."
        )
    return num_classes


def _candidates(state: dict[str, StoredTensor], models: list[str]) -> list[tuple[str, str]]:
    """List the `models`, with each shortcut option, that have about as many convolutions as `state`.

    Building one for its shapes takes 6 ms, but half a second if it has 1202 layers.
    """
    layers = 1 + sum(len(value.shape) == 4 and ".downsample." not in name for name, value in state.items())
    distance = {name: abs(MODELS[name].depth - layers) for name in models}  # papers count some 1x1 convolutions
    nearest = min(distance.values()) + 3
    return [
        (name, shortcut)
        for name in models
        for shortcut in (MODELS[name].shortcuts if MODELS[name].uses_shortcut else "B")
        if distance[name] <= nearest
    ]


def _infer(
    state: dict[str, StoredTensor], candidates: list[tuple[str, str]], num_classes: int, path: Path
) -> tuple[str, str]:
    """Infer model name and shortcut option from the names and shapes in `state`.

    Raises `DataError` with the first differences from the nearest of `candidates` if none fits. A `Note` names those
    that fit as well: a plain network has the tensors of the residual one, which is taken.
    """
    found = {name: tuple(value.shape) for name, value in state.items()}
    differences = {candidate: _differences(found, _shapes(*candidate, num_classes)) for candidate in candidates}
    fitting = [candidate for candidate, different in differences.items() if not different]
    if not fitting:
        name, shortcut = nearest = min(candidates, key=lambda candidate: len(differences[candidate]))
        some = list_some([text[:120] for text in differences[nearest]], separator="; ")
        which = f"{name} with shortcut {shortcut}" if MODELS[name].uses_shortcut else name
        several = len({model for model, _ in candidates}) > 1
        match = f"matches no known network; the nearest is {which}, but" if several else f"does not match {which}:"
        raise DataError(f"{path} {match} {some}.")
    if len(fitting) > 1:
        (name, _), *others = fitting
        also = ", ".join(f"--model {other}" for other, _ in others)
        warnings.warn(f"{path} is taken for {name}; it has the same shapes as {also}", Note, stacklevel=3)
    return fitting[0]


class _WithoutValues(TorchFunctionMode):
    """Mode that leaves out all changes in place: networks get shapes, but no values.

    Random numbers on device `meta` would import libraries for a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.endswith("_") and not func.__name__.endswith("__"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _shapes(name: str, shortcut: str, num_classes: int) -> Shapes:
    """Find the shapes of all tensors of a network, without allocating them."""
    with torch.device("meta"), _WithoutValues():
        network = create_model(name, num_classes=num_classes, shortcut=shortcut)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _differences(found: Shapes, expected: Shapes) -> list[str]:
    """Describe the differences of the tensors `found` from those `expected`."""
    # Files from before PyTorch 0.4.1 have no such counters, and evaluation does not use them.
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in expected]
    return [
        *(f"{key} is {found[key]}, not {shape}" for key, shape in expected.items() if found.get(key, shape) != shape),
        *(f"{key} is missing" for key in missing),
        *(f"{key} is unknown" for key in unknown),
    ]


def _check_types(state: dict[str, StoredTensor], path: Path) -> None:
    """Raise `DataError` on weights that are no floats. The network has 4 bytes for each of 2 bytes or more."""
    for key, value in state.items():
        if value.dtype not in _FLOATS and not key.endswith("num_batches_tracked"):
            raise DataError(f"{path}: {key} has values of type {value.dtype}. Save weights as floats.")


def _load_state(network: nn.Module, state: dict[str, StoredTensor], path: Path) -> None:
    """Load `state`, whose names and shapes match. Raises `DataError` if the network cannot compute with its values."""
    for key, value in network.state_dict().items():
        if key in state:
            state[key].copy_to(value)
        if not all(bound.isfinite() for bound in value.aminmax()):
            raise DataError(f"{path}: {key} has values that are NaN or infinite, as after a training that diverged.")
        if key.endswith("running_var") and value.min() < 0:
            raise DataError(f"{path}: {key} has variances below 0.")
