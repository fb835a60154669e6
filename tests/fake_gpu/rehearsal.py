"""CUDA code paths on a simulated GPU: the captured graphs, the launched kernels and the waits of the host.

`make gpu-rehearsal` runs it, in some minutes. Values are not checked: nothing is computed.
"""

import itertools
import json

import fakegpu  # first: it changes PyTorch
import pytest
import torch

from benchmarks import loaders, train
from benchmarks.__main__ import main
from benchmarks.cases import SameBatch
from benchmarks.gpu_cases import Candidate, RecipeCase, compile_ahead
from benchmarks.runner import WaitTimer, Work
from fastresnet import terminal
from fastresnet.checkpoint import copy_to_host
from fastresnet.config import TrainConfig
from fastresnet.device import DTYPES
from fastresnet.evaluation import Evaluator, open_evaluation
from fastresnet.models import create_model
from fastresnet.training.execution import Execution
from fastresnet.training.optimizer import create_optimizers
from fastresnet.training.step import TrainStep
from pipelines import Augmentation, open_pipeline

CUDA = torch.device("cuda")
BATCH_SIZE = 24  # seven batches of the 171 images


@pytest.fixture(autouse=True)
def no_forbidden_calls():
    """Fail a test that makes a call which CUDA forbids during graph capture."""
    yield
    assert fakegpu.violations() == []


def open_resident(dataset, precision):
    settings = {"batch_size": BATCH_SIZE, "dtype": DTYPES[precision], "augmentation": Augmentation(cutout=8)}
    return open_pipeline("resident", dataset, train=True, device=CUDA, seed=0, **settings)


def captured_engine(pipeline, batch, *, optimizer="sgd", precision="bf16"):
    network = create_model("resnet20").to(CUDA, memory_format=torch.channels_last).train()
    optimizers = create_optimizers(network, TrainConfig(optimizer=optimizer))
    settings = {"precision": precision, "device": CUDA, "ema_decay": 0.9}
    engine = Execution(TrainStep(network, optimizers, [1.0] * 20, **settings), pipeline, "graph")
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
