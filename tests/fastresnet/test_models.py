"""The networks against the papers' figures, and against the same layers written out as functions."""

import copy
import dataclasses
import functools
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastresnet import models
from fastresnet.device import autocast
from fastresnet.models import (
    batchnorm,
    check_model,
    create_model,
    find_model,
    list_models,
)
from fastresnet.models.batchnorm import fuse_batch_norms
from fastresnet.models.stochastic_depth import StochasticDepth, seed_stochastic_depth
from pipelines.errors import UsageError

# depth: parameters with shortcut A and B, millions of multiply-adds with shortcut A and B
SIZES = {
    20: (269_722, 272_474, 40.55, 40.81),
    32: (464_154, 466_906, 68.86, 69.12),
    44: (658_586, 661_338, 97.17, 97.44),
    56: (853_018, 855_770, 125.49, 125.75),
    110: (1_727_962, 1_730_714, 252.89, 253.15),
}
VARIANTS = [("resnet", "A"), ("resnet", "B"), ("plain", "B")]
LATER_DEPTHS = {
    "se-resnet20": 20,
    "se-resnet56": 56,
    "preresnet20": 20,
    "preresnet56": 56,
    "preresnet110": 110,
    "preresnet164": 164,
    "wrn16-2": 16,
    "wrn16-8": 16,
    "wrn28-10": 28,
    "resnext29-2x16d": 29,
    "resnext29-4x64d": 29,
    "resnext29-8x64d": 29,
    "resnet9": 9,
    "resnet9-medium": 9,
    "resnet9-narrow": 9,
}
"""The networks of the papers after 2015."""
LARGEST = ("resnet1202", "plain1202", "wrn16-8", "wrn28-10", "resnext29-4x64d", "resnext29-8x64d")
WITHOUT_SHORTCUT_A = ["preresnet164", *(name for name in LATER_DEPTHS if name.startswith(("wrn", "resnext")))]
SMALLEST = [
    *(("resnet20", "A"), ("resnet20", "B"), ("plain20", "B"), ("se-resnet20", "A"), ("se-resnet20", "B")),
    *(("preresnet20", "A"), ("preresnet20", "B"), ("wrn16-2", "B"), ("resnext29-2x16d", "B"), ("resnet9-narrow", "B")),
]


