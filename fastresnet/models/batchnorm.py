"""Batch norm, the addition of a shortcut and ReLU, as one operation."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastresnet.compilation import use_private_caches
from pipelines.compiler import load_kernels

_LANES = 16  # as in batchnorm.c


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm (Ioffe & Szegedy, 2015), the addition of a shortcut if one is given, and ReLU if `relu`.

    With `fused` set, training in channels-last order runs all of it in one kernel for each pass. On a CPU
    (`batchnorm.c`, fp32 and bf16) this takes a third of the time of PyTorch's separate operators and is limited by
    memory bandwidth. On a GPU (`batchnorm_triton.py`) a pass of PyTorch's operators takes two to four kernels.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    fused = False
    synchronized = False
    """Use of the statistics of all ranks' batches, not of this rank's alone."""

    def __init__(self, num_features: int, *, relu: bool) -> None:
        super().__init__(num_features)
        self.relu = relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Map `x` and `shortcut` [N, C, H, W] to [N, C, H, W]."""
        if x.is_cuda and shortcut is not None and not self.relu:
            return self.forward(x) + shortcut  # the kernels for GPUs add shortcuts before ReLU only
        if self.synchronized and self.training:
            out = self._over_all_ranks(x)
        elif self.fused and self.training and self.fits(x, shortcut):
            return self._on_gpu(x, shortcut) if x.is_cuda else self._on_cpu(x, shortcut)
        else:
            out = super().forward(x)
        # In place: batch norm's gradient needs only its input, and less memory is read and written.
        if shortcut is not None:
            out += shortcut
        return F.relu(out, inplace=True) if self.relu else out

    def fits(self, x: Tensor, shortcut: Tensor | None) -> bool:
        """Return True if the kernels support these tensors. PyTorch's operators process all others."""
        if x.device.type == "cpu":
            supported = x.dtype in (torch.float32, torch.bfloat16) and x.shape[1] % _LANES == 0
            supported = supported and not torch.compiler.is_compiling()
        else:
            supported = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0
            supported = supported and (self.relu or shortcut is None)
        return (
            supported
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.numel() > x.shape[1]
            and (shortcut is None or (shortcut.shape == x.shape and shortcut.dtype == x.dtype))
        )

    def _on_cpu(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        self.num_batches_tracked.add_(1)
        return _Fused.apply(x, shortcut, self.weight, self.bias, self)

    def _on_gpu(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        from .batchnorm_triton import BatchNorm  # Triton is missing where PyTorch has no CUDA

        return BatchNorm.apply(*self._operands(x, shortcut))

    def _operands(self, x: Tensor, shortcut: Tensor | None) -> tuple[Any, ...]:
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        statistics = (self.running_mean, self.running_var, self.num_batches_tracked, self.semaphores)
        return x, shortcut, self.weight, self.bias, *statistics, self.momentum, self.eps, self.relu

    @torch.no_grad()
    def gradients_of_sum(self, x: Tensor, shortcut: Tensor | None, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return what the backward kernel for GPUs does for the sum of two gradients of the output, as if compiled."""
        from .batchnorm_triton import batch_norm, batch_norm_backward

        operands = self._operands(x, shortcut)
        _, mask, *saved = batch_norm(*operands)
        return batch_norm_backward(*grads, x, mask, self.weight, self.bias, *saved, self.semaphores, self.relu)

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        out, mean, var, count = _Synchronized.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return out


def synchronize_batch_norms(model: nn.Module) -> None:
    """Make all of `model` normalise by the statistics of all ranks. `torch.distributed` must be initialised."""
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.synchronized = True


def fuse_batch_norms(model: nn.Module, fused: bool = True) -> None:
    """Set `fused` in all batch norms of the model. Without a C compiler, warn with a `Note` and change nothing.

    On a GPU it needs Triton.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            on_cpu = module.weight.device.type == "cpu"
            module.fused = fused and not (on_cpu and _kernels() is None)
            if module.fused and not on_cpu:
                use_private_caches()
                from .batchnorm_triton import create_semaphores

                module.register_buffer("semaphores", create_semaphores(module.weight), persistent=False)


def compiler_options(device: torch.device) -> dict[str, Any]:
    """Return options of `torch.compile` for networks with fused batch norms on `device`."""
    if device.type != "cuda":
        return {}
    from .batchnorm_triton import MergeGradients

    return {"post_grad_custom_post_pass": MergeGradients()}


class _Synchronized(torch.autograd.Function):
    """Batch norm of a batch spread over several ranks, as `torch.nn.SyncBatchNorm`, which does not support CPUs.

    The forward pass gathers each rank's mean, variance and number of pixels (combined as in Chan, Golub & LeVeque
    1979). The backward pass reduces the two sums that the gradient needs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, ...]:
        """Return normalised `x` [N, C, H, W], mean and variance of all ranks [C] and their number of pixels [1]."""
        channels = x.shape[1]
        var, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() // channels)])
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, own)
        means, variances, counts = torch.stack(of_ranks).split((channels, channels, 1), 1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        inverse_std = (var + epsilon).rsqrt()
        out = _per_channel(inverse_std * weight) * (x.to(weight.dtype) - _per_channel(mean)) + _per_channel(bias)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, var, count)
        return out.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        grad = grad_out.to(weight.dtype)
        normalized = (x.to(weight.dtype) - _per_channel(mean)) * _per_channel(inverse_std)
        sums = torch.stack([grad.sum((0, 2, 3)), (grad * normalized).sum((0, 2, 3))])
        grad_bias, grad_weight = sums.clone()  # only this rank's images, as for all other parameters
        dist.all_reduce(sums)
        mean_grad, mean_product = (_per_channel(total / count) for total in sums)
        grad_x = _per_channel(weight * inverse_std) * (grad - mean_grad - normalized * mean_product)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: BatchNorm2d
    ) -> Tensor:
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        y, mean, inverse_std = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        _call(
            "forward", x, norm.relu, y=y, shortcut=shortcut, weight=weight, bias=bias, mean=mean,
            inverse_std=inverse_std, running_mean=norm.running_mean, running_var=norm.running_var,
            momentum=norm.momentum, epsilon=norm.eps,
        )  # fmt: skip
        ctx.save_for_backward(x, None if shortcut is None else y, weight, bias, mean, inverse_std)
        ctx.relu = norm.relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, inverse_std = ctx.saved_tensors
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        grad_shortcut = None if y is None else torch.empty_like(x)
        _call(
            "backward", x, ctx.relu, y=y, grad_y=grad_y, grad_x=grad_x, grad_shortcut=grad_shortcut, weight=weight,
            bias=bias, mean=mean, inverse_std=inverse_std, grad_weight=grad_weight, grad_bias=grad_bias,
        )  # fmt: skip
        return grad_x, grad_shortcut, grad_weight, grad_bias, None


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "shortcut", "y", "grad_y", "grad_x", "grad_shortcut")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "running_mean", "running_var")),
        *((name, ctypes.c_void_p) for name in ("mean", "inverse_std", "grad_weight", "grad_bias")),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "relu", "bf16")),
        *((name, ctypes.c_double) for name in ("momentum", "epsilon")),
    )


def _call(kernel: str, x: Tensor, relu: bool, **values: Tensor | float | None) -> None:
    size = {"rows": x.numel() // x.shape[1], "channels": x.shape[1]}
    norm = _Norm(x=x.data_ptr(), **size, relu=relu, bf16=x.dtype == torch.bfloat16)
    for name, value in values.items():
        setattr(norm, name, value.data_ptr() if isinstance(value, Tensor) else value)
    if getattr(_kernels(), kernel)(ctypes.byref(norm)):
        raise MemoryError


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    return load_kernels(
        Path(__file__).with_name("batchnorm.c"),
        "-fopenmp",
        ("forward", "backward"),
        (ctypes.POINTER(_Norm),),
        ctypes.c_int,
        "batch norm runs in PyTorch, at a third of the speed",
    )
