"""Records of Weights & Biases and MLflow, read from their own files."""

import csv
import glob
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fastresnet.training.execution import Execution

SMALL = ("smoke", "--data", "shapes10", "--batch-size", 32, "--precision", "fp32", "--epochs", 3)


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def expected(rows):
    names = {"loss/train": "train_loss", "accuracy/test": "test_accuracy", "lr": "lr"}
    return {(name, int(row["step"])): row[column] for row in rows for name, column in names.items()}


def stop_and_resume(run, monkeypatch, folder, *arguments):
    """A run of three epochs, interrupted after the first."""
    arguments = ("--model", "resnet8", *arguments)
    steps = Execution.steps

    def interrupted(self, epoch, *arguments):
        if epoch == 1:
            raise KeyboardInterrupt
        return steps(self, epoch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Execution, "steps", interrupted)
        assert run("train", *SMALL, *arguments, "--out", folder)[0] == 130
    assert run("train", *SMALL, *arguments, "--out", folder, "--resume")[0] == 0


def test_a_link_in_the_place_of_the_folder_of_wandb_is_refused(run, tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path)
    code, _, err = run("train", *SMALL, "--wandb", "--out", tmp_path / "run")
    assert code == 2
    assert "wandb is a symbolic link, which is not followed. Remove it" in err


def test_no_link_can_wait_at_the_name_of_a_log_of_tensorboard(run, tmp_path):
    """It has 64 random bits; TensorBoard still finds it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run("train", *SMALL[:-1], 1, "--tensorboard", "--out", tmp_path / "run")[0] == 0
    (log,) = (tmp_path / "run").glob("events.out.tfevents.*")
    assert re.search(r"\.[0-9a-f]{16}$", log.name)
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("lr")] == [row["step"] for row in metrics(tmp_path / "run")]


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


@pytest.mark.usefixtures("resnet8")
def test_wandb_logs_every_epoch_across_a_resume(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    stop_and_resume(run, monkeypatch, folder, "--wandb")
    logged, identities, settings = {}, set(), {}
    for path in glob.glob(str(folder / "wandb" / "offline-run-*" / "*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                identities.add((record.run.project, record.run.run_id, record.run.display_name))
                settings |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                logged |= {(name, items["_step"]): value for name, value in items.items()}
    wanted = expected(metrics(folder))
    assert {key: logged[key] for key in wanted} == pytest.approx(wanted)
    assert [(project, name) for project, _, name in identities] == [("fastresnet", "run")]
    assert settings["batch_size"] == 32


@pytest.mark.usefixtures("resnet8")
def test_mlflow_logs_every_epoch_across_a_resume(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    stop_and_resume(run, monkeypatch, tmp_path / "run", "--mlflow")
    assert mlflow.environment_variables.MLFLOW_DISABLE_TELEMETRY.get()
    (logged,) = mlflow.search_runs(output_format="list")
    assert logged.info.run_name == "run"
    assert logged.info.status == "FINISHED"
    assert logged.data.params["batch_size"] == "32"
    client = mlflow.MlflowClient(uri)
    for (name, step), value in expected(metrics(tmp_path / "run")).items():
        history = {metric.step: metric.value for metric in client.get_metric_history(logged.info.run_id, name)}
        assert sorted(history) == [5, 10, 15]
        assert history[step] == pytest.approx(value)


@pytest.mark.parametrize(
    ("option", "library"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_missing_logger_library_names_the_extra_and_starts_no_run(run, tmp_path, monkeypatch, option, library):
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
    assert not (tmp_path / "run").exists()
