"""The data: from CIFAR-10's archives to normalised batches on the device. Knows nothing of models or training."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .errors import UsageError, check_choice
from .sampling import Augmentation, Sampler

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .store import Dataset

__version__ = "0.1.0"

PIPELINES = ("resident", "dali", "ffcv", "torchvision")
DECODERS = ("raw", "jpeg")


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One batch, on the pipeline's device."""

    images: Tensor
    """[B, 3, 32, 32] channels_last, normalised fp32, bf16 or fp16; or the bare pixels where uint8 was asked for."""
    labels: Tensor
    """[B] int64"""
    valid: int
    """How many rows are real; smaller than B only in the last evaluation batch."""


class Pipeline(Protocol):
    """Batches of one split, a pure function of (seed, epoch, step)."""

    def __len__(self) -> int:
        """Batches per epoch, on every rank."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on."""

    def close(self) -> None:
        """Let go of memory and worker processes."""


@runtime_checkable
class GatheringPipeline(Pipeline, Protocol):
    """Batches that lie on the device: a captured step gathers them itself, and needs nothing from the host."""

    def load(self, epoch: int) -> None:
        """Have `gather` give the batches of `epoch`."""

    def gather(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of batch `step`, int64 [1] on the device; always from the same memory."""


def choose_pipeline(dataset: Dataset, device: torch.device) -> tuple[str, str]:
    """The pipeline that `auto` means for `dataset` on `device`, and why.

    `resident` where the images take at most half of the free memory, which leaves the rest to the network; otherwise
    the first of `dali`, `ffcv` (if its files are there) and `torchvision` that is installed.
    """
    needed, free = dataset.train.images.nbytes + dataset.test.images.nbytes, free_memory(device)
    sizes = f"{needed / 1e9:.1f} GB of images, {free / 1e9:.1f} GB of memory free"
    if needed <= free / 2:
        return "resident", sizes
    if is_installed("nvidia.dali"):
        return "dali", f"{sizes}; DALI is installed"
    if is_installed("ffcv") and (dataset.folder / "beton.json").exists():
        return "ffcv", f"{sizes}; FFCV is installed, DALI is not"
    return "torchvision", f"{sizes}; neither DALI nor FFCV with its files is there"


def free_memory(device: torch.device) -> int:
    """Bytes that `device` has left."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration):  # Linux counts what its caches would give back
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_processors() -> int:
    """How many processors this process may use: not all of the machine's under taskset, Slurm or a cpuset."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_installed(module: str) -> bool:
    """Whether `module` could be imported, without doing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a part of its name is no package
        return False


def open_pipeline(
    name: str,
    dataset: Dataset,
    *,
    train: bool,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    augmentation: Augmentation,
    rank: int = 0,
    world_size: int = 1,
    decode: str = "raw",
) -> Pipeline:
    """Open pipeline `name` on the training or test split of `dataset`.

    `batch_size` counts the images of a step over all ranks. `dtype` is that of the images; `torch.uint8` delivers the
    augmented pixels without normalisation. Evaluation (`train=False`) is in order, without crop, flip and cutout, and
    needs no seed. With `decode="jpeg"`, `dali` reads the JPEG shards in place of the pixels. Raises `UsageError` where
    the arguments are impossible or a library is missing, `DataError` where a file that the pipeline reads is missing,
    damaged or of another data set.
    """
    check_choice("pipeline", name, PIPELINES)
    check_choice("decoder", decode, DECODERS)
    if decode == "jpeg" and name != "dali":
        raise UsageError(f"--decode jpeg is for --pipeline dali; {name} reads raw pixels.")
    if not train:
        augmentation = dataclasses.replace(augmentation, crop_padding=0, flip="none", cutout=0)
    split = dataset.train if train else dataset.test
    sampler = Sampler(size=len(split), batch_size=batch_size, train=train, seed=seed, rank=rank, world_size=world_size)
    arguments = (dataset, split, sampler, augmentation, device, dtype)
    if name == "dali":
        from .dali import DaliPipeline

        return DaliPipeline(*arguments, decode)
    if name == "ffcv":
        from .ffcv import FfcvPipeline

        return FfcvPipeline(*arguments)
    if name == "torchvision":
        from .torchvision import TorchvisionPipeline

        return TorchvisionPipeline(*arguments)
    from .resident import DevicePipeline, HostPipeline

    return (HostPipeline if device.type == "cpu" else DevicePipeline)(*arguments)
