"""Mixup and CutMix: images of a batch mixed with each other, and their labels in the same shares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.prng import Stream, hash64, pair_below, step_counters, stream_key, uniform
from pipelines.sampling import IMAGE_SIZE

_QUANTILES = 1024


class Mixer:
    """Mixture of each image with its neighbour in the batch: the first with the second, the third with the fourth, ...

    Mixup (Zhang et al. 2018) averages the two; CutMix (Yun et al. 2019) exchanges a box. Their shares are drawn from
    Beta(alpha, alpha), one for each pair. With both enabled, each pair gets one of the two. A draw is a pure function
    of (seed, step, pair).
    """

    def __init__(self, *, mixup: float, cutmix: float, seed: int, device: torch.device) -> None:
        """Create a mixer; `mixup` and `cutmix` are their alphas, 0 for none."""
        self._share_key, self._box_key = (stream_key(seed, purpose) for purpose in (Stream.MIX, Stream.MIX_BOX))
        self._mixup, self._cutmix = mixup, cutmix
        self._quantiles = {
            alpha: torch.tensor(beta_quantiles(alpha, _QUANTILES), dtype=torch.float32, device=device)
            for alpha in {mixup, cutmix} - {0.0}
        }

    def __call__(
        self, images: Tensor, labels: Tensor, step: Tensor, first_row: Tensor | int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix `images` [B, 3, 32, 32] of `step`, int64 [1]; return the labels mixed in [B] and shares of `labels`.

        The images begin at `first_row` of the whole batch, int64 [1], which is even.
        """
        partners = torch.arange(len(labels), device=labels.device) ^ 1
        counters = step_counters(step, (first_row + partners) >> 1)
        hashes = hash64(self._share_key, counters)
        weight, share = self._blend(hashes) if self._mixup else self._box(hashes, counters)
        if self._mixup and self._cutmix:
            chosen, (box, box_share) = hashes & 1 == 1, self._box(hashes, counters)
            weight, share = torch.where(_per_image(chosen), box, weight), torch.where(chosen, box_share, share)
        weight = weight.to(images.dtype)
        mixed = weight * images + (1 - weight) * images[partners]
        return mixed.contiguous(memory_format=torch.channels_last), labels[partners], share

    def _blend(self, hashes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of the own image [B, 1, 1, 1], and its share [B]."""
        share = self._draw(self._mixup, hashes)
        return _per_image(share), share

    def _box(self, hashes: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the own image's weight in each pixel [B, 1, 32, 32], 0 inside a box, and its share [B].

        The box is clipped at the edge. The part outside of it is the share, as in the authors' code.
        """
        half = (IMAGE_SIZE * (1 - self._draw(self._cutmix, hashes)).sqrt() / 2).round()[:, None]
        pixel = torch.arange(IMAGE_SIZE, device=hashes.device)
        in_rows, in_columns = (
            (pixel >= center[:, None] - half) & (pixel < center[:, None] + half)
            for center in pair_below(hash64(self._box_key, counters), IMAGE_SIZE)
        )
        weight = 1 - (in_rows[:, None, :, None] & in_columns[:, None, None, :]).float()
        return weight, weight.mean(dim=(1, 2, 3))

    def _draw(self, alpha: float, hashes: Tensor) -> Tensor:
        return self._quantiles[alpha][(uniform(hashes) * _QUANTILES).long()]


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def beta_quantiles(alpha: float, count: int) -> np.ndarray:
    """Compute quantiles of Beta(alpha, alpha) at the middles of `count` equal parts of 0..1, float64 [count].

    The lower half is integrated over s with x = s**(1 / alpha) / 2. That takes away the pole of the density at 0.
    """
    parts = 64 * count
    s = (np.arange(parts) + 0.5) / parts
    mass = (1 - s ** (1 / alpha) / 2) ** (alpha - 1)
    below = (mass.cumsum() - mass / 2) / (2 * mass.sum())
    levels = (np.arange(count) + 0.5) / count
    lower = np.interp(np.minimum(levels, 1 - levels), below, s) ** (1 / alpha) / 2
    return np.where(levels < 0.5, lower, 1 - lower)
