"""Whole split in memory, on the CPU or the GPU: every batch is gathered from it."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .augment import Augment, create_augment
from .base import Batch, GatheringPipeline, Pipeline
from .sampling import EpochPlan


class HostPipeline(Pipeline):
    """Pipeline for a CPU: images are the store's own memory-mapped pages, and threads prefetch the batches."""

    def _open(self) -> None:
        self._images = np.asarray(self._split.images)
        self._augment = create_augment(self._dataset, self._augmentation, self._device, self._dtype)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, "resident")
        self._planned: tuple[int, Future[EpochPlan]] = (-1, Future())

    def _plan(self, epoch: int) -> EpochPlan:
        """Return the plan, computed since the start of the previous epoch: its 5 ms are the time of 7,000 images."""
        planned_epoch, plan = self._planned
        self._planned = epoch + 1, self._pool.submit(super()._plan, epoch + 1)
        return plan.result() if planned_epoch == epoch else super()._plan(epoch)

    def _execute(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        labels = torch.as_tensor(plan.labels)
        jobs = (functools.partial(self._batch, plan, labels[step], step) for step in range(start, len(self)))
        return _prefetched(jobs, self._pool, self._threads + 1)

    def _batch(self, plan: EpochPlan, labels: Tensor, step: int) -> Batch:
        images = self._augment(self._images, plan.rows[step], plan.draws.of(step))
        return Batch(images, labels, self.valid(step))

    def close(self) -> None:
        self._pool.shutdown()
        del self._images


def _prefetched(jobs: Iterator[Callable[[], Batch]], pool: ThreadPoolExecutor, depth: int) -> Iterator[Batch]:
    """Yield the results of `jobs` in order, with `depth` of them in progress."""
    pending = deque(pool.submit(job) for job in itertools.islice(jobs, depth))
    while pending:
        batch = pending.popleft().result()
        pending.extend(pool.submit(job) for job in itertools.islice(jobs, 1))
        yield batch


class DevicePipeline(GatheringPipeline):
    """Pipeline for a GPU, which holds images, order and augmentation parameters: a step needs nothing from the host.

    `load` and `gather` serve a captured step, which is replayed with each epoch's plan in the same memory.
    """

    def _open(self) -> None:
        self._images, self._labels, self._ids = (
            torch.tensor(np.asarray(array), device=self._device)
            for array in (self._split.images, self._split.labels, self._split.ids)
        )
        self._augment = Augment(self._dataset, self._augmentation, self._device, self._dtype)
        self._loaded = self._plan(0)

    def _plan(self, epoch: int) -> EpochPlan:
        return self._sampler.plan(epoch, self._ids, self._labels, self._augmentation)

    def _execute(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        for step in range(start, len(self)):
            images = self._augment(self._images, plan.rows[step], plan.draws.of(step))
            yield Batch(images, plan.labels[step], self.valid(step))

    def load(self, epoch: int) -> None:
        """Copy the plan of `epoch` to the memory that `gather` reads."""
        for loaded, value in zip(self._loaded.columns(), self._plan(epoch).columns(), strict=True):
            loaded.copy_(value)

    def gather(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels of batch `step` of the loaded epoch; `step` is int64 [1] on the device."""
        rows, labels = (array[step].squeeze(0) for array in (self._loaded.rows, self._loaded.labels))
        draws = self._loaded.draws.map(lambda column: column[step].squeeze(0))
        return self._augment(self._images, rows, draws), labels

    def close(self) -> None:
        del self._images, self._labels, self._ids, self._loaded
