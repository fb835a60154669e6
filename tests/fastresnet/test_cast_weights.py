"""Weights in half precision against autocast, which casts each on its own."""

import pytest
import torch
import torch.nn.functional as F

from fastresnet.device import autocast
from fastresnet.models import create_model
from fastresnet.training.cast_weights import CastWeights

CPU = torch.device("cpu")


def loss_of(network):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with autocast("bf16", CPU):
        logits = network(images.contiguous(memory_format=torch.channels_last)).float()
    return F.cross_entropy(logits, torch.arange(4))


@pytest.mark.parametrize("name", ["resnet20", "se-resnet20", "preresnet20", "resnext29-2x16d", "speednet"])
def test_loss_gradients_and_statistics_have_the_bits_of_autocast(name):
    torch.manual_seed(0)
    reference, network = (create_model(name).to(memory_format=torch.channels_last) for _ in range(2))
    cast = CastWeights(network, torch.bfloat16)
    network.load_state_dict(reference.state_dict())  # `refresh` casts the weights of each step
    cast.refresh()
    expected, loss = loss_of(reference), loss_of(cast.model)
    assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    cast.collect_gradients()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        if theirs.requires_grad:
            assert ours.grad.dtype == torch.float32
            assert torch.equal(ours.grad, theirs.grad)
    assert all(map(torch.equal, network.buffers(), reference.buffers()))


def test_gradients_stay_at_their_addresses():
    network = create_model("plain20")
    cast, addresses = CastWeights(network, torch.bfloat16), set()
    for _ in range(2):
        cast.refresh()
        loss_of(cast.model).backward()
        cast.collect_gradients()
        addresses.add(network.conv1.weight.grad.data_ptr())
        network.zero_grad(set_to_none=True)
    assert len(addresses) == 1


def test_gradients_of_parts_are_added_in_single_precision():
    network = create_model("plain20")
    cast = CastWeights(network, torch.bfloat16)
    cast.refresh()
    collected = []
    for add in (False, True):
        loss_of(cast.model).backward()
        part = {
            name: value.grad.float() for name, value in cast.model.named_parameters() if value.dtype == torch.bfloat16
        }
        collected.append(part)
        cast.collect_gradients(add=add)
    for name, parameter in network.named_parameters():
        if name in collected[0]:
            assert torch.equal(parameter.grad, collected[0][name] + collected[1][name])
