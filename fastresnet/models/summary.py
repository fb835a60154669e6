"""Layers of a network: the output shape, parameters and multiply-adds of each."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.sampling import IMAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """Module without submodules."""

    name: str
    kind: str
    output: tuple[int, ...]
    """Output shape for one image."""
    parameters: int
    macs: int
    """Multiply-adds for one image, counted for convolutions and linear layers, as is usual."""


def layers(model: nn.Module) -> list[Layer]:
    """List the layers of `model` in the order of execution, for images [3, 32, 32]. Nothing is computed."""
    copied, found = copy.deepcopy(model).to("meta").eval(), []

    def add_hook(name: str, module: nn.Module) -> None:
        def record(_: nn.Module, __: Any, output: Tensor) -> None:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            found.append(Layer(name, layer_kind(module), tuple(output.shape[1:]), parameters, _macs(module, output)))

        module.register_forward_hook(record)

    for name, module in copied.named_modules():
        if not any(module.children()) and not isinstance(module, nn.Identity):
            add_hook(name, module)
    with torch.inference_mode():
        copied(one_image())
    return found


def layer_kind(module: nn.Module) -> str:
    """Describe a layer by its class; a convolution also by its size, and stride and groups other than 1."""
    name = type(module).__name__
    if not isinstance(module, nn.Conv2d):
        return name
    (size, _), (stride, _) = module.kernel_size, module.stride
    groups = f", {module.groups} groups" if module.groups > 1 else ""
    return f"{name} {size}x{size}" + (f", stride {stride}" if stride > 1 else "") + groups


def flops_per_image(model: nn.Module, *, training: bool, side: int = IMAGE_SIZE) -> int:
    """Count the floating-point operations for one image [3, side, side], 2 for a multiply-add.

    Only convolutions and linear layers are counted.

    With `training`, count the backward pass too: as many again for the gradient of a layer's weights and for that of
    its input, if they are needed. `torch.utils.flop_counter` counts the same, but ignores groups in the gradients of
    weights, and imports torch.compile, which takes seconds.
    """
    copied, macs = copy.deepcopy(model).to("meta").eval(), 0  # in training, batch norm refuses a single value

    def count(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        gradients = module.weight.requires_grad + inputs[0].requires_grad if training else 0
        macs += _macs(module, output) * (1 + gradients)

    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.set_grad_enabled(training):
        copied(one_image(side))
    return 2 * macs


def one_image(side: int = IMAGE_SIZE) -> Tensor:
    """Create an image [1, 3, side, side] on the meta device, without memory."""
    return torch.empty(1, 3, side, side, device="meta")


def _macs(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d | nn.Linear):  # each output is a sum over one output channel's weights
        return output.numel() * module.weight[0].numel()
    return 0
