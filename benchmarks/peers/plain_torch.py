"""Common training loop: `DataLoader` with PIL transforms, fp32, NCHW, eager, `.item()` every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from benchmarks.peers.torchvision_dataloader import open_loader
from pipelines.store import Dataset


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
    loader = open_loader(dataset, batch_size=batch_size, device=device, dtype=torch.float32, workers=workers)
    model = model.to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def epoch(_: int) -> Iterator[None]:
        model.train()
        running_loss, correct, total = 0.0, 0, 0
        for images, labels in watch(loader):
            images = images.contiguous()  # NCHW, as a plain loader delivers it
            optimizer.zero_grad()
            outputs = model(images)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            total += labels.size(0)
            correct += outputs.argmax(1).eq(labels).sum().item()
            yield

    return epoch
