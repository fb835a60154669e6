import contextlib
import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastresnet.config import TrainConfig
from fastresnet.device import resolve_device, resolve_precision
from fastresnet.models import create_model
from fastresnet.models.stochastic_depth import StochasticDepth, seed_stochastic_depth
from fastresnet.training import step as step_module
from fastresnet.training.cast_weights import CastWeights
from fastresnet.training.mixing import Mixer
from fastresnet.training.optimizer import Muon, create_optimizers, load_optimizer_state, optimizer_state
from fastresnet.training.step import TrainStep
from pipelines.errors import Note, UsageError

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("resnet8")


def small_batches(count, size=16):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        images = torch.randn(size, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
        yield images, torch.randint(0, 10, (size,), generator=generator)


def make_step(
    precision="fp32",
    model="resnet8",
    device=CPU,
    dtype=torch.float32,
    rates=(0.05,) * 20,
    step_settings=(),
    **settings,
):
    torch.manual_seed(0)
    network = create_model(model).to(device, dtype, memory_format=torch.channels_last)
    optimizers = create_optimizers(network, TrainConfig(**{"lr": 1.0, **settings}))
    step = TrainStep(network, optimizers, rates, precision=precision, device=device, **dict(step_settings))
    return network, step


def test_steps_equal_the_textbook_loop():
    """Contiguous layout and PyTorch's unfused SGD; in float64, where roundings stay too small to grow."""
    network, step = make_step(dtype=torch.float64, rates=[1e-3] * 4)
    reference = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=False)
    losses, correct = [], 0
    for images, labels in small_batches(4):
        images = images.double()
        step(images, labels)
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


def test_a_batch_in_parts_equals_the_textbook_loop():
    """Gradients of the parts' mean losses are averaged; batch norm sees each part by itself."""
    network, step = make_step(dtype=torch.float64, rates=[1e-3] * 3, step_settings={"accumulate": 4})
    reference = copy.deepcopy(network)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=False)
    losses = []
    for images, labels in small_batches(3):
        images = images.double()
        step(images, labels)
        optimizer.zero_grad()
        for part in range(4):
            rows = slice(4 * part, 4 * part + 4)
            loss = F.cross_entropy(reference(images[rows]), labels[rows])
            (loss / 4).backward()
            losses.append(loss.item())
        optimizer.step()
    assert step.metrics()[0] == pytest.approx(np.mean(losses), rel=1e-6)
    for a, b in zip(network.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_images_in_parts_draw_as_in_the_whole_batch():
    """Mixed images and dropped branches depend on the row in the batch, also where it is computed in parts."""

    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.fc = StochasticDepth(0.5, 0), torch.nn.Linear(3 * 32 * 32, 10)

        def forward(self, images):
            return self.fc(self.drop(images).flatten(1))

    updated = []
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 10
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        network = Dropping().double()
        optimizers = create_optimizers(network, TrainConfig(lr=1.0))
        mixer = Mixer(mixup=1.0, cutmix=1.0, seed=3, device=CPU)
        step = TrainStep(network, optimizers, [0.1] * 2, precision="fp32", device=CPU, mixer=mixer, accumulate=parts)
        seed_stochastic_depth(network, 5, step.count, step.row)
        for _ in range(2):
            step(images.double(), labels)
        updated.append(network.fc.weight.detach())
    for weight in updated[1:]:
        torch.testing.assert_close(weight, updated[0], rtol=0, atol=1e-12)
    assert not torch.allclose(updated[0], Dropping().double().fc.weight)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_parts_in_every_precision_give_about_the_same_gradients(precision):
    """Identical parts have the statistics of the whole batch. A part that is left out would change them by half."""
    weights = []
    for parts in (1, 2):
        network, step = make_step(precision, rates=[0.01], step_settings={"accumulate": parts})
        ((images, labels),) = small_batches(1)
        step(torch.cat([images, images]).contiguous(memory_format=torch.channels_last), torch.cat([labels, labels]))
        assert step.failed_at() is None
        weights.append(flat_weights(network))
    assert (weights[0] - weights[1]).norm() < 0.05 * (weights[0] - flat_weights(make_step()[0])).norm()


def flat_weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_factors_of_each_images_loss(smoothing):
    """Written out: each class of the smoothed label counts by its weight. The mean is over images, not over weights."""
    weights = np.linspace(0.2, 2, 10)
    settings = {"class_weights": torch.tensor(weights).float(), "label_smoothing": smoothing}
    network, step = make_step(dtype=torch.float64, step_settings=settings)
    ((images, labels),) = small_batches(1)
    logits = copy.deepcopy(network)(images.double())
    step(images.double(), labels)
    log_shares = F.log_softmax(logits, 1).detach().numpy()
    targets = np.full((16, 10), smoothing / 10) + (1 - smoothing) * np.eye(10)[labels.numpy()]
    expected = -(targets * weights * log_shares).sum(1).mean()
    assert step.metrics()[0] == pytest.approx(expected, rel=1e-6)


def test_images_are_shrunk_bilinearly_to_the_side_of_the_step():
    """Weights of the two nearest pixels by distance, with pixels as areas: coordinates are those of their centers."""
    seen = []
    network, step = make_step(dtype=torch.float64)
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images, labels = next(small_batches(1))
    step.side = 12
    step(images.double(), labels)
    place = (np.arange(12) + 0.5) * 16 / 12 - 0.5
    weights = np.maximum(0, 1 - abs(place[:, None] - np.arange(16)))
    expected = weights @ images.double().numpy() @ weights.T
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_overfits_one_batch(precision):
    _, step = make_step(precision, rates=[0.02] * 12)
    ((images, labels),) = small_batches(1)
    for i in range(12):
        step.reset()
        step(images, labels)
        if i == 0:
            first, _ = step.metrics()
    last, accuracy = step.metrics()
    assert step.failed_at() is None
    assert last < first / 3
    assert accuracy > 90


def inject(where, value, network, images):
    """Set an element of the images, of a weight or of its gradient to `value`; return a function that undoes it."""
    weight = network.layer2[0].conv1.weight
    if where == "gradient":
        return weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value)).remove
    target = images if where == "image" else weight.data
    before = target.clone()
    target[3, 1, 1, 1] = value
    return lambda: target.copy_(before)


