"""The networks and their names. Importing this package does not import torch: command lines are checked fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipelines.errors import UsageError, check_choice

if TYPE_CHECKING:
    from torch import nn

DEPTHS = (20, 32, 44, 56, 110, 1202)
SHORTCUTS = ("A", "B")


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    family: str
    depth: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the family's `create_` function takes besides."""
    shortcuts: tuple[str, ...] = SHORTCUTS

    @property
    def is_plain(self) -> bool:
        return "plain" in self.options

    @property
    def has_normed_branches(self) -> bool:
        """Whether batch norm is the last layer of what its shortcuts lead around."""
        return not self.is_plain and self.family != "preresnet"


_MODELS = {
    **{f"resnet{depth}": _Model("resnet", depth) for depth in DEPTHS},
    **{f"plain{depth}": _Model("resnet", depth, {"plain": True}) for depth in DEPTHS},
    **{f"se-resnet{depth}": _Model("resnet", depth, {"squeeze_excitation": True}) for depth in (20, 56)},
    **{f"preresnet{depth}": _Model("preresnet", depth) for depth in (20, 56, 110)},
    "preresnet164": _Model("preresnet", 164, {"bottleneck": True}, ("B",)),
    **{
        f"wrn{depth}-{k}": _Model("preresnet", depth, {"widening": k}, ("B",))
        for depth, k in ((16, 2), (16, 8), (28, 10))
    },
    **{
        f"resnext29-{cardinality}x{width}d": _Model("resnext", 29, {"cardinality": cardinality, "width": width}, ("B",))
        for cardinality, width in ((2, 16), (4, 64), (8, 64))
    },
    "resnet9": _Model("resnet9", 9, {"widths": (128, 256, 512), "whitening": False}),
    "resnet9-medium": _Model("resnet9", 9, {"widths": (96, 320, 320), "whitening": True}),
    "resnet9-narrow": _Model("resnet9", 9, {"widths": (64, 256, 256), "whitening": True}),
}


def list_models() -> list[str]:
    """All names that `create_model` takes."""
    return list(_MODELS)


def model_depth(name: str) -> int:
    """Weighted layers of model `name`, as its paper counts them."""
    check_choice("model", name, _MODELS)
    return _MODELS[name].depth


def model_shortcuts(name: str) -> tuple[str, ...]:
    """The shortcut options that are defined for model `name`."""
    check_choice("model", name, _MODELS)
    return _MODELS[name].shortcuts


def can_start_as_identities(name: str) -> bool:
    """Whether `create_model` takes `zero_init_residual` for model `name`."""
    check_choice("model", name, _MODELS)
    return _MODELS[name].has_normed_branches


def shortcut_matters(name: str) -> bool:
    """Whether model `name` has shortcuts that bridge a change of width, so that it depends on the `shortcut` option."""
    check_choice("model", name, _MODELS)
    model = _MODELS[name]
    return not model.is_plain and model.family != "resnet9"


def check_model(name: str, shortcut: str, drop_path: float, zero_init_residual: bool = False) -> None:
    """Raise `UsageError`, which says why, where `create_model` cannot build that."""
    check_choice("model", name, _MODELS)
    check_choice("shortcut", shortcut, SHORTCUTS)
    model = _MODELS[name]
    if shortcut not in model.shortcuts:
        raise UsageError(
            f"shortcut {shortcut} is not defined for {name}: He et al. 2015 pad basic blocks where the resolution "
            f"halves, but {name} widens in its first stage too. Use shortcut B."
        )
    if not 0 <= drop_path < 1:
        raise UsageError(f"drop path rate {drop_path} is not in 0..1 (1 excluded).")
    if drop_path and model.is_plain:
        raise UsageError(f"drop path rate {drop_path}: {name} has no shortcuts to bridge a block left out. Use 0.")
    if zero_init_residual and not model.has_normed_branches:
        raise UsageError(
            f"zero-init residual: {name} has no residual branches that end in a batch norm, whose weights would be 0. "
            "Leave it out."
        )


def create_model(
    name: str,
    *,
    num_classes: int = 10,
    shortcut: str = "B",
    drop_path: float = 0.0,
    zero_init_residual: bool = False,
) -> nn.Module:
    """Build network `name` with freshly initialised weights from torch's global generator.

    `shortcut` says how a residual network bridges a change of width: `A` (identity, subsampled and padded with zero
    channels) or `B` (1x1 convolution, and batch norm unless the network is a pre-activation one). Plain networks, which
    have no shortcuts, and ResNet-9, whose shortcuts bridge no change of width, take no notice of it. `drop_path` is the
    rate of stochastic depth in the last block, for whose randomness see `stochastic_depth.seed_stochastic_depth`.
    `zero_init_residual` starts every residual branch at zero, by the weights of its last batch norm (Goyal et al. 2017,
    "Accurate, Large Minibatch SGD", section 5.1), so that a deep network begins as a shallow one. Images go in as
    [N, 3, 32, 32], logits come out as [N, num_classes]. Raises `UsageError` as `check_model` does.
    """
    check_model(name, shortcut, drop_path, zero_init_residual)
    from .preresnet import create_preresnet
    from .resnet import create_resnet, zero_branches
    from .resnet9 import create_resnet9
    from .resnext import create_resnext

    model = _MODELS[name]
    families: dict[str, Callable[..., nn.Module]] = {
        "resnet": create_resnet,
        "preresnet": create_preresnet,
        "resnext": create_resnext,
        "resnet9": create_resnet9,
    }
    create = families[model.family]
    network = create(model.depth, num_classes=num_classes, shortcut=shortcut, drop_path=drop_path, **model.options)
    if zero_init_residual:
        zero_branches(network)
    return network
