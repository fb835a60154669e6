"""CUDA code paths on a simulated GPU: the captured graphs, the launched kernels and the waits of the host.

`make gpu-rehearsal` runs it, in some minutes. Values are not checked: nothing is computed.
"""

import dataclasses
import functools
import gc
import itertools
import json
import re

import fakegpu  # first: it changes PyTorch
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from benchmarks import kernels, loaders, train
from benchmarks.__main__ import main
from benchmarks.cases import SameBatch
from benchmarks.gpu_cases import SGD, Candidate, RecipeCase, compile_ahead
from benchmarks.kernels import LaunchCounter
from benchmarks.runner import WaitTimer, Work
from benchmarks.tables import RESULTS
from fastresnet import terminal
from fastresnet.checkpoint import copy_to_host
from fastresnet.config import TrainConfig
from fastresnet.device import DTYPES, recorded
from fastresnet.distributed import SINGLE
from fastresnet.evaluation import Evaluator, open_evaluation
from fastresnet.models import batchnorm_triton, create_model
from fastresnet.models.batchnorm import BatchNorm2d, compiler_options, fuse_batch_norms
from fastresnet.recipes import RECIPES, create_config
from fastresnet.training import loop
from fastresnet.training.execution import Execution
from fastresnet.training.kernels import choose_kernels
from fastresnet.training.loop import open_pipelines
from fastresnet.training.optimizer import create_optimizers
from fastresnet.training.step import TrainStep
from pipelines import Augmentation, open_pipeline
from pipelines.base import Batch
from pipelines.errors import Note

CUDA = torch.device("cuda")
BATCH_SIZE = 24  # seven batches of the 171 images


@pytest.fixture(autouse=True)
def no_forbidden_calls():
    """Fail a test that makes a call which CUDA forbids during graph capture."""
    torch._dynamo.reset()  # a run compiles for itself; by default PyTorch allows 8 of these
    yield
    assert fakegpu.violations() == []


def open_resident(dataset, precision):
    settings = {"batch_size": BATCH_SIZE, "dtype": DTYPES[precision], "augmentation": Augmentation(cutout=8)}
    return open_pipeline("resident", dataset, train=True, device=CUDA, seed=0, **settings)


def create_step(model="resnet20", *, optimizer="sgd", precision="bf16", ema_decay=0.9, **settings):
    network = create_model(model).to(CUDA, memory_format=torch.channels_last).train()
    optimizers = create_optimizers(network, TrainConfig(optimizer=optimizer))
    return TrainStep(network, optimizers, [1.0] * 20, precision=precision, device=CUDA, ema_decay=ema_decay, **settings)


def captured_engine(pipeline, batch, *, own=False, backend="graph", **settings):
    step = create_step(**settings)
    step.use_kernels(own)
    engine = Execution(step, pipeline, backend)
    engine.prepare(batch)
    return engine


def assert_only_replays(units):
    """Assert that from the second unit of work on, the host only launches its graph."""
    next(units)
    waits = fakegpu.host_waits()
    with fakegpu.launches() as launched:
        count = sum(1 for _ in itertools.islice(units, 5))
    assert launched == ["GRAPH"] * count
    assert count == 5
    assert fakegpu.host_waits() == waits


def test_simulation_detects_host_waits_and_calls_forbidden_during_capture():
    waits, stream = fakegpu.host_waits(), torch.cuda.Stream()
    number = torch.ones(1, device=CUDA)
    number.item()
    assert fakegpu.host_waits() > waits
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        number.item()
    assert fakegpu.violations() != []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_step_is_captured_once_and_replayed_without_host_waits(dataset, optimizer, precision):
    pipeline = open_resident(dataset, precision)
    engine = captured_engine(pipeline, next(pipeline.epoch(0)), optimizer=optimizer, precision=precision)
    kernels = [name.split()[1] for name in fakegpu.nodes() if name.startswith("CUDNN")]
    # 19 convolutions of ResNet-20 and 2 of its shortcuts; the images need no gradient.
    assert [kernels.count(kind) for kind in ("fprop", "wgrad", "dgrad")] == [21, 21, 20]
    assert_only_replays(engine.steps(0, 0, 6))


MOST_KERNELS = {
    ("sgd", "graph"): 150,
    ("sgd", "capture"): 200,
    ("muon", "graph"): 200,
    ("muon", "capture"): 200,
}


