"""CIFAR-10 networks of He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2.

6n + 2 weighted layers: a 3x3 convolution, three stages of n blocks, global average pooling and a linear layer. Each
block has two 3x3 convolutions. The stages have 16, 32 and 64 channels on 32x32, 16x16 and 8x8 pixels. Parameters are
named as in torchvision (`layer1.0.conv1`, `downsample.0`, `fc`). Optional squeeze and excitation follows Hu, Shen &
Sun, "Squeeze-and-Excitation Networks", 2018. ResNet-18 is the one of section 4.1 without the large strides of its
beginning, as in kuangliu/pytorch-cifar. The networks in the other files share these parts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import BatchNorm2d
from .stochastic_depth import StochasticDepth, linear_decay

Block = Callable[[int, int, int, StochasticDepth | None], nn.Module]
"""Creator of a block from its input channels, output channels, stride and stochastic depth."""


class PaddedIdentity(nn.Module):
    """Shortcut option A, without parameters: every second pixel, and zeros for the channels that the input lacks.

    The paper does not say where the zero channels go. Half are at each end, as in akamaster/pytorch_resnet_cifar10, so
    that its weights fit.
    """

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.padding = added_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class SqueezeExcitation(nn.Module):
    """Scaling of each channel by a factor in 0..1 that two linear layers compute from the means of all channels.

    The reduction ratio is 16, as in the paper.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // 16)
        self.fc2 = nn.Linear(channels // 16, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, C, H, W] to the same shape."""
        scale = self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))).sigmoid()
        return x * scale[:, :, None, None]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and the shortcut around them. A plain block if `shortcut` is None."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        drop_path: StochasticDepth | None,
        *,
        shortcut: str | None,
        squeeze_excitation: bool,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels, relu=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels, relu=not (squeeze_excitation or drop_path))
        self.downsample = create_shortcut(in_channels, channels, stride, shortcut) if shortcut else None
        self.se = SqueezeExcitation(channels) if squeeze_excitation else nn.Identity()
        self.drop_path = drop_path or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.bn1(self.conv1(x)))
        shortcut = None if self.downsample is None else self.downsample(x)
        if self.bn2.relu:  # nothing is between batch norm and the addition
            return self.bn2(out, shortcut)
        return F.relu(self.drop_path(self.se(self.bn2(out))) + shortcut, inplace=True)


def create_shortcut(in_channels: int, channels: int, stride: int, option: str, *, norm: bool = True) -> nn.Module:
    """Create an identity, or where the shape changes shortcut `option` A or B (without batch norm if not `norm`)."""
    if in_channels == channels and stride == 1:
        return nn.Identity()
    if option == "A":
        return PaddedIdentity(channels - in_channels)
    projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
    return nn.Sequential(projection, BatchNorm2d(channels, relu=False)) if norm else nn.Sequential(projection)


def create_stages(block: Block, widths: Sequence[int], blocks: int, drop_path: float) -> Iterator[nn.Sequential]:
    """Create stages of `blocks` blocks each. `widths`: channels of the input and of each stage.

    All stages but the first start with stride 2.
    """
    stages = len(widths) - 1
    for stage, (in_channels, channels) in enumerate(itertools.pairwise(widths)):
        shapes = [(in_channels, channels, 2 if stage else 1), *[(channels, channels, 1)] * (blocks - 1)]
        yield nn.Sequential(
            *(
                block(*shape, linear_decay(drop_path, number, stages * blocks))
                for number, shape in enumerate(shapes, stage * blocks)
            )
        )


class CifarResNet(nn.Module):
    """A 3x3 convolution, three or four stages of blocks, global average pooling and a linear layer."""

    def __init__(
        self, block: Block, widths: tuple[int, ...], blocks: int, *, num_classes: int, drop_path: float
    ) -> None:
        """Create a network with `blocks` blocks a stage. `widths`: channels of the convolution and of the stages."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(widths[0], relu=True)
        self.layer1, self.layer2, self.layer3, *fourth = create_stages(block, widths, blocks, drop_path)
        self.layer4 = fourth[0] if fourth else None
        self.fc = nn.Linear(widths[-1], num_classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, num_classes]."""
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.layer4 is not None:
            x = self.layer4(x)
        return self.fc(x.mean(dim=(2, 3)))


def initialize(module: nn.Module) -> None:
    """Initialise weights as He, Zhang, Ren & Sun, "Delving Deep into Rectifiers", 2015, and biases to zero.

    Convolutions use the fan-out, as in the authors' code.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)


def zero_branches(network: nn.Module) -> None:
    """Set the weights of the last batch norm in each block's residual branch to zero."""
    for block in network.modules():
        if hasattr(block, "downsample"):
            *_, last = (child for child in block.children() if isinstance(child, BatchNorm2d))
            nn.init.zeros_(last.weight)


def create_resnet(
    depth: int,
    *,
    num_classes: int,
    shortcut: str,
    drop_path: float,
    plain: bool = False,
    squeeze_excitation: bool = False,
) -> CifarResNet:
    """Create ResNet-`depth`, or with `plain` the same network without shortcuts."""
    block = functools.partial(BasicBlock, shortcut=None if plain else shortcut, squeeze_excitation=squeeze_excitation)
    return CifarResNet(block, (16, 16, 32, 64), (depth - 2) // 6, num_classes=num_classes, drop_path=drop_path)


def create_resnet18(depth: int, *, num_classes: int, shortcut: str, drop_path: float) -> CifarResNet:
    """Create ResNet-`depth` of four stages with 64 to 512 channels, on 32x32 to 4x4 pixels."""
    block = functools.partial(BasicBlock, shortcut=shortcut, squeeze_excitation=False)
    return CifarResNet(block, (64, 64, 128, 256, 512), (depth - 2) // 8, num_classes=num_classes, drop_path=drop_path)
