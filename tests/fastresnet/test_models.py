"""Registry of the networks. Their sizes, names of parameters and initial weights, against the papers' figures."""

import itertools
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastresnet.config import SMALLEST_IMAGE
from fastresnet.models import MODELS, check_model, create_model, find_model, list_models
from pipelines.errors import UsageError
from tests.fastresnet.reference_networks import SHALLOW, SMALLEST, block_names, on_meta, with_slow_ones

pytestmark = pytest.mark.usefixtures("one_thread")

# depth: parameters with shortcut A and B, millions of multiply-adds with shortcut A and B
SIZES = {
    20: (269_722, 272_474, 40.55, 40.81),
    32: (464_154, 466_906, 68.86, 69.12),
    44: (658_586, 661_338, 97.17, 97.44),
    56: (853_018, 855_770, 125.49, 125.75),
    110: (1_727_962, 1_730_714, 252.89, 253.15),
}
VARIANTS = [("resnet", "A"), ("resnet", "B"), ("plain", "B")]


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network):
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 32, 32, device="meta"))
    return counter.get_total_flops() // 2


def count_weighted_layers(network):
    """Count 3x3 convolutions and linear layers. The paper does not count shortcuts."""
    kernels = Counter(module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d))
    return kernels[3, 3] + sum(isinstance(module, nn.Linear) for module in network.modules())


# --- sizes of the later networks, layer by layer -----------------------------------------------------------------


class Tally:
    """Sums of the parameters and multiply-adds of layers."""

    def __init__(self):
        self.parameters = self.macs = 0

    def conv(self, in_channels, channels, kernel, side, groups=1):
        """Add a convolution whose output has `side` x `side` pixels."""
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


def tally_resnet18():
    tally, in_channels = Tally(), 64
    tally.conv(3, 64, 3, 32)
    tally.norm(64)
    for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4)):
        for _ in range(2):
            tally.conv(in_channels, channels, 3, side)
            tally.conv(channels, channels, 3, side)
            tally.norm(channels)
            tally.norm(channels)
            if in_channels != channels:
                tally.conv(in_channels, channels, 1, side)
                tally.norm(channels)
            in_channels = channels
    tally.linear(512, 10)
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
    tally_pooled(tally, 32, (64, 128, 256, 512), (2, 0, 2))
    tally.linear(512, 10)
    return tally


def tally_speednet(*widths):
    """Add up a SpeedNet: its first layer has biases in place of a norm, and no padding, and its last one no biases."""
    tally = Tally()
    tally.conv(3, 24, 2, 31)
    tally_pooled(tally, 31, (24, *widths), (1, 1, 1))
    tally.linear(widths[-1], 10)
    tally.parameters += 24 - 10
    return tally


def tally_pooled(tally, side, widths, more):
    """Add three stages of a pooled convolution and `more` others. Their input is [`widths[0]`, `side`, `side`]."""
    for (in_channels, channels), others in zip(itertools.pairwise(widths), more, strict=True):
        tally.conv(in_channels, channels, 3, side)
        tally.norm(channels)
        side //= 2
        for _ in range(others):
            tally.conv(channels, channels, 3, side)
            tally.norm(channels)


LATER_NETWORKS = {
    "resnet18": (18, tally_resnet18),
    "se-resnet20": (20, lambda: tally_se_resnet(3)),
    "se-resnet56": (56, lambda: tally_se_resnet(9)),
    "preresnet20": (20, lambda: tally_pre_activation(3, (16, 32, 64))),
    "preresnet56": (56, lambda: tally_pre_activation(9, (16, 32, 64))),
    "preresnet110": (110, lambda: tally_pre_activation(18, (16, 32, 64))),
    "preresnet164": (164, lambda: tally_pre_activation(18, (64, 128, 256), bottleneck=True)),
    "wrn16-2": (16, lambda: tally_pre_activation(2, (32, 64, 128))),
    "wrn16-8": (16, lambda: tally_pre_activation(2, (128, 256, 512))),
    "wrn28-10": (28, lambda: tally_pre_activation(4, (160, 320, 640))),
    "resnext29-2x16d": (29, lambda: tally_resnext(2, 16)),
    "resnext29-4x64d": (29, lambda: tally_resnext(4, 64)),
    "resnext29-8x64d": (29, lambda: tally_resnext(8, 64)),
    "resnet9": (9, tally_resnet9),
    "speednet": (8, lambda: tally_speednet(64, 256, 256)),
    "speednet-wide": (8, lambda: tally_speednet(96, 320, 320)),
}
"""Depth and sizes of the networks of papers after 2015."""
WITHOUT_SHORTCUT_A = ["preresnet164", *(name for name in LATER_NETWORKS if name.startswith(("wrn", "resnext")))]


