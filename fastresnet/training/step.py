"""Optimisation step: forward, loss, backward, clipping, update, averaging and metrics, without waits for the device."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastresnet.checkpoint import take_prefix, with_prefix
from fastresnet.compilation import torch_compile
from fastresnet.device import DTYPES, autocast
from fastresnet.distributed import SINGLE, World
from fastresnet.models.batchnorm import compiler_options, fuse_batch_norms
from fastresnet.training.cast_weights import CastWeights
from fastresnet.training.loss import CrossEntropy
from fastresnet.training.mixing import Mixer
from fastresnet.training.optimizer import JointUpdate, Muon, load_optimizer_state, optimizer_state

MAX_OVERFLOWS = 32
"""Number of consecutive fp16 overflows that is a failure: the scale has fallen from 2**16 to 2**-16 by then."""


class TrainStep:
    """Optimisation step, which sums its metrics on the device.

    Its index and all learning rates are tensors there too: a step captured as a CUDA graph needs nothing from the host.
    A loss or gradient that is not finite cancels this update and all later ones on the device, and `failed_at` returns
    its step. So the steady loop need not synchronise (as in torchtitan's `trainer.py`). In fp16 the gradient scaler
    handles overflows: it skips the update, which is counted.
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
        class_weights: Tensor | None = None,
        accumulate: int = 1,
        mixer: Mixer | None = None,
        world: World = SINGLE,
        batch_size: int = 0,
    ) -> None:
        """Create a step; see `TrainConfig` for most arguments, which 0 turns off.

        `lr_factors` has, for each step of the run, a factor of the `peak_lr` of each parameter group. `class_weights`
        [classes] are factors of the losses. `batch_size` counts the images of all ranks, and is needed if there is more
        than one.
        """
        self._world = world
        if device.type == "cpu":
            fuse_batch_norms(model)
        # Several ranks reduce the gradients of the network's own weights.
        self._cast = (
            CastWeights(model, DTYPES[precision])
            if device.type == "cuda" and precision != "fp32" and world.is_single
            else None
        )
        self._network = world.parallel(model) if self._cast is None else self._cast.model
        rows = world.rows(batch_size)
        # With this weight, the mean of the ranks' gradients is that of all images, even if ranks differ by one image.
        self._weight = 1.0 if world.is_single else (rows.stop - rows.start) * world.world_size / batch_size
        self.model, self.optimizers = model, list(optimizers)
        self._joint_update = JointUpdate(self.optimizers)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        if not self.scaler.is_enabled():  # which sets this itself
            self._joint_update.found_inf = torch.zeros((), device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of steps taken, which is the index of the next one."""
        self._first_row, self._parts = rows.start, accumulate
        self.row = torch.full((1,), rows.start, dtype=torch.int64, device=device)
        """Row in the whole batch, over all ranks, of the first image that is computed."""
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        """Sum of the losses, correct predictions and images since `reset`, of this rank."""
        self.overflows = torch.zeros(2, dtype=torch.int64, device=device)
        """Updates skipped because fp16 gradients overflowed: since `reset`, and consecutive ones."""
        self.averaged = copy.deepcopy(model).requires_grad_(False) if ema_decay else None
        """Exponential moving average of parameters and buffers, if enabled."""
        self._average = get_ema_multi_avg_fn(ema_decay)
        self._failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        groups = self._joint_update.param_groups
        rates = [[group["peak_lr"] * factor for group in groups] for factor in lr_factors]
        self._schedule, self._rates = torch.tensor(rates, device=device), torch.empty(1, len(groups), device=device)
        for group, rate in zip(groups, self._rates[0], strict=True):
            group["lr"] = rate
        self._precision, self._device, self._clip_norm = precision, device, clip_norm
        self._loss, self.mixer = CrossEntropy(label_smoothing, class_weights), mixer
        self.compiled = False
        """Use of torch.compile; the first such step compiles."""
        self.side: int | None = None
        """Height and width to which images are shrunk, in pixels; None leaves them as they are."""

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on `images` [B, 3, 32, 32], shrunk to `side`, with `labels` [B]."""
        torch.index_select(self._schedule, 0, self.count, out=self._rates)
        if self._cast is not None:
            self._cast.refresh()
        loss, correct = self._backward(images, labels) if self._parts == 1 else self._backward_in_parts(images, labels)
        norm = self._clip()
        account = self._compiled_account if self.compiled and self._device.type == "cuda" else self._account
        account(loss, norm, correct, len(labels))
        self.scaler.step(self._joint_update)  # type: ignore[arg-type]
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        if self.averaged is not None:
            _update_average(self.averaged, self.model, self._average, self.count)

    def _backward_in_parts(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients as `_backward` does, for equal parts of the images one after the other."""
        losses, hits, first_row = list[Tensor](), list[Tensor](), self._first_row
        for part, expected in zip(images.chunk(self._parts), labels.chunk(self._parts), strict=True):
            self.row.fill_(first_row)
            loss, correct = self._backward(part, expected, add=bool(losses))
            losses.append(loss)
            hits.append(correct)
            first_row += len(part)
        return torch.stack(losses).mean(), torch.stack(hits).sum()

    def _backward(self, images: Tensor, labels: Tensor, *, add: bool = False) -> tuple[Tensor, Tensor]:
        """Compute the gradients, or `add` them to those that are there; return the mean loss and the hits."""
        with autocast(self._precision, self._device):
            loss, correct = (self._compiled if self.compiled else self._loss_and_hits)(images, labels)
        if self.scaler.is_enabled():
            # The scaler skips an update whose gradients are not finite: a factor of NaN makes them so.
            loss = loss * torch.where(self._record_failure(~loss.detach().isfinite()), torch.nan, 1.0)
        weight = self._weight / self._parts
        self.scaler.scale(loss * weight if weight != 1 else loss).backward()
        if self._cast is not None:
            self._cast.collect_gradients(add=add)
        return loss.detach(), correct

    def _clip(self) -> Tensor:
        """Clip the gradients, if enabled; return their norm before."""
        if self._clip_norm:
            self.scaler.unscale_(self._joint_update)  # type: ignore[arg-type]
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self._clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self._clip_norm, norm, foreach=True)
        return norm

    def _account(self, loss: Tensor, norm: Tensor, correct: Tensor, size: int) -> None:
        """Add the metrics of this step and count it; cancel its update if loss or gradients are not finite."""
        if self._precision == "fp16":
            finite = norm.isfinite()
            self.overflows += (~finite).long()
            self.overflows[1] *= ~finite
            self._record_failure(self.overflows[1] >= MAX_OVERFLOWS)
        else:
            # Their sum is tested: uncompiled, a test takes four kernels.
            self._joint_update.found_inf.copy_(self._record_failure(~(norm + loss).isfinite()))
        self.totals += torch.stack([loss.double() * size, correct, torch.full_like(correct, size)])
        self.count += 1

    def _loss_and_hits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean loss and the number of correct predictions."""
        if self.mixer is None:
            logits = self._network(shrunk(images, self.side)).float()
            loss = self._loss.mean(logits, labels)
        else:
            images, others, share = self.mixer(images, labels, self.count, self.row)
            logits = self._network(shrunk(images, self.side)).float()
            loss = (share * self._loss.each(logits, labels) + (1 - share) * self._loss.each(logits, others)).mean()
            labels = torch.where(share < 0.5, others, labels)
        return loss, (logits.argmax(1) == labels).sum()

    @functools.cached_property
    def _compiled(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Forward pass, and with it the backward pass, as one graph: a graph break is an error.

        With several ranks it is one graph for each bucket of gradients. A bucket is exchanged during the backward pass
        of the next one.
        """
        return torch_compile(
            self._loss_and_hits, fullgraph=self._world.is_single, dynamic=False, options=compiler_options(self._device)
        )

    @functools.cached_property
    def _compiled_account(self) -> Callable[[Tensor, Tensor, Tensor, int], None]:
        return torch_compile(self._account, fullgraph=True, dynamic=False)

    def _record_failure(self, failed: Tensor) -> Tensor:
        """Record this step if it `failed`; return, as a tensor, True if this or an earlier one did."""
        first = (self._failed_at < 0) & failed
        self._failed_at.copy_(torch.where(first, self.count[0], self._failed_at))
        return self._failed_at >= 0

    @property
    def eval_model(self) -> nn.Module:
        """Network to evaluate and to save: the average, if enabled."""
        return self.model if self.averaged is None else self.averaged

    def _tensors(self) -> dict[str, Tensor]:
        """Name the tensors that steps change and checkpoints keep."""
        averaged = {} if self.averaged is None else with_prefix("averaged", self.averaged.state_dict())
        return {
            **with_prefix("model", self.model.state_dict()),
            **with_prefix("optimizer", optimizer_state(self.optimizers, self.model)),
            **averaged,
            "totals": self.totals,
            "overflows": self.overflows,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Collect the tensors from which `load_state_dict` continues, with the totals of all ranks.

        All ranks must call it together.
        """
        return {**self._tensors(), "totals": self._world.sum(self.totals.clone())}

    def load_state_dict(self, state: dict[str, Tensor], *, steps: int, scaler: dict[str, Any]) -> None:
        """Continue from `state` after `steps` steps. An empty `scaler` leaves the gradient scaler as it is."""
        self.model.load_state_dict(take_prefix("model", state))
        load_optimizer_state(self.optimizers, self.model, take_prefix("optimizer", state))
        if self.averaged is not None:
            self.averaged.load_state_dict(take_prefix("averaged", state))
        self.totals.copy_(state["totals"] if self._world.is_main else torch.zeros(()))
        self.overflows.copy_(state["overflows"])
        self.count.fill_(steps)
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the state after the block: for trial steps, which compile and measure. Waits for the device."""
        tensors = [*self._tensors().values(), self.count, self._failed_at]
        saved, scaler = [tensor.clone() for tensor in tensors], self.scaler.state_dict()
        try:
            yield
        finally:
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
            if scaler:
                self.scaler.load_state_dict(scaler)
                self.scaler._per_optimizer_states.clear()  # of a step that has failed
            for network in (self.model, self._network):
                network.zero_grad(set_to_none=True)

    def use_kernels(self, own: bool) -> None:
        """Use this program's kernels or PyTorch's, in all steps from now on but those of a captured graph."""
        fuse_batch_norms(self.model, own)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon) and self._device.type == "cuda":
                optimizer.use_kernels(own)

    def trial(self, images: Tensor, labels: Tensor) -> None:
        """Take a step and restore the state."""
        with self.restored():
            self(images, labels)

    def failed_at(self) -> int | None:
        """Return the first step whose loss or gradients were not finite, or None. Waits for the device."""
        step = int(self._failed_at)
        return None if step < 0 else step

    def metrics(self) -> tuple[float, float]:
        """Return mean loss and accuracy in percent since `reset`. Waits for the device."""
        loss, correct, images = self.totals.tolist()
        return loss / max(images, 1), 100 * correct / max(images, 1)

    def reset(self) -> None:
        """Reset the sums at the start of an epoch."""
        self.totals.zero_()
        self.overflows[0] = 0


def shrunk(images: Tensor, side: int | None) -> Tensor:
    """Shrink `images` [B, 3, 32, 32] to `side` pixels, if given."""
    if side in (None, images.shape[-1]):
        return images
    return F.interpolate(images, size=side, mode="bilinear")


def _update_average(averaged: nn.Module, model: nn.Module, average: Callable[..., None], count: Tensor) -> None:
    """Move the state of `averaged` towards that of `model` by `average`, after `count` steps."""
    pairs = list(zip(averaged.state_dict().values(), model.state_dict().values(), strict=True))
    smooth = [(old, new) for old, new in pairs if old.is_floating_point()]
    average([old for old, _ in smooth], [new for _, new in smooth], count)
    counts = [(old, new) for old, new in pairs if not old.is_floating_point()]  # batch norm's, of batches
    if counts:
        torch._foreach_copy_([old for old, _ in counts], [new for _, new in counts])
