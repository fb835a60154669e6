"""shapes10: a drawn stand-in with CIFAR-10's layout (10 classes, 32x32 RGB), for first runs, tests and benchmarks.

Image i shows shape number i % 10 with noise. The counter-based hash gives its position, size and colours. The same
index always gives the same image, so a smaller set is a prefix of a larger one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .prng import Stream, hash64, pair_below, stream_key
from .sampling import IMAGE_SIZE
from .sources import Report
from .store import RawData

_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda y, x: y**2 + x**2 <= 1,
    "ring": lambda y, x: (y**2 + x**2 <= 1) & (y**2 + x**2 >= 0.35),
    "square": lambda y, x: (abs(y) <= 0.85) & (abs(x) <= 0.85),
    "diamond": lambda y, x: abs(y) + abs(x) <= 1,
    "triangle": lambda y, x: 2 * abs(x) <= 1 + y,
    "plus": lambda y, x: (abs(y) <= 0.3) | (abs(x) <= 0.3),
    "cross": lambda y, x: (abs(y - x) <= 0.4) | (abs(y + x) <= 0.4),
    "horizontal_bars": lambda y, x: np.floor((y + 1) * 2.5) % 2 == 0,
    "vertical_bars": lambda y, x: np.floor((x + 1) * 2.5) % 2 == 0,
    "checkerboard": lambda y, x: (np.floor((y + 1) * 2) + np.floor((x + 1) * 2)) % 2 == 0,
}
"""Masks of the pixels in each shape, from `y` [N, 32, 1] and `x` [N, 1, 32] in units of its radius, within -1..1."""
CLASSES = tuple(_SHAPES)
_TRAIN, _TEST = 0, 1
_CHUNK = 2000


def draw_shapes10(train_images: int, test_images: int, report: Report) -> RawData:
    """Draw the data set; deterministic."""
    total = train_images + test_images
    arrays: list[np.ndarray] = []
    for split, count in ((_TRAIN, train_images), (_TEST, test_images)):
        images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        labels = np.arange(count, dtype=np.int64) % len(CLASSES)
        for start in range(0, count, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, count), dtype=np.int64)
            images[ids] = _draw(split, ids, labels[ids])
            report("drawing", split * train_images + int(ids[-1]) + 1, total)
        arrays += [images, labels]
    return RawData(CLASSES, *arrays)


def _draw(split: int, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw images, uint8 [N, 32, 32, 3]."""

    def pair(field: int, bound: int) -> tuple[np.ndarray, np.ndarray]:
        return pair_below(hash64(stream_key(split, field, Stream.SHAPE), ids), bound)

    center_y, center_x = (10 + value for value in pair(0, 13))
    radius = 6 + pair(1, 5)[0]
    grid = np.arange(IMAGE_SIZE)
    y = ((grid - center_y[:, None]) / radius[:, None])[:, :, None]
    x = ((grid - center_x[:, None]) / radius[:, None])[:, None, :]
    inside = np.empty((len(ids), IMAGE_SIZE, IMAGE_SIZE), bool)
    for label, shape in enumerate(_SHAPES.values()):
        rows = labels == label
        inside[rows] = shape(y[rows], x[rows])
    inside &= (abs(y) <= 1) & (abs(x) <= 1)
    background = np.stack([pair(2 + channel, 256)[0] for channel in range(3)], axis=1)
    contrast = np.stack([64 + pair(5 + channel, 129)[0] for channel in range(3)], axis=1)
    foreground = (background + contrast) % 256
    clean = np.where(inside[..., None], foreground[:, None, None], background[:, None, None])
    return np.clip(clean + _noise(split, ids), 0, 255).astype(np.uint8)


def _noise(split: int, ids: np.ndarray) -> np.ndarray:
    """Draw uniform noise -24..24 for each pixel, int16 [N, 32, 32, 3], from one byte of a hash each."""
    words = IMAGE_SIZE * IMAGE_SIZE * 3 // 8
    hashes = hash64(stream_key(split, 0, Stream.NOISE), ids[:, None] * words + np.arange(words))
    noise = hashes.astype("<i8").view(np.uint8).astype(np.int16)
    return (noise * 49 // 256 - 24).reshape(len(ids), IMAGE_SIZE, IMAGE_SIZE, 3)
