"""Plots and report pages of runs, parsed and, if a browser is installed, rendered."""

import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastresnet import report
from fastresnet.arguments import docstrings_of
from fastresnet.checkpoint import load_tensors, save_tensors
from fastresnet.config import TrainConfig
from fastresnet.evaluation import Predictions, predict_test_set
from fastresnet.plotting import curves, sweep
from fastresnet.run_folder import Run, named, read_run
from fastresnet.weights import load_weights
from pipelines.errors import DataError
from pipelines.store import open_store
from tests.limits import limits

SMALL = ["--data", "shapes10", "--batch-size", 32, "--precision", "fp32"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_root):
    """A run of two epochs, in a folder whose name has to be escaped."""
    from fastresnet import cli

    folder = tmp_path_factory.mktemp("runs") / "a<b>&c"
    arguments = ["train", "smoke", *map(str, SMALL), "--epochs", "2", "--root", str(data_root), "--out", str(folder)]
    assert cli.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory, data_root):
    """Another run, of three epochs and with a held-out split."""
    from fastresnet import cli

    folder = tmp_path_factory.mktemp("runs") / "other"
    arguments = ["train", "smoke", *map(str, SMALL), "--epochs", "3", "--val-split", "30", "--root", str(data_root)]
    assert cli.main([*arguments, "--out", str(folder)]) == 0
    return folder


# --- predictions on a test set -----------------------------------------------------------------------------------


def test_counts_and_mistakes_follow_from_the_probabilities():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 200).astype(np.float32)
    labels = rng.integers(0, 3, 200)
    images = rng.integers(0, 256, (200, 32, 32, 3), np.uint8)
    taken_for = probabilities.argmax(1)
    predictions = Predictions("x", ("a", "b", "c"), images, labels, taken_for, probabilities.max(1))
    (axes,) = predictions.confusion().axes
    shown = {(*map(round, text.get_position()[::-1]),): int(text.get_text()) for text in axes.texts}
    assert shown == {(i, j): sum((labels == i) & (taken_for == j)) for i in range(3) for j in range(3)}
    assert predictions.accuracy == pytest.approx(100 * np.mean(labels == taken_for))
    worst = predictions.worst()
    assert len(worst) == 24
    assert all(labels[row] != taken_for[row] for row in worst)
    by_hand = sorted((-probabilities[i].max(), i) for i in range(200) if labels[i] != taken_for[i])
    assert worst.tolist() == [i for _, i in by_hand[:24]]


def test_predictions_and_eval_agree(run, finished, data_root):
    predictions = predict_test_set(finished, None, data_root, "cpu")
    _, out, _ = run("eval", "--weights", finished / "model.safetensors")
    assert f"{predictions.accuracy:.2f} %" in out
    assert len(predictions.labels) == 50
    assert load_weights(finished / "model.safetensors").classes == predictions.classes


def test_predictions_without_mistakes_are_said_to_have_none():
    labels = np.arange(3)
    images, likely = np.zeros((3, 32, 32, 3), np.uint8), np.ones(3, np.float32)
    predictions = Predictions("x", ("a", "b", "c"), images, labels, labels, likely)
    assert [text.get_text() for text in predictions.mistakes().texts] == ["x: no mistakes: all 3 images are right"]
    assert "None: all 3 test images are right." in report._mistakes(predictions)


