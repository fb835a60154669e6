"""Stochastic depth, against the hash in unbounded integers and the layers written out as functions."""

import copy

import pytest
import torch

from fastresnet.models import MODELS, create_model, list_models
from fastresnet.models.stochastic_depth import StochasticDepth, seed_stochastic_depth
from tests.fastresnet.reference_networks import (
    REFERENCES,
    Layers,
    assert_trains_as,
    on_meta,
    random_images,
    random_network,
    with_slow_ones,
)

pytestmark = pytest.mark.usefixtures("one_thread")

START = torch.zeros(1, dtype=torch.int64)
MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
WITH_SHORTCUTS = [name for name, spec in MODELS.items() if spec.supports_drop_path]
DROPPING = [
    *(("resnet20", "A"), ("se-resnet20", "B"), ("preresnet20", "B"), ("wrn16-2", "B"), ("resnext29-2x16d", "B")),
    ("resnet9", "B"),
]


def splitmix64(z):
    """Compute the output function of SplitMix64 in unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_keep(seed, block, step, rows, rate):
    """Return True for each row that keeps the branch of the block."""
    key = 0
    for word in (seed, 7, block):  # 7: the purpose of the stream
        key = splitmix64((key + GAMMA + word) & MASK)
    hashes = (splitmix64((key + ((step << 20) + row + 1) * GAMMA) & MASK) for row in range(rows))
    return torch.tensor([(value >> 40) / 2**24 >= rate for value in hashes])


def depth_module(rate=0.5, block=0, seed=0, step=0):
    module = StochasticDepth(rate, block)
    seed_stochastic_depth(module, seed, torch.tensor([step]), START)
    return module


def keep(module, rows):
    return module(torch.ones(rows, 1, 1, 1)).flatten() != 0


def depth_modules(network):
    return [module for module in network.modules() if isinstance(module, StochasticDepth)]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("block", [0, 53])
@pytest.mark.parametrize("step", [0, 1, 64_000])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropped_samples_match_reference(seed, block, step, rate):
    assert torch.equal(keep(depth_module(rate, block, seed, step), 200), reference_keep(seed, block, step, 200, rate))


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.9])
def test_fraction_of_kept_samples(rate):
    """Chance exceeds five standard deviations in 1 of 1.7 million draws."""
    rows, steps = 1024, 64
    kept = torch.cat([keep(depth_module(rate, step=step), rows) for step in range(steps)])
    tolerance = 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=tolerance)


def test_draws_of_blocks_steps_seeds_and_rows_are_independent():
    """Independent draws agree in half of the rows, to five standard deviations."""
    rows = 1 << 16
    base = keep(depth_module(), rows)
    others = [keep(depth_module(**{what: value}), rows) for what in ("block", "step", "seed") for value in (1, 2, 16)]
    others += [base.roll(shift) for shift in (1, 2, 16)]
    for other in others:
        assert (base == other).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / rows**0.5)


def test_draws_do_not_depend_on_the_batch_size():
    module = depth_module()
    whole = keep(module, 1000)
    assert torch.equal(whole[:8], keep(module, 8))
    assert torch.equal(keep(module, 8), keep(module, 8))
    seed_stochastic_depth(module, 0, torch.zeros(1, dtype=torch.int64), torch.tensor([600]))
    assert torch.equal(whole[600:], keep(module, 400))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_samples_are_scaled_and_dropped_ones_are_zero(dtype):
    module, rate = depth_module(0.3), 0.3
    branch = torch.randn(64, 5, 3, 2).to(dtype).contiguous(memory_format=torch.channels_last)
    kept = reference_keep(0, 0, 0, 64, rate)
    branch[~kept] = torch.nan
    branch.requires_grad_()
    out = module(branch)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    # One rounding, of a quotient by a number that is itself rounded in fp32.
    expected = (branch.detach().double() / (1 - rate))[kept]
    rounding, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(out[kept].double(), expected, rtol=rounding, atol=rounding * smallest)
    assert not out[~kept].any()
    out.sum().backward()
    scales = (kept.double() / (1 - rate)).view(-1, 1, 1, 1).expand(branch.shape)
    torch.testing.assert_close(branch.grad.double(), scales, rtol=torch.finfo(dtype).eps, atol=0)


def test_expectation_is_the_branch():
    """A kept branch of 1 is 1 / (1 - rate): a variance of rate / (1 - rate). Five standard deviations are allowed."""
    rate, rows = 0.25, 1 << 16
    out = depth_module(rate)(torch.ones(rows, 1, 1, 1, dtype=torch.float64))
    assert out.mean().item() == pytest.approx(1, abs=5 * (rate / (1 - rate) / rows) ** 0.5)


def test_evaluation_keeps_every_branch():
    branch = torch.randn(4, 3, 2, 2)
    assert depth_module(0.9).eval()(branch) is branch


@pytest.mark.parametrize(("name", "shortcut"), DROPPING)
def test_network_in_evaluation_is_the_one_without_stochastic_depth(name, shortcut):
    network, images = random_network(name, shortcut, drop_path=0.5), random_images()
    without = random_network(name, shortcut)
    without.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(images), without(images))


@pytest.mark.parametrize(("name", "shortcut"), DROPPING)
def test_network_in_training_matches_reference(name, shortcut):
    seed, step, drop_path, rows = 5, 17, 0.6, 6
    reference = {(name, option): reference for name, option, reference in REFERENCES}[name, shortcut]
    network = random_network(name, shortcut, drop_path=drop_path)
    seed_stochastic_depth(network, seed, torch.tensor([step]), START)
    blocks = len(depth_modules(network))
    rates = [drop_path * (block + 1) / blocks for block in range(blocks)]
    kept = torch.stack([reference_keep(seed, block, step, rows, rate) for block, rate in enumerate(rates)])
    assert kept.any(dim=1).all()
    assert not kept.all()
    scales = kept / (1 - torch.tensor(rates, dtype=torch.float64)).view(-1, 1)
    layers = Layers(network.state_dict(), training=True, branch_scales=scales)
    assert_trains_as(network, layers, random_images(rows, side=16), reference)


@pytest.mark.parametrize("name", with_slow_ones(WITH_SHORTCUTS))
def test_rates_grow_linearly_to_that_of_the_last_block(name):
    network = on_meta(name, drop_path=0.3)
    modules, blocks = depth_modules(network), sum(hasattr(module, "drop_path") for module in network.modules())
    assert [module.rate for module in modules] == pytest.approx([0.3 * n / blocks for n in range(1, blocks + 1)])
    assert [module.block for module in modules] == list(range(blocks))


@pytest.mark.parametrize("name", with_slow_ones(list_models()))
def test_no_modules_without_drop_path(name):
    assert not depth_modules(on_meta(name))


@pytest.mark.parametrize(("name", "shortcut"), DROPPING)
def test_state_dict_has_no_further_keys(name, shortcut):
    with_it, without = (on_meta(name, shortcut=shortcut, drop_path=rate).state_dict() for rate in (0.5, 0.0))
    assert list(with_it) == list(without)


def test_initial_seed_and_step_are_zero():
    module = StochasticDepth(0.5, 3)
    assert (module.seed, module.step.tolist(), module.step.dtype) == (0, [0], torch.int64)
    assert torch.equal(keep(module, 100), reference_keep(0, 3, 0, 100, 0.5))


def test_blocks_of_a_network_share_seed_and_step():
    network, step = create_model("resnet20", drop_path=0.5), torch.zeros(1, dtype=torch.int64)
    seed_stochastic_depth(network, 3, step, START)
    modules = depth_modules(network)
    assert {module.seed for module in modules} == {3}
    for number in (0, 1, 7):
        step.fill_(number)
        for module in modules:
            assert torch.equal(keep(module, 50), reference_keep(3, module.block, number, 50, module.rate))


def test_deep_copy_has_its_own_step():
    network, step = create_model("resnet20", drop_path=0.5), torch.full((1,), 4)
    seed_stochastic_depth(network, 3, step, START)
    modules = depth_modules(copy.deepcopy(network))
    step += 1
    assert {module.step.data_ptr() for module in modules} == {modules[0].step.data_ptr()}
    assert all((module.seed, module.step.tolist()) == (3, [4]) for module in modules)
    assert torch.equal(keep(modules[8], 50), reference_keep(3, 8, 4, 50, 0.5))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", ["resnet20", "preresnet20", "resnext29-2x16d"])
def test_torch_compile_of_a_network_has_no_graph_breaks(name):
    torch._dynamo.reset()
    network = create_model(name, drop_path=0.5)
    seed_stochastic_depth(network, 1, torch.zeros(1, dtype=torch.int64), START)
    explanation = torch._dynamo.explain(network)(torch.randn(2, 3, 32, 32))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_draws_are_identical(backend):
    torch._dynamo.reset()
    module, step = depth_module(0.4, 2), torch.zeros(1, dtype=torch.int64)
    seed_stochastic_depth(module, 2**62 + 1, step, START)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for number in range(3):
        step.fill_(number)
        assert torch.equal(keep(compiled, 300), reference_keep(2**62 + 1, 2, number, 300, 0.4))


@pytest.mark.gpu
@pytest.mark.parametrize("compile_", [False, True])
def test_gpu_draws_are_identical(compile_):
    torch._dynamo.reset()
    module, step = StochasticDepth(0.4, 2).cuda(), torch.full((1,), 9, device="cuda")
    seed_stochastic_depth(module, 2**62 + 1, step, START.cuda())
    if compile_:
        module = torch.compile(module, fullgraph=True)
    out = module(torch.ones(300, 1, 1, 1, device="cuda"))
    assert torch.equal(out.flatten().cpu() != 0, reference_keep(2**62 + 1, 2, 9, 300, 0.4))
