"""Training loop in the style of timm's `train.py`.

Batches of uint8 are normalised on the device. The forward pass is in bf16 (autocast) and channels-last. Nothing is
compiled. The loss is read every 50 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.peers.torchvision_dataloader import Images
from pipelines.store import Dataset

LOG_INTERVAL = 50


def open_training(
    dataset: Dataset,
    model: nn.Module,
    watch: Callable[[Iterable], Iterator],
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> Callable[[int], Iterator[None]]:
    """Open a training, see `benchmarks.peers`."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    loader = DataLoader(
        Images(dataset.train, transforms.PILToTensor()),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    model = model.to(device).to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    mean, std = (torch.full((1, 3, 1, 1), 127.5, device=device) for _ in range(2))

    def epoch(_: int) -> Iterator[None]:
        model.train()
        losses = []
        for step, (images, labels) in enumerate(watch(loader)):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            images = images.float().sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % LOG_INTERVAL == 0:
                losses.append(loss.item())
            yield

    return epoch
