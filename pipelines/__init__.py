"""Data: from CIFAR-10's archives to normalised batches on the device. Independent of models and training."""

from __future__ import annotations

import dataclasses
import pkgutil
from typing import TYPE_CHECKING, Literal, get_args

from .base import Pipeline, free_memory, is_installed
from .errors import UsageError, check_choice
from .sampling import Augmentation as Augmentation
from .sampling import Sampler

if TYPE_CHECKING:
    import torch

    from .store import Dataset

__version__ = "0.1.0"

PipelineName = Literal["resident", "dali", "ffcv", "torchvision"]
PIPELINES = get_args(PipelineName)
LIBRARIES = {"dali": "nvidia.dali", "ffcv": "ffcv", "torchvision": "torchvision"}
"""Modules of the libraries that pipelines need besides PyTorch."""
PACKAGES = {"dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130"), "ffcv": ("ffcv",), "torchvision": ("torchvision",)}
"""Packages that provide them: one of several."""
Decoder = Literal["raw", "jpeg"]


def choose_pipeline(dataset: Dataset, device: torch.device, decode: str = "raw") -> tuple[PipelineName, str]:
    """Resolve pipeline `auto` for `device`; return the name of the pipeline and the reason.

    Only `dali` decodes JPEG. Otherwise it is `resident` if the images take at most half of the free memory, which
    leaves the rest to the network. Else it is the first installed of `dali`, `ffcv` (with its files), `torchvision`.
    """
    if decode == "jpeg":
        return "dali", "it decodes JPEG"
    needed, free = dataset.train.images.nbytes + dataset.test.images.nbytes, free_memory(device)
    sizes = f"{needed / 1e6:,.0f} MB of images, {free / 1e9:.1f} GB of memory free"
    if needed <= free / 2:
        return "resident", sizes
    if is_installed(LIBRARIES["dali"]):
        return "dali", f"{sizes}; DALI is installed"
    if is_installed(LIBRARIES["ffcv"]) and (dataset.folder / "beton.json").exists():
        return "ffcv", f"{sizes}; FFCV is installed, DALI is not"
    return "torchvision", f"{sizes}; neither DALI nor FFCV with its files is available"


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
    needs no seed. With `decode="jpeg"`, `dali` reads the JPEG shards instead of the pixels. Raises `UsageError` on
    invalid arguments or a missing library. Raises `DataError` if a file that the pipeline reads is missing, damaged or
    of another data set.
    """
    check_choice("pipeline", name, PIPELINES)
    check_choice("decoder", decode, get_args(Decoder))
    check_choice("dtype", str(dtype).removeprefix("torch."), ("float32", "bfloat16", "float16", "uint8"))
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed {seed} is not in 0..2**63-1.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch size {batch_size!r} is not a whole number above 0.")
    if decode == "jpeg" and name != "dali":
        raise UsageError(f"--decode jpeg needs --pipeline dali; {name} reads raw pixels.")
    if not train:
        augmentation = dataclasses.replace(augmentation, crop_padding=0, flip="none", cutout=0)
    split = dataset.train if train else dataset.test
    sampler = Sampler(size=len(split), batch_size=batch_size, train=train, seed=seed, rank=rank, world_size=world_size)
    return pipeline_class(name, device)(dataset, split, sampler, augmentation, device, dtype, decode)


def pipeline_class(name: str, device: torch.device) -> type[Pipeline]:
    """Import the class of pipeline `name` and the library that it needs."""
    places = {
        "resident": "resident:HostPipeline" if device.type == "cpu" else "resident:DevicePipeline",
        "dali": "dali:DaliPipeline",
        "ffcv": "ffcv:FfcvPipeline",
        "torchvision": "torchvision:TorchvisionPipeline",
    }
    return pkgutil.resolve_name(f"{__name__}.{places[name]}")
