"""Records of TensorBoard, Weights & Biases and MLflow, read from their own files."""

import csv
import dataclasses
import io
import json
import os
import re
import struct
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

import fastresnet
from fastresnet import models, plotting
from fastresnet.evaluation import predict_test_set
from fastresnet.plotting import rendered
from fastresnet.training.execution import Execution
from fastresnet.training.loggers import TensorBoardLogger

SMALL = ("smoke", "--data", "shapes10", "--batch-size", 32, "--precision", "fp32", "--epochs", 3)


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def logged(tmp_path_factory, data_root):
    """A run of three epochs that all three libraries log, interrupted after the first and resumed."""
    for library in ("tensorboard", "wandb", "mlflow"):
        pytest.importorskip(library)
    root = tmp_path_factory.mktemp("logged")
    uri, steps = (root / "mlruns").as_uri(), Execution.steps
    settings = {
        "data": "shapes10", "root": data_root, "out": root / "run", "model": "resnet8", "epochs": 3, "batch_size": 32,
        "precision": "fp32", "threads": 1, "quiet": True, "tensorboard": True, "wandb": True, "mlflow": True,
    }  # fmt: skip

    def interrupted(self, epoch, *arguments):
        if epoch == 1:
            raise KeyboardInterrupt
        return steps(self, epoch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true",
            "MLFLOW_TRACKING_URI": uri,
        }.items():  # fmt: skip
            patch.setenv(name, value)
        patch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
        patch.setitem(models.MODELS, "resnet8", dataclasses.replace(models.MODELS["resnet20"], depth=8))
        import mlflow

        mlflow.set_tracking_uri(uri)
        with pytest.MonkeyPatch.context() as stop:
            stop.setattr(Execution, "steps", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fastresnet.train("smoke", **settings)
        run = fastresnet.train("smoke", **settings, resume=True)
        assert mlflow.environment_variables.MLFLOW_DISABLE_TELEMETRY.get()
        patch.setenv("FASTRESNET_DATA", str(data_root))
        predictions = predict_test_set(run.folder, None, None, "cpu")
        confusion = np.asarray(Image.open(io.BytesIO(rendered(predictions.confusion(), "png"))).convert("RGB"))
        yield types.SimpleNamespace(run=run, uri=uri, predictions=predictions, confusion=confusion)


def expected_scalars(run):
    """The scalars of a run by name and step, from metrics.csv and summary.json."""
    names = {"loss/train": "train_loss", "accuracy/test": "test_accuracy", "lr": "lr"}
    values = {(name, int(row["step"])): row[column] for row in metrics(run.folder) for name, column in names.items()}
    summary = json.loads((run.folder / "summary.json").read_bytes())
    final = ("test_accuracy", "test_accuracy_mirror", "test_accuracy_shift", "best_accuracy", "images_per_s")
    return {**values, **{(f"final/{name}", 15): summary[name] for name in final}}


def expected_table(predictions):
    """The numbers of test images by true and predicted class, counted one by one."""
    names = predictions.classes
    pairs = zip(predictions.labels, predictions.predicted, strict=True)
    return Counter((names[true], names[taken_for]) for true, taken_for in pairs)


def counted(table):
    assert table["columns"] == ["true class", "predicted class", "images"]
    return {(true, predicted): images for true, predicted, images in table["data"]}


def assert_pictures(first_batch, confusion, expected_confusion):
    """Assert that `confusion` is that picture, and `first_batch` one of many colours."""
    pictures = [np.asarray(Image.open(source).convert("RGB")) for source in (first_batch, confusion)]
    np.testing.assert_array_equal(pictures[1], expected_confusion)
    assert len(np.unique(pictures[0].reshape(-1, 3), axis=0)) > 1000


def test_tensorboard_has_scalars_pictures_and_a_line_of_hyper_parameters(logged):
    """TensorBoard's own plugin finds the run, its settings and its accuracies, in the one folder."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    folder = logged.run.folder
    runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder.parent))
    runs.Reload()
    assert list(runs.Runs()) == ["run"]
    events = EventAccumulator(str(folder)).Reload()
    for (name, step), value in expected_scalars(logged.run).items():
        assert {event.step: event.value for event in events.Scalars(name)}[step] == pytest.approx(value)
    (first_batch,), (confusion,) = events.Images("first_batch"), events.Images("confusion")
    assert (first_batch.step, confusion.step) == (0, 15)
    pictures = (io.BytesIO(event.encoded_image_string) for event in (first_batch, confusion))
    assert_pictures(*pictures, logged.confusion)

    provider = data_provider.MultiplexerDataProvider(runs, str(folder.parent))
    request = api_pb2.ListSessionGroupsRequest(slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS])
    tab = list_session_groups.Handler(
        RequestContext(), backend_context.Context(TBContext(data_provider=provider)), "", request
    )
    (line,) = tab.run().session_groups
    assert line.name == "run"
    assert (line.hparams["batch_size"].number_value, line.hparams["model"].string_value) == (32, "resnet8")
    shown = {(value.name.tag, 15): value.value for value in line.metric_values}
    assert shown == pytest.approx({key: value for key, value in expected_scalars(logged.run).items() if key in shown})
    assert ("final/test_accuracy_shift", 15) in shown


def test_a_link_in_the_place_of_the_folder_of_wandb_is_refused(run, tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path)
    code, _, err = run("train", *SMALL, "--wandb", "--out", tmp_path / "run")
    assert code == 2
    assert "wandb is a symbolic link, which is not followed. Remove it" in err


def test_no_link_can_wait_at_the_name_of_a_log_of_tensorboard(logged):
    """It has 64 random bits; two processes have written one each."""
    logs = list(logged.run.folder.glob("events.out.tfevents.*"))
    assert len(logs) == 2
    assert all(re.search(r"\.[0-9a-f]{16}$", log.name) for log in logs)


def wandb_records(path):
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KB as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, pending = Path(path).read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        pending += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def test_wandb_has_settings_scalars_pictures_and_the_table(logged):
    values, identities, settings = {}, set(), {}
    for path in logged.run.folder.glob("wandb/offline-run-*/*.wandb"):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                identities.add((record.run.project, record.run.run_id, record.run.display_name))
                settings |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                values |= {(name, items["_step"]): (path.parent, value) for name, value in items.items()}
    wanted = expected_scalars(logged.run)
    assert {key: values[key][1] for key in wanted} == pytest.approx(wanted)
    assert [(project, name) for project, _, name in identities] == [("fastresnet", "run")]
    assert settings["batch_size"] == 32
    files = {key: folder / "files" / value for key, (folder, value) in values.items() if key[0].endswith("/path")}
    assert files.keys() == {("first_batch/path", 0), ("confusion/path", 15), ("confusion_table/path", 15)}
    assert_pictures(files["first_batch/path", 0], files["confusion/path", 15], logged.confusion)
    assert counted(json.loads(files["confusion_table/path", 15].read_bytes())) == expected_table(logged.predictions)


def test_mlflow_has_settings_scalars_pictures_and_the_table(logged):
    import mlflow

    client = mlflow.MlflowClient(logged.uri)
    (found,) = client.search_runs(["0"])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["batch_size"] == "32"
    for (name, step), value in expected_scalars(logged.run).items():
        history = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)}
        assert sorted(history) == ([15] if name.startswith("final/") else [5, 10, 15])
        assert history[step] == pytest.approx(value)
    folder = Path(urlsplit(found.info.artifact_uri).path)
    assert {file.name for file in folder.iterdir()} == {"first_batch.png", "confusion.png", "confusion_table.json"}
    assert_pictures(folder / "first_batch.png", folder / "confusion.png", logged.confusion)
    assert counted(json.loads((folder / "confusion_table.json").read_bytes())) == expected_table(logged.predictions)


class Watching(torch.nn.Module):
    """Network that keeps the first images on which it is trained."""

    def __init__(self):
        super().__init__()
        self.head, self.first = torch.nn.Linear(3, 10), None

    def forward(self, images):
        if self.training and self.first is None:
            self.first = images.clone()
        return self.head(images.mean((2, 3)))


def test_the_first_batch_is_shown_as_the_network_sees_it(dataset, tmp_path, monkeypatch):
    """Normalised by the mean of each pixel, mixed and shrunk; logged are pixels again, with both classes."""
    pytest.importorskip("tensorboard")
    dataset = dataclasses.replace(dataset, classes=tuple("abcdefghij"))
    grids, network, draw = [], Watching(), plotting.image_grid
    monkeypatch.setattr(plotting, "image_grid", lambda *arguments: grids.append(arguments) or draw(*arguments))
    settings = {"precision": "fp32", "threads": 1, "epochs": 2, "batch_size": 30, "quiet": True, "tensorboard": True}
    mixed = {"normalization": "pixel", "mixup": 1.0, "resolutions": (16, 32)}
    fastresnet.train("smoke", model=network, data=dataset, out=tmp_path / "run", **settings, **mixed)
    ((images, titles, title),) = grids
    means = dataset.train.images.mean(0).reshape(16, 2, 16, 2, 3).mean((1, 3))
    seen = 255 * network.first.permute(0, 2, 3, 1).numpy() + means
    assert images.shape == (24, 16, 16, 3)
    np.testing.assert_allclose(images, seen[:24], atol=0.51)
    assert title == "24 of the 30 images of the first step"
    with fastresnet.open_pipeline(dataset, batch_size=30, device="cpu") as loader:
        names = [dataset.classes[label] for label in next(loader.epoch(0)).labels]
    for row, title in enumerate(titles):
        own, other = names[row], names[row ^ 1]
        assert re.fullmatch(own if own == other else rf"\d+ % {own}\n{other}", title)


@pytest.mark.usefixtures("resnet8")
@pytest.mark.parametrize("event", ["begin", "epoch", "finish", "close"])
def test_a_failure_of_a_library_ends_its_log_and_not_the_run(run, tmp_path, monkeypatch, event):
    pytest.importorskip("tensorboard")
    calls = []

    def fail(*_):
        calls.append(event)
        raise OSError("No space left. On the device.\nA traceback.")

    monkeypatch.setattr(TensorBoardLogger, event, fail)
    code, out, err = run("train", *SMALL[:-1], 1, "--model", "resnet8", "--tensorboard", "--out", tmp_path / "run")
    assert code == 0
    assert "test accuracy" in out
    assert (tmp_path / "run" / "summary.json").exists()
    (line,) = err.splitlines()
    assert line == "fastresnet: note: --tensorboard: No space left. This log ends here; the run does not need it."
    assert calls == [event]


@pytest.mark.parametrize(
    ("option", "library"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_missing_logger_library_names_the_extra_and_starts_no_run(run, tmp_path, monkeypatch, option, library):
    options = ("tensorboard", "wandb", "mlflow")
    for earlier in options[: options.index(option)]:
        pytest.importorskip(earlier)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = run("train", *SMALL, "--tensorboard", "--wandb", f"--{option}", "--out", tmp_path / "run")
    assert code == 2
    assert f"fastresnet[{option}]" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "remedies"),
    [
        ("wandb", ["No API key configured", "`wandb login`", "WANDB_MODE=offline"]),
        ("mlflow", ["nowhere", "MLFLOW_TRACKING_URI", "file:", "MLFLOW_ALLOW_FILE_STORE=true"]),
    ],
)
def test_unavailable_logger_is_a_one_line_error_and_leaves_no_files(python, tmp_path, data_root, option, remedies):
    pytest.importorskip(option)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [python, "-m", "fastresnet", "train", *map(str, SMALL), "--tensorboard", f"--{option}", "--out", "run"],
        env={**own, "HOME": str(tmp_path), "FASTRESNET_DATA": str(data_root), "MLFLOW_TRACKING_URI": "nowhere:/at/all"},
        cwd=tmp_path / "here", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert all(remedy in line for remedy in remedies)
    assert list((tmp_path / "here").iterdir()) == []


def test_failure_of_one_logger_closes_the_others(run, tmp_path, monkeypatch):
    mlflow, wandb = pytest.importorskip("mlflow"), pytest.importorskip("wandb")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)

    def refuse(**_):
        raise wandb.Error("Not logged in.\nAnd more. Much more.")

    monkeypatch.setattr(wandb, "init", refuse)
    code, _, err = run("train", *SMALL, "--tensorboard", "--wandb", "--mlflow", "--out", tmp_path / "run")
    assert code == 2
    assert "--wandb: Not logged in. Log in with" in err
    assert mlflow.active_run() is None
    (logged,) = mlflow.MlflowClient(uri).search_runs(["0"])
    assert logged.info.status == "FAILED"
    assert not (tmp_path / "run").exists()