# --- registry ----------------------------------------------------------------------------------------------------


def test_registry_lists_all_networks_and_depths():
    depths = {f"{family}{depth}": depth for family in ("resnet", "plain") for depth in (*SIZES, 1202)}
    depths |= {name: depth for name, (depth, _) in LATER_NETWORKS.items()}
    assert {name: find_model(name).depth for name in list_models()} == depths


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnt56", "resnet56"), ("plain_20", "plain20"), ("ResNet110", "resnet110"), ("resnet_1202", "resnet1202")],
)
@pytest.mark.parametrize("look_up", [create_model, find_model, lambda name: check_model(name, "B", 0)])
def test_unknown_name_error_suggests_the_nearest(look_up, name, nearest):
    with pytest.raises(UsageError, match=f"unknown model '{name}': did you mean '{nearest}'"):
        look_up(name)


@pytest.mark.parametrize("shortcut", ["C", "a", ""])
def test_unknown_shortcut_is_an_error(shortcut):
    with pytest.raises(UsageError, match=f"unknown shortcut '{shortcut}'.*Valid: A, B"):
        create_model("resnet20", shortcut=shortcut)


def build(name, shortcut, drop_path):
    with torch.device("meta"):
        create_model(name, shortcut=shortcut, drop_path=drop_path)


@pytest.mark.parametrize("name", WITHOUT_SHORTCUT_A)
@pytest.mark.parametrize("check", [build, check_model])
def test_shortcut_a_is_an_error_if_the_first_stage_widens(check, name):
    reason = f"shortcut A is not defined for {name}: .* widens in its first stage too. Use shortcut B"
    with pytest.raises(UsageError, match=reason):
        check(name, "A", 0.0)


@pytest.mark.parametrize("name", with_slow_ones(list_models()))
def test_uses_shortcut_if_a_shortcut_has_a_convolution(name):
    names = on_meta(name, shortcut="B").state_dict()
    assert find_model(name).uses_shortcut == any(".downsample.0." in each for each in names)