def with_slow_ones(names):
    """Cases of a test that builds or trains each network: the largest outside the usual tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGEST else name for name in names]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The networks are too small for more, and other work on the machine would only make threads wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_meta(name, *, num_classes=10, shortcut="B", drop_path=0.0):
    """The network without memory for its weights: enough to count."""
    return _on_meta(name, num_classes=num_classes, shortcut=shortcut, drop_path=drop_path)


@functools.cache
def _on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network):
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 32, 32, device="meta"))
    return counter.get_total_flops() // 2


def count_weighted_layers(network):
    """3x3 convolutions and linear layers; the paper does not count shortcuts."""
    kernels = Counter(module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d))
    return kernels[3, 3] + sum(isinstance(module, nn.Linear) for module in network.modules())


def random_network(name, shortcut, seed=0, **options):
    """In float64 and evaluation mode, with batch norms that have seen something."""
    torch.manual_seed(seed)
    network = create_model(name, shortcut=shortcut, **options)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, std=0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return network.double().eval()


def random_images(count=3, seed=1):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the registry ------------------------------------------------------------------------------------------------


def test_the_registry_lists_the_papers_networks_and_depths():
    depths = {f"{family}{depth}": depth for family in ("resnet", "plain") for depth in (*SIZES, 1202)} | LATER_DEPTHS
    assert {name: find_model(name).depth for name in list_models()} == depths


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnt56", "resnet56"), ("plain_20", "plain20"), ("ResNet110", "resnet110"), ("resnet_1202", "resnet1202")],
)
@pytest.mark.parametrize("look_up", [create_model, find_model, lambda name: check_model(name, "B", 0)])
def test_an_unknown_name_is_refused_with_the_nearest_one(look_up, name, nearest):
    with pytest.raises(UsageError, match=f"unknown model '{name}': did you mean '{nearest}'"):
        look_up(name)


@pytest.mark.parametrize("shortcut", ["C", "a", ""])
def test_an_unknown_shortcut_is_refused(shortcut):
    with pytest.raises(UsageError, match=f"unknown shortcut '{shortcut}'.*Valid: A, B"):
        create_model("resnet20", shortcut=shortcut)


def build(name, shortcut, drop_path):
    with torch.device("meta"):
        create_model(name, shortcut=shortcut, drop_path=drop_path)


@pytest.mark.parametrize("name", WITHOUT_SHORTCUT_A)
@pytest.mark.parametrize("take", [build, check_model])
def test_shortcut_a_is_refused_where_the_first_stage_widens(take, name):
    reason = f"shortcut A is not defined for {name}: .* widens in its first stage too. Use shortcut B"
    with pytest.raises(UsageError, match=reason):
        take(name, "A", 0.0)


@pytest.mark.parametrize("name", with_slow_ones(list_models()))
def test_the_shortcut_matters_to_networks_that_have_one_with_a_convolution(name):
    names = on_meta(name, shortcut="B").state_dict()
    assert find_model(name).uses_shortcut == any(".downsample.0." in each for each in names)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("take", [build, check_model])
def test_a_drop_path_that_is_no_rate_below_one_is_refused(take, rate):
    with pytest.raises(UsageError, match=rf"drop path rate {rate} is not in 0..1 \(1 excluded\)"):
        take("resnet20", "B", rate)


@pytest.mark.parametrize("take", [build, check_model])
def test_a_plain_network_has_no_blocks_to_leave_out(take):
    with pytest.raises(UsageError, match=r"drop path rate 0\.1: plain56 has no shortcuts .* Use 0"):
        take("plain56", "B", 0.1)


@pytest.mark.parametrize("name", ["plain56", "preresnet20", "preresnet164", "wrn16-2"])
def test_branches_without_a_batch_norm_at_their_end_cannot_start_at_zero(name):
    for take in (create_model, lambda name, **options: check_model(name, "B", 0, **options)):
        with pytest.raises(UsageError, match=f"{name} has no residual branches that end in a batch norm"):
            take(name, zero_init_residual=True)
    assert not find_model(name).supports_zero_init


@pytest.mark.parametrize("name", list_models())
def test_everything_else_is_possible(name):
    for shortcut in "B" if name in WITHOUT_SHORTCUT_A else "AB":
        for drop_path in (0, 0.0) if name.startswith("plain") else (0, 0.0, 0.5, 0.999):
            for zero_init_residual in {False, find_model(name).supports_zero_init}:
                check_model(name, shortcut, drop_path, zero_init_residual)


def test_naming_the_networks_does_not_import_torch():
    program = (
        "import sys, fastresnet.models as m\n"
        "for name in m.list_models(): m.find_model(name), m.check_model(name, 'B', 0)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_the_parameters_are_as_many_as_the_architecture_has(family, shortcut, depth):
    with_a, with_b, _, _ = SIZES[depth]
    expected = with_b if (family, shortcut) == ("resnet", "B") else with_a
    assert count_parameters(on_meta(f"{family}{depth}", shortcut=shortcut)) == expected


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_the_multiply_adds_are_as_many_as_the_architecture_has(family, shortcut, depth):
    _, _, with_a, with_b = SIZES[depth]
    expected = with_b if (family, shortcut) == ("resnet", "B") else with_a
    assert count_macs(on_meta(f"{family}{depth}", shortcut=shortcut)) == pytest.approx(expected * 1e6, abs=1e4)


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_the_depth_counts_the_weighted_layers(family, shortcut, depth):
    assert count_weighted_layers(on_meta(f"{family}{depth}", shortcut=shortcut)) == depth


def test_resnet1202_has_the_papers_size():
    network = on_meta("resnet1202", shortcut="A")
    assert round(count_parameters(network) / 1e6, 1) == 19.4
    assert count_weighted_layers(network) == 1202


class Tally:
    """Sums up the parameters and multiply-adds of layers."""

    def __init__(self):
        self.parameters = self.macs = 0

    def conv(self, in_channels, channels, kernel, side, groups=1):
        """`side`: pixels of the output."""
        weights = in_channels // groups * channels * kernel**2
        self.parameters += weights
        self.macs += weights * side**2

    def norm(self, channels):
        self.parameters += 2 * channels

    def linear(self, in_features, features):
        self.parameters += in_features * features + features
        self.macs += in_features * features


def tally_se_resnet(blocks):
    tally, in_channels = Tally(), 16
    tally.conv(3, 16, 3, 32)
    tally.norm(16)
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        for _ in range(blocks):
            tally.conv(in_channels, channels, 3, side)
            tally.conv(channels, channels, 3, side)
            tally.linear(channels, channels // 16)
            tally.linear(channels // 16, channels)
            tally.norm(channels)
            tally.norm(channels)
            if in_channels != channels:
                tally.conv(in_channels, channels, 1, side)
                tally.norm(channels)
            in_channels = channels
    tally.linear(64, 10)
    return tally


def tally_pre_activation(blocks, widths, bottleneck=False):
    tally, in_channels = Tally(), 16
    tally.conv(3, 16, 3, 32)
    for channels, side in zip(widths, (32, 16, 8), strict=True):
        inner = channels // 4 if bottleneck else channels
        for _ in range(blocks):
            tally.norm(in_channels)
            tally.conv(in_channels, inner, 1 if bottleneck else 3, side)
            tally.norm(inner)
            tally.conv(inner, inner, 3, side)
            if bottleneck:
                tally.norm(inner)
                tally.conv(inner, channels, 1, side)
            if in_channels != channels:
                tally.conv(in_channels, channels, 1, side)
            in_channels = channels
    tally.norm(in_channels)
    tally.linear(in_channels, 10)
    return tally


def tally_resnext(cardinality, width):
    tally, in_channels, in_side = Tally(), 64, 32
    tally.conv(3, 64, 3, 32)
    tally.norm(64)
    for stage, side in enumerate((32, 16, 8)):
        channels, inner = 256 * 2**stage, cardinality * width * 2**stage
        for _ in range(3):
            tally.conv(in_channels, inner, 1, in_side)  # the 3x3 convolution has the stride
            tally.norm(inner)
            tally.conv(inner, inner, 3, side, groups=cardinality)
            tally.norm(inner)
            tally.conv(inner, channels, 1, side)
            tally.norm(channels)
            if in_channels != channels:
                tally.conv(in_channels, channels, 1, side)
                tally.norm(channels)
            in_channels, in_side = channels, side
    tally.linear(1024, 10)
    return tally


def tally_resnet9():
    tally = Tally()
    tally.conv(3, 64, 3, 32)
    tally.norm(64)
    return tally_pooled(tally, 32, (64, 128, 256, 512))


def tally_whitened_resnet9(*widths):
    """The first layer has biases in place of a norm, and no padding."""
    tally = Tally()
    tally.conv(3, 24, 2, 31)
    tally.parameters += 24
    return tally_pooled(tally, 31, (24, *widths))


def tally_pooled(tally, side, widths):
    """Add the stages of a ResNet-9 and its linear layer; the first of `widths` come in, on `side` x `side` pixels."""
    for stage, (in_channels, channels) in enumerate(itertools.pairwise(widths)):
        tally.conv(in_channels, channels, 3, side)
        tally.norm(channels)
        side //= 2
        for _ in range(0 if stage == 1 else 2):
            tally.conv(channels, channels, 3, side)
            tally.norm(channels)
    tally.linear(widths[-1], 10)
    return tally


TALLIES = {
    "se-resnet20": lambda: tally_se_resnet(3),
    "se-resnet56": lambda: tally_se_resnet(9),
    "preresnet20": lambda: tally_pre_activation(3, (16, 32, 64)),
    "preresnet56": lambda: tally_pre_activation(9, (16, 32, 64)),
    "preresnet110": lambda: tally_pre_activation(18, (16, 32, 64)),
    "preresnet164": lambda: tally_pre_activation(18, (64, 128, 256), bottleneck=True),
    "wrn16-2": lambda: tally_pre_activation(2, (32, 64, 128)),
    "wrn16-8": lambda: tally_pre_activation(2, (128, 256, 512)),
    "wrn28-10": lambda: tally_pre_activation(4, (160, 320, 640)),
    "resnext29-2x16d": lambda: tally_resnext(2, 16),
    "resnext29-4x64d": lambda: tally_resnext(4, 64),
    "resnext29-8x64d": lambda: tally_resnext(8, 64),
    "resnet9": tally_resnet9,
    "resnet9-medium": lambda: tally_whitened_resnet9(96, 320, 320),
    "resnet9-narrow": lambda: tally_whitened_resnet9(64, 256, 256),
}


@pytest.mark.parametrize("name", LATER_DEPTHS)
def test_the_later_networks_are_as_large_as_their_layers_together(name):
    network, tally = on_meta(name), TALLIES[name]()
    assert (count_parameters(network), count_macs(network)) == (tally.parameters, tally.macs)


@pytest.mark.parametrize(
    ("name", "millions"),
    # Zagoruyko & Komodakis 2016, table 5, which has He et al. 2016 too; Xie et al. 2017, table 7.
    [("preresnet110", 1.7), ("preresnet164", 1.7), ("wrn16-8", 11.0), ("wrn28-10", 36.5), ("resnext29-8x64d", 34.4)],
)
def test_the_papers_count_as_many_parameters(name, millions):
    assert round(count_parameters(on_meta(name)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("se-resnet20", 274_847), ("se-resnet56", 862_889), ("preresnet20", 272_282), ("preresnet56", 855_578)),
        *(("preresnet110", 1_730_522), ("preresnet164", 1_703_258), ("wrn28-10", 36_479_194)),
    ],
)
def test_another_repository_counts_as_many_parameters(name, parameters):
    """osmr/imgclsmob: seresnet20, preresnet164bn, wrn28_10 and so on."""
    assert count_parameters(on_meta(name)) == parameters


def test_resnet9_has_as_many_parameters_as_pages():
    """6,573,120 in davidcpage/cifar10-fast, whose linear layer has no biases."""
    assert count_parameters(on_meta("resnet9")) == 6_573_120 + 10


@pytest.mark.parametrize("name", ["preresnet20", "preresnet56", "preresnet110"])
def test_shortcut_a_saves_the_projections_of_pre_activation_networks(name):
    saved = count_parameters(on_meta(name)) - count_parameters(on_meta(name, shortcut="A"))
    assert saved == 16 * 32 + 32 * 64


@pytest.mark.parametrize("name", LATER_DEPTHS)
def test_the_depth_of_the_later_networks_counts_their_weighted_layers(name):
    """Wide ResNets are counted with the 1x1 convolutions of their shortcuts and without the linear layer."""
    network = on_meta(name)
    convolutions = {key for key, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    projections = {key for key in convolutions if "downsample" in key}
    in_stages = 0 if name.startswith("resnet9") else 2 if "resnet" in name and name != "preresnet164" else 3
    assert len(projections) == in_stages
    others = len(convolutions - projections)
    assert find_model(name).depth == (others + len(projections) if name.startswith("wrn") else others + 1)


# --- what they compute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_images_become_one_logit_per_class(name, shortcut, num_classes):
    network = on_meta(name, shortcut=shortcut, num_classes=num_classes)
    assert network(torch.empty(5, 3, 32, 32, device="meta")).shape == (5, num_classes)


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize("family", ["resnet", "plain"])
def test_without_options_there_are_ten_classes_and_shortcut_b(family, depth):
    state = on_meta(f"{family}{depth}").state_dict()
    assert state["fc.weight"].shape == (10, 64)
    assert ("layer2.0.downsample.0.weight" in state) == (family == "resnet")


class Layers:
    """The layers of a network as functions, with the weights of its state dict."""

    def __init__(self, state, training=False, branch_scales=None):
        """`branch_scales` [blocks, B]: factors of the residual branches."""
        self.state, self.training, self.branch_scales = state, training, branch_scales

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], **options)

    def norm(self, name, x):
        values = [self.state[f"{name}.{value}"] for value in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, values[0].clone(), values[1].clone(), *values[2:], training=self.training)

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def classify(self, x):
        return self.linear("fc", F.avg_pool2d(x, 8).flatten(1))

    def scaled(self, block, out):
        """The residual branch `out` of that block, as stochastic depth scales it."""
        return out if self.branch_scales is None else out * self.branch_scales[block].view(-1, 1, 1, 1)

    def excited(self, name, x):
        """`x`, with its channels scaled where the network has squeeze and excitation."""
        if f"{name}.se.fc1.weight" not in self.state:
            return x
        hidden = F.relu(self.linear(f"{name}.se.fc1", F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return x * torch.sigmoid(self.linear(f"{name}.se.fc2", hidden)).view(*x.shape[:2], 1, 1)

    def shortcut(self, name, x, out, option, projection):
        """What is added to the output `out` of a block with input `x`."""
        if option is None:
            return torch.zeros_like(out)
        if x.shape == out.shape:
            return x
        if option == "B":
            return projection(x, x.shape[-1] // out.shape[-1])
        padded = torch.zeros_like(out)
        first = (out.shape[1] - x.shape[1]) // 2
        padded[:, first : first + x.shape[1]] = x[:, :, ::2, ::2]
        return padded

    def resnet(self, x, depth, option):
        x = F.relu(self.norm("bn1", self.conv("conv1", x, padding=1)))
        for number, name, stride in block_names((depth - 2) // 6):
            out = F.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride=stride, padding=1)))
            out = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", out, padding=1))
            out = self.scaled(number, self.excited(name, out))

            def projection(x, stride, name=name):
                return self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride=stride))

            x = F.relu(out + self.shortcut(name, x, out, option, projection))
        return self.classify(x)

    def resnet9(self, x):
        def norm_relu(name, x):
            return F.relu(self.norm(name, x))

        if "bn1.weight" in self.state:
            x = norm_relu("bn1", self.conv("conv1", x, padding=1))
        else:
            x = F.relu(self.conv("conv1", x) + self.state["conv1.bias"][:, None, None])
        number = 0
        for stage in (1, 2, 3):
            x = norm_relu(f"layer{stage}.0.bn1", F.max_pool2d(self.conv(f"layer{stage}.0.conv1", x, padding=1), 2))
            if stage != 2:
                block = f"layer{stage}.1"
                out = norm_relu(f"{block}.bn1", self.conv(f"{block}.conv1", x, padding=1))
                out = self.norm(f"{block}.bn2", self.conv(f"{block}.conv2", out, padding=1))
                x, number = F.relu(self.scaled(number, out) + x), number + 1
        return self.linear("fc", x.flatten(2).max(2).values / 8)

    def pre_activation(self, x, blocks, option, bottleneck=False):
        x = self.conv("conv1", x, padding=1)
        for number, name, stride in block_names(blocks):
            activated = F.relu(self.norm(f"{name}.bn1", x))
            if bottleneck:
                out = F.relu(self.norm(f"{name}.bn2", self.conv(f"{name}.conv1", activated, stride=stride)))
                out = F.relu(self.norm(f"{name}.bn3", self.conv(f"{name}.conv2", out, padding=1)))
                out = self.conv(f"{name}.conv3", out)
            else:
                out = self.conv(f"{name}.conv1", activated, stride=stride, padding=1)
                out = self.conv(f"{name}.conv2", F.relu(self.norm(f"{name}.bn2", out)), padding=1)

            def projection(x, stride, name=name):
                return self.conv(f"{name}.downsample.0", x, stride=stride)

            start = activated if name.endswith(".0") else x
            x = self.scaled(number, out) + self.shortcut(name, start, out, option, projection)
        return self.classify(F.relu(self.norm("bn1", x)))

    def resnext(self, x, cardinality):
        x = F.relu(self.norm("bn1", self.conv("conv1", x, padding=1)))
        for number, name, stride in block_names(3):
            out = F.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)))
            # One convolution for each path of the block, as in the paper's figure 3b.
            paths = zip(
                out.chunk(cardinality, dim=1), self.state[f"{name}.conv2.weight"].chunk(cardinality), strict=True
            )
            out = torch.cat([F.conv2d(path, weight, stride=stride, padding=1) for path, weight in paths], dim=1)
            out = self.conv(f"{name}.conv3", F.relu(self.norm(f"{name}.bn2", out)))
            out = self.scaled(number, self.norm(f"{name}.bn3", out))
            if f"{name}.downsample.0.weight" in self.state:
                x = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride=stride))
            x = F.relu(out + x)
        return self.classify(x)


def block_names(blocks):
    """Number, name and stride of the blocks of three stages."""
    for number in range(3 * blocks):
        stage, block = divmod(number, blocks)
        yield number, f"layer{stage + 1}.{block}", 2 if stage and not block else 1


REFERENCES = [
    ("resnet20", "A", lambda layers, x: layers.resnet(x, 20, "A")),
    ("resnet20", "B", lambda layers, x: layers.resnet(x, 20, "B")),
    ("plain20", "A", lambda layers, x: layers.resnet(x, 20, None)),
    ("plain20", "B", lambda layers, x: layers.resnet(x, 20, None)),
    ("resnet32", "A", lambda layers, x: layers.resnet(x, 32, "A")),
    ("se-resnet20", "A", lambda layers, x: layers.resnet(x, 20, "A")),
    ("se-resnet20", "B", lambda layers, x: layers.resnet(x, 20, "B")),
    ("preresnet20", "A", lambda layers, x: layers.pre_activation(x, 3, "A")),
    ("preresnet20", "B", lambda layers, x: layers.pre_activation(x, 3, "B")),
    ("preresnet164", "B", lambda layers, x: layers.pre_activation(x, 18, "B", bottleneck=True)),
    ("wrn16-2", "B", lambda layers, x: layers.pre_activation(x, 2, "B")),
    ("resnext29-2x16d", "B", lambda layers, x: layers.resnext(x, 2)),
    ("resnet9", "B", lambda layers, x: layers.resnet9(x)),
    ("resnet9-narrow", "B", lambda layers, x: layers.resnet9(x)),
]
REFERENCE_IDS = [f"{name}-{shortcut}" for name, shortcut, _ in REFERENCES]


@pytest.mark.parametrize(("name", "shortcut", "reference"), REFERENCES, ids=REFERENCE_IDS)
def test_the_network_equals_its_layers_written_out(name, shortcut, reference):
    network, images = random_network(name, shortcut), random_images()
    with torch.no_grad():
        expected = reference(Layers(network.state_dict()), images)
        torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def assert_trains_as(network, layers, images, reference):
    """Logits and gradients of a training step, with those of the written-out `layers`."""
    parameters = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
    layers.state = {**layers.state, **{k: v.detach().clone().requires_grad_() for k, v in parameters.items()}}
    expected = reference(layers, images)
    logits = network.train()(images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.grad, layers.state[key].grad, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(("name", "shortcut", "reference"), REFERENCES, ids=REFERENCE_IDS)
def test_gradients_in_training_equal_those_of_the_layers_written_out(name, shortcut, reference):
    network = random_network(name, shortcut)
    assert_trains_as(network, Layers(network.state_dict(), training=True), random_images(2), reference)


def torchvision_resnext(cardinality, width):
    """ResNeXt-29 of torchvision's blocks, under torchvision's names."""
    torchvision = pytest.importorskip("torchvision")
    network, in_channels = nn.Module(), 64
    network.conv1, network.bn1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    for stage in range(3):
        planes, blocks = 64 * 2**stage, []
        for block in range(3):
            stride, downsample = 2 if stage and not block else 1, None
            if not block:
                projection = nn.Conv2d(in_channels, 4 * planes, 1, stride, bias=False)
                downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * planes))
            blocks.append(
                torchvision.models.resnet.Bottleneck(in_channels, planes, stride, downsample, cardinality, width)
            )
            in_channels = 4 * planes
        setattr(network, f"layer{stage + 1}", nn.Sequential(*blocks))
    network.fc = nn.Linear(1024, 10)
    return network


def test_resnext_is_torchvisions_blocks_under_torchvisions_names():
    network, reference, x = random_network("resnext29-2x16d", "B"), torchvision_resnext(2, 16), random_images()
    reference.load_state_dict(network.state_dict())
    reference.double().eval()
    with torch.no_grad():
        expected = F.relu(reference.bn1(reference.conv1(x)))
        expected = reference.layer3(reference.layer2(reference.layer1(expected))).mean(dim=(2, 3))
        torch.testing.assert_close(network(x), reference.fc(expected), rtol=1e-10, atol=1e-10)


def norm_keys(name):
    return {f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_parameters_are_named_as_in_torchvision(family, shortcut, depth):
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | norm_keys("bn1")
    for _, name, stride in block_names((depth - 2) // 6):
        expected |= {f"{name}.conv1.weight", f"{name}.conv2.weight"} | norm_keys(f"{name}.bn1")
        expected |= norm_keys(f"{name}.bn2")
        if stride == 2 and (family, shortcut) == ("resnet", "B"):
            expected |= {f"{name}.downsample.0.weight"} | norm_keys(f"{name}.downsample.1")
    assert set(on_meta(f"{family}{depth}", shortcut=shortcut).state_dict()) == expected


@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
def test_the_memory_layout_does_not_change_the_logits(name, shortcut):
    network, images = random_network(name, shortcut), random_images()
    channels_last = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(network(channels_last), expected, rtol=1e-10, atol=1e-10)
        network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(network(channels_last), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "shortcut"),
    [*SMALLEST, ("resnet56", "A"), ("resnet110", "B"), ("plain110", "B"), ("preresnet164", "B")],
)
def test_the_gradient_reaches_every_parameter_that_is_trained(name, shortcut):
    torch.manual_seed(0)
    network = create_model(name, shortcut=shortcut)
    F.cross_entropy(network(random_images(4).float()), torch.arange(4)).backward()
    for parameter_name, parameter in network.named_parameters():
        if (name, parameter_name) == ("resnet9-narrow", "conv1.weight"):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.fixture
def two_blocks(monkeypatch):
    """Networks of 20 layers have two blocks in each stage, where two are all kinds that there are, and not three."""
    for name, model in models.MODELS.items():
        if model.depth == 20:
            monkeypatch.setitem(models.MODELS, name, dataclasses.replace(model, depth=14))


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize(
    ("name", "shortcut"),
    [
        *(*SMALLEST[:3], ("se-resnet20", "B"), ("preresnet20", "A"), ("preresnet20", "B"), ("resnext29-2x16d", "B")),
        ("resnet9-narrow", "B"),
    ],
)
def test_torch_compile_takes_the_network_as_one_graph(name, shortcut):
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(create_model(name, shortcut=shortcut))(torch.randn(2, 3, 32, 32))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


@pytest.mark.parametrize("name", ["resnet20", "se-resnet20", "resnext29-2x16d", "resnet9-narrow"])
def test_a_network_whose_branches_start_at_zero_is_one_of_shortcuts_alone(name):
    """Their squeeze and excitation aside, which scales a zero. Only the weights of the branches' last norms differ."""
    torch.manual_seed(0)
    network = create_model(name, zero_init_residual=True).double().eval()
    torch.manual_seed(0)
    usual = create_model(name).double().eval()
    for block in usual.modules():
        if hasattr(block, "downsample"):
            block.forward = lambda x, block=block: torch.relu(block.downsample(x))
    images = random_images()
    torch.testing.assert_close(network(images), usual(images), rtol=1e-10, atol=1e-10)
    differ = {key for key, value in network.state_dict().items() if not value.equal(usual.state_dict()[key])}
    assert {key.split(".")[-2] for key in differ} == {"bn3" if name.startswith("resnext") else "bn2"}
    assert len(differ) == sum(hasattr(block, "downsample") for block in network.modules())


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
def test_torch_export_takes_the_network_for_batches_of_every_size(name, shortcut):
    network = random_network(name, shortcut, **({} if name.startswith("plain") else {"drop_path": 0.1}))
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(network, (random_images(3),), dynamic_shapes={"x": {0: batch}})
    with torch.no_grad():
        for count in (1, 5):
            images = random_images(count)
            torch.testing.assert_close(exported.module()(images), network(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", with_slow_ones(list_models()))
def test_every_network_trains(name, precision):
    """Two steps on images of 8x8 pixels (16x16 where patches are whitened), which the layers take as well, move every
    parameter that is trained.

    Without shortcuts, gradients grow by a factor of about 1.2 with each layer that they go back through (Yang et al.,
    "A mean field theory of batch normalization", 2019): after 1202 layers beyond fp32, after 110 beyond fp16.
    """
    torch.manual_seed(0)
    network = create_model(name).to(memory_format=torch.channels_last)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    size = 16 if name in ("resnet9-medium", "resnet9-narrow") else 8
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)  # whose steps do not depend on the gradient's size
    explodes = name == "plain1202" or (name, precision) == ("plain110", "fp16")
    for _ in range(2):
        with autocast(precision, torch.device("cpu")):
            loss = F.cross_entropy(network(images).float(), torch.arange(2))
        assert loss.isfinite()
        loss.backward()
        if explodes:
            assert not all(parameter.grad.isfinite().all() for parameter in network.parameters())
            return
        optimizer.step()
        optimizer.zero_grad()
    for old, (key, parameter) in zip(before, network.named_parameters(), strict=True):
        assert parameter.isfinite().all(), key
        assert torch.equal(parameter, old) != parameter.requires_grad, key


@pytest.mark.parametrize(
    ("name", "options", "norms", "with_shortcut"),
    [
        ("resnet20", {}, 21, 9),
        ("resnet20", {"shortcut": "A"}, 19, 9),
        ("resnet20", {"drop_path": 0.1}, 21, 0),
        ("plain20", {}, 19, 0),
        ("se-resnet20", {}, 21, 0),
        ("preresnet20", {"shortcut": "A"}, 19, 0),
        ("wrn16-2", {"drop_path": 0.1}, 13, 0),
        ("resnext29-2x16d", {}, 31, 9),
    ],
)
def test_batch_norm_runs_in_its_kernel_with_the_addition_that_follows_it(
    monkeypatch, name, options, norms, with_shortcut
):
    calls, call = [], batchnorm._call
    monkeypatch.setattr(
        batchnorm, "_call", lambda kernel, *a, **kw: (calls.append((kernel, kw)), call(kernel, *a, **kw))
    )
    network = create_model(name, **options).to(memory_format=torch.channels_last)
    fuse_batch_norms(network)
    network(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert Counter(kernel for kernel, _ in calls) == {"forward": norms, "backward": norms}
    assert sum(kw.get("shortcut") is not None for _, kw in calls) == with_shortcut


# --- initial weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shortcut"), [*SMALLEST, ("resnet56", "B"), ("preresnet164", "B")])
def test_convolutions_start_with_he_initialisation(name, shortcut):
    """The standard deviation of n normal samples has a relative standard error of 1 / sqrt(2n), their mean one of
    1 / sqrt(n) standard deviations; five of each are allowed, which chance exceeds in 1 of 1.7 million draws.
    """
    torch.manual_seed(0)
    for module in create_model(name, shortcut=shortcut).modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / (2 * n) ** 0.5)
            assert module.weight.mean().item() == pytest.approx(0, abs=5 * expected / n**0.5)


@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
def test_batch_norms_start_as_identities_and_biases_at_zero(name, shortcut):
    state = create_model(name, shortcut=shortcut).state_dict()
    ones = [key for key in state if key.endswith("running_var") or (state[key].ndim == 1 and key.endswith("weight"))]
    zeros = [key for key in state if key.endswith(("running_mean", "bias", "num_batches_tracked"))]
    matrices = [key for key in state if state[key].ndim > 1]
    assert len(ones) + len(zeros) + len(matrices) == len(state)
    assert all((state[key] == 1).all() for key in ones)
    assert not any(state[key].any() for key in zeros)


def initial_weights(seed):
    torch.manual_seed(seed)
    return nn.utils.parameters_to_vector(create_model("resnet20").parameters())


@pytest.mark.parametrize("size", [(40, 3, 32, 32), (700, 3, 5, 9)])
def test_whitened_patches_have_unit_variance_and_no_correlation(size):
    """In NumPy, patch by patch; what 5e-4, added to each component's variance, leaves of it."""
    images = np.random.default_rng(0).normal(size=size)
    images = images.cumsum(2).cumsum(3)  # neighbours are alike, as in photographs
    images[:, 1] += images[:, 0]
    images /= images.std()
    layer = create_model("resnet9-narrow").double().conv1
    layer.fit(torch.from_numpy(images))
    filters = layer.weight.numpy().reshape(24, 12)
    assert not layer.weight.requires_grad
    np.testing.assert_array_equal(filters[12:], -filters[:12])
    positions = [(y, x) for y in range(size[2] - 1) for x in range(size[3] - 1)]
    patches = np.concatenate([images[:, :, y : y + 2, x : x + 2].reshape(-1, 12) for y, x in positions])
    moments = patches.T @ patches / len(patches)
    whitened = filters[:12] @ moments @ filters[:12].T
    variances = np.linalg.eigvalsh(moments)
    np.testing.assert_allclose(whitened, np.diag(variances / (variances + 5e-4)), atol=1e-9)
    nn.init.normal_(layer.bias)
    with torch.no_grad():
        out = layer(torch.from_numpy(images)).numpy()
    corner = images[:, :, 2:4, 3:5].reshape(-1, 12) @ filters.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(out[:, :, 2, 3], np.maximum(corner, 0), rtol=1e-10, atol=1e-10)
    assert out.shape == (size[0], 24, size[2] - 1, size[3] - 1)


def test_the_seed_decides_the_initial_weights():
    assert torch.equal(initial_weights(3), initial_weights(3))
    assert not torch.equal(initial_weights(3), initial_weights(4))


# --- stochastic depth --------------------------------------------------------------------------------------------

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
WITH_SHORTCUTS = [name for name in list_models() if not name.startswith("plain")]
DROPPING = [
    *(("resnet20", "A"), ("se-resnet20", "B"), ("preresnet20", "B"), ("wrn16-2", "B"), ("resnext29-2x16d", "B")),
    ("resnet9-narrow", "B"),
]


def splitmix64(z):
    """The output function of SplitMix64, in unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_keep(seed, block, step, rows, rate):
    """Which of so many rows keep the branch of that block."""
    key = 0
    for word in (seed, 7, block):  # 7: the purpose
        key = splitmix64((key + GAMMA + word) & MASK)
    hashes = (splitmix64((key + ((step << 20) + row + 1) * GAMMA) & MASK) for row in range(rows))
    return torch.tensor([(value >> 40) / 2**24 >= rate for value in hashes])


def depth_module(rate=0.5, block=0, seed=0, step=0):
    module = StochasticDepth(rate, block)
    seed_stochastic_depth(module, seed, torch.tensor([step]))
    return module


def keep(module, rows):
    return module(torch.ones(rows, 1, 1, 1)).flatten() != 0


def depth_modules(network):
    return [module for module in network.modules() if isinstance(module, StochasticDepth)]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("block", [0, 53])
@pytest.mark.parametrize("step", [0, 1, 64_000])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_samples_that_lose_a_branch_follow_from_the_hash(seed, block, step, rate):
    assert torch.equal(keep(depth_module(rate, block, seed, step), 200), reference_keep(seed, block, step, 200, rate))


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.9])
def test_as_many_samples_lose_a_branch_as_the_rate_says(rate):
    """Five standard deviations, which chance exceeds in 1 of 1.7 million draws."""
    rows, steps = 1024, 64
    kept = torch.cat([keep(depth_module(rate, step=step), rows) for step in range(steps)])
    tolerance = 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=tolerance)


def test_blocks_steps_seeds_and_rows_lose_their_branches_independently():
    """Signs that agree in half of the places, to five standard deviations."""
    rows = 1 << 16
    base = keep(depth_module(), rows)
    others = [keep(depth_module(**{what: value}), rows) for what in ("block", "step", "seed") for value in (1, 2, 16)]
    others += [base.roll(shift) for shift in (1, 2, 16)]
    for other in others:
        assert (base == other).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / rows**0.5)


def test_a_row_is_drawn_alike_in_batches_of_every_size():
    module = depth_module()
    assert torch.equal(keep(module, 1000)[:8], keep(module, 8))
    assert torch.equal(keep(module, 8), keep(module, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_stays_is_divided_by_the_probability_of_staying_and_the_rest_is_zero(dtype):
    module, rate = depth_module(0.3), 0.3
    branch = torch.randn(64, 5, 3, 2).to(dtype).contiguous(memory_format=torch.channels_last)
    kept = reference_keep(0, 0, 0, 64, rate)
    branch[~kept] = torch.nan
    branch.requires_grad_()
    out = module(branch)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    # One rounding, of a quotient by a number that is itself rounded in fp32.
    expected = (branch.detach().double() / (1 - rate))[kept]
    torch.testing.assert_close(out[kept].double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert not out[~kept].any()
    out.sum().backward()
    scales = (kept.double() / (1 - rate)).view(-1, 1, 1, 1).expand(branch.shape)
    torch.testing.assert_close(branch.grad.double(), scales, rtol=torch.finfo(dtype).eps, atol=0)


def test_the_expectation_is_the_branch():
    """To five standard deviations; a kept branch of 1 is 1 / (1 - rate), so the variance is rate / (1 - rate)."""
    rate, rows = 0.25, 1 << 16
    out = depth_module(rate)(torch.ones(rows, 1, 1, 1, dtype=torch.float64))
    assert out.mean().item() == pytest.approx(1, abs=5 * (rate / (1 - rate) / rows) ** 0.5)


def test_evaluation_takes_every_branch_as_it_is():
    branch = torch.randn(4, 3, 2, 2)
    assert depth_module(0.9).eval()(branch) is branch


@pytest.mark.parametrize(("name", "shortcut"), DROPPING)
def test_in_evaluation_the_network_is_the_one_without_stochastic_depth(name, shortcut):
    network, images = random_network(name, shortcut, drop_path=0.5), random_images()
    without = random_network(name, shortcut)
    without.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(images), without(images))


@pytest.mark.parametrize(("name", "shortcut"), DROPPING)
def test_in_training_the_network_equals_its_layers_written_out_without_some_branches(name, shortcut):
    seed, step, drop_path, rows = 5, 17, 0.6, 6
    reference = {(name, option): reference for name, option, reference in REFERENCES}[name, shortcut]
    network = random_network(name, shortcut, drop_path=drop_path)
    seed_stochastic_depth(network, seed, torch.tensor([step]))
    blocks = len(depth_modules(network))
    rates = [drop_path * (block + 1) / blocks for block in range(blocks)]
    kept = torch.stack([reference_keep(seed, block, step, rows, rate) for block, rate in enumerate(rates)])
    assert kept.any(dim=1).all()
    assert not kept.all()
    scales = kept / (1 - torch.tensor(rates, dtype=torch.float64)).view(-1, 1)
    layers = Layers(network.state_dict(), training=True, branch_scales=scales)
    assert_trains_as(network, layers, random_images(rows), reference)


@pytest.mark.parametrize("name", with_slow_ones(WITH_SHORTCUTS))
def test_the_rates_grow_linearly_to_that_of_the_last_block(name):
    network = on_meta(name, drop_path=0.3)
    modules, blocks = depth_modules(network), sum(hasattr(module, "drop_path") for module in network.modules())
    assert [module.rate for module in modules] == pytest.approx([0.3 * n / blocks for n in range(1, blocks + 1)])
    assert [module.block for module in modules] == list(range(blocks))


@pytest.mark.parametrize("name", list_models())
def test_without_stochastic_depth_there_is_nothing_of_it(name):
    assert not depth_modules(on_meta(name))


@pytest.mark.parametrize(("name", "shortcut"), DROPPING)
def test_stochastic_depth_adds_nothing_to_the_weights(name, shortcut):
    with_it, without = (on_meta(name, shortcut=shortcut, drop_path=rate).state_dict() for rate in (0.5, 0.0))
    assert list(with_it) == list(without)


def test_seed_and_step_start_at_zero():
    module = StochasticDepth(0.5, 3)
    assert (module.seed, module.step.tolist(), module.step.dtype) == (0, [0], torch.int64)
    assert torch.equal(keep(module, 100), reference_keep(0, 3, 0, 100, 0.5))


def test_the_whole_network_follows_one_count_of_steps():
    network, step = create_model("resnet20", drop_path=0.5), torch.zeros(1, dtype=torch.int64)
    seed_stochastic_depth(network, 3, step)
    modules = depth_modules(network)
    assert {module.seed for module in modules} == {3}
    for number in (0, 1, 7):
        step.fill_(number)
        for module in modules:
            assert torch.equal(keep(module, 50), reference_keep(3, module.block, number, 50, module.rate))


def test_a_copy_of_the_network_has_a_count_of_its_own():
    network, step = create_model("resnet20", drop_path=0.5), torch.full((1,), 4)
    seed_stochastic_depth(network, 3, step)
    modules = depth_modules(copy.deepcopy(network))
    step += 1
    assert {module.step.data_ptr() for module in modules} == {modules[0].step.data_ptr()}
    assert all((module.seed, module.step.tolist()) == (3, [4]) for module in modules)
    assert torch.equal(keep(modules[8], 50), reference_keep(3, 8, 4, 50, 0.5))


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("name", ["resnet20", "preresnet20", "resnext29-2x16d"])
def test_torch_compile_takes_stochastic_depth_into_the_graph(name):
    torch._dynamo.reset()
    network = create_model(name, drop_path=0.5)
    seed_stochastic_depth(network, 1, torch.zeros(1, dtype=torch.int64))
    explanation = torch._dynamo.explain(network)(torch.randn(2, 3, 32, 32))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_draws_the_same_samples(backend):
    torch._dynamo.reset()
    module, step = depth_module(0.4, 2), torch.zeros(1, dtype=torch.int64)
    seed_stochastic_depth(module, 2**62 + 1, step)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for number in range(3):
        step.fill_(number)
        assert torch.equal(keep(compiled, 300), reference_keep(2**62 + 1, 2, number, 300, 0.4))


@pytest.mark.gpu
@pytest.mark.parametrize("compile_", [False, True])
def test_a_gpu_draws_the_same_samples(compile_):
    torch._dynamo.reset()
    module, step = StochasticDepth(0.4, 2).cuda(), torch.full((1,), 9, device="cuda")
    seed_stochastic_depth(module, 2**62 + 1, step)
    if compile_:
        module = torch.compile(module, fullgraph=True)
    out = module(torch.ones(300, 1, 1, 1, device="cuda"))
    assert torch.equal(out.flatten().cpu() != 0, reference_keep(2**62 + 1, 2, 9, 300, 0.4))
