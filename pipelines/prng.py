"""Counter-based generator of random numbers: every value is a pure function of its key and counter.

The output function of SplitMix64 replaces every stateful generator in the data path (Steele, Lea & Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014). The same code works on NumPy arrays and torch tensors (CPU or
CUDA): both wrap int64 arithmetic modulo 2**64 and shift right arithmetically. So this module needs no torch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

Array = Any
"""NumPy array or torch tensor, int64."""


class Stream(IntEnum):
    """Streams of hashes, one for each purpose. The values are part of the format: never reuse one."""

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


def _signed(value: int) -> int:
    """Return the int64 with the same bits as the unsigned 64-bit `value`."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
_LOW_32_BITS = 0xFFFFFFFF


def _shift_right(z: Array, bits: int) -> Array:
    """Shift int64 right logically; both libraries only shift arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(z: Array) -> Array:
    """Apply SplitMix64's output function: a bijection of 64-bit words (as int64) whose outputs look independent."""
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIER_2
    return z ^ _shift_right(z, 31)


def stream_key(*words: int) -> int:
    """Derive a 64-bit key (as int64) from small integers such as (seed, epoch, stream)."""
    key = np.zeros(1, np.int64)
    for word in words:
        key = _mix64(key + _GAMMA + np.array([word], np.int64))
    return int(key[0])


def hash64(key: int, counter: Array) -> Array:
    """Return 64 hashed bits (as int64) for each element of `counter`: the outputs of SplitMix64 seeded with `key`."""
    return _mix64((counter + 1) * _GAMMA + key)


def _below(bits: Array, bound: int) -> Array:
    """Map 32 random bits each to uniform integers in 0..bound-1 (bias under bound / 2**32)."""
    return (bits * bound) >> 32


def pair_below(hashes: Array, bound: int) -> tuple[Array, Array]:
    """Draw two independent uniform integers in 0..bound-1 from each 64-bit hash."""
    return _below(_shift_right(hashes, 32), bound), _below(hashes & _LOW_32_BITS, bound)


def step_counters(step: Array, rows: Array) -> Array:
    """Return a distinct counter for each of `rows` (below 2**20) of a batch in every step of a run."""
    return (step << 20) + rows


def uniform(hashes: Array) -> Array:
    """Map hashes to uniform numbers in [0, 1), multiples of 2**-24: exact in float32, to which torch rounds."""
    return _shift_right(hashes, 40) / (1 << 24)


def permutation(key: int, ids: Array) -> Array:
    """Order the positions 0..N-1 of `ids` [N] by their hashes: a uniformly random permutation."""
    return _shift_right(hash64(key, ids), 1).argsort(stable=True)
