"""Cases of the step benchmark: a network repeatedly run on one batch, and the time of its steps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import row_of, spread
from benchmarks.roofline import ByteCounter, memory_per_image, roof, seconds_between, stamp
from fastresnet.compilation import torch_compile
from fastresnet.config import CAPTURED, TrainConfig
from fastresnet.device import DTYPES, autocast, recorded, synchronize
from fastresnet.models import create_model
from fastresnet.models.batchnorm import fuse_batch_norms
from fastresnet.models.summary import flops_per_image
from fastresnet.training.execution import Execution
from fastresnet.training.kernels import choose_kernels
from fastresnet.training.optimizer import create_optimizers
from fastresnet.training.step import TrainStep
from pipelines.base import Batch, GatheringPipeline, free_memory
from pipelines.files import replacing
from pipelines.sampling import IMAGE_SIZE

MOST_STEPS = 100_000
"""Maximum number of steps in a turn; as many learning rates are allocated."""

Steps = Callable[[int], None]
"""Function that takes a number of steps; a GPU may not have finished them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """Step of a network to measure."""

    mode: str
    """Mode: `train` or `inference`."""
    model: str
    batch_size: int
    precision: str
    memory_format: str
    """Memory format: `channels_last` or `contiguous`."""
    backend: str
    """Backend: `eager`, `compile`, `capture` or `graph`."""

    @property
    def name(self) -> str:
        values = dataclasses.asdict(self) | {"batch_size": f"b{self.batch_size}"}
        return "/".join(values.values())


