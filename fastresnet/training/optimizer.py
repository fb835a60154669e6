"""Optimisers, their state as named tensors, and the learning-rate schedule.

An update can be cancelled on the device (`found_inf`). Learning rates are tensors, so that a captured or compiled step
uses their current values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastresnet.compilation import name_user, use_private_caches
from fastresnet.config import TrainConfig
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from fastresnet.training.muon_triton import MuonKernels


def create_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """Create the optimisers that together update each trained parameter of `model` once.

    `sgd` has momentum, as in He et al. 2015; `adamw` is by Loshchilov & Hutter 2019. `muon` trains convolutions and SGD
    the rest, as in Jordan's cifar10-airbench. A schedule scales the `peak_lr` of each group.
    """
    name_user()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    if config.optimizer == "muon":
        convolutions = [parameter for parameter in matrices if parameter.ndim == 4]
        rest = [parameter for parameter in matrices if parameter.ndim != 4]
        norm_lr = config.sgd_lr if config.norm_lr is None else config.norm_lr
        groups = _groups(rest, config.sgd_lr, vectors, norm_lr, config)
        sgd = [_sgd(groups, config)] if groups else []
        if config.freeze_backbone:
            return sgd
        if not convolutions:
            raise UsageError("--optimizer muon orthogonalises the weights of convolutions, and this network has none.")
        return [Muon([_group(convolutions, config.lr)], momentum=config.momentum), *sgd]
    groups = _groups(matrices, config.lr, vectors, config.lr, config)
    return [_adamw(groups) if config.optimizer == "adamw" else _sgd(groups, config)]


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float = 0.0) -> dict[str, Any]:
    device = parameters[0].device
    return {"params": parameters, "lr": torch.tensor(lr, device=device), "peak_lr": lr, "weight_decay": weight_decay}


def _groups(
    matrices: list[nn.Parameter], lr: float, vectors: list[nn.Parameter], norm_lr: float, config: TrainConfig
) -> list[dict[str, Any]]:
    norm_decay = config.weight_decay if config.decay_norms else 0.0
    groups = (matrices, lr, config.weight_decay), (vectors, norm_lr, norm_decay)
    return [_group(*group) for group in groups if group[0]]


# State is created here, initialised. By default the fused updates create it in the first step, where a cancelled update
# leaves it undefined, and a trial step does not restore it.


def _sgd(groups: list[dict[str, Any]], config: TrainConfig) -> Optimizer:
    momentum = config.momentum_of_sgd
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=config.nesterov, fused=True, lr=groups[0]["lr"])
    if momentum:
        for parameter in _parameters(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    lr = groups[0]["lr"]
    optimizer = torch.optim.AdamW(groups, fused=True, lr=lr, capturable=lr.is_cuda)  # required in a CUDA graph
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] |= {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic of Muon's Newton-Schulz iteration (Jordan et al. 2024), with the steepest slope at 0."""
STEPS = 3
"""Number of steps of the iteration, as in airbench."""
EPSILON = 1e-7
"""Addend to a norm by which is divided."""


