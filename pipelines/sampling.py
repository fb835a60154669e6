"""Order and augmentation parameters as a pure function of (seed, epoch, sample).

One counter-based hash, the output function of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), replaces every random generator in the data path. There is no state to save: a batch follows
from (seed, epoch, step) alone, on any machine, in any pipeline and for any number of ranks.

The same lines serve NumPy arrays and torch tensors (CPU or CUDA): both wrap int64 arithmetic modulo 2**64 and shift
right arithmetically. This module therefore imports neither torch nor anything else that is slow to load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from .errors import UsageError, check_choice

PADDING_MODES = ("zeros", "reflect")
FLIPS = ("none", "random", "alternating")
NORMALIZATIONS = ("half", "channel", "pixel")

IMAGE_SIZE = 32
"""Height and width of every image, in pixels."""

Array = Any
"""A NumPy array or a torch tensor, int64."""


class Purpose(IntEnum):
    """What a hash is drawn for; each purpose has its own stream. The values are part of the format: never reuse one."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    CUTOUT = 3
    HOLD_OUT = 4
    SHAPE = 5
    NOISE = 6
    DROP_PATH = 7
    MIX = 8
    MIX_BOX = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What happens to the pixels on the way from the store to the network. Raises `UsageError` on impossible values."""

    crop_padding: int = 4
    """Pixels added on each side before the random 32x32 crop; 0: no crop."""
    padding_mode: str = "zeros"
    """`zeros` (black, He et al. 2015) or `reflect` (mirrored without repeating the edge)."""
    flip: str = "random"
    """`none`, `random` (each epoch anew) or `alternating` (random in the first epoch, then turned over every epoch, as
    in Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024, section 3.6)."""
    cutout: int = 0
    """Side of the square filled with the mean colour (DeVries & Taylor 2017), in pixels; 0: none."""
    normalization: str = "half"
    """`half` (mean = std = 0.5), `channel` (the data set's own mean and std) or `pixel` (the per-pixel mean is
    subtracted, without division by a std; He et al. 2015)."""

    def __post_init__(self) -> None:
        check_choice("padding mode", self.padding_mode, PADDING_MODES)
        check_choice("flip", self.flip, FLIPS)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        if not 0 <= self.crop_padding < IMAGE_SIZE:
            raise UsageError(f"crop padding {self.crop_padding} is not in 0..{IMAGE_SIZE - 1}.")
        if not 0 <= self.cutout <= IMAGE_SIZE:
            raise UsageError(f"cutout {self.cutout} is not in 0..{IMAGE_SIZE}.")

    @property
    def changes_pixels(self) -> bool:
        """Whether anything but the normalisation happens."""
        return self.crop_padding > 0 or self.flip != "none" or self.cutout > 0


@dataclass(frozen=True, slots=True)
class Draws:
    """Augmentation parameters of the samples of a batch [B] or an epoch [steps, B]: arrays or tensors, int64."""

    top: Array
    """First row of the crop in the padded image, 0..2 * crop_padding."""
    left: Array
    """First column of the crop in the padded image, 0..2 * crop_padding."""
    flip: Array
    """1: mirror the crop left to right; 0: leave it."""
    cutout_top: Array
    """First row of the cutout square in the finished crop; may lie outside, the square is clipped."""
    cutout_left: Array
    """First column of the cutout square in the finished crop."""

    def map(self, change: Callable[[Array], Array]) -> Draws:
        """The draws with every array put through `change`."""
        return Draws(*(change(getattr(self, field.name)) for field in fields(self)))

    def of(self, step: int) -> Draws:
        """The draws of one batch, where these are of an epoch [steps, B]."""
        return self.map(lambda column: column[step])


def _signed(value: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit `value`."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
_LOW_32_BITS = 0xFFFFFFFF


def _shift_right(z: Array, bits: int) -> Array:
    """Logical right shift of int64, which both libraries only shift arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(z: Array) -> Array:
    """SplitMix64's output function: a bijection of 64-bit words (as int64) whose outputs look independent."""
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIER_2
    return z ^ _shift_right(z, 31)


