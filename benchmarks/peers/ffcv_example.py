"""FFCV's own pipeline for CIFAR-10, as its example (`examples/cifar/train_cifar.py`) composes it.

Numba transforms run on the CPU; torch converts and normalises on the device. Cutout is left out, and translations are
of up to 4 pixels.
"""

from __future__ import annotations

import torch
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import Convert, RandomHorizontalFlip, RandomTranslate, Squeeze, ToDevice, ToTensor, ToTorchImage
from torchvision.transforms import Normalize

from pipelines.store import Dataset


def open_loader(dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int) -> Loader:
    """Open a loader, see `benchmarks.peers`; `workers` is the number of numba's threads."""
    move = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    to_torch = [ToTensor(), *move, ToTorchImage(), Convert(dtype), Normalize([127.5] * 3, [127.5] * 3)]
    return Loader(
        str(dataset.folder / "train.beton"),
        batch_size=batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=4), *to_torch],
            "label": [IntDecoder(), ToTensor(), *move, Squeeze()],
        },
    )
