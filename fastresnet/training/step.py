"""One optimisation step: forward, loss, backward, clipping, update, averaging and metrics, without waiting for the
device.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastresnet.device import autocast
from fastresnet.models.batchnorm import fuse_batch_norms
from fastresnet.training.optimizer import optimizer_state
from fastresnet.training.regularization import Mixer


class TrainStep:
    """Runs optimisation steps and sums their metrics on the device.

    Its own number and the learning rates of all steps are tensors there too, so that a step captured as a CUDA graph
    needs nothing from the host. A non-finite loss calls off that update of the parameters and every later one on the
    device itself; `failed_at` tells the step when the caller next asks, so the steady loop needs no synchronisation
    (the idea is torchtitan's, `trainer.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        lr_factors: Sequence[float],
        *,
        precision: str,
        device: torch.device,
        clip_norm: float = 0.0,
        ema_decay: float = 0.0,
        label_smoothing: float = 0.0,
        mixer: Mixer | None = None,
    ) -> None:
        """`lr_factors` has one for each step of the run, to multiply the `peak_lr` of each parameter group with; see
        `TrainConfig` for the others. 0 turns them off.
        """
        if device.type == "cpu":
            fuse_batch_norms(model)
        self.model, self.optimizers = model, list(optimizers)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        """Steps taken, and so the number of the next: 0 is the first."""
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        """Sum of the losses, correct predictions and images since `reset`."""
        self.averaged = copy.deepcopy(model).requires_grad_(False) if ema_decay else None
        """Exponential moving average of parameters and buffers, where one is kept."""
        self._average = get_ema_multi_avg_fn(ema_decay)
        self._failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        self._learning_rates = [
            (group["lr"], torch.tensor([group["peak_lr"] * factor for factor in lr_factors], device=device))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        self._precision, self._device, self._clip_norm = precision, device, clip_norm
        self._label_smoothing, self._mixer = label_smoothing, mixer
        self.compiled = False
        """Whether steps run compiled; the first one that does compiles."""

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on `images` [B, 3, 32, 32] with `labels` [B]."""
        for lr, of_steps in self._learning_rates:
            lr.copy_(of_steps[self.count][0])
        with autocast(self._precision, self._device):
            loss, correct = (self._compiled if self.compiled else self._loss_and_hits)(images, labels)
        failed = self._note_failure(loss.detach())
        if self.scaler.is_enabled():
            # The scaler skips an update whose gradients are not finite: a factor of NaN makes them so.
            loss = loss * torch.where(failed, torch.nan, 1.0)
        else:
            for optimizer in self.optimizers:
                optimizer.found_inf = failed.float()
        self.scaler.scale(loss).backward()
        if self._clip_norm:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm, foreach=True)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self._update_average(self.averaged)
        size = len(labels)
        self.totals += torch.stack([loss.detach().double() * size, correct, torch.full_like(correct, size)])
        self.count += 1

    def _loss_and_hits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss, and how many of `labels` are the likeliest class."""
        if self._mixer is None:
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        else:
            images, others, share = self._mixer(images, labels, self.count)
            logits = self.model(images).float()
            losses = [
                F.cross_entropy(logits, target, label_smoothing=self._label_smoothing, reduction="none")
                for target in (labels, others)
            ]
            loss = (share * losses[0] + (1 - share) * losses[1]).mean()
            labels = torch.where(share < 0.5, others, labels)
        return loss, (logits.argmax(1) == labels).sum()

    @functools.cached_property
    def _compiled(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Forward pass, and with it the backward pass, as one graph: a break is an error."""
        return torch.compile(self._loss_and_hits, fullgraph=True, dynamic=False)

    def _update_average(self, averaged: nn.Module) -> None:
        old, new = averaged.state_dict().values(), self.model.state_dict().values()
        pairs = list(zip(old, new, strict=True))
        smooth = [(a, b) for a, b in pairs if a.is_floating_point()]
        self._average([a for a, _ in smooth], [b for _, b in smooth], self.count)
        for a, b in pairs:
            if not a.is_floating_point():  # batch norm's count of batches
                a.copy_(b)

    def _note_failure(self, loss: Tensor) -> Tensor:
        """Whether this step or one before it had a non-finite loss, as a tensor."""
        first = (self._failed_at < 0) & ~loss.isfinite()
        self._failed_at.copy_(torch.where(first, self.count[0], self._failed_at))
        return self._failed_at >= 0

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """What happens inside leaves no trace: for trial steps, which compile and measure. Waits for the device."""
        tensors = [*self.model.state_dict().values(), *optimizer_state(self.optimizers, self.model).values()]
        tensors += [self.count, self.totals, self._failed_at]
        if self.averaged is not None:
            tensors += self.averaged.state_dict().values()
        saved, scaler = [tensor.clone() for tensor in tensors], self.scaler.state_dict()
        try:
            yield
        finally:
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
            if scaler:
                self.scaler.load_state_dict(scaler)
            self.model.zero_grad(set_to_none=True)

    def failed_at(self) -> int | None:
        """The first step with a non-finite loss, None while all is well. Waits for the device."""
        step = int(self._failed_at)
        return None if step < 0 else step

    def metrics(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent since `reset`. Waits for the device."""
        loss, correct, images = self.totals.tolist()
        return loss / max(images, 1), 100 * correct / max(images, 1)

    def reset(self) -> None:
        """Begin a new epoch's sums."""
        self.totals.zero_()
