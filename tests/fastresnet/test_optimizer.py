"""Optimisers against PyTorch's plain ones and against the published formulas in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from fastresnet.config import TrainConfig
from fastresnet.models import create_model
from fastresnet.training.optimizer import (
    create_optimizers,
    load_optimizer_state,
    optimizer_state,
    orthogonalized,
)
from pipelines.errors import UsageError

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "nesterov": True, "decay_norms": False, "weight_decay": 5e-3},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "decay_norms": False, "weight_decay": 0.1},
    "muon": {"optimizer": "muon", "lr": 0.05, "sgd_lr": 0.02, "momentum": 0.6, "nesterov": True, "weight_decay": 5e-3},
    "muon, norm_lr": {"optimizer": "muon", "sgd_lr": 0.02, "norm_lr": 0.5, "nesterov": True, "decay_norms": False},
}


def small_network(seed=0):
    """Create a network with two convolutions of one shape, and a norm and a linear layer at 1 and 4."""
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(channels, 8, 3, bias=False) for channels in (3, 8, 8)]
    layers = [convolutions[0], nn.BatchNorm2d(8), convolutions[1], nn.Flatten(), nn.Linear(8, 4), convolutions[2]]
    return nn.Sequential(*layers).double()


def fill_gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def take_steps(network, optimizers, seeds):
    for seed in seeds:
        fill_gradients(network, seed)
        for optimizer in optimizers:
            optimizer.step()


def state_of(network, optimizers):
    return {**dict(network.named_parameters()), **optimizer_state(optimizers, network)}


def cloned(state):
    return {name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_parameter_that_is_trained_is_in_exactly_one_group(settings):
    network = create_model("resnet20")
    network.conv1.requires_grad_(False)
    optimizers = create_optimizers(network, TrainConfig(**settings))
    found = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for name, p in network.named_parameters() if name != "conv1.weight")


def test_norms_and_biases_decay_only_with_decay_norms():
    network = create_model("resnet20")
    for decay_norms in (True, False):
        config = TrainConfig(weight_decay=0.01, decay_norms=decay_norms)
        groups = [group for optimizer in create_optimizers(network, config) for group in optimizer.param_groups]
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for name, parameter in network.named_parameters():
            is_matrix = "conv" in name or name.endswith(("downsample.0.weight", "fc.weight"))
            assert decay[id(parameter)] == (0.01 if is_matrix or decay_norms else 0), name


def test_sgd_equals_pytorchs_unfused_loop():
    network, reference = small_network(), small_network()
    optimizers = create_optimizers(network, TrainConfig(lr=0.03, **OPTIMIZERS["sgd"]))
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 5e-3}, {"params": vectors, "weight_decay": 0}]
    plain = torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True, foreach=False)
    take_steps(network, optimizers, range(4))
    take_steps(reference, [plain], range(4))
    for a, b in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the learning rate is a float32 tensor


def test_adamw_equals_pytorchs_unfused_loop():
    network, reference = small_network(), small_network()
    optimizers = create_optimizers(network, TrainConfig(optimizer="adamw", lr=0.01, weight_decay=0.1))
    plain = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    take_steps(network, optimizers, range(4))
    take_steps(reference, [plain], range(4))
    for a, b in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def muon_in_numpy(weights, gradients, lr, momentum):
    """airbench94_muon.py's update of one convolution, with the same order of operations, in double precision."""
    rows = len(weights)
    weights, velocity = weights.reshape(rows, -1), 0
    for gradient in gradients:
        gradient = gradient.reshape(rows, -1)
        velocity = momentum * velocity + gradient
        x = gradient + momentum * velocity
        x = x / np.sqrt((x**2).sum())
        for _ in range(3):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        weights = weights * np.sqrt(rows) / np.sqrt((weights**2).sum())
        weights = weights - lr * x
    return weights


