"""What a step computes and moves, counted by PyTorch while it runs: floating-point operations and bytes."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastresnet.models.summary import one_image

# They allocate and write nothing.
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

# What they write over is not read before.
_OVERWRITING = {"copy_", "fill_", "zero_"}

# What batch norm reads twice in training: it knows neither the statistics of its input nor, on the way back, the sums
# that they take part in before it has read everything.
_TWICE = {"input", "grad_out", "grad_output"}


def memory_per_image(model: nn.Module, itemsize: int, *, training: bool) -> int:
    """Bytes of activations that a step holds at once for one image, each of whose values takes `itemsize` bytes.

    A training step keeps every activation that the backward pass needs; inference an input, an output and what an
    addition takes beside them.
    """
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is given out twice

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
    """Sums the bytes that the operators run inside read and write: each tensor that goes in, and each that comes out;
    twice what batch norm reads twice.

    Eager operators, that is, none of which hands its result to the next in a register. Views and allocations move
    nothing; an expanded tensor has as many bytes as lie in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func._schema.name.partition("::")[2] not in _EMPTY:
            self.bytes += _bytes_moved(func, args, kwargs or {}, result)
        return result


def _bytes_moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = func._schema.name.partition("::")[2]
    written = _tensors(_written_arguments(func, args, kwargs))
    read = [
        tensor
        for tensor in _tensors((args, kwargs))
        if name not in _OVERWRITING or all(tensor is not other for other in written)
    ]
    storages = {tensor.untyped_storage()._cdata for tensor in (*read, *written)}
    # What shares memory with an argument is that argument, changed in place, or a view of it.
    new = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in storages]
    return sum(map(_size, (*read, *written, *new, *_read_again(func, args, kwargs))))


def _read_again(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors that batch norm reads a second time in training: activations and their gradients."""
    arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if "batch_norm" not in func._schema.name or "_no_" in func._schema.name:
        return []
    if not arguments.get("training", arguments.get("train", True)):
        return []
    return [value for name, value in arguments.items() if name in _TWICE]


def _written_arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that `func` changes in place."""
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
