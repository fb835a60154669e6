"""Networks trained with this program and distributed with it.

`NAME.safetensors` is in this folder with its card, `NAME.json`: command and accuracy of its training, and the SHA-256
of the weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastresnet import hub
from pipelines.errors import DataError, UsageError, check_choice, note
from pipelines.files import sha256

if TYPE_CHECKING:
    from torch import nn

PREFIX = "pretrained:"
"""Prefix of the name of a pretrained network given instead of a file: `pretrained:NAME`."""

_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Facts about pretrained weights, trained on CIFAR-10."""

    model: str
    recipe: str
    command: str
    """Command that trained them."""
    seed: int
    epochs: int
    commit: str
    device: str
    """Device of the training."""
    test_accuracy: float
    """Accuracy of the last epoch, single view, in fp32 on a CPU, percent."""
    test_accuracy_mirror: float
    """Accuracy of the last epoch with flip TTA, in fp32 on a CPU, percent."""
    test_accuracy_shift: float
    """Accuracy of the last epoch with shift TTA, in fp32 on a CPU, percent."""
    mean: tuple[float, ...]
    """Constants of the normalisation (image - mean) / std of images in 0..1."""
    std: tuple[float, ...]
    sha256: str


def list_pretrained() -> list[str]:
    """List all names that `load_pretrained` accepts."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def pretrained_card(name: str) -> Card:
    """Read the card of pretrained network `name`. Raises `UsageError` on an unknown one."""
    check_choice("pretrained network", name, list_pretrained())
    values: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Card(**values | {key: tuple(values[key]) for key in ("mean", "std")})


def pretrained_file(name: str) -> Path:
    """Return the file of the weights. Raises `DataError` if it does not match its card."""
    card, path = pretrained_card(name), _FOLDER / f"{name}.safetensors"
    if sha256(path) != card.sha256:
        raise DataError(f"{path} does not match its card: the SHA-256 differs. Install fastresnet again.")
    return path


def is_pretrained(given: str | Path) -> bool:
    """Return True if `given` names a pretrained network, not a file."""
    return str(given).startswith(PREFIX)


def find_weights(given: str | Path) -> Path:
    """Return the file that `given` names; that of a repository of the Hugging Face Hub is downloaded.

    The file of a run folder is its model.safetensors or, until the run has finished, best.ckpt, which a `Note` says.
    Raises the same errors as `pretrained_file` and `hub.download`, and `DataError` on a folder without weights.
    """
    if is_pretrained(given):
        return pretrained_file(str(given).removeprefix(PREFIX))
    if hub.is_repository(given):
        return hub.download(str(given))
    path = Path(given)
    if os.path.isdir(path):  # unlike Path.is_dir, without an error for a name that no file can have
        return _weights_of_run(path)
    if str(given) in list_pretrained() and not os.path.exists(path):
        raise DataError(f"there is no file {given}. Did you mean {PREFIX}{given}?")
    return path


def _weights_of_run(folder: Path) -> Path:
    from fastresnet.run_folder import read_summary

    final, best = folder / "model.safetensors", folder / "best.ckpt"
    if final.exists():
        return final
    if not best.exists():
        if (folder / "summary.json").exists():
            read_summary(folder / "summary.json")  # of several seeds: an error that says so
        raise DataError(f"{folder} is a folder without model.safetensors. Give a run folder, or a file of weights.")
    note(f"{folder} is not finished: taking {best}, of its best epoch so far.")
    return best


def load_pretrained(name: str | Path, num_classes: int | None = None) -> nn.Module:
    """Load pretrained network `name`, or that of a file such as runs/NAME/model.safetensors, in evaluation mode.

    `hf-hub:USER/NAME` is the network in a repository of the Hugging Face Hub, and `hf-hub:USER/NAME@REVISION` a certain
    revision. The network, on the CPU, maps images [N, 3, 32, 32] to logits of the classes of its training: [N, 10] for
    CIFAR-10. Images are normalised as `pretrained_card(name)` says, or the card of the repository. For another number
    of classes, `num_classes`, it gets a new linear layer, freshly initialised from torch's global generator, to be
    trained.

    Raises `UsageError` on an unknown name or fewer classes than 1, `DataError` if the file is damaged or cannot be
    downloaded.
    """
    from fastresnet.models import create_model
    from fastresnet.weights import load_weights

    if num_classes is not None and num_classes < 1:
        raise UsageError(f"num_classes {num_classes} is below 1.")
    is_file = os.path.exists(name) and str(name) not in list_pretrained()
    path = (
        find_weights(name) if is_file or is_pretrained(name) or hub.is_repository(name) else pretrained_file(str(name))
    )
    weights = load_weights(path)
    network = weights.model
    if num_classes not in (None, weights.num_classes):
        network.fc = create_model(weights.name, num_classes=num_classes, shortcut=weights.shortcut).fc
    return network.eval()
