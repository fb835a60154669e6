"""Muon's update as a few Triton kernels, each of which works on all matrices of a network.

PyTorch's operations take about 60 launches for each shape of weight. Here, each program of a kernel works on one tile
of one matrix and reads from a table which one: the number of launches is constant. Only `Muon.use_kernels` imports this
module, because Triton is missing where PyTorch has no CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement, product

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Number of elements that a program of an elementwise kernel works on."""
DEPTH = 64
"""Number of columns that a program of a product loads at a time; it divides the sizes of tiles."""
FULL_GPU = 132
"""Number of programs that occupy an H100. Large tiles that gave fewer would leave a part of it idle."""

# Fields of a line of a table. They describe a weight [outputs, inputs], its matrix x (the weight, or its transpose if
# that has fewer rows), and either the tile of x in row `I` and column `J` of tiles, or block `I` of the weight.
WEIGHT = tl.constexpr(0)  # address
VELOCITY = tl.constexpr(1)  # address
GRADIENT = tl.constexpr(2)  # index of the first element among all gradients
OUTPUTS = tl.constexpr(3)
INPUTS = tl.constexpr(4)
X = tl.constexpr(5)  # index of the first tile of x among all matrices, which are padded with zeros to whole tiles
SQUARE = tl.constexpr(6)  # likewise, of x @ x.T
ROWS = tl.constexpr(7)  # in tiles
COLUMNS = tl.constexpr(8)
SUM = tl.constexpr(9)  # index of the first of the sums of squares, one for each block
BLOCKS = tl.constexpr(10)
I = tl.constexpr(11)  # noqa: E741
J = tl.constexpr(12)
FIELDS = tl.constexpr(13)