# --- plot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["curves", "confusion", "mistakes"])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_every_picture_is_written_in_both_formats(run, finished, tmp_path, kind, suffix):
    path = tmp_path / f"picture{suffix}"
    code, out, err = run("plot", finished, "--kind", kind, "--out", path)
    assert (code, out.strip()) == (0, str(path)), err
    if suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        with Image.open(path) as picture:
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_curves_of_several_runs_name_each_of_them(run, finished, other, tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    code, *_ = run("plot", finished, other, "--out", tmp_path / "curves.svg")
    assert code == 0
    text = "".join(ElementTree.parse(tmp_path / "curves.svg").getroot().itertext())
    for folder, split in ((finished, "test"), (other, "val")):
        last = read_run(folder).rows[-1]
        shown = f"train {last['train_accuracy']:.2f} %, {split} {last[f'{split}_accuracy']:.2f} %"
        assert f"{folder.name}: {shown}" in text


def run_of(rates, steps=10, **settings):
    """A run of one epoch for each of `rates`, the learning rates."""
    figures = dict.fromkeys(("train_loss", "train_accuracy", "test_loss", "test_accuracy"), 1.0)
    rows = [{"epoch": epoch, "step": epoch * steps, "lr": lr, **figures} for epoch, lr in enumerate(rates, 1)]
    return Run(Path("somewhere/run"), rows, None, TrainConfig(**settings))


@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_the_axis_of_the_epochs_has_whole_numbers_only(epochs):
    for axes in curves({"run": run_of([0.1] * epochs)}).axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("rates", "scale", "line"),
    [
        ([0.1] * 4 + [0.01] * 3 + [0.001] * 2, "log", "steps-mid"),
        ([0.3, 0.2, 0.1, 0.0], "linear", "default"),
        ([0.1, 0.1, 0.0, 0.0], "linear", "default"),  # a logarithmic axis cannot show 0
        ([0.1], "linear", "default"),
    ],
)
def test_learning_rates_that_fall_in_steps_are_stairs_and_others_a_line(rates, scale, line):
    axes = curves({"run": run_of(rates)}).axes[2]
    assert (axes.get_yscale(), axes.lines[0].get_drawstyle()) == (scale, line)
    assert scale == "log" or axes.get_ylim()[0] == 0


@pytest.mark.parametrize("several", [False, True])
def test_a_run_of_one_epoch_is_visible(several):
    runs = {"a": run_of([0.1]), **({"b": run_of([0.1] * 90)} if several else {})}
    for axes in curves(runs).axes:
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert points
        assert all(line.get_marker() == "o" for line in points)


def test_title_of_a_run_is_its_network_data_recipe_and_seed():
    run = run_of([0.1], model="resnet56", data="somewhere/shapes10", recipe="fast", seed=7)
    assert run.title == "resnet56 on shapes10, recipe fast, seed 7"
    assert curves(named([run])).get_suptitle() == run.title
    assert list(named([run, run_of([0.1])])) == ["somewhere/run"]
    assert dataclasses.replace(run, config=None).title == "run"


@pytest.mark.parametrize(
    ("epochs", "limit", "taken", "changes"),
    [
        (8, None, 8, [(0, 16), (2, 20), (4, 24), (6, 32)]),
        (8, None, 5, [(0, 16), (2, 20), (4, 24)]),  # not finished
        (8, 30, 3, [(0, 16), (0.8, 20), (1.5, 24), (2.3, 32)]),  # of 30 steps, each size has 7.5
    ],
)
def test_sizes_of_training_images_are_marked_where_they_change(epochs, limit, taken, changes):
    sides = (16, 20, 24, 32)
    run = run_of([0.1] * taken, epochs=epochs, iterations=limit, resolutions=sides)
    assert run.size_changes == changes
    steps = run.config.sides(run.config.total_steps(10))
    first = [steps.index(side) / 10 for side in sides]
    assert first[: len(changes)] == [epoch for epoch, _ in changes]
    for axes in curves({"run": run}).axes[:2]:
        assert [text.get_text() for text in axes.texts] == [f"{side} px" for _, side in changes]
    other = run_of([0.1] * taken, epochs=epochs, iterations=limit)
    assert not other.size_changes
    assert not curves({"a": run, "b": other}).axes[0].texts


def test_legend_of_a_range_test_is_beside_the_curve():
    rates = np.geomspace(1e-5, 10, 100)
    figure = sweep(rates, rates + 1, rates + 1, {"steepest": 0.1, "a tenth of the lowest": 0.01})
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert len(legend.get_texts()) == 4
    assert legend.get_window_extent().y1 < axes.get_tightbbox().y0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "plot needs RUN ..."),
        (["{run}", "--kind", "curve"], 2, "did you mean 'curves'"),
        (["{run}", "--out", "picture.bmp"], 2, "ends in .png or .svg"),
        (["{run}", "{run}", "--kind", "confusion"], 2, "takes only one run"),
        (["nowhere"], 3, "nowhere does not exist"),
        (["{damaged}"], 3, "metrics.csv is damaged"),
        (["{run}", "--kind", "mistakes", "--data", "cifar"], 3, "cifar, the data set that"),
        (["{run}", "--kind", "confusion", "--device", "tpu"], 2, "unknown device 'tpu'"),
    ],
)
def test_plot_with_invalid_arguments_is_an_error(run, finished, tmp_path, arguments, code, message):
    (tmp_path / "metrics.csv").write_text("epoch,step\n1,x\n")
    got, _, err = run("plot", *(argument.format(run=finished, damaged=tmp_path) for argument in arguments))
    assert got == code
    assert message in err


