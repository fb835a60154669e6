"""Optimisers, and their state as named tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastresnet.config import TrainConfig


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay on all parameters, as in the paper.

    Fused, so that an update can be called off on the device (`found_inf`); the learning rate is a tensor, so that a
    captured or compiled step sees it change.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=torch.tensor(config.lr, device=device),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum:
        # Left to itself, the fused update allocates the momentum without filling it, and an update that is called off
        # then leaves whatever lay in memory there.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Every state tensor as `<parameter name>.<key>`."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` returned."""
    parameters = dict(model.named_parameters())
    for full_name, value in state.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters[name]
        # Fused kernels walk parameter and state in memory order, so the state takes on the parameter's strides.
        like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][key] = like.copy_(value)
