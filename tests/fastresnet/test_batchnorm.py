"""Batch norm, addition and ReLU in one kernel against PyTorch's operators in double precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastresnet.device import autocast
from fastresnet.models import batchnorm, create_model
from fastresnet.models.batchnorm import BatchNorm2d, fuse_batch_norms
from pipelines.errors import Note

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def activation(*shape, dtype, seed, offset=0.0, device="cpu"):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
    return values.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def fused_norm(channels, *, relu, seed=0):
    norm = BatchNorm2d(channels, relu=relu)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    fuse_batch_norms(norm)
    assert norm.fused
    return norm


@pytest.fixture
def kernel_calls(monkeypatch):
    """Names of the kernels that ran."""
    calls, call = [], batchnorm._call
    monkeypatch.setattr(batchnorm, "_call", lambda name, *args, **more: (calls.append(name), call(name, *args, **more)))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", [(128, 16, 32, 32), (3, 64, 7, 5), (1, 32, 1, 2), (2, 640, 8, 9)], ids=str)
def test_fused_norm_matches_separate_operators_in_double_precision(shape, with_shortcut, relu, dtype, kernel_calls):
    norm = fused_norm(shape[1], relu=relu)
    x = activation(*shape, dtype=dtype, seed=1)
    shortcut = activation(*shape, dtype=dtype, seed=2) if with_shortcut else None
    grad = activation(*shape, dtype=dtype, seed=3).detach()
    # The same in double precision, from the same rounded inputs.
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in (x, shortcut)]
    weight, bias = (value.detach().double().requires_grad_() for value in (norm.weight, norm.bias))
    running = norm.running_mean.double(), norm.running_var.double()
    out = F.batch_norm(wide[0], *running, weight, bias, True, norm.momentum, norm.eps)
    if with_shortcut:
        out = out + wide[1]

    y = norm(x, shortcut)
    y.backward(grad)
    assert kernel_calls == ["forward", "backward"]
    assert y.dtype == x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Where an output is zero to the rounding, ReLU may let the gradient through or not: take the kernel's decision.
    out.backward(torch.where(y > 0, grad.double(), 0) if relu else grad.double())

    unit, count = ROUNDING[dtype], x.numel() // shape[1]
    expected = out.relu() if relu else out
    # One rounding of the result, and fp32 arithmetic on values of the size of the normalised input.
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=2**-19)
    # The gradient is a difference of terms of this size.
    variance = wide[0].detach().var(dim=(0, 2, 3), correction=0)
    size = float((weight.detach().abs() * (variance + norm.eps).rsqrt()).max() * grad.abs().max())
    torch.testing.assert_close(x.grad.double(), wide[0].grad, rtol=unit, atol=size * 2**-18)
    if with_shortcut:
        assert torch.equal(shortcut.grad.double(), wide[1].grad)
    # Sums of `count` terms of size 1, which may cancel, in partial sums of fp32.
    for value, reference in ((norm.weight, weight), (norm.bias, bias)):
        torch.testing.assert_close(value.grad.double(), reference.grad, rtol=2**-20, atol=count**0.5 * 2**-18)
    for value, reference in zip((norm.running_mean, norm.running_var), running, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2**-22, atol=2**-22)
    assert int(norm.num_batches_tracked) == 1


def test_a_mean_far_from_zero_costs_no_precision():
    """The textbook's mean of squares less square of the mean would leave nothing of this variance in fp32."""
    norm = fused_norm(16, relu=False)
    x = activation(64, 16, 8, 8, dtype=torch.float32, seed=4, offset=3000.0)
    norm(x)
    expected = x.detach().double().var(dim=(0, 2, 3), unbiased=True)
    fresh = fused_norm(16, relu=False).running_var.double()
    torch.testing.assert_close((norm.running_var.double() - 0.9 * fresh) / 0.1, expected, rtol=1e-4, atol=0)


