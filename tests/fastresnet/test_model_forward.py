"""Forward and backward passes of the networks, against the same layers written out as functions."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastresnet.device import autocast
from fastresnet.models import MODELS, batchnorm, create_model, list_models
from fastresnet.models.batchnorm import fuse_batch_norms
from tests.fastresnet.reference_networks import (
    LARGEST,
    REFERENCES,
    SHALLOW,
    SMALLEST,
    Layers,
    assert_trains_as,
    on_meta,
    random_images,
    random_network,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_output_shape(name, shortcut, num_classes):
    network = on_meta(name, shortcut=shortcut, num_classes=num_classes)
    assert network(torch.empty(5, 3, 32, 32, device="meta")).shape == (5, num_classes)


TRAINED = [(name, "fp32") for name in list_models()]
TRAINED += [(name, precision) for name in (*SHALLOW, "plain110") for precision in ("bf16", "fp16")]
REFERENCE_IDS = [f"{name}-{shortcut}" for name, shortcut, _ in REFERENCES]


@pytest.mark.parametrize(("name", "shortcut", "reference"), REFERENCES, ids=REFERENCE_IDS)
def test_logits_match_reference(name, shortcut, reference):
    network, images = random_network(name, shortcut), random_images()
    with torch.no_grad():
        expected = reference(Layers(network.state_dict()), images)
        torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "shortcut", "reference"), REFERENCES, ids=REFERENCE_IDS)
def test_training_step_matches_reference(name, shortcut, reference):
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


def test_resnext_matches_torchvision():
    network, reference, x = random_network("resnext29-2x16d", "B"), torchvision_resnext(2, 16), random_images()
    reference.load_state_dict(network.state_dict())
    reference.double().eval()
    with torch.no_grad():
        expected = F.relu(reference.bn1(reference.conv1(x)))
        expected = reference.layer3(reference.layer2(reference.layer1(expected))).mean(dim=(2, 3))
        torch.testing.assert_close(network(x), reference.fc(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
def test_logits_do_not_depend_on_the_memory_format(name, shortcut):
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
def test_every_trained_parameter_has_a_gradient(name, shortcut):
    torch.manual_seed(0)
    network = create_model(name, shortcut=shortcut)
    F.cross_entropy(network(random_images(4).float()), torch.arange(4)).backward()
    for parameter_name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            assert name == "speednet"
            assert parameter_name.startswith("conv1") or "bn" in parameter_name
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["resnet20", "se-resnet20", "resnext29-2x16d", "resnet9"])
def test_zero_init_residual_leaves_only_shortcuts(name):
    """Only the weights of the branches' last norms differ. Squeeze and excitation scales a zero."""
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


@pytest.mark.parametrize("size", [(40, 3, 32, 32), (700, 3, 5, 9)])
def test_whitened_patches_have_unit_variance_and_no_correlation(size):
    """The reference is in NumPy, patch by patch. 5e-4 is added to each component's variance."""
    images = np.random.default_rng(0).normal(size=size)
    images = images.cumsum(2).cumsum(3)  # neighbouring pixels correlate, as in photographs
    images[:, 1] += images[:, 0]
    images /= images.std()
    layer = create_model("speednet").double().conv1
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
    np.testing.assert_allclose(out[:, :, 2, 3], corner, rtol=1e-10, atol=1e-10)
    assert out.shape == (size[0], 24, size[2] - 1, size[3] - 1)


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(name, precision, marks=[pytest.mark.slow] * (name in LARGEST)) for name, precision in TRAINED],
)
def test_every_network_trains(name, precision):
    """Two steps change every trained parameter. Images have 8x8 pixels to save time, or 16x16 for SpeedNet.

    Without shortcuts, gradients grow by a factor of about 1.2 with each layer (Yang et al., "A mean field theory of
    batch normalization", 2019). They overflow fp32 in 1202 layers, and fp16 in 110.
    """
    torch.manual_seed(0)
    network = create_model(name).to(memory_format=torch.channels_last)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    size = 16 if name.startswith("speednet") else 8
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)  # its steps do not depend on the gradient's size
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
def test_fused_batch_norm_includes_the_addition(monkeypatch, name, options, norms, with_shortcut):
    calls, call = [], batchnorm._call
    monkeypatch.setattr(
        batchnorm, "_call", lambda kernel, *a, **kw: (calls.append((kernel, kw)), call(kernel, *a, **kw))
    )
    network = create_model(name, **options).to(memory_format=torch.channels_last)
    fuse_batch_norms(network)
    network(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert Counter(kernel for kernel, _ in calls) == {"forward": norms, "backward": norms}
    assert sum(kw.get("shortcut") is not None for _, kw in calls) == with_shortcut


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("name", "shortcut"),
    [
        *(*SMALLEST[:3], ("se-resnet20", "B"), ("preresnet20", "A"), ("preresnet20", "B"), ("resnext29-2x16d", "B")),
        ("speednet", "B"),
    ],
)
def test_torch_compile_has_no_graph_breaks(name, shortcut):
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(create_model(name, shortcut=shortcut))(torch.randn(2, 3, 32, 32))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("name", "shortcut"), SMALLEST)
def test_torch_export_with_a_dynamic_batch_size(name, shortcut):
    network = random_network(name, shortcut, **({"drop_path": 0.1} if MODELS[name].supports_drop_path else {}))
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(network, (random_images(3),), dynamic_shapes={"x": {0: batch}})
    with torch.no_grad():
        for count in (1, 5):
            images = random_images(count)
            torch.testing.assert_close(exported.module()(images), network(images), rtol=1e-10, atol=1e-10)