# --- report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(finished, data_root):
    from fastresnet import cli

    assert cli.main(["report", str(finished), "--root", str(data_root)]) == 0
    return finished / "report.html"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.attributes, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, _, attributes):
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_report_page_has_the_results_and_is_self_contained(page, finished):
    html = page.read_text()
    tags, summary = Tags(html), read_run(finished).summary
    for value in (summary["test_accuracy"], summary["test_accuracy_mirror"], summary["best_accuracy"]):
        assert f"{value:.2f} %" in tags.text
    assert "chosen on the test set itself" in tags.text
    changed = html.partition("Changed from recipe smoke:")[2].partition("<details>")[0]
    assert re.findall("<tr><td>([^<]*)</td><td>([^<]*)<", changed) == [("batch_size", "32"), ("epochs", "2")]
    assert "Images per step" in changed
    for name, value in (("threads", summary["environment"]["threads"]), ("precision", "fp32"), ("backend", "eager")):
        assert f"<tr><td>{name}</td><td>{value}</td>" in html
    fetched = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith(("#", "data:")) for value in fetched)
    assert "<script" not in html
    assert "a<b>" not in html


def test_ids_in_the_report_page_are_unique_and_resolve(page):
    identifiers = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(identifiers) > 100
    assert len(identifiers) == len(set(identifiers))
    for reference in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.read_text()):
        assert set(reference) & set(identifiers)


def test_every_setting_has_a_meaning_on_the_page():
    meanings = docstrings_of(TrainConfig)
    assert set(TrainConfig().to_dict()) - {"recipe"} <= meanings.keys()
    assert meanings["seed"] == "Seed of initial weights, order and augmentation."


@pytest.fixture(scope="module")
def comparison(finished, other, tmp_path_factory):
    from fastresnet import cli

    path = tmp_path_factory.mktemp("pages") / "several.html"
    assert cli.main(["report", str(finished), str(other), "--out", str(path)]) == 0
    return path


def test_comparison_has_accuracies_and_the_settings_that_differ(comparison, finished, other):
    html = comparison.read_text()
    text = Tags(html).text
    for folder in (finished, other):
        assert f"{read_run(folder).summary['test_accuracy']:.2f} %" in text
        assert folder.name in text
    rows = re.findall(r'<tr><td data-name="setting">(\w+)</td>', html)
    assert {"epochs", "val_split"} <= set(rows)
    assert not {"batch_size", "model", "seed"} & set(rows)
    assert "<script" not in html


def test_reports_of_several_runs_are_written_here(run, finished, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("report", finished, other)[:2] == (0, "report.html\n")
    code, _, err = run("report")
    assert (code, err) == (2, "fastresnet: report needs RUN ... (fastresnet report --help).\n")


MEASURE = """<script>
const width = document.documentElement.clientWidth, parts = "h1, h2, p, td, th, figure, figcaption, .tile"
const cut = [...document.querySelectorAll(parts)].filter(
  part => !part.closest(".wide") && part.getBoundingClientRect().right > width + 1)
const red = getComputedStyle(document.querySelector("td")).color.match(/[0-9]+/)[0]
parent.document.title += [width, document.documentElement.scrollWidth, cut.length, red > 128].join(" ") + ";"
</script>"""


@pytest.mark.parametrize("dark", [False, True])
def test_browser_renders_pages_without_messages_at_every_width(page, comparison, tmp_path, dark):
    """The narrowest window of chromium has 500 pixels, so the pages are in frames."""
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    frames = ""
    for path in (page, comparison):
        name = f"{path.stem}-measured.html"
        (tmp_path / name).write_text(path.read_text().replace("</body>", f"{MEASURE}</body>"))
        frames += "".join(f'<iframe src="{name}" width="{width}" height="900"></iframe>' for width in (390, 1280))
    (tmp_path / "frames.html").write_text(f"<title></title><style>iframe {{ border: 0 }}</style>{frames}")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "frames.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    light_text = "true" if dark else "false"
    expected = [f"{width} {width} 0 {light_text}" for width in (390, 1280)] * 2
    measured = re.search("<title>([^<]*);</title>", done.stdout)[1].split(";")
    assert sorted(measured) == sorted(expected)


def test_unfinished_run_is_shown_with_the_command_that_finishes_it(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("epochs = 2", "epochs = 9"))
    code, _, err = run("report", tmp_path / "run")
    assert code == 0
    folder = tmp_path / "run"
    assert f"Finish it: fastresnet train --config {folder}/config.toml --out {folder} --resume" in err
    text = Tags((folder / "report.html").read_text()).text
    assert "Not finished: 2 of 9 epochs." in text
    assert f"{read_run(folder).rows[-1]['test_accuracy']:.2f} %" in text
    assert "Confusion matrix" not in text


@pytest.mark.parametrize(
    ("remove", "code", "message"),
    [
        ("model.safetensors", 3, "not a readable file"),
        ("config.toml", 2, "cannot read the config"),
        ("metrics.csv", 3, "no metrics.csv"),
    ],
)
def test_report_of_an_incomplete_run_is_refused(run, finished, tmp_path, remove, code, message):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink(missing_ok=True)
    (tmp_path / "run" / remove).unlink()
    got, _, err = run("report", tmp_path / "run")
    assert (got, err.count("\n")) == (code, 1)
    assert message in err
    assert not (tmp_path / "run" / "report.html").exists()


# --- the data set of a run ---------------------------------------------------------------------------------------


@pytest.fixture
def moved(finished, data_root, tmp_path):
    """A copy of the run, whose config.toml names a data root that does not exist."""
    shutil.copytree(finished, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(data_root), str(tmp_path / "gone")))
    return tmp_path / "run"


