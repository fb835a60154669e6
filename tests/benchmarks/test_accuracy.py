"""Accuracy tables: only figures of recorded runs enter them."""

import csv
import dataclasses
import json
import statistics

import pytest
from matplotlib import pyplot as plt

from benchmarks import accuracy
from benchmarks.accuracy import (
    PUBLISHED,
    PUBLISHED_SPEEDRUNS,
    RESULTS,
    read_summaries,
    reproduction_table,
    runs_table,
    speedrun_table,
)
from fastresnet.recipes import RECIPES, create_config
from pipelines.errors import DataError


def summary(seed, percent, *, recipe="paper", model="resnet20", settings=None, **changes):
    settings = {**create_config(recipe, model).to_dict(), **(settings or {})}
    environment = {"device": "a CPU", "threads": 2, "commit": "abc", "command": "fastresnet train"}
    return {
        "schema": 1, "recipe": recipe, "model": model, "data": "cifar10", "seed": seed, "settings": settings,
        "epochs": 165, "steps": 64_000, "test_accuracy": percent, "test_accuracy_mirror": percent + 0.5,
        "best_accuracy": percent, "best_chosen_on": "test", "flops": 23456 * 10**11, "images_per_s": 1000.0,
        "train_seconds": 600.0, "total_seconds": 700.0, "cold_start": {}, "environment": environment, **changes,
    }  # fmt: skip


