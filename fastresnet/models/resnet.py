"""The CIFAR-10 networks of He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2.

6n + 2 weighted layers: a 3x3 convolution, three stages of n blocks with two 3x3 convolutions each (16, 32 and 64
channels on 32x32, 16x16 and 8x8 pixels), global average pooling and a linear layer. Parameters are named as in
torchvision (`layer1.0.conv1`, `downsample.0`, `fc`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import BatchNorm2d


class PaddedIdentity(nn.Module):
    """Shortcut option A: every second pixel, and zeros for the channels that the input lacks; no parameters.

    The zeros are split over both ends, as in akamaster/pytorch_resnet_cifar10, so that its weights fit; the paper
    leaves their place open.
    """

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.padding = added_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, around which the shortcut leads; `shortcut` None makes it a plain block."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels, relu=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels, relu=True)
        self.downsample = _shortcut(in_channels, channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.bn1(self.conv1(x)))
        return self.bn2(out, None if self.downsample is None else self.downsample(x))


def _shortcut(in_channels: int, channels: int, stride: int, option: str | None) -> nn.Module | None:
    if option is None:
        return None
    if in_channels == channels and stride == 1:
        return nn.Identity()
    if option == "A":
        return PaddedIdentity(channels - in_channels)
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), BatchNorm2d(channels, relu=False))


class CifarResNet(nn.Module):
    """`shortcut`: `A`, `B`, or None for the plain network without shortcuts."""

    def __init__(self, depth: int, *, num_classes: int, shortcut: str | None) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(16, relu=True)
        self.layer1 = _stage(16, 16, 1, blocks, shortcut)
        self.layer2 = _stage(16, 32, 2, blocks, shortcut)
        self.layer3 = _stage(32, 64, 2, blocks, shortcut)
        self.fc = nn.Linear(64, num_classes)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, 32, 32] to logits [N, num_classes]."""
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def _stage(in_channels: int, channels: int, stride: int, blocks: int, shortcut: str | None) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))


def _initialize(module: nn.Module) -> None:
    """He, Zhang, Ren & Sun, "Delving Deep into Rectifiers", 2015; convolutions by fan-out, as in the authors' code."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)