def test_the_result_does_not_depend_on_the_number_of_threads():
    def results(threads):
        torch.set_num_threads(threads)
        norm = fused_norm(32, relu=True)
        x, shortcut = (activation(40, 32, 16, 16, dtype=torch.float32, seed=seed) for seed in (5, 6))
        norm(x, shortcut).square().sum().backward()
        return x.grad, shortcut.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var

    before = torch.get_num_threads()
    try:
        for one, three in zip(results(1), results(3), strict=True):
            assert torch.equal(one, three)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_propagated(bad):
    """ReLU by comparison would hide them, and a failed run would continue."""
    norm = fused_norm(16, relu=True)
    x = activation(2, 16, 4, 4, dtype=torch.bfloat16, seed=7)
    with torch.no_grad():
        x[0, 3, 1, 1] = bad
    y = norm(x)
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    y.sum().backward()
    assert x.grad[:, 3].isnan().all()


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"dtype": torch.float16}, "no kernel for the type"),
        ({"shape": (4, 24, 8, 8)}, "channels that do not fill vectors"),
        ({"layout": torch.contiguous_format}, "NCHW"),
        ({"training": False}, "evaluation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_inputs_fall_back_to_pytorch(inputs, reason, kernel_calls):
    del reason
    x = activation(*inputs.get("shape", (4, 16, 8, 8)), dtype=inputs.get("dtype", torch.float32), seed=8).detach()
    x = x.contiguous(memory_format=inputs.get("layout", torch.channels_last))
    norm = fused_norm(x.shape[1], relu=True).train(inputs.get("training", True))
    reference = torch.nn.BatchNorm2d(x.shape[1]).train(norm.training)
    reference.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x, x), F.relu(reference(x) + x))
    assert kernel_calls == []


def test_one_value_per_channel_is_refused_as_in_pytorch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused_norm(16, relu=True)(torch.zeros(1, 16, 1, 1))


def test_fused_training_is_as_accurate_as_unfused_training(kernel_calls):
    """Losses of four steps, and all parameters and statistics after them."""

    def train(dtype, *, fused):
        torch.manual_seed(0)
        model = create_model("resnet20").to(dtype, memory_format=torch.channels_last)
        images = torch.randn(16, 3, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
        if fused:
            fuse_batch_norms(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        losses = []
        for _ in range(4):
            loss = F.cross_entropy(model(images), torch.arange(16) % 10)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.cat([torch.stack(losses), *(value.flatten() for value in model.state_dict().values())]).double()

    reference = train(torch.float64, fused=False)
    separate = train(torch.float32, fused=False)
    assert kernel_calls == []
    together = train(torch.float32, fused=True)
    assert len(kernel_calls) == 4 * 2 * 21
    assert (together - reference).norm() < 2 * (separate - reference).norm()


def test_shortcut_a_and_bfloat16_autocast_use_the_kernels(kernel_calls):
    model = create_model("resnet20", shortcut="A").to(memory_format=torch.channels_last)
    fuse_batch_norms(model)
    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with autocast("bf16", torch.device("cpu")):
        model(images).sum().backward()
    assert kernel_calls == ["forward"] * 19 + ["backward"] * 19


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_pytorch_is_used_with_a_note(monkeypatch, compiler):
    batchnorm._kernels.cache_clear()
    monkeypatch.setenv("CC", compiler)
    norm = BatchNorm2d(16, relu=True)
    with pytest.warns(Note, match=f"batch norm runs in PyTorch, .*{compiler}.*; install gcc 12"):
        fuse_batch_norms(norm)
    batchnorm._kernels.cache_clear()
    assert not norm.fused
    norm(torch.randn(4, 16, 2, 2).contiguous(memory_format=torch.channels_last))


def test_kernels_share_the_openmp_library_of_pytorch():
    """A second OpenMP's threads would take the cores from the first one's."""
    fuse_batch_norms(BatchNorm2d(16, relu=True))
    with open("/proc/self/maps") as maps:
        copies = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(copies) <= 1


def test_c_source_compiles_without_warnings(monkeypatch):
    batchnorm._kernels.cache_clear()
    monkeypatch.setenv("CC", "cc -Wall -Wextra -Werror")
    assert batchnorm._kernels() is not None
    batchnorm._kernels.cache_clear()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_kernels_pass_their_checks(device):
    """On a CPU, Triton's interpreter executes them."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    checks = Path(__file__).with_name("batchnorm_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