def cells(table, row):
    """Return the cells of the row that starts with `row`."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    (found,) = [line for line in lines if line[: len(row)] == row]
    return dict(zip(lines[0], found, strict=True))


def test_without_runs_the_table_has_the_published_errors_and_not_run():
    table = reproduction_table([])
    row = cells(table, ["resnet110"])
    assert (row["paper"], row["akamaster"], row["chenyaofo"]) == ("6.43 %", "6.32 %", "–")
    assert {cells(table, [model])[f"`{recipe}`"] for model in PUBLISHED for recipe in ("paper", "fast")} == {"not run"}


def test_a_cell_has_mean_and_sample_deviation_of_the_seeds():
    table = reproduction_table([summary(seed, percent) for seed, percent in enumerate((91.0, 91.2, 91.7))])
    assert cells(table, ["resnet20"])["`paper`"] == "8.70 ± 0.36 % (165 epochs, 3 seeds)"
    assert statistics.stdev([9.0, 8.8, 8.3]) == pytest.approx(0.36, abs=0.005)
    assert cells(reproduction_table([summary(0, 91.0)]), ["resnet20"])["`paper`"] == "9.00 % (165 epochs, 1 seed)"


def test_the_table_of_runs_has_a_row_for_each_recipe_and_network():
    runs = [summary(1, 92.0), summary(0, 91.0), summary(4, 93.0, model="resnet56"), summary(7, 90.0, recipe="fast")]
    table = runs_table(runs)
    found = [line.strip("| ").split(" | ")[:2] for line in table.splitlines()[2:]]
    assert found == [["`fast`", "resnet20"], ["`paper`", "resnet20"], ["`paper`", "resnet56"]]
    row = cells(table, ["`paper`", "resnet20"])
    assert (row["seeds"], row["test accuracy"], row["flip TTA"]) == ("0, 1", "91.50 ± 0.71 %", "92.00 ± 0.71 %")
    assert (row["PFLOP"], row["minutes"]) == ("2.35", "10")


def test_gpu_runs_have_their_own_row_and_enter_the_overall_mean():
    gpu = {"environment": {"device": "H100", "threads": 16}, "settings": {"device": "cuda"}, "train_seconds": 21.0}
    runs = [summary(0, 92.0, **gpu), summary(1, 93.0, **gpu), summary(0, 91.0)]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in runs_table(runs).splitlines()[2:]]
    assert [(row[3], row[4], row[8], row[9]) for row in rows] == [
        ("0", "91.00 %", "10", "a CPU, 2 used"),
        ("0, 1", "92.50 ± 0.71 %", "0.3", "H100"),
    ]
    assert cells(reproduction_table(runs), ["resnet20"])["`paper`"] == "8.00 ± 1.00 % (165 epochs, 3 seeds)"


def test_speedrun_table_lists_airbench_then_speedruns_and_no_other_recipe():
    runs = [summary(seed, percent, recipe="speedrun", model="speednet") for seed, percent in ((0, 93.9), (1, 94.3))]
    table = speedrun_table([*runs, summary(0, 91.0)])
    assert len(table.splitlines()) == 2 + len(PUBLISHED_SPEEDRUNS) + 1
    row = cells(table, ["airbench94_muon.py"])
    assert (row["PFLOP"], row["shift TTA"]) == ("0.277", "94.01 %")
    row = cells(table, ["`speedrun`, speednet"])
    assert (row["PFLOP"], row["runs"], row["single view"]) == ("2.35", "2", "94.10 ± 0.28 %")
    assert (row["flip TTA"], row["shift TTA"]) == ("94.60 ± 0.28 %", "–")
    assert statistics.stdev([93.9, 94.3]) == pytest.approx(0.28, abs=0.005)


def test_runs_on_other_data_or_with_other_settings_do_not_count(tmp_path):
    runs = [
        summary(0, 91.0),
        summary(1, 91.0, data="shapes10"),
        summary(2, 91.0, settings={"lr": 0.2}),
        summary(3, 91.0, settings={"device": "cuda", "precision": "fp16", "seed": 3}),  # not part of a recipe
    ]
    for run in runs:
        (tmp_path / f"{run['seed']}.json").write_text(json.dumps(run))
    assert [run["seed"] for run in read_summaries(tmp_path)] == [0, 3]


def test_a_run_of_a_recipe_that_has_changed_since_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps(summary(0, 91.0, recipe="fast")))
    assert len(read_summaries(tmp_path)) == 1
    of_today = RECIPES["fast"]
    monkeypatch.setitem(RECIPES, "fast", lambda model: dataclasses.replace(of_today(model), momentum=0.9))
    assert read_summaries(tmp_path) == []


@pytest.mark.parametrize("folder", ["", " --out /somewhere/run", " --out='/some where/run'"])
def test_add_keeps_the_summary_and_the_curves_of_a_finished_run(tmp_path, monkeypatch, folder):
    """The stored command has no local path."""
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(DataError, match="run is not a finished run"):
        accuracy.add([run])
    written, kept = summary(3, 91.0), summary(3, 91.0)
    written["environment"]["command"] = f"fastresnet train{folder} --seed 3"
    kept["environment"]["command"] = "fastresnet train --seed 3"
    (run / "summary.json").write_text(json.dumps(written))
    (run / "metrics.csv").write_text("epoch\n1\n")
    accuracy.add([run])
    assert json.loads((tmp_path / "results" / "paper-resnet20-seed3.json").read_text()) == kept
    assert (tmp_path / "results" / "paper-resnet20-seed3.csv").read_text() == "epoch\n1\n"


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def run_folder(tmp_path):
    """Write a run folder with this summary and these curves."""

    def write(name, summary, curves="epoch\n1\n"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        (tmp_path / name / "metrics.csv").write_text(curves)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("unfit", "words"),
    [
        ({"data": "shapes10"}, "trained on shapes10, not on cifar10"),
        ({"recipe": "fast", "settings": {"iterations": 2}}, "iterations = 2, which are not the settings of recipe"),
        ({"settings": None}, "without the settings"),
    ],
    ids=["other data", "other settings", "no settings"],
)
def test_add_rejects_all_runs_if_one_would_not_count(results, run_folder, unfit, words):
    without, unfit = unfit == {"settings": None}, summary(5, 90.0, **unfit)
    if without:
        del unfit["settings"]
    runs = [run_folder("good", summary(4, 91.0)), run_folder("unfit", unfit)]
    with pytest.raises(DataError, match=words) as caught:
        accuracy.add(runs)
    assert str(runs[1]) in str(caught.value)
    assert f"fastresnet train {unfit['recipe']} --model resnet20 --seed 5" in str(caught.value)
    assert not results.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": {"device": "a CPU"}}, "its environment has no command, commit, threads"),
        ({"environment": None}, "environment is not a table: null"),
        ({"test_accuracy": "91"}, "test_accuracy is not a number"),
    ],
)
def test_add_refuses_an_odd_summary_in_words(results, run_folder, changes, words):
    odd = run_folder("odd", summary(5, 90.0, **changes))
    with pytest.raises(DataError, match=words) as caught:
        accuracy.add([run_folder("good", summary(4, 91.0)), odd])
    assert str(odd / "summary.json") in str(caught.value)
    assert not results.exists()


def test_a_summary_of_an_older_version_does_not_count(tmp_path):
    old = summary(0, 91.0)
    del old["settings"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_summaries(tmp_path) == []


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("curves", ["epoch\n1\n", "epoch\n1\n2\n"])
def test_add_does_not_overwrite_another_run(results, run_folder, together, curves):
    percent = 91.0 if curves != "epoch\n1\n" else 92.0  # they differ in one file or the other
    first, second = run_folder("first", summary(3, 91.0)), run_folder("second", summary(3, percent), curves)
    if not together:
        accuracy.add([first])
        accuracy.add([first])  # the same run again is accepted
    before = {path: path.read_bytes() for path in results.glob("*")}
    with pytest.raises(DataError, match=r"remove paper-resnet20-seed3\.json and paper-resnet20-seed3\.csv") as caught:
        accuracy.add([first, second] if together else [second])
    assert str(results) in str(caught.value)
    assert {path: path.read_bytes() for path in results.glob("*")} == before
    for path in before:
        path.unlink()
    accuracy.add([second])
    assert json.loads((results / "paper-resnet20-seed3.json").read_text())["test_accuracy"] == percent


def test_chart_shows_available_curves_and_labels_missing_ones_not_run(tmp_path):
    with pytest.raises(DataError, match="has no run of recipe 'paper'"):
        accuracy.chart("paper", tmp_path / "chart.svg", tmp_path)
    (tmp_path / "paper-resnet20-seed3.json").write_text(json.dumps(summary(3, 91.0)))
    curve = "epoch,train_accuracy,test_accuracy\n1,60,55\n2,93.5,91\n"
    (tmp_path / "paper-resnet20-seed3.csv").write_text(curve)
    with plt.rc_context({"svg.fonttype": "none"}):  # keep text as text
        accuracy.chart("paper", tmp_path / "chart.svg", tmp_path)
    picture = (tmp_path / "chart.svg").read_text()
    for label in ("resnet20, train: 6.50 %", "resnet20, test: 9.00 %", "resnet56: not run", "plain20: not run"):
        assert label in picture


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_run_has_a_known_recipe_and_provenance(path):
    run = json.loads(path.read_text())
    assert run["schema"] == 1
    where = {"cpu": "", "cuda": "-gpu"}[run["settings"]["device"]]
    assert path.stem == f"{run['recipe']}-{run['model']}-seed{run['seed']}{where}"
    assert run["recipe"] in RECIPES
    environment = run["environment"]
    assert all(environment[key] for key in ("device", "threads", "versions", "commit", "command", "started"))
    assert not environment["commit"].endswith("+")  # trained from a committed state
    with open(path.with_suffix(".csv"), newline="") as file:
        *_, last = csv.DictReader(file)
    assert float(last["test_accuracy"]) == run["test_accuracy"]  # the last row of the curve is the reported accuracy
