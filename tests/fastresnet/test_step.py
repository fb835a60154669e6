import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastresnet.config import TrainConfig
from fastresnet.device import resolve_device, resolve_precision
from fastresnet.models import create_model
from fastresnet.training.optimizer import create_optimizer, load_optimizer_state, optimizer_state
from fastresnet.training.step import TrainStep
from pipelines.errors import UsageError

CPU = torch.device("cpu")


def small_batches(count, size=16):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        images = torch.randn(size, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
        yield images, torch.randint(0, 10, (size,), generator=generator)


def make_step(precision="fp32", model="resnet20", device=CPU, compile_model=False, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    network = create_model(model).to(device, dtype, memory_format=torch.channels_last)
    optimizer = create_optimizer(network, TrainConfig(**settings))
    step = TrainStep(network, optimizer, precision=precision, device=device, compile_model=compile_model)
    return network, step


def test_steps_equal_the_textbook_loop():
    """Contiguous layout and PyTorch's unfused SGD; in float64, where roundings stay too small to grow."""
    network, step = make_step(dtype=torch.float64)
    reference = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=False)
    losses, correct = [], 0
    for i, (images, labels) in enumerate(small_batches(4)):
        images = images.double()
        step(images, labels, lr=1e-3, step=i)
        logits = reference(images.contiguous())
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        correct += int((logits.argmax(1) == labels).sum())
    loss, accuracy = step.metrics()
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert accuracy == pytest.approx(100 * correct / 64)
    for a, b in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_a_batch_by_heart(precision):
    _, step = make_step(precision)
    ((images, labels),) = small_batches(1)
    for i in range(12):
        step.reset()
        step(images, labels, lr=0.02, step=i)
        if i == 0:
            first, _ = step.metrics()
    last, accuracy = step.metrics()
    assert step.failed_at() is None
    assert last < first / 3
    assert accuracy > 90


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_non_finite_loss_leaves_the_weights_untouched_for_good_and_names_its_step(precision):
    network, step = make_step(precision)
    batches = list(small_batches(3))
    step(*batches[0], lr=0.05, step=40)
    assert step.failed_at() is None
    before = [parameter.detach().clone() for parameter in network.parameters()]
    momentum = {name: value.clone() for name, value in optimizer_state(step.optimizer, network).items()}
    images, labels = batches[1]
    images[3, 1, 5, 5] = torch.nan
    step(images, labels, lr=0.05, step=41)
    step(*batches[2], lr=0.05, step=42)
    assert step.failed_at() == 41
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    after = optimizer_state(step.optimizer, network)
    assert all(torch.equal(value, after[name]) for name, value in momentum.items())


def test_a_first_update_that_overflows_leaves_no_momentum():
    """The fused optimiser allocates momentum without filling it; in a deep network rubbish in it soon reads as inf."""
    network, step = make_step("fp16", model="resnet56")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    ((images, labels),) = small_batches(1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    step(images, labels, lr=0.1, step=0)
    assert step.scaler.get_scale() < 2.0**60
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    momentum = optimizer_state(step.optimizer, network)
    assert len(momentum) == len(before)
    assert not any(value.any() for value in momentum.values())


def test_the_learning_rate_of_each_step_is_the_one_given():
    network, step = make_step(momentum=0.0, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    ((images, labels),) = small_batches(1)
    step(images, labels, lr=0.0, step=0)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    step(images, labels, lr=0.1, step=1)
    assert not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_optimizer_state_survives_the_way_through_contiguous_tensors():
    """As a checkpoint stores it; the continued run must give the same bits as the unbroken one."""
    batches = list(small_batches(4))
    network, step = make_step()
    for i in (0, 1):
        step(*batches[i], lr=0.05, step=i)
    weights = {name: value.contiguous().clone() for name, value in network.state_dict().items()}
    state = {name: v.contiguous().clone() for name, v in optimizer_state(step.optimizer, network).items()}
    other, other_step = make_step()
    other.load_state_dict(weights)
    load_optimizer_state(other_step.optimizer, other, state)
    for i in (2, 3):
        step(*batches[i], lr=0.05, step=i)
        other_step(*batches[i], lr=0.05, step=i)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_a_gpu_that_is_absent_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_where_the_cpu_computes_it(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp16", CPU) == "fp16"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compile_model", [False, True])
def test_steps_on_the_gpu_agree_with_the_cpu_and_never_wait_for_it(precision, compile_model):
    device = torch.device("cuda")
    _, on_cpu = make_step()
    _, on_gpu = make_step(precision, device=device, compile_model=compile_model)
    batches = [(i, images, labels) for i, (images, labels) in enumerate(small_batches(4))]
    moved = [(i, images.to(device), labels.to(device)) for i, images, labels in batches]
    for i, images, labels in batches[:2]:
        on_cpu(images, labels, lr=0.01, step=i)
    for i, images, labels in moved[:2]:
        on_gpu(images, labels, lr=0.01, step=i)
    assert on_gpu.metrics()[0] == pytest.approx(on_cpu.metrics()[0], rel=0.02 if precision != "fp32" else 2e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, images, labels in moved[2:]:
            on_gpu(images, labels, lr=0.01, step=i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert on_gpu.failed_at() is None
