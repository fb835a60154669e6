"""One optimisation step: forward, loss, backward, update and metrics, without waiting for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastresnet.device import autocast


class TrainStep:
    """Runs optimisation steps and sums their metrics on the device.

    A non-finite loss calls off that update of the parameters and every later one on the device itself; `failed_at`
    tells the step when the caller next asks, so the steady loop needs no synchronisation (the idea is torchtitan's,
    `trainer.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str,
        device: torch.device,
        compile_model: bool,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        """Sum of the losses, correct predictions and images since `reset`."""
        self._failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        self._model = torch.compile(model) if compile_model else model
        self._precision, self._device = precision, device

    def __call__(self, images: Tensor, labels: Tensor, *, lr: float, step: int) -> None:
        """Train on `images` [B, 3, 32, 32] with `labels` [B]; `step` is the number that a failure reports."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        with autocast(self._precision, self._device):
            logits = self._model(images).float()
        loss = F.cross_entropy(logits, labels)
        failed = self._note_failure(loss.detach(), step)
        if self.scaler.is_enabled():
            # The scaler skips an update whose gradients are not finite: a factor of NaN makes them so.
            loss = loss * torch.where(failed, torch.nan, 1.0)
        else:
            self.optimizer.found_inf = failed.float()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        correct = (logits.argmax(1) == labels).sum()
        self.totals += torch.stack([loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))])

    def _note_failure(self, loss: Tensor, step: int) -> Tensor:
        """Whether this step or one before it had a non-finite loss, as a tensor."""
        first = (self._failed_at < 0) & ~loss.isfinite()
        self._failed_at.copy_(torch.where(first, step, self._failed_at))
        return self._failed_at >= 0

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
