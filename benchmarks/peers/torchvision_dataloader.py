"""Random transforms of torchvision on PIL images, one by one, in a `DataLoader`, as most CIFAR repositories do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from pipelines.store import Dataset, Split


class Images(torch.utils.data.Dataset):
    """Images as in `torchvision.datasets.CIFAR10`, from the store's arrays: cropped, flipped, then `to_tensor`."""

    def __init__(self, split: Split, *to_tensor: Callable) -> None:
        self._split = split
        self._transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *to_tensor]
        )

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._split.images[index])), int(self._split.labels[index])


class NormalizedImages(Images):
    """Images as float tensors, normalised one by one."""

    def __init__(self, split: Split) -> None:
        super().__init__(split, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3))


class OnDevice:
    """Batches of `loader`, moved to `device` and converted to `dtype` and channels_last."""

    def __init__(self, loader: Iterable, device: torch.device, dtype: torch.dtype) -> None:
        self._loader, self._device, self._dtype = loader, device, dtype

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._loader:
            yield (
                images.to(self._device, self._dtype, non_blocking=True, memory_format=torch.channels_last),
                labels.to(self._device, non_blocking=True),
            )


def open_loader(
    dataset: Dataset, *, batch_size: int, device: torch.device, dtype: torch.dtype, workers: int
) -> OnDevice:
    """Open a loader, see `benchmarks.peers`; `workers` 0 loads in this process."""
    loader = DataLoader(
        NormalizedImages(dataset.train),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    return OnDevice(loader, device, dtype)
