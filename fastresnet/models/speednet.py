"""SpeedNet, the network of Jordan's cifar10-airbench (`airbench94_muon.py`), as a residual network.

Eight weighted layers: a frozen convolution that whitens patches, three stages of two 3x3 convolutions, and a linear
layer. Max pooling follows the first convolution of each stage, so that most of the arithmetic is on few pixels. The
convolutions start as identities, which shortens training. All activations are GELU. The weights of batch norms are
constant: then their biases tolerate the high learning rate of recipe `speedrun`.

Unlike airbench's, the network has a shortcut around the second convolution of the second stage. That one starts with
random weights: as an identity it would repeat the shortcut. The biases of the first layer are constants too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import BatchNorm2d

_WHITENED_BIAS = 0.6
"""Biases of the first layer. Training moves random ones to a mean of 0.5, and reaches no lower loss with them."""


class PatchWhitening(nn.Conv2d):
    """Projection of 2x2 patches on their principal components with both signs: 24 channels.

    After `fit`, the components have a variance of 1 and no correlation. Before, the filters are random. Neither filters
    nor biases are trained.
    """

    def __init__(self) -> None:
        super().__init__(3, 24, 2)
        nn.init.constant_(self.bias, _WHITENED_BIAS)  # type: ignore[arg-type]  # it has biases
        self.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set the filters from normalised `images` [N, 3, H, W]."""
        moments = torch.zeros(12, 12, dtype=torch.float64)
        for part in images.split(500):  # the patches of 5,000 images are half a gigabyte
            patches = F.unfold(part.double(), 2)
            moments += (patches @ patches.mT).mean(0) / patches.shape[2] * len(part) / len(images)
        variances, components = torch.linalg.eigh(moments)
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)  # 5e-4 as in airbench
        self.weight.copy_(torch.cat([filters, -filters]))


def create_norm(channels: int) -> BatchNorm2d:
    """Create a batch norm with weights of 1. Its running statistics follow a network that changes within few steps."""
    norm = BatchNorm2d(channels, relu=False)
    norm.weight.requires_grad_(False)
    norm.momentum = 0.4  # as in airbench
    return norm


class Stage(nn.Module):
    """A 3x3 convolution with 2x2 max pooling, and a second one on the remaining quarter of the pixels."""

    def __init__(self, in_channels: int, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = create_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = create_norm(channels)
        self.shortcut = shortcut
        start_as_identity(self.conv1)
        if not shortcut:
            start_as_identity(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, C, H, W] to [N, `channels`, H / 2, W / 2]."""
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(x), x if self.shortcut else None))


@torch.no_grad()
def start_as_identity(convolution: nn.Conv2d) -> None:
    """Make the first output channels copies of the input channels; the others keep PyTorch's random weights."""
    nn.init.dirac_(convolution.weight[: convolution.in_channels])


class SpeedNet(nn.Module):
    """Whitened patches, three stages, global max pooling and a linear layer."""

    def __init__(self, widths: tuple[int, int, int], *, num_classes: int) -> None:
        """Create a network with stages of `widths` channels."""
        super().__init__()
        self.conv1 = PatchWhitening()
        self.layer1 = Stage(self.conv1.out_channels, widths[0], shortcut=False)
        self.layer2 = Stage(widths[0], widths[1], shortcut=True)
        self.layer3 = Stage(widths[1], widths[2], shortcut=False)
        self.fc = nn.Linear(widths[2], num_classes, bias=False)
        nn.init.normal_(self.fc.weight, std=1 / widths[2])

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] of at least 16x16 pixels to logits [N, num_classes]."""
        x = self.layer3(self.layer2(self.layer1(F.gelu(self.conv1(x)))))
        return self.fc(x.amax(dim=(2, 3)))


def create_speednet(depth: int, *, widths: tuple[int, int, int], num_classes: int, **unused: Any) -> SpeedNet:
    """Create a `SpeedNet`. Its depth is fixed, and it has neither shortcut options nor stochastic depth."""
    return SpeedNet(widths, num_classes=num_classes)
