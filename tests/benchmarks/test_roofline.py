"""FLOPs and memory traffic of a step, against hand calculations, and the limits of a machine."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import roofline
from benchmarks.roofline import ByteCounter, copy_bandwidth, matmul_rate, memory_per_image
from fastresnet.models import create_model
from fastresnet.models.summary import flops_per_image

CPU = torch.device("cpu")


def bytes_of(work) -> int:
    with ByteCounter() as counter:
        work()
    return counter.bytes


def test_flops_of_a_convolution():
    """8 output channels, each pixel 3 x 3 x 3 multiply-adds, on 32 x 32 pixels; padding counts as if computed."""
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    forward = 2 * 8 * 27 * 1024
    assert flops_per_image(convolution, training=False) == forward
    # The images need no gradient, so that the backward pass has only that of the weights.
    assert flops_per_image(convolution, training=True) == 2 * forward


def test_flops_of_resnet20():
    """40.81 million multiply-adds with shortcut B; for training 3 times as many, less the gradient of the images."""
    model = create_model("resnet20")
    first_layer = 16 * 27 * 1024
    stages = [
        6 * 16 * 16 * 9 * 1024,
        (16 * 32 + 5 * 32 * 32) * 9 * 256 + 16 * 32 * 256,
        (32 * 64 + 5 * 64 * 64) * 9 * 64 + 32 * 64 * 64,
    ]
    macs = first_layer + sum(stages) + 640
    assert round(macs / 1e6, 2) == 40.81
    assert flops_per_image(model, training=False) == 2 * macs
    assert flops_per_image(model, training=True) == 2 * (3 * macs - first_layer)


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda x: x + x.t(), 4 * 3 * 100),
        (lambda x: x.add_(1), 4 * 2 * 100),
        (lambda x: torch.empty(10, 10).copy_(x), 4 * 2 * 100),  # what is overwritten is not read
        (lambda x: x.zero_(), 4 * 100),
        (lambda x: x.bfloat16(), (4 + 2) * 100),
        (lambda x: x[0].expand(50, 10) * 2, 4 * (10 + 500)),  # ten values lie in memory
        (lambda x: (x.t(), x.view(-1)[3:], x.detach(), torch.empty_like(x)), 0),
        (lambda x: F.relu(x), 4 * 2 * 100),
    ],
)
def test_bytes_of_operators(work, moved):
    x = torch.ones(10, 10)
    assert bytes_of(lambda: work(x)) == moved


def test_bytes_of_a_linear_layer_and_its_backward_pass():
    layer, x = nn.Linear(20, 5), torch.ones(8, 20, requires_grad=True)
    weight, bias, into, out = 100, 5, 160, 40
    forward = into + weight + bias + out
    # Three products or sums, each of which reads the gradient of the output: of the input, the weights and the bias.
    backward = (out + weight + into) + (out + into + weight) + (out + bias)
    gradient = torch.ones(8, 5)
    assert bytes_of(lambda: layer(x)) == 4 * forward
    assert bytes_of(lambda: layer(x).backward(gradient)) == 4 * (forward + backward)


def test_bytes_of_an_update():
    """Parameter and momentum are read and written; so is the gradient, by what PyTorch declares."""
    parameter = nn.Parameter(torch.ones(1000))
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    optimizer.step()
    assert bytes_of(optimizer.step) == pytest.approx(4 * 6 * 1000, abs=100)


def test_memory_of_a_training_step_is_what_the_backward_pass_needs():
    """Input, output of the convolution and of the relu, each kept once."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    largest = 8 * 1024
    kept = 3 * 1024 + 2 * largest + 2 * 8  # and mean and deviation of each channel
    assert memory_per_image(model, 2, training=True) == pytest.approx(2 * kept, abs=4 * 4 * 8)
    assert memory_per_image(model, 2, training=False) == 2 * 3 * largest


def test_the_rate_of_matrix_products_is_positive():
    assert matmul_rate(CPU, torch.float32, largest=256) > 0


def test_limits_use_the_fastest_run_by_the_device_clock(monkeypatch):
    """The fake device clock gives the second run 2 s, and all others more."""
    begin, ends = [0.0], itertools.accumulate(itertools.cycle([9.0, 2.0, 3.0, 4.0]))
    monkeypatch.setattr(roofline, "stamp", lambda _: begin.pop() if begin else next(ends))
    assert copy_bandwidth(CPU, 1000) == 2 * 1000 / 2
    begin, ends = [0.0], itertools.accumulate(itertools.cycle([9.0, 2.0, 3.0, 4.0]))
    assert matmul_rate(CPU, torch.float32) == 2 * 256**3 / 2


@pytest.mark.gpu
def test_gpu_limits_do_not_depend_on_the_host_clock(monkeypatch):
    """The host clock is frozen here."""
    monkeypatch.setattr(roofline, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))
    device = torch.device("cuda")
    assert 0 < copy_bandwidth(device) < float("inf")
    assert 0 < matmul_rate(device, torch.float32) < float("inf")


def test_bytes_of_batch_norm():
    """Training reads the input once for its mean and variance and once to apply them.

    Backward both the input and the gradient of the output are read once for two sums, and once to apply these.
    Inference reads the input once.
    """
    layer, x = nn.BatchNorm2d(16), torch.ones(8, 16, 32, 32, requires_grad=True)
    activation, few = 4 * x.numel(), 4 * 16 * 16  # at most so many vectors of 16 channels
    gradient = torch.ones_like(x)
    forward = bytes_of(lambda: layer(x))
    assert forward == pytest.approx((2 + 1) * activation, abs=few)
    assert bytes_of(lambda: layer(x).backward(gradient)) == pytest.approx(forward + (2 + 2 + 1) * activation, abs=few)
    layer.eval()
    with torch.no_grad():
        assert bytes_of(lambda: layer(x)) == pytest.approx((1 + 1) * activation, abs=few)
