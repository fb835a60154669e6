"""Training benchmark, end to end on small data, and its peers' training loops."""

import json
import os
import subprocess
import sys
from contextlib import closing

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import cases, train
from benchmarks.__main__ import main
from benchmarks.runner import WaitTimer, Work
from fastresnet import terminal
from fastresnet.models import create_model

plain_torch, timm_style = (pytest.importorskip(f"benchmarks.peers.{name}") for name in ("plain_torch", "timm_style"))

NAMES = ["resident", "step-only", "peer:plain-torch", "peer:timm-style"]
SMALL = ["--data", "shapes10", "--batch-size", "16", "--rounds", "2", "--seconds", "0.05", "--compile", "off"]


@pytest.fixture(scope="module")
def report(quick_workers, data_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRESNET_DATA", str(data_root))
        files = ["--json", str(folder / "train.json"), "--chart", str(folder / "train.png")]
        assert terminal.guarded(main, ["train", *SMALL, *files]) == 0
    return folder / "train.json"


def test_every_loop_is_measured_with_its_waiting_time(report):
    figures = json.loads(report.read_text())
    assert (figures["schema"], figures["benchmark"]) == (1, "train")
    assert [row["name"] for row in figures["rows"]] == NAMES
    for row in figures["rows"]:
        assert row["rounds"] == 2
        assert 0 < row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert row["ms_per_step"] == pytest.approx(16_000 / row["images_per_s"])
        assert 0 <= row["waiting_percent"] < 100
    assert [(each["name"], each["over"]) for each in figures["ratios"]] == [("resident", name) for name in NAMES[1:]]
    assert figures["environment"]["model"] == "resnet20"
    with Image.open(report.with_suffix(".png")) as picture:
        assert picture.width >= 1000


def test_show_prints_a_saved_result(report, run):
    code, out, err = run("bench", "show", report)
    assert (code, err) == (0, "")
    assert all(name.removeprefix("peer:") in out for name in NAMES)
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("waiting:", "busy machine:")))
    code, out, _ = run("bench", "show", report, "--markdown")
    assert code == 0
    assert out.count("\n") == 2 + len(NAMES)
    assert len({line.count("|") for line in out.splitlines()}) == 1


def test_interrupted_run_keeps_the_finished_rounds(quick_workers, data_root, tmp_path, monkeypatch):
    from benchmarks import runner

    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))
    turns = []
    original = runner.Worker.measure

    def interrupted(self, seconds):
        turns.append(self)
        if len(turns) > 4:
            raise KeyboardInterrupt
        original(self, seconds)

    monkeypatch.setattr(runner.Worker, "measure", interrupted)
    assert terminal.guarded(main, ["train", *SMALL, "--json", str(tmp_path / "train.json")]) == 130
    assert {row["rounds"] for row in json.loads((tmp_path / "train.json").read_text())["rows"]} == {1}
    assert not any(each._process.is_alive() for each in turns)


def test_auto_backend_is_the_faster_one(data_root, monkeypatch):
    """Only our loops are compiled, not the peers'."""

    def measure_workers(options, quick_seconds, cases, *_):
        backends.extend(case.options.get("backend") for case in cases)

    backends = []
    monkeypatch.setattr("fastresnet.training.execution.choose_backend", lambda *_: ("compile", "faster"))
    monkeypatch.setattr(train, "measure_workers", measure_workers)
    train.measure_training(train.TrainingOptions(data="shapes10", root=data_root, batch_size=16, device="cpu"))
    assert backends == ["compile", "compile", None, None]


def test_peers_have_a_worker_for_each_usable_processor(data_root, monkeypatch):
    def measure_workers(options, quick_seconds, cases, *_):
        workers.update({case.name: case.options.get("workers") for case in cases})

    workers = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)))
    monkeypatch.setattr(train, "measure_workers", measure_workers)
    train.measure_training(train.TrainingOptions(data="shapes10", root=data_root, batch_size=16, quick=True))
    assert workers == dict(zip(NAMES, [None, None, 77, 77], strict=True))


@pytest.mark.parametrize("data", [True, False])
def test_a_long_turn_does_not_run_out_of_learning_rates(dataset, monkeypatch, resnet8, data):
    """The learning rates of one epoch are reused in every epoch."""
    created, create = [], cases.create_step

    def recorded(*arguments):
        created.append(create(*arguments))
        return created[0]

    monkeypatch.setattr(cases, "create_step", recorded)
    work = Work(folder=dataset.folder, batch_size=50, device="cpu", precision="fp32", threads=1)
    settings = {"model": resnet8, "backend": "eager", "data": data}
    epoch = train.open_ours(work, WaitTimer(), **settings)
    for number in range(3):
        assert len(list(epoch(number))) == 3  # of 171 images
        assert int(created[0].count) == 3


@pytest.fixture
def slow_backends():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.benchmark = False
    yield
    matmul.allow_tf32, cudnn.benchmark = before


@pytest.mark.gpu
def test_timm_style_loop_enables_tf32_and_cudnn_benchmark_on_a_gpu(dataset, slow_backends):
    device = torch.device("cuda")
    timm_style.open_training(dataset, create_model("resnet20"), iter, batch_size=50, device=device, workers=0)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("peer", [plain_torch, timm_style])
def test_a_peer_trains_the_network_through_every_batch(peer, dataset, resnet8):
    torch.manual_seed(0)
    network = create_model(resnet8)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    timer, seen = WaitTimer(), []

    def watch(batches):
        for batch in timer(batches):
            seen.append(batch)
            yield batch

    epoch = peer.open_training(dataset, network, watch, batch_size=50, device=torch.device("cpu"), workers=0)
    with closing(epoch(0)) as steps:
        assert len(list(steps)) == 3  # of 171 images
    assert all(len(labels) == 50 for _, labels in seen)
    assert timer.seconds > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_peers_see_images_of_the_same_range(dataset):
    """mean = std = 0.5: values in -1..1, both ends occurring; the timm-style loop normalises on the device."""

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

        def forward(self, images):
            self.seen.append(images)
            return self.weight * images.mean(dim=(1, 2, 3))[:, None].expand(-1, 10)

    for peer in (plain_torch, timm_style):
        spy = Spy()
        epoch = peer.open_training(dataset, spy, iter, batch_size=50, device=torch.device("cpu"), workers=0)
        list(epoch(0))
        values = torch.cat(spy.seen)
        assert values.shape == (150, 3, 32, 32)
        assert (values.min(), values.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet21"], "did you mean 'resnet20'"),
        (["--batch-size", "999"], "batch size 999 is larger than the training set"),
        (["--compile", "graph"], "needs a GPU"),
        (["--seconds", "0"], "give finite numbers above 0"),
        (["--seconds", "inf"], "give finite numbers above 0"),
        (["--device", "cuda"], "sees no CUDA device"),
    ],
)
def test_wrong_arguments_exit_with_2(run, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("bench", "train", "--data", "shapes10", *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_without_torchvision_only_the_peers_are_left_out(data_root, tmp_path, without_torchvision):
    command = [sys.executable, "-m", "benchmarks", "train", *SMALL, "--root", str(data_root), "--compile", "off"]
    command += ["--json", str(tmp_path / "train.json")]
    done = subprocess.run(command, env=without_torchvision, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "train.json").read_text())
    assert [row["name"] for row in report["rows"]] == NAMES[:2]
    assert list(report["failed"]) == NAMES[2:]
    notes = done.stderr.splitlines()
    assert len(notes) == 2
    assert all("ModuleNotFoundError: import of torchvision halted" in note for note in notes)
