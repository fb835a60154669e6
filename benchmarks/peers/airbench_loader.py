"""airbench's `CifarLoader`, as its README shows it, but without cutout and with this benchmark's mean and deviation.

It augments a whole epoch in fp16 at the epoch's first batch, and pads by reflection. The time to the first batch
includes writing the file that it reads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import airbench
import torch
from torchvision.transforms import Normalize

from benchmarks.peers.torchvision_dataloader import OnDevice
from pipelines.store import Dataset


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> OnDevice:
    """Open a loader, see `benchmarks.peers`; it has no `workers`."""
    split = dataset.train
    data = {
        "images": torch.tensor(split.images),
        "labels": torch.tensor(split.labels, dtype=torch.int64),
        "classes": list(dataset.classes),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(data, Path(folder, "train.pt"))
        loader = airbench.CifarLoader(
            folder, train=True, aug={"flip": True, "translate": 4}, batch_size=batch_size, gpu=device
        )
    loader.normalize = Normalize([0.5] * 3, [0.5] * 3)
    return OnDevice(loader, device, dtype)