@pytest.mark.parametrize("name", with_slow_ones(SHALLOW))
def test_networks_train_on_small_images(name):
    """SpeedNet's poolings leave one pixel of the smallest. Strides and poolings round an odd side."""
    network = on_meta(name).train()
    for side in (SMALLEST_IMAGE, 21):
        assert network(torch.empty(2, 3, side, side, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("check", [build, check_model])
def test_drop_path_outside_0_to_1_is_an_error(check, rate):
    with pytest.raises(UsageError, match=rf"drop path rate {rate} is not in 0..1 \(1 excluded\)"):
        check("resnet20", "B", rate)


@pytest.mark.parametrize("check", [build, check_model])
def test_drop_path_of_a_plain_network_is_an_error(check):
    with pytest.raises(UsageError, match=r"drop path rate 0\.1: plain56 has no shortcuts .* Use 0"):
        check("plain56", "B", 0.1)


@pytest.mark.parametrize("name", ["plain56", "preresnet20", "preresnet164", "wrn16-2"])
def test_zero_init_residual_without_final_batch_norms_is_an_error(name):
    for check in (create_model, lambda name, **options: check_model(name, "B", 0, **options)):
        with pytest.raises(UsageError, match=f"{name} has no residual branches that end in a batch norm"):
            check(name, zero_init_residual=True)
    assert not find_model(name).supports_zero_init


@pytest.mark.parametrize("name", list_models())
def test_all_other_options_are_valid(name):
    for shortcut in "B" if name in WITHOUT_SHORTCUT_A else "AB":
        for drop_path in (0, 0.0) if not MODELS[name].supports_drop_path else (0, 0.0, 0.5, 0.999):
            for zero_init_residual in {False, find_model(name).supports_zero_init}:
                check_model(name, shortcut, drop_path, zero_init_residual)


def test_registry_does_not_import_torch():
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
def test_parameter_counts(family, shortcut, depth):
    with_a, with_b, _, _ = SIZES[depth]
    expected = with_b if (family, shortcut) == ("resnet", "B") else with_a
    assert count_parameters(on_meta(f"{family}{depth}", shortcut=shortcut)) == expected


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_multiply_adds(family, shortcut, depth):
    _, _, with_a, with_b = SIZES[depth]
    expected = with_b if (family, shortcut) == ("resnet", "B") else with_a
    assert count_macs(on_meta(f"{family}{depth}", shortcut=shortcut)) == pytest.approx(expected * 1e6, abs=1e4)


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_depth_is_the_number_of_weighted_layers(family, shortcut, depth):
    assert count_weighted_layers(on_meta(f"{family}{depth}", shortcut=shortcut)) == depth


def test_resnet1202_size():
    network = on_meta("resnet1202", shortcut="A")
    assert round(count_parameters(network) / 1e6, 1) == 19.4
    assert count_weighted_layers(network) == 1202


@pytest.mark.parametrize("name", LATER_NETWORKS)
def test_sizes_of_later_networks(name):
    network, (_, add_up) = on_meta(name), LATER_NETWORKS[name]
    tally = add_up()
    assert (count_parameters(network), count_macs(network)) == (tally.parameters, tally.macs)


@pytest.mark.parametrize(
    ("name", "millions"),
    # Zagoruyko & Komodakis 2016, table 5, which has He et al. 2016 too; Xie et al. 2017, table 7; for ResNet-18, timm.
    [
        ("preresnet110", 1.7),
        ("preresnet164", 1.7),
        ("wrn16-8", 11.0),
        ("wrn28-10", 36.5),
        ("resnext29-8x64d", 34.4),
        ("resnet18", 11.2),
    ],
)
def test_parameter_counts_match_the_papers(name, millions):
    assert round(count_parameters(on_meta(name)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("se-resnet20", 274_847), ("se-resnet56", 862_889), ("preresnet20", 272_282), ("preresnet56", 855_578)),
        *(("preresnet110", 1_730_522), ("preresnet164", 1_703_258), ("wrn28-10", 36_479_194)),
    ],
)
def test_parameter_counts_match_imgclsmob(name, parameters):
    """Figures of osmr/imgclsmob for seresnet20, preresnet164bn, wrn28_10 and so on."""
    assert count_parameters(on_meta(name)) == parameters


def test_resnet9_parameter_count_matches_cifar10_fast():
    """The network of davidcpage/cifar10-fast has 6,573,120, without biases in its linear layer."""
    assert count_parameters(on_meta("resnet9")) == 6_573_120 + 10


@pytest.mark.parametrize("name", ["preresnet20", "preresnet56", "preresnet110"])
def test_shortcut_a_saves_the_projections_of_preresnets(name):
    saved = count_parameters(on_meta(name)) - count_parameters(on_meta(name, shortcut="A"))
    assert saved == 16 * 32 + 32 * 64


@pytest.mark.parametrize("name", LATER_NETWORKS)
def test_depth_of_later_networks(name):
    """Wide ResNets count the 1x1 convolutions of their shortcuts and not the linear layer."""
    network = on_meta(name)
    convolutions = {key for key, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    projections = {key for key in convolutions if "downsample" in key}
    in_stages = {"resnet9": 0, "speednet": 0, "speednet-wide": 0, "resnet18": 3, "preresnet164": 3}
    assert len(projections) == in_stages.get(name, 2 if "resnet" in name else 3)
    others = len(convolutions - projections)
    assert find_model(name).depth == (others + len(projections) if name.startswith("wrn") else others + 1)


# --- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize("family", ["resnet", "plain"])
def test_default_options_are_ten_classes_and_shortcut_b(family, depth):
    state = on_meta(f"{family}{depth}").state_dict()
    assert state["fc.weight"].shape == (10, 64)
    assert ("layer2.0.downsample.0.weight" in state) == (family == "resnet")


def norm_keys(name):
    return {f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_parameter_names_match_torchvision(family, shortcut, depth):
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | norm_keys("bn1")
    for _, name, stride in block_names((depth - 2) // 6):
        expected |= {f"{name}.conv1.weight", f"{name}.conv2.weight"} | norm_keys(f"{name}.bn1")
        expected |= norm_keys(f"{name}.bn2")
        if stride == 2 and (family, shortcut) == ("resnet", "B"):
            expected |= {f"{name}.downsample.0.weight"} | norm_keys(f"{name}.downsample.1")
    assert set(on_meta(f"{family}{depth}", shortcut=shortcut).state_dict()) == expected


HE_INITIALIZED = [pair for pair in SMALLEST if pair[0] != "speednet"]


@pytest.mark.parametrize(("name", "shortcut"), [*HE_INITIALIZED, ("resnet56", "B"), ("preresnet164", "B")])
def test_he_initialization_of_convolutions(name, shortcut):
    """Chance exceeds five standard errors in 1 of 1.7 million draws.

    The standard deviation of n normal samples has a relative standard error of 1 / sqrt(2n), and their mean one of
    1 / sqrt(n) standard deviations.
    """
    torch.manual_seed(0)
    for module in create_model(name, shortcut=shortcut).modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / (2 * n) ** 0.5)
            assert module.weight.mean().item() == pytest.approx(0, abs=5 * expected / n**0.5)


@pytest.mark.parametrize(("name", "shortcut"), HE_INITIALIZED)
def test_initial_batch_norms_and_biases(name, shortcut):
    state = create_model(name, shortcut=shortcut).state_dict()
    ones = [key for key in state if key.endswith("running_var") or (state[key].ndim == 1 and key.endswith("weight"))]
    zeros = [key for key in state if key.endswith(("running_mean", "bias", "num_batches_tracked"))]
    matrices = [key for key in state if state[key].ndim > 1]
    assert len(ones) + len(zeros) + len(matrices) == len(state)
    assert all((state[key] == 1).all() for key in ones)
    assert not any(state[key].any() for key in zeros)


def test_speednet_starts_with_identities_and_random_weights_beside_the_shortcut():
    """Its first output channels are then the input channels; the others, and the linear layer, are random."""
    torch.manual_seed(0)
    network = create_model("speednet")
    image = torch.randn(1, 256, 7, 7)
    for name in ("layer1.conv1", "layer1.conv2", "layer2.conv1", "layer3.conv1", "layer3.conv2"):
        convolution = network.get_submodule(name)
        channels = convolution.in_channels
        out = convolution(image[:, :channels])
        torch.testing.assert_close(out[:, :channels], image[:, :channels])
        assert convolution.out_channels == channels or convolution.weight[channels:].std() > 0
    beside = network.layer2.conv2.weight
    assert beside.std().item() == pytest.approx((3 * 9 * 256) ** -0.5, rel=0.01)  # PyTorch's uniform initialisation
    assert network.fc.weight.std().item() == pytest.approx(1 / 256, rel=5 / (2 * 2560) ** 0.5)
    assert (network.conv1.bias == 0.6).all()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.4}  # as in airbench


def initial_weights(seed):
    torch.manual_seed(seed)
    return nn.utils.parameters_to_vector(create_model("resnet20").parameters())


def test_initial_weights_depend_on_the_seed():
    assert torch.equal(initial_weights(3), initial_weights(3))
    assert not torch.equal(initial_weights(3), initial_weights(4))
