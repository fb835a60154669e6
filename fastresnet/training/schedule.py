"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from fastresnet.config import TrainConfig


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimisation step `step` (0 is the first) of `total_steps`, as a fraction of its peak.

    `step`: a tenth of the peak during warm-up, then the peak, divided by 10 at each milestone passed (He et al. 2015,
    section 4.2). `linear` (with warm-up: one-cycle, Smith & Topin 2018) and `cosine` (Loshchilov & Hutter 2017) grow
    linearly during warm-up and then fall to 0.
    """
    warmup = round(config.warmup * total_steps)
    if config.schedule == "step":
        passed = sum(step >= round(fraction * total_steps) for fraction in config.milestones)
        return 0.1 if step < warmup else 0.1**passed
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = (total_steps - step) / max(total_steps - warmup, 1)  # warm-up may last to the end
    return remaining if config.schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2