COMMANDS = [("report",), ("plot", "--kind", "confusion"), ("plot", "--kind", "mistakes")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_data_set_is_that_of_the_run_whatever_the_current_root_is(run, finished, tmp_path, monkeypatch, command):
    """Where it is not, nothing is drawn: shapes10 of another size is another data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTRESNET_DATA", str(tmp_path / "empty"))
    code, _, err = run(*command, finished, "--out", tmp_path / "picture.svg")
    assert (code, err) == (0, "")
    assert not (tmp_path / "empty").exists()


def test_report_shows_one_accuracy(page, finished):
    """That of the predictions, in the title of the matrix and in the list of classes, is that of the run."""
    accuracy = read_run(finished).summary["test_accuracy"]
    predictions = predict_test_set(finished, None, None, "cpu")
    assert predictions.accuracy == pytest.approx(accuracy, abs=1e-9)
    assert f"{predictions.accuracy:.2f} %" in Tags(page.read_text()).text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_missing_data_set_of_a_run_is_named_and_not_prepared(run, moved, data_root, tmp_path, command):
    arguments = [*command, moved, "--out", tmp_path / "picture.svg"]
    code, _, err = run(*arguments)
    assert code == 3
    assert f"{tmp_path / 'gone' / 'shapes10'}, the data set that {moved} was trained on, does not exist" in err
    assert "--root or --data" in err
    assert not (tmp_path / "gone").exists()
    assert run(*arguments, "--root", data_root)[0] == 0
    assert run(*arguments, "--data", data_root / "shapes10")[0] == 0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_another_data_set_than_that_of_the_run_is_refused(run, finished, tmp_path, command):
    run("prepare", "--data", "shapes10", "--root", tmp_path, "--train-images", 171, "--test-images", 51)
    other = open_store(tmp_path / "shapes10").digest
    own = load_tensors(finished / "last.ckpt")[1]["data_sha256"]
    for place in (["--root", tmp_path], ["--data", tmp_path / "shapes10"]):
        code, _, err = run(*command, finished, *place, "--out", tmp_path / "picture.svg")
        assert code == 3
        assert "another data set" in err
        assert all(part in err for part in (str(finished), own[:12], str(tmp_path / "shapes10"), other[:12]))
        assert not (tmp_path / "picture.svg").exists()


def test_run_from_before_digests_is_shown_if_the_classes_match(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    tensors, description = load_tensors(finished / "model.safetensors")
    del description["data_sha256"]
    save_tensors(tmp_path / "run" / "model.safetensors", tensors, description)
    assert run("report", tmp_path / "run")[0] == 0


def test_data_set_given_as_a_folder_is_found_under_another_root(run, dataset, data_root, tmp_path, monkeypatch):
    """A path in config.toml would otherwise precede --root."""
    shutil.copytree(dataset.folder, tmp_path / "here" / "shapes10")
    arguments = ["smoke", "--data", tmp_path / "here" / "shapes10", *SMALL[2:], "--iterations", 1]
    assert run("train", *arguments, "--out", tmp_path / "run")[0] == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert run("report", tmp_path / "run")[0] == 3
    assert run("report", tmp_path / "run", "--root", tmp_path / "there")[0] == 0


# --- odd files of a run ------------------------------------------------------------------------------------------


NO_NUMBERS = [None, True, [], {}, "1", float("nan"), float("inf"), 10**400]
ODD_TEXTS, ODD_COUNTS, ODD_TABLES = [None, True, 1, [], {}], [*NO_NUMBERS, 1.5], [None, True, 1, [], "1"]
ODD = {
    **dict.fromkeys(("recipe", "model", "data", "best_chosen_on"), ODD_TEXTS),
    **dict.fromkeys(("seed", "epochs", "steps"), ODD_COUNTS),
    "flops": [value for value in ODD_COUNTS if value is not None],  # those of some networks are not counted
    **dict.fromkeys(("test_accuracy", "test_accuracy_mirror", "best_accuracy", "images_per_s"), NO_NUMBERS),
    **dict.fromkeys(("train_seconds", "total_seconds"), NO_NUMBERS),
    "cold_start": [*ODD_TABLES, {"data": None}, {"data": "1"}, {"data": 10**400}],
    "environment": ODD_TABLES,
    "settings": ODD_TABLES,
}
MISSING = object()


@pytest.mark.parametrize("command", ["report", "plot"])
@pytest.mark.parametrize("field", ODD)
def test_summary_with_a_missing_or_odd_field_is_refused_in_words(run, finished, tmp_path, command, field):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "metrics.csv", tmp_path / "run")
    path, intact = tmp_path / "run" / "summary.json", json.loads((finished / "summary.json").read_text())
    for value in [*[MISSING] * (field != "settings"), *ODD[field]]:  # older runs have no settings
        changed = {**intact, field: value}
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not MISSING}))
        code, _, err = run(command, tmp_path / "run")
        assert (code, err.count("\n")) == (3, 1)
        assert f"{path} is damaged: {field} " in err


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "{}", '{"schema": 2}', "", "{", "[" * 100_000, "\0"])
def test_file_that_is_no_summary_is_refused_in_words(run, finished, tmp_path, text):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(text)
    code, _, err = run("plot", tmp_path / "run")
    assert code == 3
    assert f"{tmp_path / 'run' / 'summary.json'} is damaged: " in err


HEADER = "epoch,step,lr,train_loss,train_accuracy,test_loss,test_accuracy,overflows\n"


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", HEADER, "epoch,step\n1,5\n", HEADER + "1,5,0.1,2,10,2,10\n", HEADER + "1,5,0.1,2,10,2,10,0,0\n"),
        *(HEADER + "1,5,0.1,2,,2,10,0\n", HEADER + "1,5,0.1,x,10,2,10,0\n", HEADER + "nan,5,0.1,2,10,2,10,0\n"),
        *(HEADER + "1,5,inf,2,10,2,10,0\n", HEADER + "1e300,5,0.1,2,10,2,10,0\n", HEADER + '1,5,0.1,2,10,2,10,"0\n'),
        HEADER + "1,5,0.1,2,10,2,10,0\0\n",
        HEADER.replace("test_loss", "epoch") + "1,5,0.1,2,10,2,10,0\n",
    ],
)
def test_damaged_metrics_are_refused_in_words(run, tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    code, _, err = run("plot", tmp_path)
    assert (code, err.count("\n")) == (3, 1)
    assert f"{tmp_path / 'metrics.csv'} is damaged: " in err


@pytest.mark.parametrize(
    "text",
    [HEADER + 600_000 * "1,5,.1,2,1,2,1,0\n", 500_000 * "ab,", "a\n" + 2_000_000 * "1\n", HEADER + 5000 * "9" + "x\n"],
    ids=["rows", "columns", "short rows", "digits"],
)
def test_hostile_metrics_are_refused(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with limits(len(text)), pytest.raises(DataError, match=r"metrics\.csv is damaged: .{0,210}$"):
        read_run(tmp_path)


def test_losses_that_are_not_finite_leave_a_gap_in_the_curves(run, tmp_path):
    """The evaluation of weights that diverged in the last steps of an epoch may overflow."""
    (tmp_path / "metrics.csv").write_text(HEADER + "1,5,0.1,2,10,inf,10,0\n2,10,0.1,1e30,10,nan,10,0\n")
    code, _, err = run("plot", tmp_path)
    assert (code, err) == (0, "")
