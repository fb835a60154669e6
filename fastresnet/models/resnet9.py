"""ResNet-9, the shallow and wide network of Page, "How to train your ResNet", 2018 (davidcpage/cifar10-fast).

Nine weighted layers: a 3x3 convolution, three convolutions that are max-pooled, behind the first and the last of them a
residual block, global max pooling and a linear layer. Few layers and early pooling make for little arithmetic, and for
few epochs. The residual blocks are those of He et al. 2015, with ReLU behind the addition; Page's have it before.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import BatchNorm2d
from .resnet import BasicBlock, initialize
from .stochastic_depth import linear_decay

FEATURE_SCALE = 0.125
"""What Page multiplies the logits with: maxima are larger than means, and label smoothing wants small logits."""


class PooledConvolution(nn.Module):
    """A 3x3 convolution, 2x2 max pooling, batch norm and ReLU; pooling first leaves the others a quarter to do."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, C, H, W] to [N, `channels`, H / 2, W / 2]."""
        return self.bn1(F.max_pool2d(self.conv1(x), 2))


class ResNet9(nn.Module):
    """A 3x3 convolution, three stages, global max pooling and a linear layer."""

    def __init__(self, widths: tuple[int, int, int, int], *, num_classes: int, drop_path: float) -> None:
        """`widths`: channels of the first convolution and of the stages."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(widths[0], relu=True)
        blocks = [
            BasicBlock(width, width, 1, linear_decay(drop_path, number, 2), shortcut="B", squeeze_excitation=False)
            for number, width in enumerate((widths[1], widths[3]))
        ]
        self.layer1 = nn.Sequential(PooledConvolution(widths[0], widths[1]), blocks[0])
        self.layer2 = nn.Sequential(PooledConvolution(widths[1], widths[2]))
        self.layer3 = nn.Sequential(PooledConvolution(widths[2], widths[3]), blocks[1])
        self.fc = nn.Linear(widths[3], num_classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, 32, 32] to logits [N, num_classes]."""
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(FEATURE_SCALE * x.amax(dim=(2, 3)))


def create_resnet9(depth: int, *, num_classes: int, shortcut: str, drop_path: float, narrow: bool = False) -> ResNet9:
    """ResNet-9 with Page's channels; `narrow`: with about as many as the network of Jordan's cifar10-airbench has, for
    a third of the arithmetic. All its shortcuts are identities, whatever `shortcut` says.
    """
    widths = (32, 64, 256, 256) if narrow else (64, 128, 256, 512)
    return ResNet9(widths, num_classes=num_classes, drop_path=drop_path)
