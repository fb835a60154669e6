"""Checks of batch norm's Triton kernels against PyTorch's operators in double precision.

`test_batchnorm.py` runs them in a process of their own: on a CPU Triton reads TRITON_INTERPRET when it is imported.
"""

import pytest
import torch
import torch.nn.functional as F

from fastresnet.models import batchnorm_triton
from fastresnet.models.batchnorm_triton import BatchNorm, batch_norm, batch_norm_backward, create_semaphores
from tests.fastresnet.test_batchnorm import activation

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8 if CUDA else 2**-7}  # interpreted: cut
MOMENTUM, EPSILON = 0.1, 1e-5


@pytest.fixture(params=[None] if CUDA else [1, 3], ids=lambda programs: f"{programs or 'all'} programs", autouse=True)
def programs(request, monkeypatch):
    """Number of programs at a time. One is launched once, as on a GPU, and does not wait; several, for each part."""
    if request.param:
        monkeypatch.setattr(batchnorm_triton, "programs_at_once", lambda _: request.param)


class Operands:
    """Operands of a batch norm, and the same in double precision from the same rounded values."""

    def __init__(self, shape, dtype, *, shortcut, offset=0.0):
        self.x = activation(*shape, dtype=dtype, seed=1, offset=offset, device=DEVICE)
        self.shortcut = activation(*shape, dtype=dtype, seed=2, device=DEVICE) if shortcut else None
        generator = torch.Generator().manual_seed(3)
        self.weight, self.bias = (torch.randn(shape[1], generator=generator).to(DEVICE) for _ in range(2))
        self.running = torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)
        self.batches = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.semaphores = create_semaphores(self.weight)

    @property
    def statistics(self):
        return *self.running, self.batches, self.semaphores, MOMENTUM, EPSILON

    def double(self):
        tensors = (self.x, self.shortcut, self.weight, self.bias)
        wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]
        return *wide, tuple(tensor.double() for tensor in self.running)


SHAPES = [
    (1024, 16, 4, 4),
    (5, 16, 32, 32),
    (3, 24, 7, 5),
    (1, 32, 1, 2),
    (1, 64, 32, 32),
    (2, 640, 8, 9),
    (7, 160, 1, 1),
]


CASES = [
    (torch.float32, False, False),
    (torch.float32, True, False),
    (torch.float32, True, True),
    (torch.bfloat16, True, True),
    (torch.float16, True, True),
]


@pytest.mark.parametrize(("dtype", "relu", "with_shortcut"), CASES, ids=str)
def test_both_passes_match_double_precision(dtype, relu, with_shortcut):
    for shape in SHAPES if (dtype, with_shortcut) == (torch.float32, True) else SHAPES[2:5]:
        ours = Operands(shape, dtype, shortcut=with_shortcut)
        x, shortcut, weight, bias, running = ours.double()
        out = F.batch_norm(x, *running, weight, bias, True, MOMENTUM, EPSILON)
        out = out if shortcut is None else out + shortcut
        weights = [value.requires_grad_() for value in (ours.weight, ours.bias)]
        y = BatchNorm.apply(ours.x, ours.shortcut, *weights, *ours.statistics, relu)
        grad = activation(*shape, dtype=dtype, seed=4, device=DEVICE).detach()
        y.backward(grad)
        # Where an output is zero to the rounding, ReLU may let the gradient through or not: take the kernel's decision.
        out.backward(torch.where(y > 0, grad.double(), 0) if relu else grad.double())

        unit, count = ROUNDING[dtype], x.numel() // shape[1]
        assert y.dtype == ours.x.grad.dtype == dtype
        # One rounding of the result, and fp32 arithmetic on values of the size of the normalised input.
        torch.testing.assert_close(y.double(), out.relu() if relu else out, rtol=unit, atol=2**-19)
        # The gradient is a difference of terms of this size; it has the rounded gradient of the shortcut.
        variance = x.detach().var(dim=(0, 2, 3), correction=0)
        size = float((weight.detach().abs() * (variance + EPSILON).rsqrt()).max() * grad.abs().max())
        torch.testing.assert_close(ours.x.grad.double(), x.grad, rtol=unit, atol=size * 2**-18)
        if with_shortcut:
            assert torch.equal(ours.shortcut.grad.double(), shortcut.grad)
        # Sums of `count` terms of size 1, which may cancel, in partial sums of fp32.
        for value, reference in ((ours.weight, weight), (ours.bias, bias)):
            torch.testing.assert_close(value.grad.double(), reference.grad, rtol=2**-20, atol=count**0.5 * 2**-18)
        for value, reference in zip(ours.running, running, strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=2**-22, atol=2**-22)
        assert int(ours.batches) == 1