class MuonKernels:
    """Update of `weights` and their momentum, `velocities`, whose addresses must not change.

    The matrices are fp16, which is as fast as bf16 and eight times as precise. Its small range suffices, because they
    are normalised before. Sums are float32, and no result depends on the order in which programs run.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        velocities: Sequence[Tensor],
        *,
        coefficients: tuple[float, float, float],
        epsilon: float,
        steps: int,
    ) -> None:
        """Create workspaces and tables. The last three arguments are those of the orthogonalisation."""
        for weight, velocity in zip(weights, velocities, strict=True):
            # Then rows of the matrix follow each other in memory. The order of its columns makes no difference.
            dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
            if not dense or weight.stride() != velocity.stride() or not weight.dtype == velocity.dtype == torch.float32:
                raise ValueError("Muon's kernels need contiguous or channels_last weights in float32")
        self._tensors = [*weights, *velocities]  # owners of the addresses in the tables
        self._coefficients, self._epsilon, self._steps = coefficients, epsilon, steps
        shapes = [(len(weight), weight.numel() // len(weight)) for weight in weights]
        tiles = sum(math.ceil(min(shape) / 128) ** 2 for shape in shapes)
        self._tile = 128 if tiles >= FULL_GPU else 64

        lines = []
        gradient = x = square = blocks = 0
        for weight, velocity, shape in zip(weights, velocities, shapes, strict=True):
            rows, columns = (math.ceil(size / self._tile) for size in sorted(shape))
            count = math.ceil(weight.numel() / BLOCK)
            addresses = (weight.data_ptr(), velocity.data_ptr())
            lines.append((*addresses, gradient, *shape, x, square, rows, columns, blocks, count))
            gradient, blocks = gradient + weight.numel(), blocks + count
            x, square = x + rows * columns, square + rows * rows

        device = weights[0].device
        sizes = [(line[ROWS.value], line[COLUMNS.value]) for line in lines]
        self._blocks = _table(lines, [product(range(line[BLOCKS.value]), [0]) for line in lines], device)
        self._upper = _table(lines, [combinations_with_replacement(range(rows), 2) for rows, _ in sizes], device)
        self._all = _table(lines, [product(range(rows), range(columns)) for rows, columns in sizes], device)
        flat = torch.zeros(gradient, device=device)
        self._gradients = [
            flat[line[GRADIENT.value] :].as_strided(weight.shape, weight.stride())
            for line, weight in zip(lines, weights, strict=True)
        ]
        self._flat = flat
        self._x = [torch.zeros(x * self._tile**2, dtype=torch.float16, device=device) for _ in range(2)]
        self._squares = [torch.zeros(square * self._tile**2, dtype=torch.float16, device=device) for _ in range(2)]
        self._sums = torch.zeros(blocks, 2, device=device)
        self._zero, self._one = torch.zeros((), device=device), torch.ones((), device=device)

    def update(
        self,
        gradients: list[Tensor],
        lr: Tensor,
        momentum: float,
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update the weights by `gradients`, unless `found_inf` is above 0."""
        torch._foreach_copy_(self._gradients, gradients)
        grad_scale = self._one if grad_scale is None else grad_scale
        found_inf = self._zero if found_inf is None else found_inf
        inputs = (self._flat, grad_scale, momentum, found_inf)
        a, b, c = self._coefficients
        (x, other), (gram, polynomial) = self._x, self._squares
        blocks, upper, everything = ((len(table),) for table in (self._blocks, self._upper, self._all))
        tiles = {"TILE": self._tile, "DEPTH": DEPTH, "num_warps": self._tile // 16, "num_stages": 4}
        elements = {"BLOCK": BLOCK, "TILE": self._tile}

        _accumulate[blocks](self._blocks, *inputs, self._sums, BLOCK=BLOCK)
        _normalize[blocks](self._blocks, *inputs, self._sums, self._epsilon, x, **elements)
        for _ in range(self._steps):
            _square[upper](self._upper, x, gram, 0.0, 1.0, OF_X=True, **tiles)
            _square[upper](self._upper, gram, polynomial, b, c, OF_X=False, **tiles)
            _apply[everything](self._all, polynomial, x, a, other, **tiles)
            x, other = other, x
        _descend[blocks](self._blocks, x, lr, found_inf, self._sums, **elements)


def _table(
    lines: Sequence[tuple[int, ...]], tiles: Sequence[Iterable[tuple[int, ...]]], device: torch.device
) -> Tensor:
    """Return a table of the programs of a kernel, which has a line for each of the `tiles` of each matrix."""
    table = [(*line, *tile) for line, of_line in zip(lines, tiles, strict=True) for tile in of_line]
    return torch.tensor(table, dtype=torch.int64, device=device)


@triton.jit
def _field(table, FIELD: tl.constexpr):
    """Return a field of this program's line."""
    return tl.load(table + tl.program_id(0) * FIELDS + FIELD).to(tl.int32)


@triton.jit
def _elements(table, FIELD: tl.constexpr):
    """Return the pointer to the tensor whose address is a field of this program's line."""
    return tl.load(table + tl.program_id(0) * FIELDS + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def _indices(table, found_inf, BLOCK: tl.constexpr):
    """Return the indices of the block, and which are in the weight: none, if the update is cancelled."""
    size = tl.where(tl.load(found_inf) <= 0, _field(table, OUTPUTS) * _field(table, INPUTS), 0)
    index = _field(table, I) * BLOCK + tl.arange(0, BLOCK)
    return index, index < size


@triton.jit
def _norm(table, sums, OF: tl.constexpr):
    """Return the norm of a matrix: of what is orthogonalised (`OF` 0), or of the weight (1)."""
    count = _field(table, BLOCKS)
    sums += _field(table, SUM) * 2 + OF
    index = tl.arange(0, 256)
    total = tl.zeros([256], tl.float32)
    for start in range(0, count, 256):
        total += tl.load(sums + 2 * (start + index), mask=start + index < count, other=0.0)
    return tl.sqrt(tl.sum(total))


@triton.jit
def _accumulate(table, gradients, grad_scale, momentum, found_inf, sums, BLOCK: tl.constexpr):
    """Update the momentum; sum the squares of what is orthogonalised, and of the weight."""
    index, inside = _indices(table, found_inf, BLOCK)
    gradient = tl.load(gradients + _field(table, GRADIENT) + index, mask=inside, other=0.0) / tl.load(grad_scale)
    velocities = _elements(table, VELOCITY) + index
    velocity = momentum * tl.load(velocities, mask=inside, other=0.0) + gradient
    tl.store(velocities, velocity, mask=inside)
    update = gradient + momentum * velocity
    weight = tl.load(_elements(table, WEIGHT) + index, mask=inside, other=0.0)
    sums += tl.program_id(0) * 2
    tl.store(sums, tl.sum(update * update))
    tl.store(sums + 1, tl.sum(weight * weight))


@triton.jit
def _places(table, x, index, TILE: tl.constexpr):
    """Return pointers to elements of x, which may be the transpose of the weight that has them at `index`."""
    outputs, inputs, stride = _field(table, OUTPUTS), _field(table, INPUTS), _field(table, COLUMNS) * TILE
    row_stride, column_stride = tl.where(outputs <= inputs, stride, 1), tl.where(outputs <= inputs, 1, stride)
    return x + _field(table, X) * (TILE * TILE) + index // inputs * row_stride + index % inputs * column_stride


@triton.jit
def _normalize(
    table, gradients, grad_scale, momentum, found_inf, sums, epsilon, x, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Write x: gradients with the updated momentum, of norm 1."""
    index, inside = _indices(table, found_inf, BLOCK)
    gradient = tl.load(gradients + _field(table, GRADIENT) + index, mask=inside, other=0.0) / tl.load(grad_scale)
    velocity = tl.load(_elements(table, VELOCITY) + index, mask=inside, other=0.0)
    update = (gradient + momentum * velocity) / (_norm(table, sums, 0) + epsilon)
    tl.store(_places(table, x, index, TILE), update.to(tl.float16), mask=inside)


@triton.jit
def _descend(table, x, lr, found_inf, sums, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Scale the weights to a norm of sqrt(outputs) and update them by x."""
    index, inside = _indices(table, found_inf, BLOCK)
    weights = _elements(table, WEIGHT) + index
    scale = tl.sqrt(_field(table, OUTPUTS).to(tl.float32)) / _norm(table, sums, 1)
    update = tl.load(lr) * tl.load(_places(table, x, index, TILE), mask=inside, other=0.0)
    tl.store(weights, scale * tl.load(weights, mask=inside, other=0.0) - update, mask=inside)


@triton.jit
def _block(matrix, first, row, column, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return pointers to a block of the matrix whose first element is `first`."""
    start = matrix + (first + row * stride + column)
    return start + tl.arange(0, HEIGHT)[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _square(table, source, target, linear, quadratic, OF_X: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Write linear * s + quadratic * s @ s.T of the matrices s in `source`: x, or if not `OF_X` symmetric ones."""
    rows, first = _field(table, ROWS) * TILE, _field(table, SQUARE) * (TILE * TILE)
    columns = _field(table, COLUMNS if OF_X else ROWS) * TILE
    source_first = _field(table, X if OF_X else SQUARE) * (TILE * TILE)
    i, j = _field(table, I) * TILE, _field(table, J) * TILE
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, columns, DEPTH):
        left = tl.load(_block(source, source_first, i, k, columns, TILE, DEPTH))
        right = tl.load(_block(source, source_first, j, k, columns, TILE, DEPTH))
        total = tl.dot(left, tl.trans(right), total)
    if not OF_X:
        total = linear * tl.load(_block(source, source_first, i, j, columns, TILE, TILE)) + quadratic * total
    total = total.to(tl.float16)
    tl.store(_block(target, first, i, j, rows, TILE, TILE), total)
    if i != j:  # the result is symmetric, and only its upper half is computed
        tl.store(_block(target, first, j, i, rows, TILE, TILE), tl.trans(total))


@triton.jit
def _apply(table, polynomials, x, linear, target, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Write linear * x + polynomial @ x."""
    rows, columns = _field(table, ROWS) * TILE, _field(table, COLUMNS) * TILE
    first, polynomial_first = _field(table, X) * (TILE * TILE), _field(table, SQUARE) * (TILE * TILE)
    i, j = _field(table, I) * TILE, _field(table, J) * TILE
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, rows, DEPTH):
        left = tl.load(_block(polynomials, polynomial_first, i, k, rows, TILE, DEPTH))
        total = tl.dot(left, tl.load(_block(x, first, k, j, columns, DEPTH, TILE)), total)
    total += linear * tl.load(_block(x, first, i, j, columns, TILE, TILE))
    tl.store(_block(target, first, i, j, columns, TILE, TILE), total.to(tl.float16))