def stream_key(*words: int) -> int:
    """One 64-bit key (as int64) for a sequence of small integers such as (seed, epoch, purpose)."""
    key = np.zeros(1, np.int64)
    for word in words:
        key = _mix64(key + _GAMMA + np.array([word], np.int64))
    return int(key[0])


def hash64(key: int, counter: Array) -> Array:
    """64 hashed bits (as int64) for each element of `counter`: that output of SplitMix64 seeded with `key`."""
    return _mix64((counter + 1) * _GAMMA + key)


def _below(bits: Array, bound: int) -> Array:
    """Uniform integers in 0..bound-1 from 32 random bits each (bias under bound / 2**32)."""
    return (bits * bound) >> 32


def pair_below(hashes: Array, bound: int) -> tuple[Array, Array]:
    """Two independent uniform integers in 0..bound-1 from each 64-bit hash."""
    return _below(_shift_right(hashes, 32), bound), _below(hashes & _LOW_32_BITS, bound)


def step_counters(step: Array, rows: Array) -> Array:
    """A counter of its own for each of `rows` (below 2**20) of a batch, in every step of a run."""
    return (step << 20) + rows


def uniform(hashes: Array) -> Array:
    """Uniform numbers in [0, 1), multiples of 2**-24: exact in single precision, to which torch rounds."""
    return _shift_right(hashes, 40) / (1 << 24)


def permutation(key: int, ids: Array) -> Array:
    """Positions 0..N-1 of `ids` [N], ordered by their hashes: a uniformly random permutation."""
    return _shift_right(hash64(key, ids), 1).argsort(stable=True)


def draw(seed: int, epoch: int, ids: Array, augmentation: Augmentation) -> Draws:
    """Augmentation parameters of the samples `ids` (any shape) in `epoch`."""
    top, left = pair_below(hash64(stream_key(seed, epoch, Purpose.CROP), ids), 2 * augmentation.crop_padding + 1)
    center_y, center_x = pair_below(hash64(stream_key(seed, epoch, Purpose.CUTOUT), ids), IMAGE_SIZE)
    half = augmentation.cutout // 2
    return Draws(top, left, _flips(seed, epoch, ids, augmentation.flip), center_y - half, center_x - half)


def _flips(seed: int, epoch: int, ids: Array, mode: str) -> Array:
    if mode == "none":
        return ids * 0
    if mode == "alternating":
        return (hash64(stream_key(seed, 0, Purpose.FLIP), ids) & 1) ^ (epoch & 1)
    return hash64(stream_key(seed, epoch, Purpose.FLIP), ids) & 1


def rank_rows(batch_size: int, rank: int, world_size: int) -> slice:
    """The rows of a batch of `batch_size` that are `rank`'s: the ranks' slices joined are the batch."""
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Which samples make up each batch, on this rank.

    `batch_size` counts the images of a step over all ranks; rank r takes a fixed slice of them, so the ranks' batches
    joined are the single-process batch. Training drops the ragged last batch, evaluation pads it by repeating the last
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
            raise UsageError(f"batch size {self.batch_size} is larger than the training set, {self.size} images.")

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.size // self.batch_size if self.train else -(-self.size // self.batch_size)

    @property
    def _rows(self) -> slice:
        return rank_rows(self.batch_size, self.rank, self.world_size)

    @property
    def rows_per_batch(self) -> int:
        """Images of a batch on this rank."""
        return self._rows.stop - self._rows.start

    def positions(self, epoch: int, ids: Array) -> Array:
        """Positions into the split [batches, rows of this rank] for its sample ids [size], of the same array type."""
        if self.train:
            order = permutation(stream_key(self.seed, epoch, Purpose.ORDER), ids)[: len(self) * self.batch_size]
        else:
            padded = np.minimum(np.arange(len(self) * self.batch_size), self.size - 1)
            order = padded if isinstance(ids, np.ndarray) else ids.new_tensor(padded)
        return order.reshape(len(self), self.batch_size)[:, self._rows]

    def valid(self, step: int) -> int:
        """How many rows of this rank's batch are real samples."""
        rows = self._rows
        real = self.size - step * self.batch_size
        return min(max(real - rows.start, 0), rows.stop - rows.start)