@pytest.mark.parametrize("where", ["image", "weight", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_non_finite_value_stops_updates_and_its_step_is_reported(precision, value, where):
    """Non-finite gradients in fp16 are handled by the gradient scaler instead."""
    network, step = make_step(precision, rates=[0.05] * 50)
    step.count.fill_(40)
    batches = list(small_batches(3))
    step(*batches[0])
    assert step.failed_at() is None
    before = [parameter.detach().clone() for parameter in network.parameters()]
    momentum = {name: tensor.clone() for name, tensor in optimizer_state(step.optimizers, network).items()}
    undo = inject(where, value, network, batches[1][0])
    step(*batches[1])
    undo()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    overflowed = precision == "fp16" and where == "gradient"
    assert step.failed_at() == (None if overflowed else 41)
    assert not overflowed or step.overflows.tolist() == [1, 1]
    step(*batches[2])
    after = optimizer_state(step.optimizers, network)
    assert overflowed != all(torch.equal(tensor, after[name]) for name, tensor in momentum.items())
    assert overflowed != all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_overflows_are_counted_and_too_many_in_a_row_are_a_failure(monkeypatch, clip_norm):
    """The limit is lowered here: fp16 is slow on a CPU."""
    assert 2.0**16 * 0.5**step_module.MAX_OVERFLOWS == 2.0**-16
    monkeypatch.setattr(step_module, "MAX_OVERFLOWS", 6)
    network, step = make_step("fp16", rates=[0.01] * 99, step_settings={"clip_norm": clip_norm})
    ((images, labels),) = small_batches(1, 4)
    undo = inject("gradient", math.inf, network, images)
    for _ in range(3):
        step(images, labels)
    undo()
    assert step.scaler.get_scale() == 2.0**13
    step(images, labels)
    assert step.overflows.tolist() == [3, 0]
    step.reset()
    inject("gradient", math.inf, network, images)
    for _ in range(5):
        step(images, labels)
    assert step.failed_at() is None
    assert step.overflows.tolist() == [5, 5]
    step(images, labels)
    assert step.failed_at() == 9


def test_a_first_update_that_overflows_leaves_no_momentum():
    """The fused optimiser allocates momentum without filling it; in a deep network such values soon become inf."""
    network, step = make_step("fp16", model="resnet56")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    ((images, labels),) = small_batches(1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    step(images, labels)
    assert step.scaler.get_scale() < 2.0**60
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    momentum = optimizer_state(step.optimizers, network)
    assert len(momentum) == len(before)
    assert not any(value.any() for value in momentum.values())


def test_each_step_takes_its_own_learning_rate():
    network, step = make_step(momentum=0.0, weight_decay=0.0, rates=[0.0, 0.1])
    before = [parameter.detach().clone() for parameter in network.parameters()]
    ((images, labels),) = small_batches(1)
    step(images, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    step(images, labels)
    assert not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_optimizer_state_round_trips_through_contiguous_tensors():
    """A checkpoint stores it so; the resumed run must give the same bits as the uninterrupted one."""
    batches = list(small_batches(4))
    network, step = make_step()
    for i in (0, 1):
        step(*batches[i])
    weights = {name: value.contiguous().clone() for name, value in network.state_dict().items()}
    state = {name: v.contiguous().clone() for name, v in optimizer_state(step.optimizers, network).items()}
    other, other_step = make_step()
    other.load_state_dict(weights)
    load_optimizer_state(other_step.optimizers, other, state)
    for i in (2, 3):
        step(*batches[i])
        other_step(*batches[i])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_device_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


def test_container_without_gpu_access_gets_a_note_with_the_docker_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("fastresnet.device.NVIDIA_CONTROL", Path("no/such/file"))
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")
    with pytest.warns(Note, match="docker run --gpus all"):
        assert resolve_device("auto") == CPU
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_device("cpu")  # no note: the CPU was requested


def test_cpu_memory_is_reused_between_steps():
    """20 tensors of 4 MB in every round have 20,480 pages; by default, glibc requests most of them again."""
    program = """
import resource, torch
from fastresnet.device import resolve_device
resolve_device("cpu")
def work():
    kept = [torch.ones(1 << 20) for _ in range(20)]
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_where_the_cpu_computes_it(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp16", CPU) == "fp16"


def test_clipping_equals_the_textbook_loop():
    network, step = make_step(dtype=torch.float64, rates=[1e-2] * 4, step_settings={"clip_norm": 0.5})
    reference = copy.deepcopy(network)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-4, foreach=False)
    clipped = 0
    for images, labels in small_batches(4):
        step(images.double(), labels)
        optimizer.zero_grad()
        F.cross_entropy(reference(images.double()), labels).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm()
        for parameter in reference.parameters():
            parameter.grad *= min(1.0, 0.5 / norm.item())
        clipped += int(norm > 0.5)
        optimizer.step()
    assert clipped > 0
    for a, b in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_ema_averages_weights_and_batch_norm_statistics():
    network, step = make_step(dtype=torch.float64, step_settings={"ema_decay": 0.8})
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for images, labels in small_batches(3):
        step(images.double(), labels)
        for name, value in network.state_dict().items():
            moving = 0.8 * expected[name] + 0.2 * value if value.is_floating_point() else value.clone()
            expected[name] = moving
    averaged = step.averaged.state_dict()
    assert averaged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_trial_step_changes_no_state(precision):
    """Later steps are the same with and without it."""
    batches = list(small_batches(3))
    settings = {"step_settings": {"ema_decay": 0.9, "clip_norm": 1.0}}
    (network, step), (other, disturbed) = make_step(precision, **settings), make_step(precision, **settings)
    for images, labels in batches:
        with contextlib.suppress(RuntimeError), disturbed.restored():
            disturbed(torch.full_like(images, torch.nan), labels)
            disturbed(images, labels)
            raise RuntimeError("a trial may fail")
        step(images, labels)
        disturbed(images, labels)
    assert step.failed_at() is None
    assert disturbed.failed_at() is None
    assert disturbed.metrics() == step.metrics()
    assert int(disturbed.count) == 3
    assert disturbed.scaler.state_dict() == step.scaler.state_dict()
    for a, b in ((network, other), (step.averaged, disturbed.averaged)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gpu_steps_match_the_cpu_and_never_wait_for_the_gpu(precision, compiled):
    device = torch.device("cuda")
    settings = {"model": "resnet20", "rates": [0.01] * 4, "step_settings": {"ema_decay": 0.9, "clip_norm": 5.0}}
    _, on_cpu = make_step(**settings)
    _, on_gpu = make_step(precision, device=device, **settings)
    on_gpu.compiled = compiled
    batches = list(small_batches(4))
    moved = [(images.to(device), labels.to(device)) for images, labels in batches]
    for a, b in zip(batches[:2], moved[:2], strict=True):
        on_cpu(*a)
        on_gpu(*b)
    assert on_gpu.metrics()[0] == pytest.approx(on_cpu.metrics()[0], rel=0.02 if precision != "fp32" else 2e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in moved[2:]:
            on_gpu(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert on_gpu.failed_at() is None


def textbook_muon(weight, gradient, lr, momentum):
    """A first update in float64 of airbench94_muon.py, its orthogonalisation by singular values."""
    weight, update = weight.double().reshape(len(weight), -1), (1 + momentum) * gradient.reshape(len(weight), -1)
    left, values, right = torch.linalg.svd(update / update.norm(), full_matrices=False)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return weight * len(weight) ** 0.5 / weight.norm() - lr * left @ torch.diag(values) @ right


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_an_update_in_fp16_is_that_of_unscaled_gradients_in_float64(clip_norm):
    """Muon and SGD beside it: the scaler multiplies by 2**16, which divides out exactly."""
    settings = {"optimizer": "muon", "lr": 0.1, "sgd_lr": 0.2, "momentum": 0.6, "nesterov": True, "weight_decay": 0.01}
    network, step = make_step("fp16", rates=[1.0], step_settings={"clip_norm": clip_norm}, **settings)
    reference = copy.deepcopy(network)
    ((images, labels),) = small_batches(1)
    step(images, labels)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(reference(images).float(), labels)
    (2**16 * loss).backward()
    gradients = {name: parameter.grad.double() / 2**16 for name, parameter in reference.named_parameters()}
    norm = sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5
    assert norm > 0.5
    for name, parameter in reference.named_parameters():
        gradient = gradients[name] * (min(1.0, clip_norm / norm) if clip_norm else 1.0)
        if parameter.ndim == 4:
            expected = textbook_muon(parameter, gradient, 0.1, 0.6)
        else:
            expected = parameter.double() - 0.2 * 1.6 * (gradient + 0.01 * parameter.double())
        updated = network.get_parameter(name).double()
        torch.testing.assert_close(updated, expected.reshape(updated.shape), rtol=1e-4, atol=1e-5)
    assert step.overflows.tolist() == [0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("layer", ["layer2.0.conv1", "fc"])
def test_overflow_in_one_optimizer_skips_the_update_of_all(layer, clip_norm, value):
    settings = {"optimizer": "muon", "momentum": 0.6, "step_settings": {"clip_norm": clip_norm}}
    network, step = make_step("fp16", rates=[0.01] * 3, **settings)
    batches = list(small_batches(3))
    step(*batches[0])
    before = {**network.state_dict(), **optimizer_state(step.optimizers, network)}
    before = {name: tensor.clone() for name, tensor in before.items() if "running" not in name and "num_" not in name}
    weight = network.get_submodule(layer).weight
    undo = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value)).remove
    step(*batches[1])
    undo()
    after = {**network.state_dict(), **optimizer_state(step.optimizers, network)}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (step.overflows.tolist(), step.scaler.get_scale(), step.failed_at()) == ([1, 1], 2.0**15, None)
    step(*batches[2])
    assert not any(torch.equal(before[name], parameter) for name, parameter in network.named_parameters())


def fail(*_):
    raise RuntimeError("a kernel fails")


def test_a_failed_backward_pass_leaves_no_gradients_in_cast_weights():
    """On a GPU the network of a step has weights in half precision."""
    ((images, labels),) = small_batches(1)
    steps = []
    for _ in range(2):
        network, step = make_step("bf16", rates=[1.0] * 3)
        step._cast = CastWeights(network, torch.bfloat16)
        step._network = step._cast.model
        steps.append(step)
    failing, undisturbed = steps
    norm = next(module for module in failing.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    hook = norm.register_forward_hook(lambda module, given, out: out.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="a kernel fails"):
        failing.trial(images, labels)
    hook.remove()
    for each in steps:
        each(images, labels)
    pairs = zip(failing.model.parameters(), undisturbed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_steps_go_on_after_an_update_that_failed_in_fp16_with_clipping(monkeypatch):
    """The gradient scaler keeps how far the failed one came."""
    _, step = make_step("fp16", rates=[1.0] * 3, optimizer="muon", step_settings={"clip_norm": 1.0})
    ((images, labels),) = small_batches(1)
    with monkeypatch.context() as patch:
        patch.setattr(Muon, "step", fail)
        with pytest.raises(RuntimeError, match="a kernel fails"):
            step.trial(images, labels)
    step(images, labels)
    assert step.failed_at() is None


def test_gradients_whose_norm_overflows_cancel_the_update():
    network, step = make_step(rates=[1.0])
    with torch.no_grad():
        network.fc.weight.mul_(1e19)
    before = network.fc.weight.clone()
    ((images, labels),) = small_batches(1)
    step(images, labels)
    assert step.failed_at() == 0
    assert torch.equal(network.fc.weight, before)
