"""ResNet-9, the shallow and wide network of Page, "How to train your ResNet", 2018 (davidcpage/cifar10-fast).

Nine weighted layers: a 3x3 convolution, three convolutions with max pooling, global max pooling and a linear layer. A
residual block follows the first and the last pooled convolution. Few layers and early pooling need little arithmetic
and few epochs. The residual blocks are those of He et al. 2015, with ReLU after the addition. Page's have it before.

The medium and the narrow network start with patch whitening, as Page's later versions and Jordan's cifar10-airbench do.
The source is Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, section 3.2. Widths are in airbench's
proportions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import BatchNorm2d
from .resnet import BasicBlock, initialize
from .stochastic_depth import linear_decay

FEATURE_SCALE = 0.125
"""Page's factor of the logits. Maxima are larger than means, and label smoothing needs small logits."""


class PatchWhitening(nn.Conv2d):
    """Projection of 2x2 patches on their principal components with both signs, and ReLU: 24 channels.

    After `fit`, the components have a variance of 1 and no correlation. Before, the filters are random. The filters are
    never trained, unlike the biases.
    """

    def __init__(self) -> None:
        super().__init__(3, 24, 2)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, 3, H, W] to [N, 24, H - 1, W - 1]."""
        return F.relu(super().forward(x), inplace=True)

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


class PooledConvolution(nn.Module):
    """A 3x3 convolution, 2x2 max pooling, then batch norm and ReLU on the remaining quarter of the pixels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, C, H, W] to [N, `channels`, H / 2, W / 2]."""
        return self.bn1(F.max_pool2d(self.conv1(x), 2))


class ResNet9(nn.Module):
    """A first layer, three stages, global max pooling and a linear layer."""

    def __init__(self, widths: tuple[int, int, int], *, num_classes: int, drop_path: float, whitening: bool) -> None:
        """Create a network with stages of `widths` channels. Without `whitening`, `conv1` has half of the first."""
        super().__init__()
        first = widths[0] // 2
        self.conv1 = PatchWhitening() if whitening else nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.Identity() if whitening else BatchNorm2d(first, relu=True)
        blocks = [
            BasicBlock(width, width, 1, linear_decay(drop_path, number, 2), shortcut="B", squeeze_excitation=False)
            for number, width in enumerate((widths[0], widths[2]))
        ]
        self.layer1 = nn.Sequential(PooledConvolution(self.conv1.out_channels, widths[0]), blocks[0])
        self.layer2 = nn.Sequential(PooledConvolution(widths[0], widths[1]))
        self.layer3 = nn.Sequential(PooledConvolution(widths[1], widths[2]), blocks[1])
        self.fc = nn.Linear(widths[2], num_classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, num_classes]."""
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(FEATURE_SCALE * x.amax(dim=(2, 3)))


def create_resnet9(depth: int, *, shortcut: str, **options: Any) -> ResNet9:
    """Create a `ResNet9` with its `options`. All its shortcuts are identities, so `shortcut` has no effect."""
    return ResNet9(**options)
