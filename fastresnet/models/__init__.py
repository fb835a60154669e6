"""The networks and their names. Importing this package does not import torch: command lines are checked fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.errors import check_choice

if TYPE_CHECKING:
    from torch import nn

DEPTHS = (20, 32, 44, 56, 110, 1202)
SHORTCUTS = ("A", "B")
_RESNETS = {f"resnet{depth}": depth for depth in DEPTHS}
_PLAINS = {f"plain{depth}": depth for depth in DEPTHS}


def list_models() -> list[str]:
    """All names that `create_model` takes."""
    return [*_RESNETS, *_PLAINS]


def model_depth(name: str) -> int:
    """Weighted layers of model `name`."""
    check_choice("model", name, list_models())
    return {**_RESNETS, **_PLAINS}[name]


def create_model(name: str, *, num_classes: int = 10, shortcut: str = "B") -> nn.Module:
    """Build network `name` with freshly initialised weights from torch's global generator.

    `shortcut` says how a residual network bridges a change of width: `A` (identity, subsampled and padded with zero
    channels) or `B` (1x1 convolution and batch norm). Plain networks have no shortcuts and take no notice of it.
    Images go in as [N, 3, 32, 32], logits come out as [N, num_classes]. Raises `UsageError` on an unknown name.
    """
    depth = model_depth(name)
    check_choice("shortcut", shortcut, SHORTCUTS)
    from .resnet import CifarResNet

    return CifarResNet(depth, num_classes=num_classes, shortcut=shortcut if name in _RESNETS else None)
