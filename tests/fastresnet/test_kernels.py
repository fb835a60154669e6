"""Choice between this program's kernels and PyTorch's, with the CPU's kernels in place of a GPU's."""

import dataclasses
import warnings

import pytest
import torch
from rich.console import Console

from fastresnet.config import TrainConfig
from fastresnet.distributed import SINGLE
from fastresnet.models import batchnorm
from fastresnet.models.batchnorm import BatchNorm2d
from fastresnet.models.resnet import create_resnet
from fastresnet.training import kernels, loop
from fastresnet.training.kernels import check_muon, choose_kernels
from fastresnet.training.loop import train
from fastresnet.training.optimizer import Muon, create_optimizers
from fastresnet.training.step import TrainStep
from pipelines.base import Batch
from pipelines.errors import Note, RunError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_timed_steps(monkeypatch):
    monkeypatch.setattr(kernels, "_TIMED_STEPS", 1)


def create_step(precision, **settings):
    """A step of ResNet-8, which has one block in each stage."""
    torch.manual_seed(0)
    network = create_resnet(8, num_classes=10, shortcut="B", drop_path=0.0).to(memory_format=torch.channels_last)
    optimizers = create_optimizers(network, TrainConfig(optimizer="muon"))
    return TrainStep(network, optimizers, [1.0, 0.5], precision=precision, device=CPU, **settings)


@pytest.fixture
def step():
    return create_step("bf16", ema_decay=0.9)


@pytest.fixture
def batch():
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Batch(images.contiguous(memory_format=torch.channels_last), torch.arange(8), 8)


@pytest.fixture
def changed_kernels(monkeypatch):
    """Function that makes a pass end with another function, of its results by name."""

    def change(name, then):
        call = batchnorm._call

        def changed(kernel, x, relu, **values):
            call(kernel, x, relu, **values)
            if kernel == name:
                then(values)

        monkeypatch.setattr(batchnorm, "_call", changed)

    return change


def fused(step):
    return {module.fused for module in step.model.modules() if isinstance(module, BatchNorm2d)}


def test_kernels_that_agree_are_chosen_by_their_time_and_leave_no_trace(step, batch, monkeypatch):
    before = {name: value.clone() for name, value in step.state_dict().items()}
    measure = kernels._measure
    for own_is_faster in (True, False):

        def measured(*arguments, own, own_is_faster=own_is_faster, **options):
            measure(*arguments, own=own, **options)
            return 0.001 if own == own_is_faster else 0.002

        monkeypatch.setattr(kernels, "_measure", measured)
        chosen, reason = choose_kernels(step, batch, captured=False)
        assert chosen == ("own" if own_is_faster else "torch")
        assert fused(step) == {own_is_faster}
        faster, slower = ("1.00", "2.00") if own_is_faster else ("2.00", "1.00")
        assert reason == f"a step takes {faster} ms with this program's, {slower} with PyTorch's"
    after = step.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert int(step.count) == 0
    assert all(parameter.grad is None for parameter in step.model.parameters())


def one_percent_more(name):
    return lambda values: values[name].mul_(1.01)


def fail(_):
    raise RuntimeError("no kernel image is available\nfor execution")


WRONG = {
    "output": ("forward", one_percent_more("y"), r"batch norm of \(8, 64, 8, 8\) differs by 1\.\d\d%"),
    "running mean": ("forward", one_percent_more("running_mean"), r"differs by \d"),
    "gradient": ("backward", one_percent_more("grad_x"), r"differs by \d"),
    "gradient of the weight": ("backward", one_percent_more("grad_weight"), r"differs by 1\.00%"),
    "not a number": ("backward", lambda values: values["grad_x"].fill_(torch.nan), "differs by nan%"),
    "failure": ("forward", fail, r"no kernel image is available for execution\. Please"),
}


@pytest.mark.parametrize(("name", "then", "reason"), WRONG.values(), ids=WRONG)
def test_kernels_that_are_wrong_or_fail_are_not_used(step, batch, changed_kernels, name, then, reason):
    changed_kernels(name, then)
    with pytest.warns(Note, match=rf"do not work here, so PyTorch's are used: .*{reason}"):
        chosen, _ = choose_kernels(step, batch, captured=False)
    assert chosen == "torch"
    assert fused(step) == {False}
    step(batch.images, batch.labels)
    assert step.failed_at() is None


def test_a_step_with_another_loss_is_not_used(step, batch, monkeypatch):
    """Each layer may be right, and its place in the step wrong."""
    call = TrainStep.__call__

    def larger(self, images, labels):
        call(self, images, labels)
        if fused(self) == {True}:
            self.totals[0] *= 1.02

    monkeypatch.setattr(TrainStep, "__call__", larger)
    with pytest.warns(Note, match=r"the loss differs by [12]\.\d\d%"):
        assert choose_kernels(step, batch, captured=False)[0] == "torch"


def test_lack_of_memory_is_no_fault_of_the_kernels(step, batch, changed_kernels):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    changed_kernels("forward", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        chosen, reason = choose_kernels(step, batch, captured=False)
    assert (chosen, fused(step)) == ("torch", {False})
    assert "not enough memory" in reason


def test_an_overflow_in_fp16_is_no_fault_of_the_kernels(batch):
    step = create_step("fp16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        choose_kernels(step, dataclasses.replace(batch, images=batch.images.half()), captured=False)
    step(batch.images.half(), batch.labels)
    assert step.overflows.tolist() == [1, 1]


class WrongMuonKernels:
    """Kernels of `muon` that are PyTorch's operations, and 1 % more in the first weight."""

    def __init__(self, muon):
        self._muon = muon

    def update(self, gradients, lr, momentum, **scaling):
        self._muon.kernels = None
        self._muon.step()
        self._muon.kernels = [self]
        self._muon.param_groups[0]["params"][0].data.mul_(1.01)


def test_an_update_by_muon_that_is_wrong_is_found(step, monkeypatch):
    def use_kernels(muon, own=True):
        muon.kernels = [WrongMuonKernels(muon)] if own else None

    muon, _ = step.optimizers
    gradients = [torch.randn_like(weight) for weight in muon.param_groups[0]["params"]]
    monkeypatch.setattr(Muon, "use_kernels", use_kernels)
    torch.set_float32_matmul_precision("high")
    with step.restored(), pytest.raises(ValueError, match=r"an update by Muon differs by 1\.00%"):
        check_muon(muon, gradients)
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("wanted", ["torch", "own"])
def test_kernels_are_those_that_the_option_names(tmp_path, dataset, wanted, monkeypatch):
    used, use_kernels = [], TrainStep.use_kernels
    monkeypatch.setattr(TrainStep, "use_kernels", lambda self, own: (used.append(own), use_kernels(self, own)))
    config = TrainConfig(kernels=wanted, iterations=1, batch_size=8, device="cpu", compile="off", out=tmp_path / "run")
    train(config, dataset, Console(quiet=True))
    assert used == [wanted == "own"]


def test_own_kernels_that_are_wrong_are_refused_on_a_gpu(step, batch, changed_kernels):
    """A CPU is in place of the GPU, whose settings the run resolves."""
    changed_kernels("backward", one_percent_more("grad_x"))
    config = TrainConfig(kernels="own", device="cuda")
    with pytest.raises(RunError, match=r"do not work here: batch norm .* differs by .*\. Use --kernels torch\."):
        loop._settle_kernels(config, step, batch, SINGLE, lambda _: None)
