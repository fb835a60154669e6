"""Loader benchmark, end to end on small data: every worker runs, and the figures are consistent."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import loaders
from benchmarks.__main__ import main
from benchmarks.report import print_tables, ratio, spread
from fastresnet import cli, terminal
from pipelines import LIBRARIES, PIPELINES
from pipelines.errors import Note
from pipelines.store import open_store

OURS = list(PIPELINES)
PEERS = ["peer:torchvision-w0", "peer:torchvision-wN", "peer:dali", "peer:ffcv"]


@pytest.fixture(scope="module")
def report(quick_workers, data_root, tmp_path_factory):
    for module in LIBRARIES.values():
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRESNET_DATA", str(data_root))
        small = ["--data", "shapes10", "--batch-size", "64", "--rounds", "3", "--seconds", "0.05"]
        files = ["--json", str(folder / "report.json"), "--chart", str(folder / "chart.png")]
        assert terminal.guarded(main, ["loaders", *small, "--precision", "fp32", *files]) == 0
    return json.loads((folder / "report.json").read_text()), folder / "chart.png"


def test_every_pipeline_and_peer_is_measured(report):
    figures, _ = report
    assert (figures["schema"], figures["benchmark"]) == (1, "loaders")
    assert [row["name"] for row in figures["rows"]] == OURS + PEERS
    for row in figures["rows"]:
        assert row["kind"] == ("ours" if row["name"] in OURS else "peer")
        assert row["rounds"] == 3
        assert 0 < row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert row["first_batch_s"] > 0
        assert row["peak_memory_mb"] > 0
        assert ("compile_s" in row) == ("ffcv" in row["name"])
    assert {"device", "threads", "versions", "commit", "command", "started"} <= figures["environment"].keys()
    assert {"ffcv", "torch", "numpy"} <= figures["environment"]["versions"].keys()
    assert figures["environment"]["data"] == "shapes10"


def test_processes_and_threads_are_those_of_the_loader(report):
    """A `DataLoader` without workers is one process; with one for each core, as many more."""
    rows = {row["name"]: row for row in report[0]["rows"]}
    assert rows["peer:torchvision-w0"]["processes"] == 1
    assert rows["peer:torchvision-wN"]["processes"] > 1
    assert all(row["threads"] >= row["processes"] for row in rows.values())


def test_the_limit_counts_the_bytes_a_batch_must_move(report):
    """fp32: each of the 3,072 values is read as one byte and written as four."""
    figures, _ = report
    limits = figures["limits"]
    assert limits["images_per_s"] == pytest.approx(limits["copy_gb_per_s"] * 1e9 / (3072 * 5))
    for row in figures["rows"]:
        assert row["percent_of_limit"] == pytest.approx(100 * row["images_per_s"] / limits["images_per_s"])


def test_each_pipeline_is_compared_with_each_peer(report):
    figures, _ = report
    assert [(each["name"], each["over"]) for each in figures["ratios"]] == [(a, b) for a in OURS for b in PEERS]
    assert all(0 < each["low"] <= each["median"] <= each["high"] for each in figures["ratios"])


def test_the_chart_is_a_readable_picture(report):
    with Image.open(report[1]) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_ratios_are_taken_round_by_round():
    """A machine that is ten times slower in the second round does not change the ratios."""
    assert ratio("a", [20.0, 2.0, 30.0], "b", [10.0, 1.0, 10.0]) == {
        "name": "a",
        "over": "b",
        "median": 2.0,
        "low": 2.0,
        "high": 3.0,
    }
    assert spread([3.0, 1.0, 2.0], "x") == {"x": 2.0, "x_low": 1.0, "x_high": 3.0}


def test_peers_have_a_worker_for_each_usable_processor(dataset, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)))
    monkeypatch.setattr(loaders, "is_installed", lambda _: False)
    with pytest.warns(Note, match="is skipped"):
        cases = {case.name: case for case in loaders._available(dataset, "cpu")}
    assert [cases[f"peer:torchvision-w{n}"].options["workers"] for n in "0N"] == [0, 77]


def test_the_data_set_may_be_the_current_folder(dataset, need, monkeypatch):
    need("ffcv")
    monkeypatch.chdir(dataset.folder)
    assert "peer:ffcv" in [case.name for case in loaders._available(open_store(Path()), "cpu")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loadrs"], "did you mean 'loaders'?"),
        (["loaders", "--precision", "bf61"], "did you mean 'bf16'?"),
        (["loaders", "--data", "shapes10", "--batch-size", "999"], "batch size 999"),
        (["loaders", "--data", "shapes10", "--rounds", "0"], "--rounds 0"),
        (["loaders", "--data", "shapes10", "--seconds", "nan"], "--seconds nan"),
        (["loaders", "--json", "no/such/folder/f.json"], "there is no folder no/such/folder"),
        (["loaders", "--chart", "chart.doc"], "ends in .png, .svg or .pdf"),
    ],
)
@pytest.mark.parametrize("command", ["fastresnet bench", "python -m benchmarks"])
def test_wrong_arguments_exit_with_2(data_root, monkeypatch, capsys, command, arguments, message):
    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))
    code = cli.main(["bench", *arguments]) if command == "fastresnet bench" else terminal.guarded(main, arguments)
    assert code == 2
    assert message in capsys.readouterr().err


def test_tables_show_failed_loaders_and_gpu_memory(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {"name": "resident", "images_per_s": 2e6, "images_per_s_low": 1e6, "images_per_s_high": 3e6}
    row |= {"percent_of_limit": 9.0, "first_batch_s": 1.0, "peak_memory_mb": 1234.0, "processes": 1, "threads": 20}
    report = {
        "environment": {"data": "cifar10", "batch_size": 512, "precision": "bf16", "device": "GPU", "data_mb": 184.0},
        "limits": {"images_per_s": 1e7, "copy_gb_per_s": 3000.0},
        "rows": [row],
        "ratios": [],
    }
    print_tables(loaders.tables(report), loaders.notes(report))
    assert "left out" not in (without := capsys.readouterr().out)
    assert "GPU" not in without.replace("bf16, GPU", "")
    report["rows"] = [row | {"gpu_memory_mb": 5678.0}]
    report["failed"] = {"peer:dali": "peer:dali failed: no DALI"}
    print_tables(loaders.tables(report), loaders.notes(report))
    out = capsys.readouterr().out
    assert "MB host/GPU" in out
    assert "1,234/5,678" in out
    assert "left out: peer:dali failed: no DALI" in out
    assert "1,234/5,678" in loaders.markdown_table(report)
