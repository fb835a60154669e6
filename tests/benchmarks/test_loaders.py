import json

import pytest

from benchmarks.__main__ import main
from fastresnet import cli


@pytest.fixture
def report(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))
    arguments = [
        "--data",
        "shapes10",
        "--batch-size",
        "64",
        "--rounds",
        "3",
        "--seconds",
        "0.05",
        "--precision",
        "fp32",
    ]
    assert cli.guarded(main, ["loaders", *arguments, "--json", str(tmp_path / "report.json")]) == 0
    return json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out


def test_the_report_has_every_pipeline_and_its_provenance(report):
    figures, out = report
    assert (figures["schema"], figures["benchmark"]) == (1, "loaders")
    assert [row["name"] for row in figures["rows"]] == ["resident", "torchvision"]
    for row in figures["rows"]:
        assert row["kind"] == "ours"
        assert row["rounds"] == 3
        assert 0 < row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert row["first_batch_s"] > 0
        assert row["name"] in out
    assert {"device", "threads", "versions", "commit", "command", "started"} <= figures["environment"].keys()
    assert "shapes10" in out


def test_the_limit_counts_the_bytes_a_batch_must_move(report):
    """fp32: each of the 3,072 values is read as one byte and written as four."""
    figures, _ = report
    limits = figures["limits"]
    assert limits["images_per_s"] == pytest.approx(limits["copy_gb_per_s"] * 1e9 / (3072 * 5))
    for row in figures["rows"]:
        assert row["percent_of_limit"] == pytest.approx(100 * row["images_per_s"] / limits["images_per_s"])


def test_the_ratio_lies_between_the_extremes_of_the_rounds(report):
    figures, _ = report
    (ratio,) = figures["ratios"]
    ours, other = figures["rows"]
    assert (ratio["name"], ratio["over"]) == ("resident", "torchvision")
    assert ours["images_per_s_low"] / other["images_per_s_high"] <= ratio["low"] <= ratio["median"]
    assert ratio["median"] <= ratio["high"] <= ours["images_per_s_high"] / other["images_per_s_low"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loadrs"], "did you mean 'loaders'?"),
        (["loaders", "--precision", "bf61"], "did you mean 'bf16'?"),
        (["loaders", "--data", "shapes10", "--batch-size", "999"], "batch size 999"),
        (["loaders", "--data", "shapes10", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_wrong_arguments_exit_with_2(data_root, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))
    assert cli.guarded(main, arguments) == 2
    assert message in capsys.readouterr().err
