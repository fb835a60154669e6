"""The networks against the paper's figures, and against the same layers written out as functions."""

import functools
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastresnet.models import create_model, list_models, model_depth
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
SMALLEST = [("resnet20", "A"), ("resnet20", "B"), ("plain20", "B")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The networks are too small for more, and other work on the machine would only make threads wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def on_meta(name, **options):
    """The network without memory for its weights: enough to count."""
    with torch.device("meta"):
        return create_model(name, **options)


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def count_mega_macs(network):
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 32, 32, device="meta"))
    return counter.get_total_flops() / 2 / 1e6


def count_weighted_layers(network):
    """3x3 convolutions and linear layers; the paper does not count shortcuts."""
    kernels = Counter(module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d))
    return kernels[3, 3] + sum(isinstance(module, nn.Linear) for module in network.modules())


def random_network(name, shortcut, seed=0):
    """In float64 and evaluation mode, with batch norms that have seen something."""
    torch.manual_seed(seed)
    network = create_model(name, shortcut=shortcut)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return network.double().eval()


def random_images(count=3, seed=1):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the registry ------------------------------------------------------------------------------------------------


def test_the_registry_lists_the_papers_depths_with_and_without_shortcuts():
    depths = (*SIZES, 1202)
    assert sorted(list_models()) == sorted(f"{family}{depth}" for family in ("resnet", "plain") for depth in depths)
    assert all(model_depth(f"{family}{depth}") == depth for family in ("resnet", "plain") for depth in depths)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnt56", "resnet56"), ("plain_20", "plain20"), ("ResNet110", "resnet110"), ("resnet_1202", "resnet1202")],
)
@pytest.mark.parametrize("look_up", [create_model, model_depth])
def test_an_unknown_name_is_refused_with_the_nearest_one(look_up, name, nearest):
    with pytest.raises(UsageError, match=f"unknown model '{name}': did you mean '{nearest}'"):
        look_up(name)


@pytest.mark.parametrize("shortcut", ["C", "a", ""])
def test_an_unknown_shortcut_is_refused(shortcut):
    with pytest.raises(UsageError, match=f"unknown shortcut '{shortcut}'.*Valid: A, B"):
        create_model("resnet20", shortcut=shortcut)


def test_naming_the_networks_does_not_import_torch():
    program = "import sys, fastresnet.models as m; m.model_depth(m.list_models()[0]); print('torch' in sys.modules)"
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
    assert count_mega_macs(on_meta(f"{family}{depth}", shortcut=shortcut)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize(("family", "shortcut"), VARIANTS)
def test_the_depth_counts_the_weighted_layers(family, shortcut, depth):
    assert count_weighted_layers(on_meta(f"{family}{depth}", shortcut=shortcut)) == depth


def test_resnet1202_has_the_papers_size():
    network = on_meta("resnet1202", shortcut="A")
    assert round(count_parameters(network) / 1e6, 1) == 19.4
    assert count_weighted_layers(network) == 1202


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


def reference_norm(state, name, x):
    statistics = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, state[f"{name}.weight"], state[f"{name}.bias"])


def reference_bridge(state, name, x, out, shortcut):
    """What is added to the output `out` of a block with input `x`."""
    if shortcut is None:
        return torch.zeros_like(out)
    if x.shape == out.shape:
        return x
    if shortcut == "B":
        projected = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
        return reference_norm(state, f"{name}.downsample.1", projected)
    padded = torch.zeros_like(out)
    first = (out.shape[1] - x.shape[1]) // 2
    padded[:, first : first + x.shape[1]] = x[:, :, ::2, ::2]
    return padded


def reference_block(state, name, x, stride, shortcut):
    out = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
    out = F.relu(reference_norm(state, f"{name}.bn1", out))
    out = reference_norm(state, f"{name}.bn2", F.conv2d(out, state[f"{name}.conv2.weight"], padding=1))
    return F.relu(out + reference_bridge(state, name, x, out, shortcut))


def reference_network(state, x, depth, shortcut):
    x = F.relu(reference_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            x = reference_block(state, f"layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1, shortcut)
    return F.linear(F.avg_pool2d(x, 8).flatten(1), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("name", "shortcut", "reference_shortcut"),
    [
        ("resnet20", "A", "A"),
        ("resnet20", "B", "B"),
        ("plain20", "A", None),
        ("plain20", "B", None),
        ("resnet32", "A", "A"),
    ],
)
def test_the_network_equals_its_layers_written_out(name, shortcut, reference_shortcut):
    network, images = random_network(name, shortcut), random_images()
    with torch.no_grad():
        expected = reference_network(network.state_dict(), images, model_depth(name), reference_shortcut)
        torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
def test_the_memory_layout_does_not_change_the_logits(name, shortcut):
    network, images = random_network(name, shortcut), random_images()
    channels_last = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(network(channels_last), expected, rtol=1e-10, atol=1e-10)
        network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(network(channels_last), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "shortcut"), [*SMALLEST, ("resnet56", "A"), ("resnet110", "B"), ("plain110", "B")])
def test_the_gradient_reaches_every_parameter(name, shortcut):
    torch.manual_seed(0)
    network = create_model(name, shortcut=shortcut)
    F.cross_entropy(network(random_images(4).float()), torch.arange(4)).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
def test_torch_compile_takes_the_network_as_one_graph(name, shortcut):
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(create_model(name, shortcut=shortcut))(torch.randn(2, 3, 32, 32))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


# --- initial weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shortcut"), [*SMALLEST, ("resnet56", "B")])
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


def test_the_seed_decides_the_initial_weights():
    assert torch.equal(initial_weights(3), initial_weights(3))
    assert not torch.equal(initial_weights(3), initial_weights(4))
