"""Stochastic depth (Huang, Sun, Liu, Sedra & Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016).

As is usual today, each sample of a batch loses residual branches of its own, and those that stay are scaled up in
training; in the paper a batch shares its fate, and branches are scaled down in evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.prng import Stream, hash64, step_counters, stream_key, uniform


class StochasticDepth(nn.Module):
    """Leaves out the residual branch of block number `block` with probability `rate`, in training.

    Which samples lose it is a pure function of (seed, block, step, row): there is no random generator to save. `step`
    [1] int64 is a buffer, so that the number of a step captured as a CUDA graph can change, but not part of the
    weights. `first_row` is the number of the first sample, where others have the rows before.
    """

    def __init__(self, rate: float, block: int) -> None:
        super().__init__()
        self.rate, self.block = rate, block
        self.first_row = 0
        self.draw_with(0)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64), persistent=False)

    def draw_with(self, seed: int) -> None:
        self.seed = seed
        self._key = stream_key(seed, Stream.DROP_PATH, self.block)  # NumPy: not for torch.compile to see

    def forward(self, branch: Tensor) -> Tensor:
        """`branch` [B, C, H, W] to the same, with zeros for the samples that lose it."""
        if not self.training:
            return branch
        rows = self.first_row + torch.arange(len(branch), device=branch.device)
        keep = uniform(hash64(self._key, step_counters(self.step, rows))) >= self.rate
        return torch.where(keep.view(-1, 1, 1, 1), branch / (1 - self.rate), 0)


def linear_decay(drop_path: float, block: int, blocks: int) -> StochasticDepth | None:
    """For block number `block` of `blocks`: rates grow linearly, from 0 at the images to `drop_path` in the last block
    (the paper's equation 4). None where `drop_path` is 0.
    """
    return StochasticDepth(drop_path * (block + 1) / blocks, block) if drop_path else None


def seed_stochastic_depth(model: nn.Module, seed: int, step: Tensor, first_row: int = 0) -> None:
    """Have all of `model` draw with `seed`, for the step whose number `step` [1] int64 holds, from `first_row` on.

    The tensor is shared, not copied: whoever counts in it moves the model on. To be called when the model is on its
    device, that of `step`. A deep copy of the model has a copy of `step`, which all of it shares.
    """
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.draw_with(seed)
            module.step, module.first_row = step, first_row