class Muon(Optimizer):
    """Momentum whose matrices are orthogonalised (Jordan et al., "Muon: an optimizer for hidden layers", 2024).

    It is for convolutions, whose weights are reshaped to [out channels, rest]. Before each update they are scaled to a
    norm of sqrt(out channels), as in cifar10-airbench (`airbench94_muon.py`). Batch norm is invariant to their scale,
    and the learning rate is then the relative change of a step. The momentum is Nesterov's. Weights of equal shape are
    orthogonalised as one batch. PyTorch's own `torch.optim.Muon` supports matrices only, keeps their scale, and cannot
    cancel an update on the device.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})
        self.grad_scale: Tensor | None = None  # set from outside, like those of PyTorch's fused optimisers
        self.found_inf: Tensor | None = None
        self.kernels: list[MuonKernels] | None = None
        """Triton kernels that update each group; PyTorch's operations do, if None."""
        for parameter in _parameters(self):
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def use_kernels(self, own: bool = True) -> None:
        """Update by Triton kernels, on a CUDA device, or by PyTorch's. Weights and state must keep their memory."""
        if not own:
            self.kernels = None
            return
        use_private_caches()
        from fastresnet.training.muon_triton import MuonKernels  # Triton is missing where PyTorch has no CUDA

        def create(parameters: list[nn.Parameter]) -> MuonKernels:
            velocities = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            return MuonKernels(parameters, velocities, coefficients=COEFFICIENTS, epsilon=EPSILON, steps=STEPS)

        self.kernels = [create(group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's own may be given a closure
        """Update all parameters, unless `found_inf` is 1."""
        if self.kernels is not None:
            scaling = {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
            for group, kernels in zip(self.param_groups, self.kernels, strict=True):
                kernels.update([p.grad for p in group["params"]], group["lr"], group["momentum"], **scaling)
            return
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:  # the loss may not depend on it
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                gradients = _stacked([parameter.grad for parameter in parameters])
                self._update(parameters, gradients, group["lr"], group["momentum"])

    def _update(self, parameters: list[nn.Parameter], gradients: Tensor, lr: Tensor, momentum: float) -> None:
        if self.grad_scale is not None:
            gradients = gradients / self.grad_scale
        velocity = _stacked([self.state[parameter]["momentum_buffer"] for parameter in parameters])
        velocity = momentum * velocity + gradients
        weights = _stacked(parameters)
        weights = weights * (weights.shape[1] ** 0.5 / weights.norm(dim=(1, 2), keepdim=True))
        weights = weights - lr * orthogonalized(gradients + momentum * velocity)
        for i, parameter in enumerate(parameters):
            self._assign(parameter, weights[i])
            self._assign(self.state[parameter]["momentum_buffer"], velocity[i])

    def _assign(self, old: Tensor, new: Tensor) -> None:
        new = new.view_as(old)
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors [rows, ...] of one shape as matrices [n, rows, columns]."""
    return torch.stack([tensor.reshape(len(tensor), -1) for tensor in tensors])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring all singular values of `matrices` [n, rows, columns] to about 1, by a Newton-Schulz iteration.

    After it, all but the smallest lie in 0.7 ... 1.2.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + EPSILON)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class JointUpdate:
    """Union of all optimisers of a network into one, for a gradient scaler.

    Given several, a scaler checks the gradients of each separately for overflow: one would update its parameters while
    another does not.
    """

    found_inf: Tensor
    """Number above 0 that cancels the update."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        # With it GradScaler leaves the decision to the device: for `step` it sets `found_inf` and, while gradients are
        # still scaled, `grad_scale`, which must not exist before.
        self._step_supports_amp_scaling = True

    def step(self) -> None:
        """Update all parameters, or none."""
        for optimizer in self._optimizers:
            optimizer.grad_scale = getattr(self, "grad_scale", None)  # type: ignore[attr-defined]
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            optimizer.step()


def optimizer_state(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Name every state tensor `<parameter name>.<key>`."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimizer_state(optimizers: Sequence[Optimizer], model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore the tensors that `optimizer_state` returned."""
    for name, value in optimizer_state(optimizers, model).items():
        value.copy_(state[name])


def lr_factors(config: TrainConfig, total_steps: int) -> list[float]:
    """Compute the learning rates of all steps, as fractions of each parameter group's peak."""
    return [config.lr_scale * lr_factor(config, step, total_steps) for step in range(total_steps)]


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of step `step` (0 is the first) of `total_steps`, as a fraction of its peak.

    `step`: a tenth of the peak during warm-up, then the peak, divided by 10 at each milestone passed (He et al. 2015,
    section 4.2). `linear` (with warm-up: one-cycle, Smith & Topin 2018) and `cosine` (Loshchilov & Hutter 2017) grow
    linearly during warm-up and then fall to 0.
    """
    warmup = round(config.warmup * total_steps)
    if config.schedule == "step":
        passed = sum(step >= round(fraction * total_steps) for fraction in config.milestones)
        return 0.1 if step < warmup else 0.1**passed
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = (total_steps - step) / max(total_steps - warmup, 1)  # warm-up may last to the end
    return remaining if config.schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2
