"""Stochastic depth (Huang, Sun, Liu, Sedra & Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016).

As is usual today, residual branches are dropped per sample, and the others are scaled up in training. The paper drops
them per batch and scales them down in evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.prng import Stream, hash64, step_counters, stream_key, uniform


class StochasticDepth(nn.Module):
    """Dropping of the residual branch of block number `block` with probability `rate`, in training.

    The dropped samples are a pure function of (seed, block, step, row), so there is no random generator to save. `step`
    and `first_row`, the row of the first sample in the whole batch, are buffers [1] int64, so that they can change
    under a captured CUDA graph. They are not part of the weights.
    """

    step: Tensor
    first_row: Tensor

    def __init__(self, rate: float, block: int) -> None:
        super().__init__()
        self.rate, self.block = rate, block
        self.draw_with(0)
        for name in ("step", "first_row"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.int64), persistent=False)

    def draw_with(self, seed: int) -> None:
        self.seed = seed
        self._key = stream_key(seed, Stream.DROP_PATH, self.block)  # NumPy: hidden from torch.compile

    def forward(self, branch: Tensor) -> Tensor:
        """Map `branch` [B, C, H, W] to the same shape, with zeros for the dropped samples."""
        if not self.training:
            return branch
        rows = self.first_row + torch.arange(len(branch), device=branch.device)
        keep = uniform(hash64(self._key, step_counters(self.step, rows))) >= self.rate
        return torch.where(keep.view(-1, 1, 1, 1), branch / (1 - self.rate), 0)


def linear_decay(drop_path: float, block: int, blocks: int) -> StochasticDepth | None:
    """Create the stochastic depth of block number `block` of `blocks`; return None if `drop_path` is 0.

    The rate grows linearly, from 0 at the images to `drop_path` in the last block (the paper's equation 4).
    """
    return StochasticDepth(drop_path * (block + 1) / blocks, block) if drop_path else None


def seed_stochastic_depth(model: nn.Module, seed: int, step: Tensor, first_row: Tensor) -> None:
    """Make all of `model` draw with `seed`, for the step whose number is in `step` [1] int64, from `first_row` on.

    The model shares both tensors, which the caller changes in place. Call this when the model is on their device. A
    deep copy of the model has one copy of each, shared by all its modules.
    """
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.draw_with(seed)
            module.step, module.first_row = step, first_row
