"""Plots and report pages of runs, parsed and, if a browser is installed, rendered."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastresnet.checkpoint import load_tensors, save_tensors
from fastresnet.evaluation import Predictions, predict_test_set
from fastresnet.plotting import curves
from fastresnet.run_folder import read_run
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


def test_mistakes_figure_works_without_mistakes():
    labels = np.arange(3)
    images, likely = np.zeros((3, 32, 32, 3), np.uint8), np.ones(3, np.float32)
    predictions = Predictions("x", ("a", "b", "c"), images, labels, labels, likely)
    assert predictions.mistakes().get_suptitle()


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
        assert f"{folder.name}, train ({last['train_accuracy']:.2f} %)" in text
        assert f"{folder.name}, {split} ({last[f'{split}_accuracy']:.2f} %)" in text


@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_the_axis_of_the_epochs_has_whole_numbers_only(epochs):
    rows = [
        {"epoch": epoch, "lr": 0.1, "train_loss": 1, "train_accuracy": 50, "test_loss": 1, "test_accuracy": 50}
        for epoch in range(1, epochs + 1)
    ]
    for axes in curves({"run": (rows, "test")}).axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("rates", "scale", "line"),
    [([0.1] * 4 + [0.01] * 3 + [0.001] * 2, "log", "steps-mid"), ([0.3, 0.2, 0.1, 0.0], "linear", "default")],
)
def test_learning_rates_that_fall_in_steps_are_stairs_and_others_a_line(rates, scale, line):
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    rows = [{"epoch": epoch, "lr": lr, **dict.fromkeys(names, 1.0)} for epoch, lr in enumerate(rates, 1)]
    axes = curves({"run": (rows, "test")}).axes[2]
    assert (axes.get_yscale(), axes.lines[0].get_drawstyle()) == (scale, line)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "plot needs run folders"),
        (["{run}", "--kind", "curve"], 2, "did you mean 'curves'"),
        (["{run}", "--out", "picture.bmp"], 2, "ends in .png or .svg"),
        (["{run}", "{run}", "--kind", "confusion"], 2, "takes only one run"),
        (["nowhere"], 3, "nowhere has no metrics.csv"),
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
    assert "Changed from the recipe: batch_size, epochs" in tags.text
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


@pytest.mark.parametrize("width", [390, 1200])
def test_browser_renders_the_page_without_messages_at_every_width(page, tmp_path, width):
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    copy = tmp_path / "page.html"
    measure = (
        "<script>document.title = document.documentElement.scrollWidth + ' ' + document.images[0].naturalWidth</script>"
    )
    copy.write_text(page.read_text().replace("</body>", f"{measure}</body>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, f"--window-size={width},2000", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    shown_width, image_width = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
    assert shown_width <= max(width, 500)  # the narrowest window that chromium opens
    assert image_width > 500


@pytest.mark.parametrize(
    ("remove", "message"), [("summary.json", "is not finished"), ("model.safetensors", "not a readable file")]
)
def test_report_of_an_unfinished_run_is_refused(run, finished, tmp_path, remove, message):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink(missing_ok=True)
    (tmp_path / "run" / remove).unlink()
    code, _, err = run("report", tmp_path / "run")
    assert code == 3
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
