"""Batches, the constructor that all pipelines share, and facts about the host."""

from __future__ import annotations

import abc
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import UsageError
from .sampling import Augmentation, EpochPlan, Sampler

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self

    from .store import Dataset, Split


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch, on the pipeline's device."""

    images: Tensor
    """Images [B, 3, 32, 32] channels_last, normalised fp32, bf16 or fp16; raw pixels if uint8 was requested."""
    labels: Tensor
    """Labels [B], int64."""
    valid: int
    """Number of real rows; smaller than B only in the last evaluation batch."""


class Pipeline(abc.ABC):
    """Batches of one split, a pure function of (seed, epoch, step).

    A subclass opens its files in `_open` and executes plans in `_execute`: `plan.rows` index `self._split.images`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        sampler: Sampler,
        augmentation: Augmentation,
        device: torch.device,
        dtype: torch.dtype,
        decode: str = "raw",
    ) -> None:
        """Open a pipeline; see `pipelines.open_pipeline`, which checks the arguments."""
        self._dataset, self._split, self._sampler, self._augmentation = dataset, split, sampler, augmentation
        self._device, self._dtype, self._decode = device, dtype, decode
        self._open()

    def __len__(self) -> int:
        """Return the batches per epoch, the same on every rank."""
        return len(self._sampler)

    def valid(self, step: int) -> int:
        """Count the real rows of batch `step`."""
        return self._sampler.valid(step)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of `epoch` from step `start` on. Raises `UsageError` if they are no such numbers."""
        if epoch < 0 or not 0 <= start <= len(self):
            steps = f"steps 0..{len(self) - 1}"
            raise UsageError(f"epoch {epoch} from step {start} on: epochs begin at 0, and have {steps}.")
        for batch in self._execute(self._plan(epoch), start):
            yield batch
            self._check_files()

    def _plan(self, epoch: int) -> EpochPlan:
        ids, labels = np.asarray(self._split.ids), np.asarray(self._split.labels)
        return self._sampler.plan(epoch, ids, labels, self._augmentation)

    def _check_files(self) -> None:
        """Raise `DataError` if a mapped file was truncated: to read the missing part would end the process."""
        self._split.check_whole()

    @abc.abstractmethod
    def _open(self) -> None:
        """Open files, start threads and processes."""

    @abc.abstractmethod
    def _execute(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        """Yield batches from step `start` on: `plan.rows[step]`, `plan.draws.of(step)` and `plan.labels[step]`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release memory and worker processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GatheringPipeline(Pipeline):
    """Pipeline with its data on the device: a captured step gathers batches itself, and needs nothing from the host."""

    @abc.abstractmethod
    def load(self, epoch: int) -> None:
        """Make `gather` return the batches of `epoch`."""

    @abc.abstractmethod
    def gather(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels of batch `step`, int64 [1] on the device; always from the same memory."""


def free_memory(device: torch.device) -> int:
    """Return the free memory of `device` in bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def usable_processors() -> int:
    """Count the processors that this process may use: fewer than the machine's under taskset, Slurm or a cpuset."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_installed(module: str) -> bool:
    """Return True if `module` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is not a package
        return False