@pytest.mark.parametrize(("optimizer", "backend"), MOST_KERNELS)
def test_own_kernels_make_a_step_of_few_kernels(dataset, optimizer, backend):
    pipeline = open_resident(dataset, "bf16")
    batch = next(pipeline.epoch(0))
    engine = captured_engine(pipeline, batch, optimizer=optimizer, own=True, backend=backend, ema_decay=0.0)
    names = fakegpu.nodes()
    assert (names.count("_batch_norm_forward"), names.count("_batch_norm_backward")) == (21, 21)
    if backend == "graph":
        assert not [name for name in names if "batch_norm_legit" in name]
        # The sums of the gradients of two branches are part of the batch norms.
        assert not [name for name in names if "fused_add" in name and "batch_norm_backward" in name]
    assert len(names) <= MOST_KERNELS[optimizer, backend]
    assert_only_replays(engine.steps(0, 0, 6))


def test_sums_over_a_large_batch_fill_the_gpu():
    """Batch norm's kernels keep all 132 multiprocessors of an H100 busy, and the mean over pixels does."""
    images = torch.zeros(1024, 3, 32, 32, dtype=torch.bfloat16, device=CUDA)
    batch = Batch(images.contiguous(memory_format=torch.channels_last), torch.zeros(1024, device=CUDA).long(), 1024)
    launches = fakegpu.cooperative_launches()
    captured_engine(SameBatch(batch, 20), batch, own=True, ema_decay=0.0)
    # Their programs wait for each other: in the compiling step, three warm-up steps and the recorded one.
    assert fakegpu.cooperative_launches() - launches == 5 * 42
    kernels = zip(fakegpu.nodes(), fakegpu.programs(), strict=True)
    sums = [(name, programs) for name, programs in kernels if re.match("_batch_norm|triton_(red|per)", name)]
    assert [programs for name, programs in sums if name.startswith("_batch_norm")] == 42 * [132]
    (mean,) = (programs for name, programs in sums if "mean" in name)
    assert mean >= 132


