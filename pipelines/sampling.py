"""Order and augmentation parameters of an epoch, as a pure function of (seed, epoch, sample).

There is no state to save: a batch depends on (seed, epoch, step) alone, on any machine, in any pipeline and for any
number of ranks. The same code works on NumPy arrays and torch tensors, so this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from .errors import UsageError, check_literals
from .prng import Array, Stream, hash64, pair_below, permutation, stream_key

PaddingMode = Literal["zeros", "reflect"]
Flip = Literal["none", "random", "alternating"]
NormalizationMode = Literal["half", "channel", "pixel"]

IMAGE_SIZE = 32
"""Height and width of every image, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Changes of the pixels between the store and the network. Raises `UsageError` on invalid values."""

    crop_padding: int = 4
    """Pixels added on each side before the random 32x32 crop; 0: no crop."""
    padding_mode: PaddingMode = "zeros"
    """Content of the padding: `zeros` (black, He et al. 2015) or `reflect` (mirrored without repeating the edge)."""
    flip: Flip = "random"
    """Choice of the flipped images: `none`, `random` (in each epoch) or `alternating`.

    `alternating` is random in the first epoch, then inverted every epoch (Jordan, "94% on CIFAR-10 in 3.29
    seconds", 2024, section 3.6)."""
    cutout: int = 0
    """Side of the square filled with the mean colour (DeVries & Taylor 2017), in pixels; 0: none."""
    normalization: NormalizationMode = "half"
    """Name of the normalisation: `half`, `channel` or `pixel`.

    `half` is mean = std = 0.5, `channel` the data set's own mean and std. `pixel` subtracts the per-pixel mean,
    without division by a std (He et al. 2015)."""

    def __post_init__(self) -> None:
        check_literals(self)
        if not 0 <= self.crop_padding < IMAGE_SIZE:
            raise UsageError(f"crop padding {self.crop_padding} is not in 0..{IMAGE_SIZE - 1}.")
        if not 0 <= self.cutout <= IMAGE_SIZE:
            raise UsageError(f"cutout {self.cutout} is not in 0..{IMAGE_SIZE}.")

    @property
    def changes_pixels(self) -> bool:
        """Use of any change besides the normalisation."""
        return self.crop_padding > 0 or self.flip != "none" or self.cutout > 0


@dataclass(frozen=True, slots=True)
class Draws:
    """Augmentation parameters of the samples of a batch [B] or an epoch [steps, B]: arrays or tensors, int64."""

    top: Array
    """First row of the crop in the padded image, 0..2 * crop_padding."""
    left: Array
    """First column of the crop in the padded image, 0..2 * crop_padding."""
    flip: Array
    """Flip of the crop: 1 mirrors it left to right, 0 does not."""
    cutout_top: Array
    """First row of the cutout square in the finished crop; may be outside, as the square is clipped."""
    cutout_left: Array
    """First column of the cutout square in the finished crop."""

    def map(self, change: Callable[[Array], Array]) -> Draws:
        """Apply `change` to every array."""
        return Draws(*(change(getattr(self, field.name)) for field in fields(self)))

    def of(self, step: int) -> Draws:
        """Select the draws of one batch from those of an epoch [steps, B]."""
        return self.map(lambda column: column[step])


def draw(seed: int, epoch: int, ids: Array, augmentation: Augmentation) -> Draws:
    """Draw the augmentation parameters of the samples `ids` (any shape) in `epoch`."""
    top, left = pair_below(hash64(stream_key(seed, epoch, Stream.CROP), ids), 2 * augmentation.crop_padding + 1)
    center_y, center_x = pair_below(hash64(stream_key(seed, epoch, Stream.CUTOUT), ids), IMAGE_SIZE)
    half = augmentation.cutout // 2
    return Draws(top, left, _flips(seed, epoch, ids, augmentation.flip), center_y - half, center_x - half)


def _flips(seed: int, epoch: int, ids: Array, mode: str) -> Array:
    if mode == "none":
        return ids * 0
    if mode == "alternating":
        return (hash64(stream_key(seed, 0, Stream.FLIP), ids) & 1) ^ (epoch & 1)
    return hash64(stream_key(seed, epoch, Stream.FLIP), ids) & 1


def rank_rows(batch_size: int, rank: int, world_size: int) -> slice:
    """Select `rank`'s rows of a batch of `batch_size`: the ranks' slices joined are the batch."""
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Assignment of samples to batches, on this rank.

    `batch_size` counts the images of a step over all ranks; rank r takes a fixed slice of them, so the ranks' batches
    joined are the single-process batch. Training drops the partial last batch, evaluation pads it by repeating the last
    sample: shapes never change.
    """

    size: int
    """Samples in the split."""
    batch_size: int
    train: bool
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise UsageError(f"batch size {self.batch_size} is smaller than the number of ranks, {self.world_size}.")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is not in 0..{self.world_size - 1}.")
        if self.size == 0:
            raise UsageError("the split has no images.")
        if self.train and self.batch_size > self.size:
            raise UsageError(
                f"batch size {self.batch_size} is larger than the training set, {self.size} images. "
                f"Give --batch-size {self.size} or less."
            )

    def __len__(self) -> int:
        """Return the batches per epoch, the same on every rank."""
        return self.size // self.batch_size if self.train else -(-self.size // self.batch_size)

    @property
    def _rows(self) -> slice:
        return rank_rows(self.batch_size, self.rank, self.world_size)

    @property
    def rows_per_batch(self) -> int:
        """Images of a batch on this rank."""
        return self._rows.stop - self._rows.start

    def positions(self, epoch: int, ids: Array) -> Array:
        """Order the split: positions [batches, rows of this rank] for its sample ids [size], of the same array type."""
        if self.train:
            order = permutation(stream_key(self.seed, epoch, Stream.ORDER), ids)[: len(self) * self.batch_size]
        else:
            padded = np.minimum(np.arange(len(self) * self.batch_size), self.size - 1)
            order = padded if isinstance(ids, np.ndarray) else ids.new_tensor(padded)
        return order.reshape(len(self), self.batch_size)[:, self._rows]

    def valid(self, step: int) -> int:
        """Count the rows of this rank's batch that are real samples."""
        rows = self._rows
        real = self.size - step * self.batch_size
        return min(max(real - rows.start, 0), rows.stop - rows.start)

    def plan(self, epoch: int, ids: Array, labels: Array, augmentation: Augmentation) -> EpochPlan:
        """Plan `epoch` over a split with sample `ids` [size]; `labels` [N] are those of the whole store."""
        rows = ids[self.positions(epoch, ids)]
        return EpochPlan(rows, draw(self.seed, epoch, rows, augmentation), labels[rows])


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """Plan of the batches of an epoch on one rank, without pixels; a pipeline executes it."""

    rows: Array
    """Rows of the store, int64 [steps, B]."""
    draws: Draws
    """Augmentation parameters [steps, B]."""
    labels: Array
    """Labels, int64 [steps, B]."""

    def columns(self) -> list[Array]:
        """Return all arrays, in a fixed order."""
        columns: list[Array] = []
        self.draws.map(columns.append)
        return [self.rows, *columns, self.labels]
