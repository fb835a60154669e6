"""Batch norm, the addition of a shortcut and ReLU for GPUs: one kernel for each pass, in Triton.

Activations [N, C, H, W] in channels-last order are matrices of `rows` N H W and `channels` C. Each program has every
P-th tile of rows of up to 64 channels, P being the number of programs that the GPU runs at the same time. A pass reads
its operands for sums over all rows, waits for the other programs, and writes its result. For this it reads the operands
again, in reverse order: the last ones are still in the cache. A program's only tile stays in registers.

Sums are combined in a fixed order, without atomic additions, so that repeated steps have the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.autograd.function import once_differentiable

CHANNELS = 64
"""Most channels of a tile."""

_LARGEST_TILE = 16384
_PER_WARP = 512
"""Elements of a tile for each warp: 16 for a thread, which stay in registers for several operands."""

BOTH, SUMS, RESULT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Parts of a pass that a launch executes."""


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _wait_for_all(semaphore):
    """Wait until all programs of this column of the grid have arrived; all must run at the same time.

    The semaphore needs no reset: each round flips its sign, as in CUDA's cooperative groups.
    """
    tl.debug_barrier()  # all threads of this program have stored their sums
    others = tl.num_programs(0) - 1
    before = tl.atomic_add(semaphore, tl.where(tl.program_id(0) == 0, -2147483648 - others, 1), sem="release")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(semaphore, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _place(tile, rows, channels, channel, ROWS: tl.constexpr):
    """Return a tile's offset, those of its elements from it, and True for those inside the matrix."""
    row = tl.arange(0, ROWS)[:, None]
    inside = (row < rows - tile * ROWS) & (channel < channels)
    return tl.cast(tile, tl.int64) * ROWS * channels, row * channels + channel, inside


@triton.jit
def _load(pointer, start, place, inside):
    return tl.load(pointer + start + place, inside, 0.0).to(tl.float32)


@triton.jit
def _store(pointer, start, place, inside, values):
    tl.store(pointer + start + place, values.to(pointer.dtype.element_ty), inside)


@triton.jit
def _place_of_mask(tile, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the same as `_place` for a mask, which has a byte for 8 channels."""
    byte = tl.program_id(1) * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
    return _place(tile, rows, channels // 8, byte[None, :], ROWS)


@triton.jit
def _pack(bits, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    bits = tl.reshape(bits.to(tl.int32), [ROWS, CHANNELS // 8, 8])
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)


@triton.jit
def _unpack(packed, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, CHANNELS])


@triton.jit
def _rows_of_each(rows, ROWS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Return the number of rows of each program [PROGRAMS, 1]."""
    tiles, programs, program = tl.cdiv(rows, ROWS), tl.num_programs(0), tl.arange(0, PROGRAMS)[:, None]
    of_full_tiles = tl.where(program < programs, tl.cdiv(tiles - program, programs) * ROWS, 0)
    missing = tl.where(program == (tiles - 1) % programs, tiles * ROWS - rows, 0)
    return (of_full_tiles - missing).to(tl.float32)


@triton.jit
def _store_sums(partials, one, other, channels, channel):
    """Store the two sums of this program."""
    place = partials + 2 * tl.program_id(0) * channels + channel
    tl.store(place, one, channel < channels)
    tl.store(place + channels, other, channel < channels)


@triton.jit
def _sums_of_each(partials, channels, channel, PROGRAMS: tl.constexpr):
    """Return the two sums that each program has stored [PROGRAMS, CHANNELS]."""
    program = tl.arange(0, PROGRAMS)[:, None]
    stored = (program < tl.num_programs(0)) & (channel < channels)
    place = partials + 2 * program * channels + channel
    return tl.load(place, stored, 0.0), tl.load(place + channels, stored, 0.0)


@triton.jit
def _batch_norm_forward(
    x, shortcut, y, mask, weight, bias, mean, inverse_std, running_mean, running_var, batches, partials, semaphores,
    rows, channels, momentum, epsilon,
    RELU: tl.constexpr, SHORTCUT: tl.constexpr, PART: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    exists, tiles = channel < channels, tl.cdiv(rows, ROWS)
    if SINGLE:
        start, place, inside = _place(program, rows, channels, channel, ROWS)
        values = _load(x, start, place, inside)

    if PART != RESULT:
        count, center = 0.0, tl.zeros([1, CHANNELS], tl.float32)
        squares = tl.zeros([1, CHANNELS], tl.float32)
        for tile in range(program, tiles, programs):
            if not SINGLE:
                start, place, inside = _place(tile, rows, channels, channel, ROWS)
                values = _load(x, start, place, inside)
            added = tl.minimum(rows - tile * ROWS, ROWS).to(tl.float32)
            tile_mean = tl.sum(values, 0, keep_dims=True) / added
            deviations = tl.where(inside, values - tile_mean, 0.0)
            # Chan, Golub & LeVeque 1979: no cancellation, even if the mean is much larger than the deviations.
            distance, total = tile_mean - center, count + added
            center += distance * (added / total)
            squares += tl.sum(deviations * deviations, 0, keep_dims=True)
            squares += distance * distance * (count * added / total)
            count = total
        _store_sums(partials, center, squares, channels, channel)

    if PART == BOTH:
        _wait_for_all(semaphores + tl.program_id(1))

    if PART != SUMS:
        centers, squares = _sums_of_each(partials, channels, channel, PROGRAMS)
        own_rows = _rows_of_each(rows, ROWS, PROGRAMS)
        batch_mean = tl.sum(centers * own_rows, 0, keep_dims=True) / rows
        distances = centers - batch_mean
        squares = tl.sum(squares + own_rows * distances * distances, 0, keep_dims=True)
        batch_inverse_std = tl.rsqrt(squares / rows + epsilon)
        if program == 0:
            tl.store(mean + channel, batch_mean, exists)
            tl.store(inverse_std + channel, batch_inverse_std, exists)
            old = tl.load(running_mean + channel, exists)
            tl.store(running_mean + channel, old + momentum * (batch_mean - old), exists)
            old = tl.load(running_var + channel, exists)
            tl.store(running_var + channel, old + momentum * (squares / (rows - 1) - old), exists)
            if tl.program_id(1) == 0:
                tl.store(batches, tl.load(batches) + 1)

        scale = tl.load(weight + channel, exists, 0.0) * batch_inverse_std
        shift = tl.load(bias + channel, exists, 0.0)
        own_tiles = tl.cdiv(tiles - program, programs)
        for step in range(own_tiles):
            tile = program + (own_tiles - 1 - step) * programs
            if not SINGLE:
                start, place, inside = _place(tile, rows, channels, channel, ROWS)
                values = _load(x, start, place, inside)
            out = (values - batch_mean) * scale + shift
            if SHORTCUT:
                out += _load(shortcut, start, place, inside)
                mask_start, mask_place, mask_inside = _place_of_mask(tile, rows, channels, ROWS, CHANNELS)
                _store(mask, mask_start, mask_place, mask_inside, _pack(out > 0, ROWS, CHANNELS))
            if RELU:
                out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
            _store(y, start, place, inside, out)


@triton.jit
def _gradient(
    grad_y, more_grad_y, x, mask, tile, rows, channels, channel, center, scale, shift,
    RELU: tl.constexpr, SHORTCUT: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return a tile of `x`, less its mean, and of the gradient before ReLU."""
    start, place, inside = _place(tile, rows, channels, channel, ROWS)
    centered = _load(x, start, place, inside) - center
    gradient = _load(grad_y, start, place, inside)
    if MORE:
        gradient += _load(more_grad_y, start, place, inside)
    if RELU:
        if SHORTCUT:
            mask_start, mask_place, mask_inside = _place_of_mask(tile, rows, channels, ROWS, CHANNELS)
            bits = tl.load(mask + mask_start + mask_place, mask_inside, 0)
            gradient = tl.where(_unpack(bits, ROWS, CHANNELS) > 0, gradient, 0.0)
        else:  # recomputed: one operand less
            gradient = tl.where(centered * scale + shift > 0, gradient, 0.0)
    return tl.where(inside, centered, 0.0), gradient


@triton.jit
def _batch_norm_backward(
    grad_y, more_grad_y, x, mask, weight, bias, mean, inverse_std, grad_x, grad_shortcut, grad_weight, grad_bias,
    partials, semaphores, rows, channels,
    RELU: tl.constexpr, SHORTCUT: tl.constexpr, MORE: tl.constexpr, PART: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    exists, tiles = channel < channels, tl.cdiv(rows, ROWS)
    center, inverse = tl.load(mean + channel, exists, 0.0), tl.load(inverse_std + channel, exists, 0.0)
    scale, shift = tl.load(weight + channel, exists, 0.0) * inverse, tl.load(bias + channel, exists, 0.0)
    if SINGLE:
        start, place, inside = _place(program, rows, channels, channel, ROWS)
        centered, gradient = _gradient(
            grad_y, more_grad_y, x, mask, program, rows, channels, channel, center, scale, shift,
            RELU, SHORTCUT, MORE, ROWS, CHANNELS,
        )  # fmt: skip

    if PART != RESULT:
        total, product = tl.zeros([1, CHANNELS], tl.float32), tl.zeros([1, CHANNELS], tl.float32)
        for tile in range(program, tiles, programs):
            if not SINGLE:
                start, place, inside = _place(tile, rows, channels, channel, ROWS)
                centered, gradient = _gradient(
                    grad_y, more_grad_y, x, mask, tile, rows, channels, channel, center, scale, shift,
                    RELU, SHORTCUT, MORE, ROWS, CHANNELS,
                )  # fmt: skip
            total += tl.sum(gradient, 0, keep_dims=True)
            product += tl.sum(gradient * centered, 0, keep_dims=True)
            if SHORTCUT:
                _store(grad_shortcut, start, place, inside, gradient)
        _store_sums(partials, total, product, channels, channel)

    if PART == BOTH:
        _wait_for_all(semaphores + tl.program_id(1))

    if PART != SUMS:
        totals, products = _sums_of_each(partials, channels, channel, PROGRAMS)
        total, product = tl.sum(totals, 0, keep_dims=True), tl.sum(products, 0, keep_dims=True)
        if program == 0:
            tl.store(grad_bias + channel, total, exists)
            tl.store(grad_weight + channel, product * inverse, exists)
        slope = product * inverse * inverse / rows
        own_tiles = tl.cdiv(tiles - program, programs)
        for step in range(own_tiles):
            if not SINGLE:
                tile = program + (own_tiles - 1 - step) * programs
                start, place, inside = _place(tile, rows, channels, channel, ROWS)
                if SHORTCUT:  # what this each stored before
                    centered = _load(x, start, place, inside) - center
                    gradient = _load(grad_shortcut, start, place, inside)
                else:
                    centered, gradient = _gradient(
                        grad_y, more_grad_y, x, mask, tile, rows, channels, channel, center, scale, shift,
                        RELU, SHORTCUT, MORE, ROWS, CHANNELS,
                    )  # fmt: skip
            out = scale * (gradient - total / rows - centered * slope)
            _store(grad_x, start, place, inside, out)


# --- operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastresnet::batch_norm", mutates_args=("running_mean", "running_var", "batches"))
def batch_norm(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    semaphores: Tensor,
    momentum: float,
    epsilon: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, mean and inverse standard deviation of a batch, and a mask; update the running statistics.

    The mask has a bit for each positive output, and is empty without a shortcut. `semaphores` are those of
    `create_semaphores`. They change, but only these kernels use them.
    """
    y, mask, mean, inverse_std = results = _create_results(x, shortcut, weight)
    operands = (x, shortcut, y, mask, weight, bias, mean, inverse_std, running_mean, running_var, batches)
    constants = {"RELU": relu, "SHORTCUT": shortcut is not None}
    _launch(_batch_norm_forward, operands, semaphores, x, (momentum, epsilon), constants)
    return results


def _create_results(x: Tensor, shortcut: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = x.new_empty(0 if shortcut is None else x.numel() // 8, dtype=torch.uint8)
    return torch.empty_like(x), mask, torch.empty_like(weight), torch.empty_like(weight)


@batch_norm.register_fake
def _(x: Tensor, shortcut: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _create_results(x, shortcut, weight)


@torch.library.custom_op("fastresnet::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    grad_y: Tensor,
    more_grad_y: Tensor | None,
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    semaphores: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `x`, of the shortcut (empty if `mask` is), of weight and bias.

    The gradient of the output is `grad_y` + `more_grad_y`: its sum, as an operation of its own, would cost two passes.
    """
    results = _create_gradients(x, mask, weight)
    operands = (grad_y, more_grad_y, x, mask, weight, bias, mean, inverse_std, *results)
    constants = {"RELU": relu, "SHORTCUT": mask.numel() > 0, "MORE": more_grad_y is not None}
    _launch(_batch_norm_backward, operands, semaphores, x, (), constants)
    return results


def _create_gradients(x: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_shortcut = torch.empty_like(x) if mask.numel() else x.new_empty(0)
    return torch.empty_like(x), grad_shortcut, torch.empty_like(weight), torch.empty_like(weight)


@batch_norm_backward.register_fake
def _(
    grad_y: Tensor, more_grad_y: Tensor | None, x: Tensor, mask: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _create_gradients(x, mask, weight)


def create_semaphores(weight: Tensor) -> Tensor:
    """Create the `semaphores` of a batch norm with `weight` [C]."""
    return torch.zeros(triton.cdiv(len(weight), CHANNELS), dtype=torch.int32, device=weight.device)


class BatchNorm(torch.autograd.Function):
    """Both operators as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        *_, semaphores, _, _, relu = rest
        y, mask, mean, inverse_std = batch_norm(x, shortcut, weight, bias, *rest)
        ctx.save_for_backward(x, mask, weight, bias, mean, inverse_std, semaphores)
        ctx.relu = relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        gradients = batch_norm_backward(grad_y, None, *ctx.saved_tensors, ctx.relu)
        grad_x, grad_shortcut, *of_parameters = gradients
        return grad_x, grad_shortcut if grad_shortcut.numel() else None, *of_parameters, *[None] * 7


class MergeGradients(CustomGraphPass):
    """Pass of Inductor that leaves sums of two gradients, from the branches of a block, to `batch_norm_backward`."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.fastresnet.batch_norm_backward.default):
            total, more, *rest = node.args
            if more is None and total.target is torch.ops.aten.add.Tensor and _is_plain_sum(total):
                node.args = (*total.args, *rest)
                graph.erase_node(total)

    def uuid(self) -> bytes:
        """Identify this pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


def _is_plain_sum(total: torch.fx.Node) -> bool:
    """Return True if only one node uses `total`, and its operands are tensors of the same shape, type and strides."""
    tensors = [node.meta["val"] for node in (total, *total.args) if isinstance(node, torch.fx.Node)]
    kinds = {(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors}
    return len(total.users) == 1 and len(tensors) == 3 and len(kinds) == 1 and not total.kwargs


def _launch(
    kernel: Any,
    operands: tuple[Tensor | None, ...],
    semaphores: Tensor,
    x: Tensor,
    numbers: tuple[float, ...],
    constants: dict[str, bool],
) -> None:
    """Launch both parts of a pass as one kernel; in Triton's interpreter, where programs cannot wait, as two."""
    channels = x.shape[1]
    rows, columns = x.numel() // channels, triton.cdiv(channels, CHANNELS)
    width = min(triton.next_power_of_2(channels), CHANNELS)
    most = max(programs_at_once(x.device) // columns, 1)
    largest = _LARGEST_TILE // width
    tile = max(min(triton.next_power_of_2(triton.cdiv(rows, most)), largest), 1)
    programs = min(triton.cdiv(rows, tile), most)
    partials = torch.empty(programs, 2, channels, device=x.device)
    sizes = {"ROWS": tile, "CHANNELS": width, "PROGRAMS": triton.next_power_of_2(programs)}

    def launch(part: int, **options: Any) -> None:
        single = part == BOTH.value and programs * tile >= rows
        kernel[(programs, columns)](
            *operands, partials, semaphores, rows, channels, *numbers, **constants, **sizes, PART=part, SINGLE=single,
            **options,
        )  # fmt: skip

    if x.is_cuda:
        launch(BOTH.value, launch_cooperative_grid=True, num_warps=max(min(tile * width // _PER_WARP, 16), 4))
    else:
        for part in [BOTH.value] if programs == 1 else [SUMS.value, RESULT.value]:
            launch(part)


@functools.cache
def programs_at_once(device: torch.device) -> int:
    """Return the number of programs that run at the same time: one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
