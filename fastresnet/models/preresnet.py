"""Pre-activation residual networks: blocks start with batch norm and ReLU, so that shortcuts carry unchanged values.

He, Zhang, Ren & Sun, "Identity Mappings in Deep Residual Networks", 2016: ResNets of 6n + 2 layers, or of 9n + 2 with
bottleneck blocks. Zagoruyko & Komodakis, "Wide Residual Networks", 2016: k times the channels and 6n + 4 layers. Their
depth counts the three 1x1 convolutions of the shortcuts and not the linear layer.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from .batchnorm import BatchNorm2d
from .resnet import Block, create_shortcut, create_stages, initialize
from .stochastic_depth import StochasticDepth


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU, the convolutions of a subclass, and the shortcut around them."""

    activates_shortcut = False
    """Start of the shortcut after the first batch norm and ReLU, not before."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, drop_path: StochasticDepth | None, *, shortcut: str
    ) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels, relu=True)
        self.downsample = create_shortcut(in_channels, channels, stride, shortcut, norm=False)
        self.drop_path = drop_path or nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        """Compute the residual branch from the activated input `x`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x)
        shortcut = self.downsample(activated if self.activates_shortcut else x)
        return self.drop_path(self.branch(activated)) + shortcut


class BasicBlock(PreActivationBlock):
    """Two 3x3 convolutions."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, drop_path: StochasticDepth | None, *, shortcut: str
    ) -> None:
        super().__init__(in_channels, channels, stride, drop_path, shortcut=shortcut)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels, relu=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(x)))


class BottleneckBlock(PreActivationBlock):
    """Two 1x1 convolutions, and between them a 3x3 convolution on a quarter of the channels.

    The first 1x1 convolution has the stride, as in KaimingHe/resnet-1k-layers.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, drop_path: StochasticDepth | None, *, shortcut: str
    ) -> None:
        super().__init__(in_channels, channels, stride, drop_path, shortcut=shortcut)
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, stride, bias=False)
        self.bn2 = BatchNorm2d(inner, relu=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn3 = BatchNorm2d(inner, relu=True)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv3(self.bn3(self.conv2(self.bn2(self.conv1(x)))))


class PreActivationResNet(nn.Module):
    """A 3x3 convolution, three stages of blocks, batch norm and ReLU, global average pooling and a linear layer."""

    def __init__(
        self, block: Block, widths: tuple[int, int, int, int], blocks: int, *, num_classes: int, drop_path: float
    ) -> None:
        """Create a network with `blocks` blocks a stage. `widths`: channels of the convolution and of the stages."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3 = create_stages(block, widths, blocks, drop_path)
        # Both paths are activated where the shape changes and after the first convolution (He et al., appendix).
        for stage in (self.layer1, self.layer2, self.layer3):
            stage[0].activates_shortcut = True  # type: ignore[assignment]  # mypy infers only a module
        self.bn1 = BatchNorm2d(widths[3], relu=True)
        self.fc = nn.Linear(widths[3], num_classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, num_classes]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.bn1(x).mean(dim=(2, 3)))


def create_preresnet(
    depth: int, *, num_classes: int, shortcut: str, drop_path: float, bottleneck: bool = False, widening: int = 1
) -> PreActivationResNet:
    """Create the pre-activation ResNet of `depth` layers, with `widening` times the channels in its stages."""
    block = functools.partial(BottleneckBlock if bottleneck else BasicBlock, shortcut=shortcut)
    blocks = (depth - 2) // (9 if bottleneck else 6)
    expansion = 4 if bottleneck else widening
    widths = (16, 16 * expansion, 32 * expansion, 64 * expansion)
    return PreActivationResNet(block, widths, blocks, num_classes=num_classes, drop_path=drop_path)
