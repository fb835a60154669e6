"""Step benchmark: counts against hand calculations, consistent figures, and results kept on interruption."""

import json
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.autograd import DeviceType

from benchmarks import cases, roofline, step
from benchmarks.__main__ import main
from benchmarks.cases import StepCase
from benchmarks.report import ratio
from benchmarks.step import StepOptions, markdown_table, measure_steps, notes, tables
from fastresnet import terminal
from fastresnet.models.batchnorm import BatchNorm2d

CPU = torch.device("cpu")
SMALL = {"models": ("resnet20",), "batch_sizes": (4,), "backends": ("eager",), "seconds": 0.001, "device": "cpu"}
BASE = "train/resnet20/b4/fp32/channels_last/eager"


def small_case(mode: str = "train", batch_size: int = 4) -> StepCase:
    return StepCase(
        mode=mode,
        model="resnet20",
        batch_size=batch_size,
        precision="fp32",
        memory_format="channels_last",
        backend="eager",
    )


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """Use small copies and products: the rates are not tested."""
    copy, product = roofline.copy_bandwidth, roofline.matmul_rate
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device: copy(device, 1 << 20))
    monkeypatch.setattr(roofline, "matmul_rate", lambda device, dtype: product(device, dtype, largest=256))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    files = {"json": folder / "steps.json", "chart": folder / "steps.png", "profile": folder / "trace.json"}
    small = SMALL | {"batch_sizes": (4, 2), "precisions": ("fp32", "bf16")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "MOST_STEPS", 100)
        patch.setattr("fastresnet.device._computes_bf16", lambda _: False)  # so that the base is the same everywhere
        measure_steps(StepOptions(**small, **files, rounds=2))
    return json.loads(files["json"].read_text()), folder


# --- end to end --------------------------------------------------------------------------------------------------


def test_every_case_is_measured_in_every_round(result):
    report, _ = result
    assert (report["schema"], report["benchmark"]) == (1, "step")
    assert [row["name"] for row in report["rows"]] == [
        BASE,
        "train/resnet20/b2/fp32/channels_last/eager",
        "inference/resnet20/b4/fp32/channels_last/eager",
        "inference/resnet20/b2/fp32/channels_last/eager",
        "train/resnet20/b4/bf16/channels_last/eager",
        "train/resnet20/b4/fp32/contiguous/eager",
    ]
    for row in report["rows"]:
        fields = ("mode", "model", "batch_size", "precision", "memory_format", "backend")
        parts = [f"b{row[field]}" if field == "batch_size" else row[field] for field in fields]
        assert "/".join(parts) == row["name"]
        assert (row["kind"], row["rounds"]) == ("ours", 2)
        assert 0 < row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert row["ms_per_step"] == pytest.approx(1000 * row["batch_size"] / row["images_per_s"])
    (split,) = report["splits"]
    assert split["model"] == "resnet20"
    assert all(split[f"{part}_ms"] > 0 for part in ("forward", "backward", "optimizer"))


def test_timed_parts_match_the_whole_step_and_update_nothing():
    """Batch norms are fused alike, and no parameter changes."""
    case = small_case()
    split, alone = cases.TimedParts(case, CPU), cases._train_step(case, CPU)
    fused = [[m.fused for m in model.modules() if isinstance(m, BatchNorm2d)] for model in (split._model, alone.model)]
    assert fused[0] == fused[1] != []
    before = [parameter.clone() for parameter in split._model.parameters()]
    split.measure(0.001)
    assert all(map(torch.equal, before, split._model.parameters()))
    assert all(ms > 0 for (ms,) in split.ms.values())


def test_report_has_its_environment(result):
    environment = result[0]["environment"]
    assert {"device", "threads", "versions", "commit", "command", "started"} <= environment.keys()
    assert (environment["precision"], environment["batch_size"], environment["backend"]) == ("fp32", 4, "eager")


def test_the_roof_follows_from_the_limits_and_the_counts(result):
    report, _ = result
    for row in report["rows"]:
        computing = row["flops_per_image"] / (report["limits"]["matmul_tflops"][row["precision"]] * 1e12)
        moving = row["bytes_per_image"] / (report["limits"]["copy_gb_per_s"] * 1e9)
        assert row["percent_of_roof"] == pytest.approx(100 * row["images_per_s"] * max(computing, moving))
        assert row["bound"] == ("compute" if computing > moving else "memory")