FAMILIES = ["plain20", "se-resnet20", "preresnet20", "wrn16-2", "resnext29-2x16d", "resnet9", "speednet"]
VARIANTS = [
    *({"model": model} for model in FAMILIES),
    {"shortcut": "A", "optimizer": "adamw"},
    {"optimizer": "muon", "clip_norm": 1.0, "ema_decay": 0.9},
    {"mixup": 1.0, "cutmix": 1.0, "label_smoothing": 0.1},
    {"drop_path": 0.2, "zero_init_residual": True},
    {"accumulate": 2, "mixup": 1.0, "drop_path": 0.2, "class_weights": "balanced"},
    {"init_from": "pretrained:resnet20", "freeze_backbone": True},
    {"cutout": 8, "padding_mode": "reflect", "flip": "alternating", "normalization": "pixel"},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_of_all_recipes_and_options_are_captured(dataset, precision):
    """`no_forbidden_calls` checks each capture."""
    cases = [*map(create_config, RECIPES), *(TrainConfig(**variant) for variant in VARIANTS)]
    for case in cases:
        config = dataclasses.replace(
            case, batch_size=BATCH_SIZE, device="cuda", precision=precision, pipeline="resident", compile="capture"
        )
        torch._dynamo.reset()
        with open_pipelines(config, dataset, SINGLE) as (pipeline, _):
            step = loop.create_step(config, dataset, [1.0] * 8, SINGLE, fresh=False)
            step.use_kernels(True)
            engine = Execution(step, pipeline, "capture", config.sides(8))
            engine.prepare(next(pipeline.epoch(0)))
            assert_only_replays(engine.steps(0, 0, 6))
        # Frozen layers are in evaluation mode.
        fused = sum(norm.training for norm in step.model.modules() if isinstance(norm, BatchNorm2d))
        assert fakegpu.nodes().count("_batch_norm_forward") == fused * config.accumulate, config.model


def reserved_by_steps(dataset, *resolutions):
    """Return the bytes that PyTorch reserves for the recorded steps of each size of images."""
    config = TrainConfig(batch_size=128, device="cuda", pipeline="resident", precision="bf16", resolutions=resolutions)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with open_pipelines(config, dataset, SINGLE) as (pipeline, _):
        step = loop.create_step(config, dataset, [1.0] * 8, SINGLE)
        engine = Execution(step, pipeline, "capture", config.sides(8))
        engine.prepare(next(pipeline.epoch(0)))
        torch.cuda.empty_cache()  # what the warm-up used
        return torch.cuda.memory_reserved() - before


def test_steps_of_several_sizes_share_memory(dataset):
    whole = reserved_by_steps(dataset, 32)
    assert whole > 100e6
    assert reserved_by_steps(dataset, 16, 20, 24, 28, 32) < 1.1 * whole


def test_a_sum_of_gradients_with_another_use_stays_a_kernel():
    norm = BatchNorm2d(16, relu=True).to(CUDA)
    fuse_batch_norms(norm)
    x, offset = (
        torch.randn(4, 16, 8, 8, device=CUDA).contiguous(memory_format=torch.channels_last).requires_grad_()
        for _ in range(2)
    )

    @functools.partial(torch.compile, fullgraph=True, options=compiler_options(CUDA))
    def loss(x, offset):
        y = norm(x) + offset
        return F.max_pool2d(y, 2).sum() + F.max_pool2d(y, 4).sum()

    with fakegpu.launches() as launched:
        loss(x, offset).backward()
    assert "_batch_norm_backward" in launched


@triton.jit
def uncompilable(x):
    tl.static_assert(False, "no such instruction")


class Uncompilable:
    """Kernel, called with a grid and with any operands, that does not compile."""

    def __getitem__(self, grid):
        return lambda x, *operands, **constants: uncompilable[grid](x)


def test_a_kernel_that_does_not_compile_is_not_used(dataset, monkeypatch):
    monkeypatch.setattr(batchnorm_triton, "_batch_norm_backward", Uncompilable())
    batch = next(open_resident(dataset, "bf16").epoch(0))
    step = create_step()
    with pytest.warns(Note, match="do not work here, so PyTorch's are used: .*no such instruction"):
        assert choose_kernels(step, batch, captured=True)[0] == "torch"
    step(batch.images, batch.labels)


def test_kernels_are_chosen_in_captured_steps_without_a_trace(dataset):
    batch = next(open_resident(dataset, "bf16").epoch(0))
    step = create_step(optimizer="muon")
    chosen, reason = choose_kernels(step, batch, captured=True)
    assert chosen in ("own", "torch")
    assert reason.startswith("a step takes")


@pytest.mark.parametrize("model", ["resnet20", "resnet110", "wrn16-8"])
def test_kernels_of_muon_are_few_for_any_network(model):
    network = create_model(model).to(CUDA, memory_format=torch.channels_last)
    muon, _ = create_optimizers(network, TrainConfig(optimizer="muon"))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muon.use_kernels()
    muon.found_inf = torch.zeros((), device=CUDA)
    recorded(muon.step)
    names = fakegpu.nodes()
    own = {"_accumulate": 1, "_normalize": 1, "_square": 6, "_apply": 3, "_descend": 1}
    assert {name: names.count(name) for name in own} == own
    assert len(names) <= 15  # with PyTorch's, which copy the gradients


def test_a_step_on_the_same_batch_copies_nothing(dataset):
    batch = next(open_resident(dataset, "bf16").epoch(0))
    assert_only_replays(captured_engine(SameBatch(batch, 20), batch).steps(0, 0, 6))


def test_loader_benchmark_gathers_batches_in_a_captured_graph(dataset):
    work = Work(folder=dataset.folder, batch_size=BATCH_SIZE, device="cuda", precision="bf16", threads=1)
    epochs = loaders.open_ours(work, WaitTimer(), pipeline="resident")
    names = [name for name in fakegpu.nodes() if name.startswith("triton")]
    assert 1 <= len(names) <= 2
    assert len(fakegpu.nodes()) == len(names) + 2  # and which step it is, and one more
    assert_only_replays(iter(epochs(0)))
    images, labels = next(iter(epochs(1)))
    assert images.shape == (BATCH_SIZE, 3, 32, 32)
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (BATCH_SIZE,)


def test_evaluation_replays_a_graph_for_each_batch_and_waits_at_its_end(dataset, monkeypatch):
    monkeypatch.setattr("fastresnet.evaluation.BATCH_SIZE", 7)  # eight batches of the 50 images
    network = create_model("resnet20").to(CUDA, memory_format=torch.channels_last)
    pipeline = open_evaluation(dataset, "half", "bf16", CUDA)
    evaluate = Evaluator(network, pipeline, dataset.classes, "bf16", CUDA, captured=True)
    evaluate()
    assert sum("fprop" in name for name in fakegpu.nodes()) == 21
    with fakegpu.launches() as launched:
        waits, waits_by_batch = fakegpu.host_waits(), []
        evaluate(lambda: waits_by_batch.append(fakegpu.host_waits()))
    assert waits_by_batch == [waits] * 8
    begin, end = launched.index("GRAPH"), len(launched) - launched[::-1].index("GRAPH")
    assert launched[begin:end] == ["GRAPH"] * 8
    assert begin == 3  # loss, counts and the number of the next batch are set to zero


def test_a_checkpoint_is_copied_to_pinned_memory_and_only_its_writer_waits():
    state = create_model("resnet20").to(CUDA, memory_format=torch.channels_last).state_dict()
    waits = fakegpu.host_waits()
    with fakegpu.launches() as launched:
        wait = copy_to_host(state)
    assert launched.count("MEMCPY DP") == len(state)
    assert "MEMCPY DH" not in launched
    assert fakegpu.host_waits() == waits
    copies = wait()
    assert fakegpu.host_waits() == waits + 1
    assert all(copies[name].is_pinned() and copies[name].is_contiguous() for name in state)


@pytest.mark.parametrize("data", [True, False], ids=["resident", "step-only"])
def test_the_training_benchmark_replays_its_steps(dataset, data):
    work = Work(folder=dataset.folder, batch_size=BATCH_SIZE, device="cuda", precision="bf16", threads=1)
    epochs = train.open_ours(work, WaitTimer(), model="resnet20", backend="graph", data=data)
    assert_only_replays(iter(epochs(0)))


def change_nothing(step):
    """Import this module, and so the simulated GPU, in a process that unpickles this function."""


def test_ahead_of_time_compilation_fills_the_inductor_cache(dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    broken, good = (
        Candidate(name="", case=RecipeCase("baseline", "resnet20", batch_size), change=change_nothing)
        for batch_size in (1 << 20, 24)
    )
    compile_ahead([broken, good], dataset, CUDA)
    assert "b1048576 does not compile: UsageError" in capsys.readouterr().out
    assert [path for path in (tmp_path / "fxgraph").rglob("*") if path.is_file()]


def test_step_benchmark_completes(tmp_path):
    cases = ["--models", "resnet20", "--batch-sizes", "32", "--precisions", "bf16", "--backends", "eager", "graph"]
    assert terminal.guarded(main, ["step", "--quick", *cases, "--json", str(tmp_path / "step.json")]) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["failed"] == {}
    names = {row["name"] for row in report["rows"]}
    assert {f"{mode}/resnet20/b32/bf16/channels_last/graph" for mode in ("train", "inference")} <= names
    assert all(row["gpu_memory_mb"] > 0 for row in report["rows"])


@triton.jit
def _copy_kernel(source, target, size, BLOCK: triton.language.constexpr):
    offsets = triton.language.program_id(0) * BLOCK + triton.language.arange(0, BLOCK)
    values = triton.language.load(source + offsets, mask=offsets < size)
    triton.language.store(target + offsets, values, mask=offsets < size)


def copied(source: torch.Tensor) -> torch.Tensor:
    target = torch.empty_like(source, dtype=torch.bfloat16)
    torch.library.wrap_triton(_copy_kernel)[(4,)](source, target, len(source), BLOCK=256)
    return target


opaque = torch.library.custom_op("rehearsal::opaque", copied, mutates_args=())
inlined = torch.library.triton_op("rehearsal::inlined", copied, mutates_args=())


def test_launches_during_capture_are_counted_with_the_bytes_of_their_operands():
    values, images = torch.ones(1000, device=CUDA), torch.ones(5000, 300, device=CUDA)
    rows, weights = torch.arange(16, device=CUDA), torch.ones(8, 4, 3, 3, device=CUDA)
    gather = torch.compile(lambda: images[rows] + 1, fullgraph=True, dynamic=False)
    inductor_copied = torch.compile(inlined, fullgraph=True, dynamic=False)
    inputs = torch.ones(2, 4, 10, 10, device=CUDA)

    def work():
        opaque(values)
        inductor_copied(values)
        values.add_(values)
        gather()
        torch.conv2d(inputs, weights, padding=1)

    with LaunchCounter(fakegpu.nodes) as counter:
        recorded(work)
    found = {each["name"]: (each["calls"], each["bytes"]) for each in counter.kernels()}
    (inductor,) = (name for name in found if name.startswith("triton"))
    assert found == {
        "_copy_kernel": (2, 2 * (4 * 1000 + 2 * 1000)),
        "aten.add_.Tensor": (1, 4 * 3 * 1000),  # reads both operands, which are the same here, and writes
        inductor: (1, 8 * 16 + 4 * 16 * 300 + 4 * 16 * 300),  # of the images only the 16 rows
        "fprop (2, 4, 10, 10) (8, 4, 3, 3) (2, 8, 10, 10) torch.float32": (1, 4 * (800 + 288 + 1600)),
    }
    assert len(fakegpu.nodes()) == sum(calls for calls, _ in found.values())


def test_kernels_of_a_step_are_those_of_the_committed_result(tmp_path, monkeypatch):
    committed = json.loads((RESULTS / "kernels-simulated.json").read_text())
    if (version := committed["environment"]["versions"]["torch"]) != torch.__version__:
        pytest.skip(f"the committed kernels are those of torch {version}")
    monkeypatch.setattr(kernels, "CASES", (SGD,))
    assert terminal.guarded(main, ["kernels", "--json", str(tmp_path / "kernels.json")]) == 0
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert row["kernels_per_step"]["calls"] == len(fakegpu.nodes())
    assert row == next(each for each in committed["rows"] if each["name"] == SGD.name)
