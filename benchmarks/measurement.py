"""Means that all benchmarks share: spread, ratios, memory, and the limit that the hardware sets."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines import Batch, GatheringPipeline
from pipelines.sampling import EpochPlan


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Median, lowest and highest of `values` as `name`, `name_low` and `name_high`."""
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def ratio(name: str, values: Sequence[float], over: str, others: Sequence[float]) -> dict[str, Any]:
    """Divide `values` by `others`' figures, round by round: machines drift, ratios less so.

    Of the rounds that both have had: one may be a turn ahead.
    """
    ratios = [value / other for value, other in zip(values, others, strict=False)]
    return {"name": name, "over": over, "median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


class SameBatch(GatheringPipeline):
    """A pipeline of `length` batches that costs nothing."""

    def __init__(self, batch: Batch, length: int) -> None:
        self._batch, self._length = batch, length

    def _open(self) -> None:
        """Nothing is read."""

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return itertools.repeat(self._batch, self._length - start)

    def _execute(self, plan: EpochPlan, start: int) -> Iterator[Batch]:
        raise NotImplementedError

    def load(self, epoch: int) -> None:
        pass

    def gather(self, _: Tensor) -> tuple[Tensor, Tensor]:
        """A recorded step reads the batch where it lies."""
        return self._batch.images, self._batch.labels

    def close(self) -> None:
        pass


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph, after three runs on a stream of their own (as PyTorch's notes on CUDA graphs ask)."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def stamp(device: torch.device) -> Any:
    """Now; on a GPU, when it comes to this point of its work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Waits for the second stamp."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _shortest(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Seconds that the fastest of so many runs of `work` takes; a GPU has the next one before it is done with one."""
    stamps = [stamp(device)]
    for _ in range(times):
        work()
        stamps.append(stamp(device))
    return min(seconds_between(*pair) for pair in itertools.pairwise(stamps))


def copy_bandwidth(device: torch.device, size: int = 256 << 20) -> float:
    """Bytes a second that a large copy reads and writes together on `device`; the best of 6."""
    source = torch.ones(size, dtype=torch.uint8, device=device)  # pages never written would all be one cached page
    target = torch.empty_like(source)
    return 2 * size / _shortest(lambda: target.copy_(source), device, 6)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.05, largest: int = 8192) -> float:
    """Floating-point operations a second of a large square matrix product, a multiply-add counted as 2.

    The best of all sizes from 256 on, doubled until one product takes `seconds`: what fills a GPU would keep a CPU busy
    for minutes, above all in a type that it has to emulate.
    """
    best, size, shortest = 0.0, 256, 0.0
    while shortest < seconds and size <= largest:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        shortest = _shortest(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), device, 4)
        best, size = max(best, 2 * size**3 / shortest), 2 * size
    return best


def memory_held(device: torch.device) -> int | None:
    """Bytes that PyTorch keeps on a GPU for what is in use; the highest is counted from here on. None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def memory_taken(held: int | None) -> dict[str, float]:
    """Return the most that PyTorch has taken of a GPU beyond `held`, an entry of a result; empty on a CPU."""
    return {"gpu_memory_mb": (torch.cuda.max_memory_reserved() - held) / 1e6} if held is not None else {}