@pytest.mark.parametrize("with_shortcut", [False, True])
def test_the_backward_pass_adds_two_gradients(with_shortcut):
    for shape in SHAPES[1:4]:
        ours = Operands(shape, torch.float32, shortcut=with_shortcut)
        grads = [activation(*shape, dtype=torch.float32, seed=seed, device=DEVICE).detach() for seed in (4, 5)]
        with torch.no_grad():
            _, mask, *saved = batch_norm(ours.x, ours.shortcut, ours.weight, ours.bias, *ours.statistics, True)

        def backward(first, second, ours=ours, mask=mask, saved=saved):
            operands = (first, second, ours.x.detach(), mask, ours.weight, ours.bias)
            return batch_norm_backward(*operands, *saved, ours.semaphores, True)

        for one, other in zip(backward(*grads), backward(grads[0] + grads[1], None), strict=True):
            assert torch.equal(one, other)


def test_a_mean_far_from_zero_costs_no_precision():
    """The textbook's mean of squares less square of the mean would leave nothing of this variance in fp32."""
    ours = Operands((64, 16, 8, 8), torch.float32, shortcut=False, offset=3000.0)
    BatchNorm.apply(ours.x, None, ours.weight, ours.bias, *ours.statistics, False)
    expected = ours.x.detach().double().var(dim=(0, 2, 3), unbiased=True)
    torch.testing.assert_close((ours.running[1].double() - 0.9) / 0.1, expected, rtol=1e-4, atol=0)


def test_a_channel_without_variance_becomes_the_bias():
    ours = Operands((4, 16, 8, 8), torch.float32, shortcut=False)
    with torch.no_grad():
        ours.x[:, 3] = 7.0
    y = BatchNorm.apply(ours.x, None, ours.weight, ours.bias, *ours.statistics, False)
    assert torch.equal(y[:, 3], ours.bias[3].expand(4, 8, 8))
    y.backward(torch.ones_like(y))
    assert ours.x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_propagated(bad):
    """ReLU by comparison would hide them, and a failed run would continue."""
    ours = Operands((2, 16, 4, 4), torch.bfloat16, shortcut=False)
    with torch.no_grad():
        ours.x[0, 3, 1, 1] = bad
    y = BatchNorm.apply(ours.x, None, ours.weight, ours.bias, *ours.statistics, True)
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    y.sum().backward()
    assert ours.x.grad[:, 3].isnan().all()


def test_repeated_passes_have_the_same_bits():
    ours = Operands((9, 32, 16, 16), torch.bfloat16, shortcut=True)
    grad = activation(9, 32, 16, 16, dtype=torch.bfloat16, seed=4, device=DEVICE).detach()

    def results():
        y, mask, *saved = batch_norm(ours.x, ours.shortcut, ours.weight, ours.bias, *ours.statistics, True)
        operands = (grad, None, ours.x, mask, ours.weight, ours.bias)
        return [y, mask, *saved, *batch_norm_backward(*operands, *saved, ours.semaphores, True)]

    with torch.no_grad():
        for first, second in zip(results(), results(), strict=True):
            assert torch.equal(first, second)
