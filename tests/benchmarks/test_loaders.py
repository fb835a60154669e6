"""Loader benchmark, end to end on small data: every worker runs, and the figures are consistent."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from benchmarks import loaders, roofline
from benchmarks.__main__ import main
from benchmarks.report import print_tables, ratio, spread
from fastresnet import cli, terminal
from pipelines import PIPELINES
from pipelines.errors import Note
from pipelines.store import RawData, open_store, write_store

OURS = list(PIPELINES)
NEEDS_DRIVER = ["peer:dali-torchvision"]
PEERS = [
    "peer:torchvision-w0",
    "peer:torchvision-wN",
    "peer:torchvision-v2-batch",
    "peer:torchdata-nodes",
    "peer:spdl",
    "peer:dali",
    *(NEEDS_DRIVER if torch.cuda.is_available() else []),
    "peer:ffcv",
    "peer:airbench",
]


@pytest.fixture(scope="module")
def report(quick_workers, data_root, tmp_path_factory):
    for module in loaders.MODULES.values():
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRESNET_DATA", str(data_root))
        copy = roofline.copy_bandwidth
        patch.setattr(roofline, "copy_bandwidth", lambda device: copy(device, 1 << 20))
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
    assert {"ffcv", "torch", "numpy", "airbench", "spdl_core", "torchdata"} <= figures["environment"]["versions"].keys()
    assert figures["environment"]["data"] == "shapes10"
    assert figures["failed"] == {}
    assert list(figures["missing"]) == [name for name in NEEDS_DRIVER if name not in PEERS]


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


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Store of 171 images of noise; red is the number of the image, and its last digit is the label."""
    images = np.random.default_rng(0).integers(0, 256, (171, 32, 32, 3), np.uint8)
    images[..., 0] = np.arange(171)[:, None, None]
    labels = np.arange(171) % 10
    folder = tmp_path_factory.mktemp("tagged") / "noise"
    classes = tuple("abcdefghij")
    write_store(folder, RawData(classes, images, labels, images[:50], labels[:50]), source="drawn", version="0")
    return open_store(folder)


def places(image, source, padding):
    """Return the places (row, column, flip) of a crop of 32 x 32 in the padded `source` that is `image`."""
    padded = np.pad(source, ((4, 4), (4, 4), (0, 0)), padding)
    crops = sliding_window_view(padded, (32, 32), axis=(0, 1)).transpose(0, 1, 3, 4, 2)  # [9, 9, 32, 32, 3]
    found = [(crops == each).all(axis=(2, 3, 4)) for each in (image, image[:, ::-1])]
    return set(map(tuple, np.argwhere(np.stack(found, axis=-1))))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "peer", [pytest.param(name, marks=pytest.mark.slow) if name == "ffcv" else name for name in loaders.PEERS]
)
def test_a_peer_delivers_every_image_once_cropped_flipped_and_normalised(tagged, monkeypatch, peer, device):
    """FFCV compiles for half a minute. DALI's Compose asks PyTorch for a CUDA stream, which needs a driver."""
    module, library = loaders.PEERS[peer]
    pytest.importorskip(loaders.MODULES[library])
    if peer == "ffcv":
        importlib.import_module("pipelines.ffcv").write_beton(tagged.train, tagged.folder / "train.beton", print)
    if peer == "dali-torchvision" and not torch.cuda.is_available():
        monkeypatch.setattr("nvidia.dali.types._get_default_stream_for_array", lambda _: None)
    settings = {"device": torch.device(device), "dtype": torch.float32, "workers": 0 if peer.endswith("w0") else 2}
    loader = importlib.import_module(f"benchmarks.peers.{module}").open_loader(tagged, batch_size=57, **settings)
    orders = []
    for _ in range(2):
        orders.append([])
        for images, labels in loader:
            assert (images.shape, images.dtype, images.device.type) == ((57, 3, 32, 32), torch.float32, device)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert (labels.dtype, labels.device.type) == (torch.int64, device)
            values = images.permute(0, 2, 3, 1).cpu().numpy()
            pixels = (255 * (values + 1) / 2).round().astype(np.uint8)
            assert abs(values - (pixels / 255 - 0.5) / 0.5).max() < 0.001  # airbench computes in fp16
            numbers = pixels[:, 16, 16, 0]
            assert (labels.cpu().numpy() == numbers % 10).all()
            padding = "reflect" if peer == "airbench" else "constant"
            found = [places(pixels[row], tagged.train.images[numbers[row]], padding) for row in range(57)]
            assert all(found)
            assert bool(set.intersection(*found)) == (peer == "torchvision-v2-batch")
            orders[-1].extend(numbers)
        assert sorted(orders[-1]) == list(range(171))
    assert orders[0] != orders[1]


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


