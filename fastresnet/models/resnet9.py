"""ResNet-9, the shallow and wide network of Page, "How to train your ResNet", 2018 (davidcpage/cifar10-fast).

Nine weighted layers: a 3x3 convolution, three convolutions with max pooling, global max pooling and a linear layer. A
residual block follows the first and the last pooled convolution. Few layers and early pooling need little arithmetic
and few epochs. The residual blocks are those of He et al. 2015, with ReLU after the addition. Page's have it before.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import BatchNorm2d
from .resnet import BasicBlock, initialize
from .stochastic_depth import linear_decay

FEATURE_SCALE = 0.125
"""Page's factor of the logits. Maxima are larger than means, and label smoothing needs small logits."""


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

    def __init__(self, widths: tuple[int, int, int], *, num_classes: int, drop_path: float) -> None:
        """Create a network with stages of `widths` channels; `conv1` has half of the first."""
        super().__init__()
        first = widths[0] // 2
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(first, relu=True)
        blocks = [
            BasicBlock(width, width, 1, linear_decay(drop_path, number, 2), shortcut="B", squeeze_excitation=False)
            for number, width in enumerate((widths[0], widths[2]))
        ]
        self.layer1 = nn.Sequential(PooledConvolution(first, widths[0]), blocks[0])
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