def test_flop_and_byte_counts_of_a_case(result):
    rows = {row["name"]: row for row in result[0]["rows"]}
    base, inference = rows[BASE], rows[BASE.replace("train", "inference")]
    assert base["flops_per_image"] == 2 * (3 * 40_813_184 - 442_368)
    assert inference["flops_per_image"] == 2 * 40_813_184
    # Inference reads and writes each of the 19 large convolutions' outputs at least 3 times (convolution, batch norm,
    # relu), and every parameter once in a batch.
    activations = 7 * 16 * 1024 + 6 * 32 * 256 + 6 * 64 * 64
    assert inference["bytes_per_image"] > 4 * (5 * activations + 272_474 / 4)
    assert inference["bytes_per_image"] < 4 * (9 * activations + 272_474)
    assert base["bytes_per_image"] > 2 * inference["bytes_per_image"]
    smaller = rows[BASE.replace("b4", "b2")]
    # Parameters, gradients and momentum are moved once a step, and so twice as often for an image in half the batch.
    assert smaller["bytes_per_image"] > base["bytes_per_image"]


def test_ratios_compare_cases_that_differ_in_one_setting(result):
    assert [(each["name"], each["over"]) for each in result[0]["ratios"]] == [
        (BASE.replace("fp32", "bf16"), BASE),
        (BASE, BASE.replace("channels_last", "contiguous")),
    ]


def test_tables_fit_into_80_columns(result, capsys, monkeypatch):
    from benchmarks.report import print_tables

    monkeypatch.setenv("COLUMNS", "80")
    report = json.loads(json.dumps(result[0]))
    longest = {"model": "resnet110", "batch_size": 4096, "backend": "compile", "percent_of_roof": 123.4}
    figures = {"images_per_s": 525_400.0, "images_per_s_low": 501_234.0, "images_per_s_high": 531_234.0}
    report["rows"][0] |= longest | figures
    print_tables(tables(report), [])
    out = capsys.readouterr().out
    assert "…" not in out
    assert "resnet110 b4096 fp32 NHWC compile 525 (501–531)" in " ".join(out.split())
    assert any("GB/s" in note for note in notes(result[0]))
    lines = markdown_table(result[0]).splitlines()
    assert len(lines) == 2 + len(result[0]["rows"])
    assert len({line.count("|") for line in lines}) == 1


def test_case_faster_than_its_roof_gets_a_note(result):
    report = json.loads(json.dumps(result[0]))
    for row in report["rows"]:
        row["percent_of_roof"] = 50.0
    assert not any("faster than its roof" in note for note in notes(report))
    report["rows"][1]["percent_of_roof"] = 120.0
    assert any("faster than its roof" in note and report["rows"][1]["name"] in note for note in notes(report))