@pytest.mark.filterwarnings("ignore:left out:pipelines.errors.Note")
def test_peers_have_a_worker_for_each_usable_processor(dataset, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)))
    monkeypatch.setattr(loaders, "is_installed", lambda _: False)
    monkeypatch.setattr(loaders, "MODULES", {})
    monkeypatch.setattr(loaders, "prepare", lambda *_, **__: None)  # the files of FFCV
    cases = {case.name: case for case in loaders._available(dataset, "cpu")[0]}
    assert [cases[f"peer:torchvision-w{n}"].options["workers"] for n in "0N"] == [0, 77]
    assert cases["peer:spdl"].options["workers"] == cases["peer:torchdata-nodes"].options["workers"] == 77


def test_a_missing_library_is_named_with_its_remedy(dataset, monkeypatch):
    monkeypatch.setattr(loaders, "is_installed", lambda _: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(Note) as notes:
        cases, missing = loaders._available(dataset, "cpu")
    assert [case.name for case in cases] == ["resident"]
    assert str(notes[0].message) == f"left out, for the reasons below the table: {', '.join(missing)}"
    assert missing.keys() == {*OURS[1:], *(f"peer:{name}" for name in loaders.PEERS)}
    assert missing["ffcv"] == "ffcv: ffcv is not installed (pip install 'fastresnet[ffcv]')"
    assert missing["peer:dali-torchvision"] == (
        "peer:dali-torchvision: dali is not installed (pip install 'fastresnet[dali]')"
    )
    assert missing["peer:spdl"] == "peer:spdl: spdl is not installed (pip install 'fastresnet[peers]')"
    assert missing["peer:torchvision-w0"].endswith("torchvision is not installed (pip install torchvision)")


def test_a_peer_that_needs_a_driver_is_left_out_without_one(dataset, need, monkeypatch):
    need("dali")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(Note, match="peer:dali-torchvision"):
        _, missing = loaders._available(dataset, "cpu")
    assert "needs an NVIDIA driver" in missing["peer:dali-torchvision"]


@pytest.mark.filterwarnings("ignore:left out:pipelines.errors.Note")
def test_the_data_set_may_be_the_current_folder(dataset, need, monkeypatch):
    need("ffcv")
    monkeypatch.chdir(dataset.folder)
    assert "peer:ffcv" in [case.name for case in loaders._available(open_store(Path()), "cpu")[0]]


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
    report["missing"] = {"peer:spdl": "peer:spdl: spdl is not installed"}
    print_tables(loaders.tables(report), loaders.notes(report))
    out = capsys.readouterr().out
    assert "MB host/GPU" in out
    assert "1,234/5,678" in out
    assert "left out: peer:dali failed: no DALI" in out
    assert "left out: peer:spdl: spdl is not installed" in out
    markdown = loaders.markdown_table(report)
    assert "1,234/5,678" in markdown
    assert markdown.endswith(
        "|\n\nleft out: peer:spdl: spdl is not installed.\n\nleft out: peer:dali failed: no DALI.\n"
    )
