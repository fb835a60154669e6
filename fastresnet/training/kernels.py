"""Choice between this program's kernels and PyTorch's, in trial steps that restore the state.

The kernels for GPUs cannot be tested on every GPU beforehand. So none is used that does not agree with PyTorch's
operators on this GPU, or is slower.
"""

from __future__ import annotations

import contextlib
import copy
import textwrap
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastresnet.config import Kernels
from fastresnet.device import recorded, synchronize
from fastresnet.models.batchnorm import BatchNorm2d, fuse_batch_norms
from fastresnet.training.optimizer import Muon
from fastresnet.training.step import TrainStep
from pipelines.base import Batch, is_installed
from pipelines.errors import Note

AGREEMENT = 2**-8
"""Largest relative error, as a ratio of norms. Rounding to bf16 causes 2**-9 at most."""
LOSS_AGREEMENT = 0.01
"""Largest relative difference of the loss, to which the roundings of all layers contribute."""
_TIMED_STEPS = 20


def choose_kernels(step: TrainStep, batch: Batch, *, captured: bool) -> tuple[Kernels, str]:
    """Use the faster kernels in `step`, this program's only if they agree with PyTorch's; return them and the reason.

    Uncompiled steps are timed, with `captured` as CUDA graphs. A failure or a disagreement is reported by a `Note`.
    """
    if step.count.is_cuda and not is_installed("triton"):
        return "torch", "Triton is not installed"
    try:
        check_kernels(step, batch)
        # In an order in which both gain as much from a clock that changes.
        turns = [(own, _measure(step, batch, own=own, captured=captured)) for own in (False, True, True, False)]
    except torch.OutOfMemoryError:  # the comparison needs more than a step
        choice, reason = False, "not enough memory to compare them with this program's"
    except Exception as error:  # noqa: BLE001  # a compiler or a driver may raise anything
        choice, reason = False, "this program's do not work here"
        message = f"this program's kernels do not work here, so PyTorch's are used: {explained(error)}. Please report "
        warnings.warn(message + "this line and the output of fastresnet doctor.", Note, stacklevel=2)
    else:
        theirs, ours = (min(seconds for own, seconds in turns if own == kind) for kind in (False, True))
        choice = ours <= theirs
        reason = f"a step takes {1000 * ours:.2f} ms with this program's, {1000 * theirs:.2f} with PyTorch's"
    step.use_kernels(choice)
    if step.count.is_cuda:  # the trial's memory is neither kept nor reported as the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return "own" if choice else "torch", reason


def explained(error: Exception) -> str:
    """Return the message of `error` as the end of one line."""
    return textwrap.shorten(str(error), 300).rstrip(".") or type(error).__name__


# --- agreement ---------------------------------------------------------------------------------------------------


def check_kernels(step: TrainStep, batch: Batch) -> None:
    """Compare this program's kernels with PyTorch's in a step, which uses this program's from then on.

    Raises `ValueError` if one disagrees.
    """
    found = record_step(step, batch)
    for call in found.batch_norms:
        check_batch_norm(call)
    if step.count.is_cuda:
        with step.restored():
            for muon, gradients in found.gradients:
                check_muon(muon, gradients)
    losses = []
    for own in (False, True):
        step.use_kernels(own)
        with step.restored():
            step.reset()
            step(batch.images, batch.labels)
            losses.append(step.totals[0].clone())
    _require_agreement("the loss", losses[1:], losses[:1], LOSS_AGREEMENT)


class BatchNormCall(NamedTuple):
    """Operands of a batch norm in a step; `grad` is the gradient of its output."""

    module: BatchNorm2d
    x: Tensor
    shortcut: Tensor | None
    grad: Tensor


class RecordedStep(NamedTuple):
    """Operands of a step's kernels."""

    batch_norms: list[BatchNormCall]
    gradients: list[tuple[Muon, list[Tensor]]]
    """Gradients of the weights of each Muon."""


