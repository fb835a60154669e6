"""Training and evaluation from Python give what the commands give; the notebook runs."""

import dataclasses
import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import fastresnet
from fastresnet.weights import load_weights
from pipelines.errors import DataError, UsageError

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "resnet.ipynb"
SMALL = {"data": "shapes10", "batch_size": 32, "precision": "fp32", "iterations": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    return fastresnet.train("smoke", root=data_root, out=tmp_path_factory.mktemp("api") / "run", quiet=True, **SMALL)


def test_train_function_gives_the_same_run_as_the_command(run, trained, tmp_path, capsys):
    arguments = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert run("train", "smoke", *arguments, "--out", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (trained.folder / "metrics.csv").read_bytes()
    assert trained.summary["steps"] == 3
    assert trained.rows[0]["train_loss"] > 0


def test_quiet_training_prints_nothing(data_root, tmp_path, capfd):
    fastresnet.train("smoke", root=data_root, out=tmp_path / "run", quiet=True, **{**SMALL, "iterations": 1})
    assert capfd.readouterr() == ("", "")


def test_training_outlives_standard_output(data_root, tmp_path, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("sys.stdout", Closed())
    run = fastresnet.train("smoke", root=data_root, out=tmp_path / "run", **SMALL)
    assert run.summary["steps"] == 3
    note = "fastresnet: note: standard output is lost (Broken pipe); the run goes on.\n"
    assert capsys.readouterr().err == note


class Broken:
    """Stream without a file."""

    def write(self, _):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("stream", "note"),
    [
        (Broken, "fastresnet: note: standard output is lost (Input/output error); the run goes on.\n"),
        (closed, ""),
        (lambda: None, ""),
    ],
    ids=["broken, without a file", "closed", "none, as in pythonw"],
)
def test_training_needs_no_standard_output(data_root, tmp_path, monkeypatch, capsys, stream, note):
    monkeypatch.setattr("sys.stdout", before := stream())
    run = fastresnet.train("smoke", root=data_root, out=tmp_path / "run", **{**SMALL, "iterations": 1})
    assert run.summary["steps"] == 1
    assert sys.stdout is before
    assert capsys.readouterr().err == note


def test_names_that_standard_output_cannot_encode_do_not_end_a_training(data_root, tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    run = fastresnet.train("smoke", root=data_root, out=tmp_path / "é猫", **{**SMALL, "iterations": 1})
    assert run.summary["steps"] == 1
    assert rb"run folder " + str(tmp_path).encode() + b"/\xe9\\u732b\n" in written.getvalue()


def test_home_folder_is_expanded_in_settings(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTRESNET_RUNS", "~/runs")
    small = {**SMALL, "iterations": 1, "root": data_root, "quiet": True}
    assert fastresnet.train("smoke", out="~/run", **small).folder == tmp_path / "run"
    assert fastresnet.train("smoke", **small).folder.parent == tmp_path / "runs"


def test_settings_accept_command_line_and_python_types(data_root, tmp_path):
    settings = {**SMALL, "iterations": 1, "lr": 1, "milestones": (0.25, 0.5), "lr_batch_size": None}
    settings |= {"seed": np.int64(2), "momentum": np.float32(0.5), "nesterov": np.bool_(True)}
    run = fastresnet.train("smoke", root=str(data_root), out=str(tmp_path / "run"), quiet=True, **settings)
    assert run.folder == tmp_path / "run"
    assert (run.summary["settings"]["lr"], run.summary["settings"]["milestones"]) == (1.0, [0.25, 0.5])
    assert [run.summary["settings"][name] for name in ("seed", "momentum", "nesterov")] == [2, 0.5, True]


def test_evaluate_gives_the_result_of_the_command_for_file_and_network(run, trained, data_root):
    file = trained.folder / "model.safetensors"
    of_file = fastresnet.evaluate(file, data="shapes10", root=data_root, tta="shift")
    network = load_weights(file).model
    of_network = fastresnet.evaluate(network, data="shapes10", root=data_root, normalization="half", tta="shift")
    changing = {"images_per_s": 0.0}
    assert dataclasses.replace(of_file, **changing) == dataclasses.replace(of_network, **changing)
    _, out, _ = run("eval", "--weights", file, "--tta", "shift", "--precision", "fp32")
    for value in (of_file.accuracy, of_file.mirror_accuracy, of_file.shift_accuracy):
        assert f"{value:.2f} %" in out
    assert of_file.accuracy == pytest.approx(trained.summary["test_accuracy"])
    assert fastresnet.evaluate(file, root=data_root).loss == of_file.loss  # on the data set that the file names
    assert fastresnet.evaluate(file, root=data_root, threads=np.int64(1)).accuracy == of_file.accuracy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": 0}, "--epochs 0"),
        ({"epochs": "3"}, "epochs = '3': expected int"),
        ({"milestones": 0.5}, "milestones = 0.5: expected a list"),
        ({"model": "resnet21"}, "did you mean 'resnet20'"),
    ],
)
def test_invalid_settings_are_usage_errors(data_root, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        fastresnet.train("smoke", root=data_root, out=tmp_path / "run", **{**SMALL, **settings})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tta": "Shift"}, "did you mean 'shift'"), ({"tta": True}, "unknown tta"), ({"precision": "fp99"}, "'fp32'")],
)
def test_invalid_options_of_an_evaluation_are_usage_errors(trained, data_root, settings, message):
    with pytest.raises(UsageError, match=message):
        fastresnet.evaluate(trained.folder / "model.safetensors", root=data_root, **settings)


def test_unknown_recipe_existing_run_and_missing_file_are_refused(trained, data_root):
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        fastresnet.train("smokey")
    with pytest.raises(UsageError, match="already holds a run"):
        fastresnet.train("smoke", root=data_root, out=trained.folder, quiet=True, **SMALL)
    with pytest.raises(DataError, match="not a readable file"):
        fastresnet.evaluate("nothing.pt", data="shapes10", root=data_root)


def test_packages_are_marked_as_typed():
    for package in ("fastresnet", "pipelines"):
        assert (NOTEBOOK.parents[1] / package / "py.typed").exists()


SMALLER = {
    "train_images=4000, test_images=500": "train_images=64, test_images=30",
    "epochs=3": "epochs=1",
    "torch.randn(64, 3, 32, 32)": "torch.randn(8, 3, 32, 32)",
    "torch.randint(0, 10, (64,))": "torch.randint(0, 10, (8,))",
}


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("size", ["smaller", pytest.param("full", marks=pytest.mark.slow)])
def test_notebook_runs_and_shows_its_results(monkeypatch, size):
    """Every cell runs. At full size, the residual network is more accurate than the plain one."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    text = NOTEBOOK.read_text()
    for whole, part in SMALLER.items() if size == "smaller" else ():
        assert whole in text
        text = text.replace(whole, part)
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    accuracies = next(
        o["data"]["text/plain"] for o in outputs if "'resnet32'" in o.get("data", {}).get("text/plain", "")
    )
    plain, residual = (float(text.split("'")[0].rstrip(" %")) for text in accuracies.split(": '")[1:])
    if size == "full":
        assert residual > 80
        assert residual > plain + 10
