"""FFCV: its `Loader` reads `.beton` files in our order and copies them to the device, where we augment them.

FFCV's augmentations draw from random generators that cannot be seeded, one for each thread. So it delivers the raw
pixels, and `augment` does the rest on the device.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from queue import Empty
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from .augment import create_augment
from .base import Batch, Pipeline
from .errors import RunError, UsageError
from .formats import open_derived
from .prng import Array
from .sampling import EpochPlan
from .store import Split

_threads = torch.get_num_threads()
try:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import ToDevice, ToTensor
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, handle_sample
    from numba import config as numba_config
except (ImportError, OSError) as error:  # a missing shared library raises OSError
    raise UsageError(
        f"FFCV is not installed ({error}). It is built from source: apt-get install libopencv-dev libturbojpeg0-dev "
        "pkg-config g++, then pip install 'fastresnet[ffcv]'"
    ) from None
finally:
    torch.set_num_threads(_threads)  # importing FFCV sets it to 1

TIMEOUT_S = 300.0
"""Longest wait for a batch. The first one takes half a minute, while numba compiles."""


# --- writing -----------------------------------------------------------------------------------------------------


def write_beton(split: Split, path: Path, report: Callable[[int], None]) -> None:
    """Write the samples of `split`, in their order and uncompressed, to `path`. Raises `OSError`."""
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    _Writer(str(path), fields, page_size=4 * MIN_PAGE_SIZE, num_workers=1).write(split, report)


class _Writer(DatasetWriter):
    """FFCV's writer, in this process: if one of FFCV's own worker processes fails, the parent waits forever."""

    metadata_sm: SharedMemory | SimpleNamespace

    def write(self, split: Split, report: Callable[[int], None]) -> None:
        self.num_samples = len(split.labels)
        self.prepare()
        self.metadata_sm.close()
        self.metadata_sm.unlink()
        metadata = np.zeros(self.num_samples, dtype=self.metadata_type)
        self.metadata_sm = SimpleNamespace(buf=metadata)  # one process needs no shared memory
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        with allocator:
            for row, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
                sample = (np.asarray(image), int(label))
                handle_sample(sample, row, metadata.dtype.names, metadata, allocator, self.fields)
                if row % 1000 == 999:
                    report(row + 1)
        self.finalize(allocator.allocations)
        # FFCV does not detect a write that a full disk truncated.
        if self.header["alloc_table_ptr"] != allocator.offset + allocator.next_page_written.value * self.page_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.fname)


# --- reading -----------------------------------------------------------------------------------------------------


class FfcvPipeline(Pipeline):
    """Pipeline that prefetches batches with FFCV's threads and augments them on the target device."""

    def _open(self) -> None:
        (path,) = open_derived(self._dataset, "beton", self._split.name)
        self._file, self._bytes = path, path.stat().st_size
        self._order = _Order(self._plan(0).rows)  # FFCV reads an order at construction
        move = [ToTensor(), ToDevice(self._device)] if self._device.type == "cuda" else [ToTensor()]
        self._loader = _Loader(
            str(path),
            batch_size=self._sampler.rows_per_batch,
            # FFCV sets torch's threads to this number too, and numba accepts no more than it has
            num_workers=min(torch.get_num_threads(), numba_config.NUMBA_NUM_THREADS),
            order=self._order,
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder(), *move], "label": [IntDecoder(), *move]},
        )
        self._augment = create_augment(self._dataset, self._augmentation, self._device, self._dtype)
        self._batches: _EpochIterator | None = None

    def _check_files(self) -> None:
        if self._file.stat().st_size < self._bytes:
            open_derived(self._dataset, "beton", self._split.name)  # which raises, with the remedy

    def _execute(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        self._order.rows = plan.rows[start:]
        if start >= len(self):
            return
        draws = plan.draws
        all_rows: Array = np.arange(plan.rows.shape[1])
        if self._device.type != "cpu":
            draws, all_rows = draws.map(self._to_device), self._to_device(all_rows)
        batches = self._batches = iter(self._loader)
        try:
            for step, (images, labels) in enumerate(batches, start):
                source = images.numpy() if self._device.type == "cpu" else images
                # FFCV will overwrite the memory of `images` and `labels`: only copies may be used after this line.
                augmented, labels = self._augment(source, all_rows, draws.of(step)), labels.flatten().clone()
                yield Batch(augmented, labels, self.valid(step))
        finally:
            batches.stop()

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.stop()  # references to the epoch may remain, for example in a traceback
        del self._loader, self._batches


class _Order(TraversalOrder):
    """Order of our sampler, instead of FFCV's own."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __call__(self, _: Loader) -> _Order:
        return self  # FFCV calls a class or, as here, an object

    def sample_order(self, _: int) -> np.ndarray:
        return self.rows.reshape(-1).astype(np.uint64)


class _Loader(Loader):
    def __iter__(self) -> _EpochIterator:
        Compiler.set_num_threads(self.num_workers)
        return _EpochIterator(self, self.next_traversal_order())


class _EpochIterator(EpochIterator):
    """FFCV's iterator, which reports its thread's error instead of waiting forever, and can end the thread."""

    def __init__(self, loader: Loader, order: np.ndarray) -> None:
        self._error: BaseException | None = None
        self._slot: int | None = None
        self._hangs = False
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # noqa: BLE001  reported to the consumer, in the other thread
            self._error = error
            self.output_queue.put(None)

    def __next__(self) -> tuple[Tensor, ...]:
        if IS_CUDA and self._slot is not None:
            # Once the next batch is taken, FFCV may overwrite the pinned memory of this one, which it protects only by
            # the order on the GPU: a copy still queued there would transfer the wrong images.
            self.cuda_streams[self._slot].synchronize()
        try:
            result = self.output_queue.get(timeout=TIMEOUT_S)
        except Empty:
            self._hangs = True
            raise RunError(f"FFCV has delivered nothing for {TIMEOUT_S:.0f} s.") from None
        if result is None:
            if self._error is not None:
                raise RunError(f"FFCV's loader failed: {self._error!r}") from self._error
            raise StopIteration
        self._slot, batch = result
        if IS_CUDA:
            self.current_stream.wait_stream(self.cuda_streams[self._slot])
        return batch

    def stop(self) -> None:
        """End the thread, which may be waiting for space in the queue; do not wait for one that hangs."""
        self.terminate_event.set()
        while self.is_alive() and not self._hangs:
            while not self.output_queue.empty():
                self.output_queue.get_nowait()
            self.join(timeout=0.01)
        if IS_CUDA:
            for stream in self.cuda_streams:  # a copy still queued would read from freed memory
                stream.synchronize()
        self.close()