class TimedStep:
    """Steps of a case, ready to be measured. Raises `MemoryError` if it would not fit, and any error of PyTorch."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        self.case, self._device = case, device
        self.images_per_s: list[float] = []
        """Throughput of every turn."""
        self._kernels: dict[str, Any] = {}
        _check_memory(case, device)
        self.flops_per_image, self.bytes_per_image = _count(dataclasses.replace(case, backend="eager"), device)
        held = memory_held(device)
        began = time.perf_counter()
        self._steps = (_training if case.mode == "train" else _inference)(case, device)
        self._seconds_per_step = math.inf  # of the latest steps
        self._take(0)  # the first one includes setup
        self.prepare_s = time.perf_counter() - began
        """Seconds of compilation, recording and the first step."""
        self._take(0)
        self.memory = memory_taken(held)

    def measure(self, seconds: float) -> None:
        """Take steps for about `seconds`, after a third of that untimed."""
        self._take(seconds / 3)
        self._take(seconds)
        self.images_per_s.append(self.case.batch_size / self._seconds_per_step)

    def row(self, limits: dict[str, Any]) -> dict[str, Any]:
        """Return the figures of the case, compared with the roof that `limits` set."""
        row = step_row(self.case.name, self.case, self.images_per_s, self.prepare_s) | self.memory
        row |= {"flops_per_image": self.flops_per_image, "bytes_per_image": self.bytes_per_image} | self._kernels
        highest, bound = roof(row, limits)
        return {**row, "percent_of_roof": 100 * row["images_per_s"] / highest, "bound": bound}

    def profile(self, path: Path | None = None, steps: int = 3) -> list[tuple[str, float, float]]:
        """Profile `steps` steps; write a Chrome trace to `path`, if given. Return `kernels_of` it."""
        with profile(activities=activities(self._device)) as profiler:
            self._steps(steps)
            synchronize(self._device)
        if path is not None:
            with replacing(path) as temporary:
                profiler.export_chrome_trace(str(temporary))
        return kernels_of(profiler, self._device, steps)

    def count_kernels(self) -> None:
        """Count the kernels of a step on a GPU, for `row`."""
        if self._device.type == "cuda":
            self._kernels = {"kernels_per_step": {"calls": sum(calls for *_, calls in self.profile())}}

    def _take(self, seconds: float) -> None:
        count = steps_in(seconds, self._seconds_per_step)
        synchronize(self._device)
        begin = stamp(self._device)
        self._steps(count)
        self._seconds_per_step = seconds_between(begin, stamp(self._device)) / count


def step_row(name: str, case: Any, images_per_s: list[float], prepare_s: float) -> dict[str, Any]:
    """Return the figures of a step, with the fields of its `case`, a dataclass that has a `batch_size`."""
    ms_per_step = 1000 * case.batch_size / statistics.median(images_per_s)
    timed = {"ms_per_step": ms_per_step, "prepare_s": prepare_s}
    return {**row_of(name, "ours", images_per_s), **dataclasses.asdict(case), **timed}


class TimedParts:
    """Timed parts of a case's eager training step: forward pass, backward pass and update.

    `TrainStep` does more: metrics, learning rates, scaled losses in fp16, and a check for values that are not finite.
    """

    PARTS = ("forward", "backward", "optimizer")

    def __init__(self, case: StepCase, device: torch.device) -> None:
        self.case, self._device = case, device
        self.ms: dict[str, list[float]] = {part: [] for part in self.PARTS}
        """Milliseconds per step of every turn, by part."""
        _check_memory(case, device)
        step = _train_step(case, device)
        self._batch, self._model, (self._optimizer,) = _random_batch(case, device), step.model, step.optimizers
        for group in self._optimizer.param_groups:
            group["lr"].zero_()  # as the step does
        self._seconds_per_step = math.inf
        self._take(0), self._take(0)

    def measure(self, seconds: float) -> None:
        """Take steps for about `seconds`, after a third of that untimed."""
        self._take(seconds / 3)
        for part, ms in zip(self.PARTS, self._take(seconds), strict=True):
            self.ms[part].append(ms)

    def row(self) -> dict[str, Any]:
        """Return the figures of the parts: an entry of `splits` in a result."""
        spreads = [spread(ms, f"{part}_ms") for part, ms in self.ms.items()]
        return {"model": self.case.model, **{key: value for each in spreads for key, value in each.items()}}

    def _take(self, seconds: float) -> list[float]:
        """Take steps for `seconds`; return the milliseconds of their parts."""
        count = steps_in(seconds, self._seconds_per_step)
        synchronize(self._device)
        stamps = [self._stamped_step() for _ in range(count)]
        synchronize(self._device)
        totals = [
            sum(seconds_between(*pair) for pair in pairs)
            for pairs in zip(*(itertools.pairwise(step) for step in stamps), strict=True)
        ]
        self._seconds_per_step = sum(totals) / count
        return [1000 * total / count for total in totals]

    def _stamped_step(self) -> list[Any]:
        stamps = [stamp(self._device)]
        with autocast(self.case.precision, self._device):
            logits = self._model(self._batch.images).float()
            loss = F.cross_entropy(logits, self._batch.labels)
        stamps.append(stamp(self._device))
        loss.backward()
        stamps.append(stamp(self._device))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return [*stamps, stamp(self._device)]


def unlimited_compilation() -> AbstractContextManager:
    """Return a context in which each case compiles its own step from the same code; by default PyTorch allows 8."""
    return torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20)


def steps_in(seconds: float, seconds_per_step: float, most: int = MOST_STEPS) -> int:
    """Return the number of steps for a turn, fixed before it: nothing waits for a GPU until the last step."""
    return min(max(round(seconds / seconds_per_step), 1), most)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """List the activities to profile: the host's, and those of a GPU if there is one."""
    return [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")


def kernels_of(profiler: profile, device: torch.device, steps: int) -> list[tuple[str, float, float]]:
    """List the kernels of a profile, on a CPU its operators: name, own ms and calls per step, the slowest first."""
    on_gpu = device.type == "cuda"
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # The profiler also attributes the time of a kernel to the operator that launched it, and to enclosing regions.
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [each for each in profiler.key_averages() if each.device_type == kind and not each.is_user_annotation]
    kernels = [(each.key, getattr(each, time_of) / 1000 / steps, each.count / steps) for each in events]
    return sorted(kernels, key=lambda kernel: -kernel[1])


def trial_step(case: StepCase, device: torch.device) -> Callable[[int], None]:
    """Return a function that takes an eager step of `case` on a number of images, and restores the state."""
    step, batch = _train_step(case, device), _random_batch(case, device)
    return lambda images: step.trial(batch.images[:images], batch.labels[:images])


def _training(case: StepCase, device: torch.device) -> Steps:
    step, batch = _train_step(case, device), _random_batch(case, device)
    if device.type == "cuda":
        choose_kernels(step, batch, captured=case.backend in CAPTURED)
    execution = Execution(step, SameBatch(batch, MOST_STEPS), case.backend)
    execution.prepare(batch)

    def take(count: int) -> None:
        step.count.zero_()  # restart the learning rates
        for _ in execution.steps(0, 0, count):
            pass

    return take


def _inference(case: StepCase, device: torch.device) -> Steps:
    model, images = _network(case, device).eval(), _random_batch(case, device).images
    network = model if case.backend in ("eager", "capture") else torch_compile(model, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def predict() -> None:
        with autocast(case.precision, device):
            network(images)

    predict()
    once = recorded(predict) if case.backend in CAPTURED else predict

    def take(count: int) -> None:
        for _ in range(count):
            once()

    return take


def _network(case: StepCase, device: torch.device) -> nn.Module:
    return create_model(case.model).to(device).to(memory_format=_memory_format(case))


def _random_batch(case: StepCase, device: torch.device) -> Batch:
    images = torch.randn(case.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    images = images.to(DTYPES[case.precision], memory_format=_memory_format(case))
    return Batch(images, torch.randint(10, (case.batch_size,), device=device), case.batch_size)


def _memory_format(case: StepCase) -> torch.memory_format:
    return torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format


def _train_step(case: StepCase, device: torch.device) -> TrainStep:
    # With learning rates of 0 every step computes the same: memorising one batch leads to gradients so small that a
    # CPU takes longer for them.
    return create_step(case.model, case.precision, device, [0.0] * MOST_STEPS, _memory_format(case))


def create_step(
    model: str,
    precision: str,
    device: torch.device,
    lr_factors: Sequence[float],
    memory_format: torch.memory_format = torch.channels_last,
) -> TrainStep:
    """Create a step with the usual optimiser, and with `lr_factors` as `TrainStep` takes them."""
    network = create_model(model).to(device).to(memory_format=memory_format).train()
    return TrainStep(network, create_optimizers(network, TrainConfig()), lr_factors, precision=precision, device=device)


def _check_memory(case: StepCase, device: torch.device) -> None:
    """Raise `MemoryError` if main memory is too small: Linux would kill the program instead of refusing the memory."""
    if device.type == "cuda":
        return
    itemsize = DTYPES[case.precision].itemsize
    needed = case.batch_size * _memory_per_image(case.model, itemsize, training=case.mode == "train")
    if needed > free_memory(device):
        raise MemoryError


@functools.cache
def _memory_per_image(model: str, itemsize: int, *, training: bool) -> int:
    return memory_per_image(create_model(model), itemsize, training=training)


@functools.cache
def _count(case: StepCase, device: torch.device) -> tuple[int, float]:
    """Count the FLOPs of the eager `case`, and the bytes that its operators read and write, for one image."""
    batch = _random_batch(case, device)
    if case.mode == "train":
        step = _train_step(case, device)
        fuse_batch_norms(step.model, False)
        with ByteCounter() as counter:
            step(batch.images, batch.labels)
        flops = flops_per_image(step.model, training=True)
    else:
        model = _network(case, device).eval()
        # Inference mode would hide the parts of an operator from the counter.
        with ByteCounter() as counter, torch.no_grad(), autocast(case.precision, device):
            model(batch.images)
        flops = flops_per_image(model, training=False)
    return flops, counter.bytes / case.batch_size


class SameBatch(GatheringPipeline):
    """Pipeline of `length` equal batches, at no cost."""

    def __init__(self, batch: Batch, length: int) -> None:
        self._batch, self._length = batch, length

    def _open(self) -> None:
        """Do nothing: the batch already exists."""

    def __len__(self) -> int:
        return self._length

    def _plan(self, _: int) -> Any:
        """Do nothing: all epochs are the same."""

    def _execute(self, _: Any, start: int) -> Iterator[Batch]:
        return itertools.repeat(self._batch, self._length - start)

    def _check_files(self) -> None:
        """Do nothing: there are none."""

    def load(self, epoch: int) -> None:
        pass

    def gather(self, _: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch without a copy, for a recorded step."""
        return self._batch.images, self._batch.labels

    def close(self) -> None:
        pass


def memory_held(device: torch.device) -> int | None:
    """Return the bytes that PyTorch has reserved on a GPU, and reset their peak; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def memory_taken(held: int | None) -> dict[str, float]:
    """Return PyTorch's peak of GPU memory beyond `held`, as an entry of a row; empty on a CPU."""
    return {"gpu_memory_mb": (torch.cuda.max_memory_reserved() - held) / 1e6} if held is not None else {}