def test_chart_is_png_and_trace_is_json(result):
    _, folder = result
    with Image.open(folder / "steps.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
    trace = json.loads((folder / "trace.json").read_text())
    assert any(event.get("name") == "aten::convolution_backward" for event in trace["traceEvents"])


def test_gpu_operators_are_counted_by_kernel_only(tmp_path, monkeypatch):
    """PyTorch reports 3 convolutions in a region: the GPU's 300 us stand at operator, kernel and region."""

    class Profiler:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def export_chrome_trace(self, path):
            Path(path).write_text("{}")

        def key_averages(self):
            return [
                event("aten::convolution", DeviceType.CPU, 0),
                event("aten::cudnn_convolution", DeviceType.CPU, 300),
                event("ProfilerStep*", DeviceType.CUDA, 300, is_user_annotation=True),
                event("cudnn::conv_kernel", DeviceType.CUDA, 300),
                event("Memset (Device)", DeviceType.CUDA, 6),
            ]

    def event(key, device_type, microseconds, is_user_annotation=False):
        return types.SimpleNamespace(
            key=key, device_type=device_type, self_device_time_total=microseconds, self_cpu_time_total=1, count=3,
            is_user_annotation=is_user_annotation,
        )  # fmt: skip

    timed = cases.TimedStep(small_case(), CPU)
    monkeypatch.setattr(cases, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timed._device = torch.device("cuda")
    operators = timed.profile(tmp_path / "trace.json")
    assert operators == [("cudnn::conv_kernel", pytest.approx(0.1), 1), ("Memset (Device)", pytest.approx(0.002), 1)]


@pytest.mark.gpu
def test_gpu_operator_times_sum_to_the_kernel_times_of_the_trace(tmp_path):
    operators = cases.TimedStep(small_case(), torch.device("cuda")).profile(tmp_path / "trace.json", steps=3)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    on_gpu = [event["dur"] for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    assert sum(ms for _, ms, _ in operators) == pytest.approx(sum(on_gpu) / 1000 / 3)
    assert sum(calls for _, _, calls in operators) == pytest.approx(len(on_gpu) / 3)


def test_interruption_keeps_the_finished_rounds(tmp_path, monkeypatch):
    turns = []
    measure = cases.TimedStep.measure

    def stopped_in_the_second_round(self, seconds):
        turns.append(self.case.name)
        if turns.count(self.case.name) == 2:
            raise KeyboardInterrupt
        measure(self, seconds)

    monkeypatch.setattr(cases.TimedStep, "measure", stopped_in_the_second_round)
    path = tmp_path / "steps.json"
    arguments = ["--models", "resnet20", "--batch-sizes", "2", "--backends", "eager", "--precisions", "fp32"]
    arguments += ["--seconds", "0.001", "--device", "cpu", "--json", str(path)]
    assert terminal.guarded(main, ["step", *arguments]) == 130
    report = json.loads(path.read_text())
    assert {row["rounds"] for row in report["rows"]} == {1}
    assert list(tmp_path.iterdir()) == [path]


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet2"], "did you mean 'resnet20'?"),
        (["--precisions", "bf61"], "did you mean 'bf16'?"),
        (["--precisions", "auto"], "unknown precision 'auto'"),
        (["--backends", "compiled"], "did you mean 'compile'?"),
        (["--backends", "graph", "--device", "cpu"], "--backends graph"),
        (["--batch-sizes", "128", "0"], "--batch-sizes 128 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--json", "no/such/folder/f.json"], "there is no folder no/such/folder"),
        (["--profile", "no/such/folder/f.json"], "there is no folder no/such/folder"),
        (["--chart", "chart.doc"], "ends in .png, .svg or .pdf"),
        (["--profile", "trace.gz"], "ends in .json"),
    ],
)
def test_wrong_arguments_exit_with_2(capsys, arguments, message):
    assert terminal.guarded(main, ["step", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_precision_that_the_gpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("fastresnet.device._computes_bf16", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    with pytest.raises(step.UsageError, match="an old GPU does not support it"):
        step._sweep(StepOptions(precisions=("bf16",)), torch.device("cuda"))


def test_gpu_sweep_varies_one_setting_of_a_graph_base_case(monkeypatch):
    monkeypatch.setattr("fastresnet.device._computes_bf16", lambda _: True)
    base, *others = step._sweep(StepOptions(), torch.device("cuda"))
    assert base.name == "train/resnet20/b128/bf16/channels_last/graph"
    assert len(set(others)) == len(others)
    varied = ("model", "batch_size", "precision", "memory_format", "backend")
    assert all(sum(getattr(base, key) != getattr(case, key) for key in varied) <= 1 for case in others)
    assert {"eager", "compile", "fp16", "contiguous", "resnet110", "b4096"} <= {
        part for case in others for part in case.name.split("/")
    }


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_batch_that_exceeds_memory_names_its_case(monkeypatch, capsys, mode):
    monkeypatch.setattr(cases, "free_memory", lambda _: 10 << 20)
    arguments = [word if word not in ("2", "3") else str(1 << 16) for word in SMALLEST]
    assert terminal.guarded(main, [*arguments, "--threads", "1"]) == 1
    advice = "fp32/channels_last/eager does not fit; give smaller --batch-sizes."
    assert f"left out: out of memory: {mode}/resnet20/b65536/{advice}" in capsys.readouterr().err


def failing(monkeypatch, error, *names):
    """Raise `error` where one of the cases `names` is prepared."""
    original = cases._training

    def training(case, device):
        if case.name in names:
            raise error
        return original(case, device)

    monkeypatch.setattr(cases, "_training", training)


SMALLEST = ["step", "--models", "resnet20", "--backends", "eager", "--precisions", "fp32", "--batch-sizes", "2", "3"]
SMALLEST += ["--rounds", "1", "--seconds", "0.001", "--device", "cpu"]
FIRST, SECOND = (f"train/resnet20/b{size}/fp32/channels_last/eager" for size in (2, 3))


def test_interruption_while_preparing_a_case_keeps_the_earlier_cases(tmp_path, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt(), SECOND)
    assert terminal.guarded(main, [*SMALLEST, "--json", str(tmp_path / "steps.json")]) == 130
    report = json.loads((tmp_path / "steps.json").read_text())
    assert [(row["name"], row["rounds"]) for row in report["rows"]] == [(FIRST, 1)]


def test_a_case_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    """This holds for the base case, too; then no trace is written."""
    failing(monkeypatch, RuntimeError("PassManager::run failed\nmore"), FIRST)
    files = ["--json", tmp_path / "steps.json", "--profile", tmp_path / "trace.json", "--chart", tmp_path / "chart.png"]
    assert terminal.guarded(main, [*SMALLEST, *map(str, files)]) == 0
    out, err = capsys.readouterr()
    report = json.loads((tmp_path / "steps.json").read_text())
    assert FIRST not in [row["name"] for row in report["rows"]]
    assert len(report["rows"]) == 4
    assert report["failed"].keys() == {FIRST}
    note = f"left out: {FIRST} failed: RuntimeError: PassManager::run failed (test_step.py:"
    assert note in out
    assert f"fastresnet: note: {note}" in err


def test_benchmark_fails_if_every_case_fails(monkeypatch, capsys):
    monkeypatch.setattr(cases, "free_memory", lambda _: 0)
    assert terminal.guarded(main, SMALLEST) == 1
    assert "every case has failed" in capsys.readouterr().err


def test_ratio_uses_only_rounds_that_both_completed():
    assert ratio("a", [4.0, 9.0], "b", [2.0])["high"] == 2.0
