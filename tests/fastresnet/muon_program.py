"""Updates by Muon's Triton kernels: `python -m tests.fastresnet.muon_program DEVICE FILE`.

On a CPU it needs TRITON_INTERPRET=1. It is a program of its own because Triton reads that when it is imported.
"""

import sys
from unittest import mock

import torch
from torch import nn

from fastresnet.config import TrainConfig
from fastresnet.training import muon_triton
from fastresnet.training.optimizer import Muon, create_optimizers
from fastresnet.training.step import TrainStep

SHAPES = ((16, 3, 3, 3), (32, 16, 1, 1), (70, 13, 5, 2), (130, 70, 1, 1), (2, 200, 1, 1), (64, 24, 3, 3))
"""Wide and tall weights of one and several tiles, which all but the last do not fill."""
FEW = SHAPES[:2]
"""Shapes, wide and tall, where others add nothing."""
LR, MOMENTUM = 0.05, 0.6
CASES = {"normal": (SHAPES, (1.0, 1.0)), "tiny": (FEW, (1e-9,)), "zero": (FEW, (0.0,))}
"""Shapes, and the factor of the gradients in each step. Tiny gradients have norms like the epsilon in the update."""


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients_of(step, scale=1.0):
    return [random(shape, 100 * (step + 1) + i) * scale for i, shape in enumerate(SHAPES)]


def create_muon(device, shapes=SHAPES):
    """Create a Muon with kernels, of weights that are channels_last and contiguous in turns."""
    formats = (torch.channels_last, torch.contiguous_format)
    weights = [
        nn.Parameter(random(shape, i).to(device).contiguous(memory_format=formats[i % 2]))
        for i, shape in enumerate(shapes)
    ]
    muon = Muon([{"params": weights, "lr": torch.tensor(LR, device=device)}], momentum=MOMENTUM)
    muon.use_kernels()
    return muon


def update(muon, gradients):
    for weight, gradient in zip(muon.param_groups[0]["params"], gradients, strict=False):
        weight.grad = torch.empty_like(weight).copy_(gradient)
    muon.step()


def state_of(muon):
    """Copy the weights and their momentum."""
    weights = muon.param_groups[0]["params"]
    tensors = [*weights, *(muon.state[weight]["momentum_buffer"] for weight in weights)]
    return [tensor.detach().clone().cpu() for tensor in tensors]


def updated(device, scales, shapes=SHAPES):
    """Return the weights and momentum after a step with gradients of each of the `scales`."""
    muon = create_muon(device, shapes)
    for step, scale in enumerate(scales):
        update(muon, gradients_of(step, scale))
    return state_of(muon)


def updated_by_scaled_gradients(device):
    """Return the state after updates by gradients that are scaled, as in fp16 training."""
    muon = create_muon(device, FEW)
    muon.grad_scale, muon.found_inf = torch.tensor(1024.0, device=device), torch.zeros((), device=device)
    for step in range(2):
        update(muon, gradients_of(step, 1024.0))
    return state_of(muon)


def cancelled(device):
    """Return the state before and after a cancelled update, and after another update."""
    muon, states = create_muon(device, FEW), []
    for found_inf, gradients in ((0, gradients_of(0)), (1, gradients_of(0, torch.nan)), (0, gradients_of(1))):
        muon.found_inf = torch.full((), float(found_inf), device=device)
        update(muon, gradients)
        states.append(state_of(muon))
    return states


def updated_by_bf16(device):
    """Return the state after an update by gradients in bf16, and by the same in float32."""
    states = []
    for dtype in (torch.bfloat16, torch.float32):
        muon = create_muon(device, FEW)
        (kernels,), lr = muon.kernels, muon.param_groups[0]["lr"]
        gradients = [gradient.to(device, torch.bfloat16).to(dtype) for gradient in gradients_of(0)[: len(FEW)]]
        kernels.update(gradients, lr, MOMENTUM, grad_scale=None, found_inf=None)
        states.append(state_of(muon))
    return states


def trained(device, *, kernels):
    """Return the state of training before and after a step, and after one whose loss is NaN, which is cancelled."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, stride=4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    network.to(device, memory_format=torch.channels_last)
    optimizers = create_optimizers(network, TrainConfig(optimizer="muon", lr=LR, momentum=MOMENTUM))
    if kernels:
        optimizers[0].use_kernels()
    step = TrainStep(network, optimizers, [1.0, 1.0], precision="fp32", device=torch.device(device))
    states = [{name: value.clone().cpu() for name, value in step.state_dict().items()}]
    for images in (random((8, 3, 32, 32), 0), torch.full((8, 3, 32, 32), torch.nan)):
        with torch.backends.cudnn.flags(deterministic=True):
            step(images.to(device), torch.arange(8, device=device))
        states.append({name: value.clone().cpu() for name, value in step.state_dict().items()})
    return states


def results(device):
    with mock.patch.object(muon_triton, "FULL_GPU", 1):
        large = updated(device, [1.0])
    return {
        **{name: updated(device, scales, shapes) for name, (shapes, scales) in CASES.items()},
        "large tiles": large,
        "scaled": updated_by_scaled_gradients(device),
        "cancelled": cancelled(device),
        "bf16": updated_by_bf16(device),
        "trained": {kernels: trained(device, kernels=kernels) for kernels in (False, True)},
    }


if __name__ == "__main__":
    torch.save(results(sys.argv[1]), sys.argv[2])
