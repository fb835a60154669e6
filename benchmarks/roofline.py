"""Roofline of a step: the bytes that it moves, counted while it runs, and the limits of a machine.

`flops_per_image` of `fastresnet.models` counts its floating-point operations.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastresnet.device import DTYPES
from fastresnet.models.summary import one_image

# Operators that allocate, and write nothing.
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

# Operators that do not read the tensor that they write.
_OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_"}

# Arguments that batch norm reads twice in training: first all of them for its statistics or, in the backward pass, its
# sums, and then again to apply those.
_TWICE = {"input", "grad_out", "grad_output"}


def memory_per_image(model: nn.Module, itemsize: int, *, training: bool) -> int:
    """Count the bytes of activations that a step holds at once for one image, in values of `itemsize` bytes.

    A training step keeps every activation that the backward pass needs. Inference keeps an input, an output and the
    other operand of an addition.
    """
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is reused

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.numel() * itemsize
            kept.append(tensor)
        return tensor

    twin = copy.deepcopy(model).to("meta").train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        twin(one_image())
    return sum(sizes.values()) if training else 3 * max(sizes.values())


class ByteCounter(TorchDispatchMode):
    """Sum of the bytes that eager operators in the block read and write.

    Each input and output tensor of an operator counts, or counts twice if batch norm reads it twice. No tensor stays in
    registers for the next operator. Views and allocations move nothing. An expanded tensor counts as its bytes in
    memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func._schema.name.partition("::")[2] not in _EMPTY:
            self.bytes += bytes_moved(func, args, kwargs or {}, result)
        return result


def bytes_moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an operator reads and writes; allocations and views must be left out before."""
    name = func._schema.name.partition("::")[2]
    written = _tensors(_written_arguments(func, args, kwargs))
    read = [
        tensor
        for tensor in _tensors((args, kwargs))
        if name not in _OVERWRITING or all(tensor is not other for other in written)
    ]
    storages = {tensor.untyped_storage()._cdata for tensor in (*read, *written)}
    # A tensor that shares memory with an argument is that argument, changed in place, or a view of it.
    new = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in storages]
    return operand_bytes((*read, *written, *new, *_read_again(func, args, kwargs)))


def operand_bytes(values: Any) -> int:
    """Return the bytes of the tensors in `values`, which may be nested."""
    return sum(map(_size, _tensors(values)))


def _read_again(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors that batch norm reads a second time in training: activations and their gradients."""
    arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if "batch_norm" not in func._schema.name or "_no_" in func._schema.name:
        return []
    if not arguments.get("training", arguments.get("train", True)):
        return []
    return [value for name, value in arguments.items() if name in _TWICE]


def _written_arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """List the arguments that `func` changes in place."""
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    extents = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * math.prod(extents)


def stamp(device: torch.device) -> Any:
    """Record the time; on a GPU, the time at which it reaches this point of its work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Return the seconds between two stamps; wait for the second one."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _shortest(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Return the seconds of the fastest of `times` runs of `work`; on a GPU the next one is always queued."""
    stamps = [stamp(device)]
    for _ in range(times):
        work()
        stamps.append(stamp(device))
    return min(seconds_between(*pair) for pair in itertools.pairwise(stamps))


def copy_bandwidth(device: torch.device, size: int = 256 << 20) -> float:
    """Measure the bytes per second that a large copy reads and writes together: the best of 6."""
    source = torch.ones(size, dtype=torch.uint8, device=device)  # unwritten pages would all be one cached page
    target = torch.empty_like(source)
    return 2 * size / _shortest(lambda: target.copy_(source), device, 6)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.05, largest: int = 8192) -> float:
    """Measure the floating-point operations per second of a large square matrix product; a multiply-add is 2.

    The result is the best of all sizes from 256 on. They double until one product takes `seconds`. The size that fills
    a GPU would take a CPU minutes, above all in an emulated type.
    """
    best, size, shortest = 0.0, 256, 0.0
    while shortest < seconds and size <= largest:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        shortest = _shortest(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), device, 4)
        best, size = max(best, 2 * size**3 / shortest), 2 * size
    return best


class Limits:
    """Limits of a machine for copies and matrix products, measured in every round."""

    def __init__(self, device: torch.device, precisions: Sequence[str]) -> None:
        self._device = device
        self._copy: list[float] = []
        self._matmul: dict[str, list[float]] = {precision: [] for precision in precisions}

    def measure(self) -> None:
        """Measure both once more."""
        self._copy.append(copy_bandwidth(self._device))
        for precision, rates in self._matmul.items():
            rates.append(matmul_rate(self._device, DTYPES[precision]))

    def to_dict(self) -> dict[str, Any]:
        """Return the medians: `limits` in a result."""
        return {
            "copy_gb_per_s": statistics.median(self._copy) / 1e9,
            "matmul_tflops": {name: statistics.median(rates) / 1e12 for name, rates in self._matmul.items()},
        }


def roof(row: dict[str, Any], limits: dict[str, Any]) -> tuple[float, str]:
    """Return the images/s at which the FLOPs or bytes of `row` take all of the time, and which of the two."""
    compute = 1e12 * limits["matmul_tflops"][row["precision"]] / row["flops_per_image"]
    memory = 1e9 * limits["copy_gb_per_s"] / row["bytes_per_image"]
    return (compute, "compute") if compute < memory else (memory, "memory")
