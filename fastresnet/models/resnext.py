"""ResNeXt for CIFAR: ResNets of bottleneck blocks whose 3x3 convolution is split into groups.

Xie, Girshick, Dollár, Tu & He, "Aggregated Residual Transformations for Deep Neural Networks", 2017, section 5.3. The
networks have 9n + 2 weighted layers. The first convolution has 64 channels, the stages have 256, 512 and 1024.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import BatchNorm2d
from .resnet import CifarResNet, create_shortcut
from .stochastic_depth import StochasticDepth


class ResNeXtBlock(nn.Module):
    """A 3x3 convolution in `cardinality` groups, a 1x1 convolution before and after it, and the shortcut around them.

    Each group has `width` channels in the first stage, where the block has 256, and grows with the block.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        drop_path: StochasticDepth | None,
        *,
        shortcut: str,
        cardinality: int,
        width: int,
    ) -> None:
        super().__init__()
        inner = cardinality * width * channels // 256
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = BatchNorm2d(inner, relu=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = BatchNorm2d(inner, relu=True)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = BatchNorm2d(channels, relu=not drop_path)
        self.downsample = create_shortcut(in_channels, channels, stride, shortcut)
        self.drop_path = drop_path or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        shortcut = self.downsample(x)
        if self.bn3.relu:  # nothing is between batch norm and the addition
            return self.bn3(out, shortcut)
        return F.relu(self.drop_path(self.bn3(out)) + shortcut, inplace=True)


def create_resnext(
    depth: int, *, num_classes: int, shortcut: str, drop_path: float, cardinality: int, width: int
) -> CifarResNet:
    """Create ResNeXt-`depth`, `cardinality`x`width`d."""
    block = functools.partial(ResNeXtBlock, shortcut=shortcut, cardinality=cardinality, width=width)
    return CifarResNet(block, (64, 256, 512, 1024), (depth - 2) // 9, num_classes=num_classes, drop_path=drop_path)
