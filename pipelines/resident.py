"""The whole split stays in memory, on the CPU or the GPU, and every batch is gathered from it."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import Batch
from .augment import Augment
from .native import create_augment
from .sampling import Array, Augmentation, Draws, Sampler, draw
from .store import Dataset, Split


@dataclass(frozen=True, slots=True)
class _Plan:
    """What makes the batches of an epoch."""

    rows: Array
    """int64 [steps, B], rows of the store."""
    draws: Draws
    """[steps, B]"""
    labels: Array
    """int64 [steps, B]"""

    @classmethod
    def of(cls, epoch: int, ids: Array, labels: Array, sampler: Sampler, augmentation: Augmentation) -> _Plan:
        rows = ids[sampler.positions(epoch, ids)]
        return cls(rows, draw(sampler.seed, epoch, rows, augmentation), labels[rows])

    def tensors(self) -> list[Tensor]:
        columns: list[Tensor] = []
        self.draws.map(columns.append)
        return [self.rows, *columns, self.labels]


class HostPipeline:
    """On a CPU the images are the store's own memory-mapped pages; threads make the batches ahead of time."""

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        sampler: Sampler,
        augmentation: Augmentation,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._images, self._sampler = np.asarray(split.images), sampler
        ids, labels = np.asarray(split.ids), np.asarray(split.labels)
        self._plan = functools.partial(_Plan.of, ids=ids, labels=labels, sampler=sampler, augmentation=augmentation)
        self._augment = create_augment(dataset, augmentation, device, dtype)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, "resident")
        self._planned: tuple[int, Future[_Plan]] = (-1, Future())

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        plan = self._plan_ahead(epoch)
        labels = torch.as_tensor(plan.labels)
        jobs = (functools.partial(self._batch, plan, labels[step], step) for step in range(start, len(self)))
        return _ahead(jobs, self._pool, self._threads + 1)

    def _plan_ahead(self, epoch: int) -> _Plan:
        """The plan, begun when the epoch before began: its 5 ms are the time of 7,000 images."""
        planned_epoch, plan = self._planned
        self._planned = epoch + 1, self._pool.submit(self._plan, epoch + 1)
        return plan.result() if planned_epoch == epoch else self._plan(epoch)

    def _batch(self, plan: _Plan, labels: Tensor, step: int) -> Batch:
        images = self._augment(self._images, plan.rows[step], plan.draws.of(step))
        return Batch(images, labels, self._sampler.valid(step))

    def close(self) -> None:
        self._pool.shutdown()
        del self._images


def _ahead(jobs: Iterator[Callable[[], Batch]], pool: ThreadPoolExecutor, depth: int) -> Iterator[Batch]:
    """The results of `jobs` in their order, with `depth` of them in the making."""
    pending = deque(pool.submit(job) for job in itertools.islice(jobs, depth))
    while pending:
        batch = pending.popleft().result()
        pending.extend(pool.submit(job) for job in itertools.islice(jobs, 1))
        yield batch


class DevicePipeline:
    """On a GPU images, order and augmentation parameters are tensors there: a step needs nothing from the host.

    `load` and `gather` are for a captured step, which is replayed with another epoch's plan in the same memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        sampler: Sampler,
        augmentation: Augmentation,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._images, self._labels, self._ids = (
            torch.tensor(np.asarray(array), device=device) for array in (split.images, split.labels, split.ids)
        )
        self._sampler, self._augmentation = sampler, augmentation
        self._augment = Augment(dataset, augmentation, device, dtype)
        self._loaded = self._plan(0)

    def __len__(self) -> int:
        return len(self._sampler)

    def _plan(self, epoch: int) -> _Plan:
        return _Plan.of(epoch, self._ids, self._labels, self._sampler, self._augmentation)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        plan = self._plan(epoch)
        for step in range(start, len(self)):
            images = self._augment(self._images, plan.rows[step], plan.draws.of(step))
            yield Batch(images, plan.labels[step], self._sampler.valid(step))

    def load(self, epoch: int) -> None:
        """Put the plan of `epoch` where `gather` reads it."""
        for loaded, value in zip(self._loaded.tensors(), self._plan(epoch).tensors(), strict=True):
            loaded.copy_(value)

    def gather(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of batch `step` of the loaded epoch; `step` is int64 [1] on the device."""
        rows, labels = (array[step].squeeze(0) for array in (self._loaded.rows, self._loaded.labels))
        draws = self._loaded.draws.map(lambda column: column[step].squeeze(0))
        return self._augment(self._images, rows, draws), labels

    def close(self) -> None:
        del self._images, self._labels, self._ids, self._loaded
