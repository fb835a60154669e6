"""Networks trained with this program, whose weights come with it.

`NAME.safetensors` lies beside this file with its card, `NAME.json`: how it was trained, what it achieves, and the
SHA-256 of the weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import DataError, check_choice
from pipelines.files import sha256

if TYPE_CHECKING:
    from torch import nn

PREFIX = "pretrained:"
"""Where a file of weights is asked for, `pretrained:NAME` stands for one of these."""

_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known of pretrained weights. They are a network's `model`, trained on CIFAR-10."""

    model: str
    recipe: str
    command: str
    """The command that trained them."""
    seed: int
    epochs: int
    commit: str
    device: str
    """Where they were trained."""
    test_accuracy: float
    """Last epoch, single view, in fp32 on a CPU, percent."""
    test_accuracy_mirror: float
    """The same with the logits of mirrored images averaged in."""
    mean: tuple[float, ...]
    """Images in 0..1 are normalised as (image - mean) / std."""
    std: tuple[float, ...]
    sha256: str


def list_pretrained() -> list[str]:
    """All names that `load_pretrained` takes."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def pretrained_card(name: str) -> Card:
    """The card of pretrained network `name`. Raises `UsageError` on an unknown one."""
    check_choice("pretrained network", name, list_pretrained())
    values: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Card(**values | {key: tuple(values[key]) for key in ("mean", "std")})


def pretrained_file(name: str) -> Path:
    """The file of its weights. Raises `DataError` where it is not the one that its card describes."""
    card, path = pretrained_card(name), _FOLDER / f"{name}.safetensors"
    if sha256(path) != card.sha256:
        raise DataError(f"{path} is not what its card describes: the SHA-256 differs. Install fastresnet anew.")
    return path


def is_pretrained(given: str | Path) -> bool:
    """Whether `given` names a pretrained network, in place of a file."""
    return str(given).startswith(PREFIX)


def find_weights(given: str | Path) -> Path:
    """The file that `given` names. Raises as `pretrained_file` does."""
    return pretrained_file(str(given).removeprefix(PREFIX)) if is_pretrained(given) else Path(given)


def load_pretrained(name: str) -> nn.Module:
    """Pretrained network `name`, in evaluation mode, on the CPU.

    Images go in as [N, 3, 32, 32], normalised as `pretrained_card(name)` says; logits of CIFAR-10's classes come out as
    [N, 10]. Raises `UsageError` on an unknown name, `DataError` where the file is damaged.
    """
    from fastresnet.weights import load_weights

    return load_weights(pretrained_file(name)).model
