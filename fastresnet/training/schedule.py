"""The learning rate as a pure function of the step."""

from __future__ import annotations

from fastresnet.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimisation step `step` (0 is the first) of `total_steps`: a tenth of the peak during warm-up,
    then the peak divided by 10 at each milestone passed (He et al. 2015, section 4.2).
    """
    if step < config.warmup_iterations:
        return config.lr / 10
    passed = sum(step >= round(fraction * total_steps) for fraction in config.milestones)
    return config.lr / 10**passed
