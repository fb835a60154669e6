"""Networks and their names. This package does not import torch, so that command lines are checked quickly."""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from typing import TYPE_CHECKING, Any, Literal, get_args

from pipelines.errors import UsageError, check_choice

if TYPE_CHECKING:
    from torch import nn

DEPTHS = (20, 32, 44, 56, 110, 1202)
Shortcut = Literal["A", "B"]
SHORTCUTS: tuple[Shortcut, ...] = get_args(Shortcut)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """Properties of a network, and the function that creates it."""

    creator: str
    """`module:function`. It takes `depth`, the `options`, and `num_classes`, `shortcut` and `drop_path`."""
    depth: int
    """Weighted layers, as the network's paper counts them."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the creator for this network alone."""
    shortcuts: tuple[Shortcut, ...] = SHORTCUTS
    """Shortcut options that are defined for the network."""
    uses_shortcut: bool = True
    """Dependence on the shortcut option: some shortcut bridges a change of width."""
    supports_drop_path: bool = True
    """Support for stochastic depth: a shortcut bridges each block."""
    supports_zero_init: bool = True
    """Support for `zero_init_residual`: each residual branch ends in a batch norm."""


_RESNET = functools.partial(ModelSpec, "fastresnet.models.resnet:create_resnet")
_PLAIN = functools.partial(
    _RESNET, options={"plain": True}, uses_shortcut=False, supports_drop_path=False, supports_zero_init=False
)
_PRERESNET = functools.partial(ModelSpec, "fastresnet.models.preresnet:create_preresnet", supports_zero_init=False)
_RESNEXT29 = functools.partial(ModelSpec, "fastresnet.models.resnext:create_resnext", 29, shortcuts=("B",))
_SPEEDNET = functools.partial(
    ModelSpec,
    "fastresnet.models.speednet:create_speednet",
    8,
    uses_shortcut=False,
    supports_drop_path=False,
    supports_zero_init=False,
)

MODELS = {
    **{f"resnet{depth}": _RESNET(depth) for depth in DEPTHS},
    "resnet18": ModelSpec("fastresnet.models.resnet:create_resnet18", 18),
    **{f"plain{depth}": _PLAIN(depth) for depth in DEPTHS},
    **{f"se-resnet{depth}": _RESNET(depth, {"squeeze_excitation": True}) for depth in (20, 56)},
    **{f"preresnet{depth}": _PRERESNET(depth) for depth in (20, 56, 110)},
    "preresnet164": _PRERESNET(164, {"bottleneck": True}, ("B",)),
    **{f"wrn{depth}-{k}": _PRERESNET(depth, {"widening": k}, ("B",)) for depth, k in ((16, 2), (16, 8), (28, 10))},
    **{f"resnext29-{c}x{w}d": _RESNEXT29({"cardinality": c, "width": w}) for c, w in ((2, 16), (4, 64), (8, 64))},
    "resnet9": ModelSpec(
        "fastresnet.models.resnet9:create_resnet9", 9, {"widths": (128, 256, 512)}, uses_shortcut=False
    ),
    "speednet": _SPEEDNET({"widths": (64, 256, 256)}),
    "speednet-wide": _SPEEDNET({"widths": (96, 320, 320)}),
}


OWN = "own-"
"""Prefix of the name of a network that a Python program brings along: `own-CLASS`."""


def list_models() -> list[str]:
    """List all names that `create_model` accepts."""
    return list(MODELS)


def find_model(name: str) -> ModelSpec:
    """Return the properties of network `name`, which may begin with `OWN`. Raise `UsageError` on an unknown name."""
    if name.startswith(OWN):
        return ModelSpec("", 0, uses_shortcut=False, supports_drop_path=False, supports_zero_init=False)
    check_choice("model", name, MODELS)
    return MODELS[name]


def check_model(name: str, shortcut: str, drop_path: float, zero_init_residual: bool = False) -> None:
    """Raise `UsageError`, with the reason, unless `create_model` supports these arguments."""
    spec = find_model(name)
    check_choice("shortcut", shortcut, SHORTCUTS)
    if shortcut not in spec.shortcuts:
        raise UsageError(
            f"shortcut {shortcut} is not defined for {name}: He et al. 2015 pad basic blocks where the resolution "
            f"halves, but {name} widens in its first stage too. Use shortcut B."
        )
    if not 0 <= drop_path < 1:
        raise UsageError(f"drop path rate {drop_path} is not in 0..1 (1 excluded).")
    if drop_path and not spec.supports_drop_path:
        raise UsageError(f"drop path rate {drop_path}: {name} has no shortcuts that can bridge a dropped block. Use 0.")
    if zero_init_residual and not spec.supports_zero_init:
        raise UsageError(
            f"zero-init residual: {name} has no residual branches that end in a batch norm with trained weights, which "
            "would be 0. Leave it out."
        )


def create_model(
    name: str, *, num_classes: int = 10, shortcut: str = "B", drop_path: float = 0.0, zero_init_residual: bool = False
) -> nn.Module:
    """Create network `name` with freshly initialised weights from torch's global generator.

    The network maps images [N, 3, 32, 32] to logits [N, num_classes]. `shortcut` selects how a residual network bridges
    a change of width. `A` is the identity, subsampled and padded with zero channels. `B` is a 1x1 convolution, followed
    by batch norm unless the network is a pre-activation one. Plain networks, ResNet-9 and SpeedNet ignore it.
    `drop_path` is the rate of stochastic depth in the last block; `stochastic_depth.seed_stochastic_depth` sets the
    seed. `zero_init_residual` sets the weights of each residual branch's last batch norm to zero (Goyal et al. 2017,
    "Accurate, Large Minibatch SGD", section 5.1), so that a deep network begins as a shallow one. Raise `UsageError` as
    `check_model` does.
    """
    check_model(name, shortcut, drop_path, zero_init_residual)
    if name.startswith(OWN):
        raise UsageError(f"{name} is a network of a Python program. Train it there: fastresnet.train(model=network).")
    spec = MODELS[name]
    create = pkgutil.resolve_name(spec.creator)
    network = create(spec.depth, num_classes=num_classes, shortcut=shortcut, drop_path=drop_path, **spec.options)
    if zero_init_residual:
        from .resnet import zero_branches

        zero_branches(network)
    return network