def test_muon_equals_the_published_update():
    network, reference = small_network(), small_network()
    optimizers = create_optimizers(network, TrainConfig(**OPTIMIZERS["muon"]))
    take_steps(network, optimizers, range(3))
    gradients = {0: [], 2: [], 5: []}
    for seed in range(3):
        fill_gradients(reference, seed)
        for i in gradients:
            gradients[i].append(reference[i].weight.grad.numpy().copy())
    for i, of_steps in gradients.items():
        expected = muon_in_numpy(reference[i].weight.detach().numpy(), of_steps, 0.05, 0.6)
        np.testing.assert_allclose(network[i].weight.detach().reshape(8, -1).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm_lr", "sgd_momentum"), [(None, None), (0.5, 0.85)])
def test_muon_uses_sgd_for_parameters_other_than_convolutions(norm_lr, sgd_momentum):
    """Norms and biases use `norm_lr` if it is set."""
    network, reference = small_network(), small_network()
    config = TrainConfig(**OPTIMIZERS["muon"], norm_lr=norm_lr, sgd_momentum=sgd_momentum)
    optimizers = create_optimizers(network, config)
    take_steps(network, optimizers, range(3))
    rates = [(reference[4].weight, 0.02), *((p, norm_lr or 0.02) for p in reference.parameters() if p.ndim == 1)]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in rates]
    take_steps(
        reference, [torch.optim.SGD(groups, momentum=sgd_momentum or 0.6, nesterov=True, weight_decay=5e-3)], range(3)
    )
    for i in (1, 4):
        for a, b in zip(network[i].parameters(), reference[i].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 144), (64, 576), (64, 16)], ids=str)
def test_orthogonalisation_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    for matrix, together in zip(matrices, orthogonalized(matrices), strict=True):
        torch.testing.assert_close(orthogonalized(matrix[None])[0], together)
    inner = left.mT @ orthogonalized(matrices) @ right.mT  # diagonal, if the vectors are the same
    values = inner.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-9)
    before = torch.linalg.svdvals(matrices)
    assert values.max() < 1.21
    assert (values.amax(1) / values.amin(1) < before.amax(1) / before.amin(1)).all()


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_update_skipped_by_found_inf_changes_nothing(settings):
    network = small_network().float()
    optimizers = create_optimizers(network, TrainConfig(**settings))
    for seeds in ((), (1, 2)):  # as the first of all, and later
        take_steps(network, optimizers, seeds)
        before = cloned(state_of(network, optimizers))
        for optimizer in optimizers:
            optimizer.found_inf = torch.ones(())
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.found_inf = torch.zeros(())
        after = state_of(network, optimizers)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scaled_gradients_give_the_same_update(settings):
    """GradScaler passes them scaled by a power of two, so that nothing is rounded."""
    (network, scaled) = (small_network().float() for _ in range(2))
    take_steps(network, create_optimizers(network, TrainConfig(**settings)), (1, 2))
    optimizers = create_optimizers(scaled, TrainConfig(**settings))
    for seed in (1, 2):
        fill_gradients(scaled, seed)
        for parameter in scaled.parameters():
            parameter.grad *= 1024
        for optimizer in optimizers:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.zeros(())
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), scaled.parameters(), strict=True))


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_restored_optimizer_state_continues_bit_exactly(settings):
    (network, other) = (create_model("resnet20").to(memory_format=torch.channels_last) for _ in range(2))
    optimizers, others = (create_optimizers(each, TrainConfig(**settings)) for each in (network, other))
    take_steps(network, optimizers, (1, 2))
    other.load_state_dict({name: value.contiguous().clone() for name, value in network.state_dict().items()})
    saved = {name: value.contiguous().clone() for name, value in optimizer_state(optimizers, network).items()}
    load_optimizer_state(others, other, saved)
    for each, of_each in ((network, optimizers), (other, others)):
        take_steps(each, of_each, (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_muon_without_convolutions_is_refused():
    with pytest.raises(UsageError, match="muon orthogonalises the weights of convolutions, and this network has none"):
        create_optimizers(nn.Linear(3, 4), TrainConfig(optimizer="muon"))
