"""Reference networks: their layers written out as functions. Helpers of the tests of networks."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastresnet.models import create_model, list_models

LARGEST = ("resnet18", "resnet1202", "plain1202", "wrn16-8", "wrn28-10", "resnext29-4x64d", "resnext29-8x64d")
SMALLEST = [
    *(("resnet20", "A"), ("resnet20", "B"), ("plain20", "B"), ("se-resnet20", "A"), ("se-resnet20", "B")),
    *(("preresnet20", "A"), ("preresnet20", "B"), ("wrn16-2", "B"), ("resnext29-2x16d", "B"), ("speednet", "B")),
]


DEEPER = {f"{family}{depth}" for family in ("resnet", "plain") for depth in (32, 44, 56, 110)}
DEEPER |= {"se-resnet56", "preresnet56", "preresnet110"}
SHALLOW = [name for name in list_models() if name not in DEEPER]
"""Networks without those of others' blocks in larger numbers."""


def with_slow_ones(names):
    """Mark the largest networks as slow, for tests that create or train each network."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGEST else name for name in names]


def on_meta(name, *, num_classes=10, shortcut="B", drop_path=0.0):
    """Create the network without memory for its weights, which is enough for counting."""
    return _on_meta(name, num_classes=num_classes, shortcut=shortcut, drop_path=drop_path)


@functools.cache
def _on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def random_network(name, shortcut, seed=0, **options):
    """Create the network in float64 and evaluation mode, with random batch norms and biases."""
    torch.manual_seed(seed)
    network = create_model(name, shortcut=shortcut, **options)
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return network.double().eval()


def random_images(count=3, seed=1, side=32):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Layers:
    """Layers of a network as functions of its state dict."""

    def __init__(self, state, training=False, branch_scales=None):
        """Take the weights from `state`. `branch_scales` [blocks, B]: factors of the residual branches."""
        self.state, self.training, self.branch_scales = state, training, branch_scales

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], **options)

    def norm(self, name, x):
        values = [self.state[f"{name}.{value}"] for value in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, values[0].clone(), values[1].clone(), *values[2:], training=self.training)

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def classify(self, x):
        return self.linear("fc", F.avg_pool2d(x, x.shape[-1]).flatten(1))

    def scaled(self, block, out):
        """Scale the residual branch `out` of that block as stochastic depth does."""
        return out if self.branch_scales is None else out * self.branch_scales[block].view(-1, 1, 1, 1)

    def excited(self, name, x):
        """Scale the channels of `x` if the network has squeeze and excitation."""
        if f"{name}.se.fc1.weight" not in self.state:
            return x
        hidden = F.relu(self.linear(f"{name}.se.fc1", F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return x * torch.sigmoid(self.linear(f"{name}.se.fc2", hidden)).view(*x.shape[:2], 1, 1)

    def shortcut(self, name, x, out, option, projection):
        """Return the shortcut to add to the output `out` of a block with input `x`."""
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

    def resnet(self, x, depth, option, stages=3):
        x = F.relu(self.norm("bn1", self.conv("conv1", x, padding=1)))
        for number, name, stride in block_names((depth - 2) // (2 * stages), stages):
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

        x, number = norm_relu("bn1", self.conv("conv1", x, padding=1)), 0
        for stage in (1, 2, 3):
            x = norm_relu(f"layer{stage}.0.bn1", F.max_pool2d(self.conv(f"layer{stage}.0.conv1", x, padding=1), 2))
            if stage != 2:
                block = f"layer{stage}.1"
                out = norm_relu(f"{block}.bn1", self.conv(f"{block}.conv1", x, padding=1))
                out = self.norm(f"{block}.bn2", self.conv(f"{block}.conv2", out, padding=1))
                x, number = F.relu(self.scaled(number, out) + x), number + 1
        return self.linear("fc", x.flatten(2).max(2).values / 8)

    def speednet(self, x):
        x = F.gelu(self.conv("conv1", x) + self.state["conv1.bias"][:, None, None])
        for stage in ("layer1", "layer2", "layer3"):
            x = F.gelu(self.norm(f"{stage}.bn1", F.max_pool2d(self.conv(f"{stage}.conv1", x, padding=1), 2)))
            out = self.norm(f"{stage}.bn2", self.conv(f"{stage}.conv2", x, padding=1))
            x = F.gelu(out + x if stage == "layer2" else out)
        return x.flatten(2).max(2).values @ self.state["fc.weight"].T

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


def block_names(blocks, stages=3):
    """Yield number, name and stride of each block of the stages."""
    for number in range(stages * blocks):
        stage, block = divmod(number, blocks)
        yield number, f"layer{stage + 1}.{block}", 2 if stage and not block else 1


REFERENCES = [
    ("resnet20", "A", lambda layers, x: layers.resnet(x, 20, "A")),
    ("resnet20", "B", lambda layers, x: layers.resnet(x, 20, "B")),
    ("resnet18", "B", lambda layers, x: layers.resnet(x, 18, "B", stages=4)),
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
    ("speednet", "B", lambda layers, x: layers.speednet(x)),
]


def assert_trains_as(network, layers, images, reference):
    """Compare logits and gradients of a training step with those of the reference `layers`."""
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
