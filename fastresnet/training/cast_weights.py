"""Weights in half precision, all cast at once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_CAST = (nn.Conv2d, nn.Linear)


class CastWeights:
    """Copy of a network whose convolutions and linear layers have their weights in `dtype`; it shares all other layers.

    Autocast casts each weight by one kernel and each gradient by another, 42 of them in ResNet-20. Here both are one
    kernel, with the same values.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        leaves = [module for module in model.modules() if not list(module.children())]
        shared = {id(module): module for module in leaves if not isinstance(module, _CAST)}
        self.model = copy.deepcopy(model, shared)
        for module in self.model.modules():
            if isinstance(module, _CAST):
                module.to(dtype)
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        self._pairs = [(own, cast) for own, cast in pairs if own is not cast]
        self._trained = [(own, cast) for own, cast in self._pairs if own.requires_grad]
        self._gradients = [torch.empty_like(own) for own, _ in self._trained]

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the network's weights."""
        own, cast = (list(weights) for weights in zip(*self._pairs, strict=True))
        torch._foreach_copy_(cast, own)

    @torch.no_grad()
    def collect_gradients(self, *, add: bool = False) -> None:
        """Move the gradients of the cast weights to the network's own, in its type and always at the same addresses.

        With `add`, add them to those that are there.
        """
        gradients: list[Tensor] = [cast.grad for _, cast in self._trained]  # type: ignore[misc]
        (torch._foreach_add_ if add else torch._foreach_copy_)(self._gradients, gradients)
        for (own, cast), gradient in zip(self._trained, self._gradients, strict=True):
            own.grad, cast.grad = gradient, None
