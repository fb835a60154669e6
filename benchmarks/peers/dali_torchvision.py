"""DALI's replacements of torchvision's v2 transforms, on whole batches; crop and flip differ between images.

`Compose` uses a CUDA stream even for its operators on the CPU, so it needs an NVIDIA driver.
"""

from __future__ import annotations

import nvidia.dali.experimental.torchvision as v2
import torch
from torch import Tensor

from benchmarks.peers.torchvision_dataloader import OnDevice
from benchmarks.peers.torchvision_v2_batch import WholeBatches
from pipelines.store import Dataset


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> OnDevice:
    """Open a loader, see `benchmarks.peers`; `workers` is the number of DALI's threads."""
    place = "gpu" if device.type == "cuda" else "cpu"
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4, device=place),
            v2.RandomHorizontalFlip(device=place),
            v2.Normalize([127.5] * 3, [127.5] * 3, device=place),
        ],
        batch_size=batch_size,
        num_threads=workers,
    )

    def dense(pixels: Tensor) -> Tensor:
        return transform(pixels.contiguous())

    return OnDevice(WholeBatches(dataset.train, batch_size, device, dense), device, dtype)
