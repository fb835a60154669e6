"""Charts of results, their comparison, and rejection of invalid result files."""

import functools
import json
from operator import getitem
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.report import draw_bars
from benchmarks.tables import RESULTS
from fastresnet import plotting

ENVIRONMENT = {"device": "a CPU", "threads": 2, "data": "shapes10", "batch_size": 8, "precision": "fp32"}


@pytest.fixture
def write(tmp_path):
    def write_report(name, benchmark="train", environment=(), **rows):
        """`rows` are (lowest, median, highest) by name."""
        report = {
            "schema": 1,
            "benchmark": benchmark,
            "environment": ENVIRONMENT | dict(environment),
            "limits": {},
            "rows": [
                {"name": row, "images_per_s_low": low, "images_per_s": median, "images_per_s_high": high}
                for row, (low, median, high) in rows.items()
            ],
            "ratios": [],
        }
        (tmp_path / name).write_text(json.dumps(report))
        return tmp_path / name

    return write_report


def test_compare_marks_only_changes_beyond_the_spread(write, run):
    before = write("a.json", worse=(90, 100, 110), same=(90, 100, 110), better=(90, 100, 110))
    after = write("b.json", worse=(70, 80, 89), same=(80, 85, 90), better=(111, 150, 160))
    code, out, err = run("bench", "compare", before, after)
    assert (code, err) == (0, "")
    words = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert words["worse"] == ["100", "80", "0.800", "SLOWER"]
    assert words["same"] == ["100", "85", "0.850", "within", "the", "spread"]
    assert words["better"] == ["100", "150", "1.50", "faster"]
    assert "1 of 3 slower beyond the spread" in out


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_chart_begins_at_0_and_has_the_spread_of_each_row_beside_its_bar(write, monkeypatch, limit):
    drawn = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, _: drawn.append(figure))
    result = json.loads(write("a.json", slow=(3, 4, 6), fast=(900, 1000, 1234)).read_text())
    for row in result["rows"]:
        row["kind"] = "ours"
    draw_bars(result, Path(), "Loaders", (limit, "limit"))
    (figure,) = drawn
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert (axes.get_xscale(), low) == ("linear", 0)
    assert [bar.get_width() for bar in axes.patches if bar.get_x() == 0] == [4, 1000]
    assert [text.get_text() for text in axes.texts] == ["4 (3–6)", "1,000 (900–1,230)"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (limit < high) == ("limit: 2,000" in texts)
    assert (limit > high) == ("limit: 100,000 (beyond the axis)" in texts)


@pytest.mark.parametrize("benchmark", ["loaders", "step", "train"])
def test_chart_of_a_stored_result_is_drawn_again(run, tmp_path, benchmark):
    result = RESULTS / f"{benchmark}-2-cores.json"
    code, out, err = run("bench", "show", result, "--chart", tmp_path / "chart.png")
    assert (code, err) == (0, "")
    assert out
    with Image.open(tmp_path / "chart.png") as ours, Image.open(result.with_suffix(".png")) as committed:
        assert ours.size == committed.size
    code, _, err = run("bench", "show", result, "--chart", "chart.doc")
    assert code == 2
    assert "ends in .png, .svg or .pdf" in err


def test_compare_reports_different_devices_and_unmatched_rows(write, run):
    before = write("a.json", both=(1, 2, 3), old=(1, 2, 3))
    after = write("b.json", environment={"device": "another CPU"}, both=(1, 2, 3), new=(1, 2, 3))
    code, out, _ = run("bench", "compare", before, after)
    assert code == 0
    assert "nothing slower" in out
    assert "not the same device: a CPU, another CPU" in out
    assert "in only one of the two: new, old" in out


def test_results_of_different_benchmarks_are_refused(write, run):
    code, _, err = run("bench", "compare", write("a.json", x=(1, 2, 3)), write("b.json", "loaders", x=(1, 2, 3)))
    assert code == 2
    assert "bench train" in err
    assert "bench loaders" in err
    code, _, err = run("bench", "compare", write("a.json", x=(1, 2, 3)), write("b.json", y=(1, 2, 3)))
    assert code == 2
    assert "no row in common" in err


def without(report, *keys):
    """Delete the entry of `report` at the path `keys`."""
    *path, last = keys
    for key in path:
        report = report[key]
    del report[last]


@pytest.mark.parametrize("benchmark", ["loaders", "step", "train"])
def test_result_with_a_missing_key_never_ends_in_a_traceback(tmp_path, run, benchmark):
    """Each key of a real result is removed in turn. Some are optional; the others give a one-line error."""
    whole = (RESULTS / f"{benchmark}-2-cores.json").read_text()
    first = {"rows": 0, "ratios": 0, "splits": 0}
    report, path = json.loads(whole), tmp_path / "bad.json"
    places = [(key, *([first[key]] if key in first else [])) for key in report if key not in ("schema", "benchmark")]
    inner = [(*place, key) for place in places for key in functools.reduce(getitem, place, report)]
    refused = set()
    for place in [*((key,) for key in report), *inner]:
        without(report := json.loads(whole), *place)
        path.write_text(json.dumps(report))
        for command in (["show", path], ["show", path, "--markdown"], ["compare", path, path]):
            code, _, err = run("bench", *command)
            assert (code, err.count("\n")) in {(0, 0), (2, 1)}, (place, command)
            assert str(path) in err or code == 0
            if code:
                refused.add((command[0], place[0], place[-1]))
    own = {"loaders": "threads", "step": "percent_of_roof", "train": "waiting_percent"}[benchmark]
    assert {("show", "rows", own), ("show", "environment", "device"), ("show", "ratios", "median")} <= refused
    assert {("compare", "rows", "images_per_s_low"), ("compare", "environment", "environment")} <= refused


@pytest.mark.parametrize("name", ["name", "over"])
def test_a_ratio_between_numbers_is_refused_in_one_line(tmp_path, run, name):
    report = json.loads((RESULTS / "train-2-cores.json").read_text())
    report["ratios"][0][name] = 1
    (tmp_path / "bad.json").write_text(json.dumps(report))
    code, _, err = run("bench", "show", tmp_path / "bad.json")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("command", ["show", "compare"])
@pytest.mark.parametrize("value", ["fast", None, [], {}, 0, -1, float("nan")], ids=repr)
def test_a_result_with_impossible_figures_is_refused_in_one_line(write, run, command, value):
    path = write("bad.json", x=(value, value, value))
    code, _, err = run("bench", command, *[path] * (1 + (command == "compare")))
    assert (code, err.count("\n")) == (2, 1)
    assert str(path) in err


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\xff\x00",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"schema": 2, "benchmark": "train", "environment": {}, "limits": {}, "rows": [], "ratios": []}',
        b'{"schema": 1, "benchmark": "other", "environment": {}, "limits": {}, "rows": [], "ratios": []}',
        b'{"schema": 1, "benchmark": ["train"], "environment": {}, "limits": {}, "rows": [], "ratios": []}',
        b'{"schema": 1, "benchmark": "train", "rows": []}',
        b"[" * 200_000,
    ],
)
@pytest.mark.parametrize("command", ["show", "compare"])
def test_invalid_result_file_is_refused_in_one_line(tmp_path, write, run, command, content):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    good = [write("good.json", x=(1, 2, 3))] if command == "compare" else []
    code, _, err = run("bench", command, *good, path)
    assert code == 2
    assert str(path) in err
    assert len(err.splitlines()) == 1