def record_step(step: TrainStep, batch: Batch) -> RecordedStep:
    """Take a step with PyTorch's kernels; return the operands of those that this program has too."""
    found = RecordedStep([], [])

    def record(module: BatchNorm2d, operands: tuple[Tensor | None, ...], out: Tensor) -> None:
        # The backward pass needs them too, so they are not overwritten.
        x, shortcut = (None if tensor is None else tensor.detach() for tensor in (*operands, None)[:2])
        assert x is not None  # noqa: S101
        out.register_hook(lambda grad: found.batch_norms.append(BatchNormCall(module, x, shortcut, grad.clone())))

    def record_update(muon: Muon, *_: object) -> None:
        found.gradients.append((muon, [parameter.grad.clone() for parameter in muon.param_groups[0]["params"]]))

    step.use_kernels(False)
    with contextlib.ExitStack() as hooks:
        for module in step.model.modules():
            if isinstance(module, BatchNorm2d):
                hooks.callback(module.register_forward_hook(record).remove)  # type: ignore[arg-type]
        for optimizer in step.optimizers:
            if isinstance(optimizer, Muon):
                hooks.callback(optimizer.register_step_pre_hook(record_update).remove)  # type: ignore[arg-type]
        step.trial(batch.images, batch.labels)
    return found


def check_batch_norm(call: BatchNormCall) -> None:
    """Compare both passes of this program's kernel with PyTorch's operators in double precision.

    A comparison layer by layer finds small errors. Over a whole network, rounding alone changes gradients by more: by
    3 % in ResNet-20 in bf16.
    """
    ours, reference = copy.deepcopy(call.module), copy.deepcopy(call.module).double()
    fuse_batch_norms(ours)
    shortcut = None if call.shortcut is None else call.shortcut.double()
    name = f"batch norm of {tuple(call.x.shape)}"
    mine = _both_passes(ours, call.x, call.shortcut, call.grad)
    theirs = _both_passes(reference, call.x.double(), shortcut, call.grad.double())
    _require_agreement(name, mine, theirs, AGREEMENT)
    if call.x.is_cuda and ours.fits(
        call.x, call.shortcut
    ):  # compiled steps leave the sum of the gradients of two branches to the kernel
        grad_x, *_ = ours.gradients_of_sum(call.x, call.shortcut, call.grad, call.grad)
        _require_agreement(name, [grad_x], [2 * theirs[1]], AGREEMENT)


def check_muon(muon: Muon, gradients: Sequence[Tensor]) -> None:
    """Compare an update by this program's kernels with PyTorch's in full float32. It changes the weights."""
    (group,) = muon.param_groups
    weights = group["params"]
    tensors = [*weights, *(muon.state[weight]["momentum_buffer"] for weight in weights)]
    before = [tensor.detach().clone() for tensor in tensors]
    muon.found_inf = muon.grad_scale = None

    def update(*, own: bool) -> list[Tensor]:
        muon.use_kernels(own)
        group["lr"].fill_(1.0)  # so that the update is as large as the weights
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        muon.step()
        return [tensor.detach().clone() for tensor in tensors]

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        theirs, ours = update(own=False), update(own=True)
    finally:
        torch.set_float32_matmul_precision(precision)
    _require_agreement("an update by Muon", ours, theirs, AGREEMENT)


def _both_passes(norm: BatchNorm2d, x: Tensor, shortcut: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Return the output of `norm`, all gradients, and the running statistics."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, shortcut) if tensor is not None]
    parameters = [norm.weight, norm.bias]
    y = norm(*inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *parameters], grad), norm.running_mean, norm.running_var]


@torch.no_grad()
def _require_agreement(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], allowed: float) -> None:
    """Raise `ValueError` if a tensor differs from its reference by more than `allowed`, as a ratio of norms."""
    for one, other in zip(ours, theirs, strict=True):
        error, size = (one.double() - other).norm(), other.double().norm()
        overflowed = not bool(size.isfinite())  # in fp16, with which the gradient scaler deals
        if not overflowed and not bool(error <= allowed * size):
            raise ValueError(f"{name} differs by {float(error / size):.2%} from PyTorch's ({allowed:.2%} are allowed)")


# --- time --------------------------------------------------------------------------------------------------------


def _measure(step: TrainStep, batch: Batch, *, own: bool, captured: bool) -> float:
    """Return the seconds of a step, each with the first step's learning rate."""

    def take_step() -> None:
        step.count.zero_()
        step(batch.images, batch.labels)

    step.use_kernels(own)
    with step.restored():
        work = recorded(take_step) if captured else take_step
        work()
        synchronize(step.count.device)
        began = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            work()
        synchronize(step.count.device)
    return (time.perf_counter() - began) / _TIMED_STEPS
