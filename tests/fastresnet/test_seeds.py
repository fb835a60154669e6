"""Trainings with several seeds, as real processes."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks.accuracy import RESULTS, add
from fastresnet import seeds
from fastresnet.arguments import given_values
from fastresnet.commands.train import Options
from fastresnet.seeds import finished_seeds, format_seeds, parse_seeds, summarize
from fastresnet.training.loggers import PlainLogger, Status
from pipelines.errors import DataError, UsageError

SMALL = ["smoke", "--data", "shapes10", "--batch-size", "32", "--precision", "fp32", "--iterations", "2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("0-1,7", [0, 1, 7]), (" 5 , 2-3", [5, 2, 3]), ("4-4", [4])],
)
def test_seeds_are_numbers_and_ranges(text, expected):
    assert parse_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "0-99999999", "1.5", "0-3,2"])
def test_invalid_seeds_are_refused(text):
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize("text", ["3", "0-9", "0-1,7", "2-4,6,8-9"])
def test_seeds_are_written_as_they_are_read(text):
    assert format_seeds(parse_seeds(text)[::-1]) == text


@pytest.mark.usefixtures("quick_processes")
def test_each_seed_is_trained_in_its_folder_and_the_table_has_mean_and_spread(run, tmp_path):
    code, out, _ = run("train", *SMALL, "--seeds", "3-4", "--out", tmp_path / "runs")
    assert code == 0
    assert "2 trainings, one after the other, on the CPU" in out
    accuracies = []
    for seed in (3, 4):
        folder = tmp_path / "runs" / f"seed{seed}"
        assert "epoch   1" in (folder / "train.log").read_text()
        assert json.loads((folder / "summary.json").read_text())["seed"] == seed
        accuracies.append(float((folder / "metrics.csv").read_text().split(",")[-2]))
    assert run("train", *SMALL, "--seed", 4, "--out", tmp_path / "alone")[0] == 0
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "alone" / "metrics.csv").read_bytes()
    assert f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %" in out
    for number, accuracy in enumerate(accuracies):
        assert f"seed {3 + number}: test accuracy {accuracy:.2f} %, training time 0:0" in out
        assert f"({1 + number} of 2)\n" in out
    assert out.endswith(f"{tmp_path / 'runs' / 'summary.json'}\n")
    common = json.loads((tmp_path / "runs" / "summary.json").read_text())
    figures = common["figures"]["test_accuracy"]
    expected = {"mean": np.mean(accuracies), "std": np.std(accuracies, ddof=1)}
    assert figures == pytest.approx({**expected, "min": min(accuracies), "max": max(accuracies)})
    assert [(one["seed"], one["folder"], one["test_accuracy"]) for one in common["runs"]] == [
        (3, "seed3", accuracies[0]),
        (4, "seed4", accuracies[1]),
    ]
    assert (common["recipe"], common["data"], common["seeds"]) == ("smoke", "shapes10", [3, 4])
    assert "--seed 4" in common["runs"][1]["environment"]["command"]
    assert common["environment"]["versions"]["torch"] == torch.__version__


@pytest.mark.usefixtures("quick_processes")
def test_finished_seeds_are_announced_and_not_trained_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRESNET_RUNS", str(tmp_path))
    code, out, _ = run("train", *SMALL, "--seeds", 5)
    assert code == 0
    assert "finished before" not in out
    (folder,) = tmp_path.glob("*-seed5")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "train.log"}
    code, out, _ = run("train", *SMALL, "--seeds", "5-6", "--resume")
    assert code == 0
    assert "finished before, and not trained again: seeds 5 (1 of 2)" in out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "train.log"} == before
    (common,) = tmp_path.glob("*-seeds5-6.json")
    assert [one["folder"] for one in json.loads(common.read_text())["runs"]] == [folder.name, f"{folder.name[:-1]}6"]
    alone = json.loads(next(tmp_path.glob("*-seeds5.json")).read_text())
    assert alone["figures"]["test_accuracy"]["std"] is None


def test_a_run_that_is_to_take_more_steps_is_not_finished(tmp_path):
    text = next(RESULTS.glob("*.json")).read_text()
    (tmp_path / "summary.json").write_text(text)
    steps, folders = json.loads(text)["steps"], {3: tmp_path, 4: tmp_path / "missing"}
    assert [finished_seeds(folders, steps), finished_seeds(folders, steps + 1)] == [[3], []]


def test_a_common_summary_has_what_runs_share_and_for_each_the_rest(tmp_path):
    first = json.loads(next(RESULTS.glob("fast-resnet20-*.json")).read_text())
    second = {**first, "environment": {**first["environment"], "device": "another"}}
    del second["test_accuracy_mirror"]
    common = summarize([first, second], {0: tmp_path / "a", 1: tmp_path / "b"}, "command")
    assert "device" not in common["environment"]
    own = [one["environment"] for one in common["runs"]]
    assert own == [{"device": first["environment"]["device"]}, {"device": "another"}]
    assert all(
        {**common["environment"], **rest} == one["environment"] for rest, one in zip(own, (first, second), strict=True)
    )
    assert "test_accuracy_mirror" not in common["figures"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "0-1", "--out", "run"), "run holds a run. Give another folder for those of --seeds"),
        (("--seeds", ",".join(map(str, range(0, 400, 2)))), "the name of the summary too long"),
    ],
    ids=["in a run", "long name"],
)
def test_a_place_without_room_for_the_common_summary_is_refused_at_once(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTRESNET_RUNS", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    code, _, err = run("train", *SMALL, *options)
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_progress_is_shown_on_a_terminal(tmp_path, monkeypatch, capsys):
    """The lines in the log are those of a training; one is not complete yet."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    display, log = seeds._Display(3, epochs=4, steps=40), tmp_path / "train.log"
    status = Status(epoch=2, step=20, loss=1.0, accuracy=50.0, lr=0.1, side=32, images_per_s=1000.0, eta_s=60.0)
    row = {"epoch": 2, "step": 20, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 50.0, "overflows": 0}
    log.write_text("epoch   3  step     30  lr 0.1  test loss 1.0 acc  99.00 %  of an earlier training\n")
    with display.bars:
        display.begin(7, log)
        with open(log, "a") as file:
            logger = PlainLogger(lambda line: print(line, file=file), 40)
            logger.epoch({**row, "val_loss": 1.2, "val_accuracy": 48.5}, status)
            file.write("epoch   3  step     30  lr 0.1  val lo")
        display.update()
        display.bars.refresh()
        shown = capsys.readouterr().out
        assert "epoch 3/4  val accuracy 48.50 %" in shown
        assert "0 of 3 finished" in shown
        with open(log, "a") as file:
            file.write("ss 1.0 acc  51.25 %\n")
            logger = PlainLogger(lambda line: print(line, file=file), 40)
            logger.interval_s = -1.0
            logger.status(status.__class__(4, 35, 1.0, 50.0, 0.1, 32, 1000.0, 5.0))
        display.update()
        assert [task.completed for task in display.bars.tasks] == [35, 35]
        display.end(7, "done")
        display.update()
        display.bars.refresh()
    shown = capsys.readouterr().out
    assert "seed 7: done (1 of 3)" in shown
    assert "1 of 3 finished  ETA" in shown


@pytest.mark.usefixtures("quick_processes")
def test_failed_training_is_reported_and_the_others_continue(run, tmp_path):
    (tmp_path / "seed1").mkdir()
    (tmp_path / "seed1" / "last.ckpt").touch()
    code, _, err = run("train", *SMALL, "--seeds", "1-2", "--out", tmp_path, "--resume")
    assert code == 1
    assert f"1 of 2 trainings failed; see {tmp_path / 'seed1' / 'train.log'} (exit code 3)" in err
    assert "last.ckpt" in (tmp_path / "seed1" / "train.log").read_text()
    assert (tmp_path / "seed2" / "summary.json").exists()


def test_trainings_get_the_arguments_in_any_order(monkeypatch, tmp_path, dataset):
    """A recipe after a list of numbers, or after two dashes, stays the recipe."""
    from fastresnet.commands import train

    passed = []
    monkeypatch.setattr(seeds, "train_seeds", lambda arguments, *_, **__: passed.append(arguments) or [])
    monkeypatch.setattr(train, "_find_dataset", lambda _: dataset)
    monkeypatch.setattr(train, "print_table", lambda *_, **__: None)
    monkeypatch.setattr(seeds, "summarize", lambda *_: {})
    for words in (
        ["--milestones", "0.5", "--seeds", "0-1", "smoke", "--out", str(tmp_path / "a"), "--data", "shapes10"],
        ["--milestones", "0.5", "--data=shapes10", "--seeds", "0-1", "--out", str(tmp_path / "a"), "--", "smoke"],
    ):
        (tmp_path / "a").mkdir(exist_ok=True)
        train.run(words)
        (tmp_path / "a" / "summary.json").unlink()
    assert passed == [["smoke", "--data=shapes10", "--milestones", "0.5"]] * 2


def test_folder_with_a_run_is_refused_before_any_training_and_before_data_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRESNET_DATA", str(tmp_path / "data"))
    (tmp_path / "seed2").mkdir()
    (tmp_path / "seed2" / "last.ckpt").touch()
    arguments = ("train", "smoke", "--data", "shapes10", "--root", tmp_path / "data")
    for more, folder in ((("--seeds", "1-2", "--out", tmp_path), "seed2"), (("--out", tmp_path / "seed2"), "seed2")):
        code, _, err = run(*arguments, *more)
        assert code == 2
        assert f"{tmp_path / folder} already holds a run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["seed2"]


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_stop_the_running_training_and_start_no_other(tmp_path, data_root, name, code):
    """A terminal that closes, and schedulers, may send several."""
    command = [sys.executable, "-m", "fastresnet", "train", *SMALL[:-2], "--epochs", "500"]
    command += ["--seeds", "1-2", "--out", tmp_path]
    environment = {**os.environ, "FASTRESNET_DATA": str(data_root)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "seed1" / "train.log"
    while not log.exists() or "epoch   1" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.2)
    for _ in range(1 if name == "SIGINT" else 3):
        process.send_signal(getattr(signal, name))
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == (
        f"fastresnet: stopped by {name}. Finished seeds: none (0 of 2). The same command with --resume continues the "
        "others.\n"
    )
    assert "stopped by SIGTERM after step" in log.read_text()
    assert not (tmp_path / "seed2" / "train.log").exists()


@pytest.mark.parametrize("per_gpu", [1, 2, 3])
def test_as_many_trainings_as_requested_run_on_each_gpu(tmp_path, monkeypatch, per_gpu):
    """A stand-in for the training waits until all places are taken, and records its GPU and how many run."""
    program, summary = tmp_path / "python", next(RESULTS.glob("*.json"))
    program.write_text(
        "#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\n"  # the folder is the last argument
        f'touch "$1/running"; echo "$CUDA_VISIBLE_DEVICES" > "$1/seen"; cp {summary} "$1/summary.json"\n'
        f'until [ "$(ls {tmp_path}/*/seen | wc -l)" -ge {2 * per_gpu} ]; do sleep 0.05; done\n'
        f'ls {tmp_path}/*/running | wc -l > "$1/together"; rm "$1/running"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(seeds.sys, "executable", str(program))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    folders = {seed: tmp_path / str(seed) for seed in range(2 * per_gpu + 2)}
    assert seeds.train_seeds([], folders, gpus=2, per_gpu=per_gpu, epochs=1, steps=1) == [
        json.loads(summary.read_text())
    ] * len(folders)
    first = [(folders[seed] / "seen").read_text().strip() for seed in range(2 * per_gpu)]
    assert sorted(first) == ["4"] * per_gpu + ["6"] * per_gpu
    assert max(int((folder / "together").read_text()) for folder in folders.values()) <= 2 * per_gpu


def test_training_without_a_readable_summary_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds.sys, "executable", "true")
    with pytest.raises(DataError, match="is not a finished run"):
        seeds.train_seeds([], {1: tmp_path / "seed1"}, gpus=0, epochs=1, steps=1)
    (tmp_path / "seed1" / "summary.json").write_text('{"schema": 1}')
    with pytest.raises(DataError, match="damaged: recipe is not a text: null"):
        seeds.train_seeds([], {1: tmp_path / "seed1"}, gpus=0, epochs=1, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "3 trainings, 2 in parallel, one on each GPU; each logs"),
        (("--per-gpu", 4), "3 trainings, 3 in parallel, up to 4 on each GPU; each logs"),
        (("--per_gpu=4",), "3 trainings, 3 in parallel, up to 4 on each GPU; each logs"),
    ],
)
def test_trainings_on_each_gpu_are_announced_and_not_an_option_of_theirs(run, tmp_path, monkeypatch, options, message):
    started = []

    def train_seeds(arguments, folders, gpus, per_gpu, *, epochs, steps):
        started.append((arguments, gpus * per_gpu, epochs, steps))
        return [{**json.loads(next(RESULTS.glob("*.json")).read_text()), "seed": seed} for seed in folders]

    monkeypatch.setattr(seeds, "train_seeds", train_seeds)
    monkeypatch.setattr("fastresnet.device.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, out, _ = run("train", *SMALL, "--device", "cuda", "--seeds", "0-2", *options, "--out", tmp_path)
    assert code == 0
    assert message in out
    ((arguments, *numbers),) = started
    assert numbers == [8 if options else 2, 1, 2]
    assert given_values(Options, "train", arguments) == given_values(Options, "train", [*SMALL, "--device", "cuda"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--seeds", "0-1", "--per-gpu", "2", "--device", "cpu"),
            "one after the other.*Leave --per-gpu out",
        ),
        (("--per-gpu", "2"), "Give --seeds"),
        (("--seeds", "0-1", "--per-gpu", "0"), "--per-gpu 0 is not in 1"),
    ],
    ids=["on a CPU", "without seeds", "too low"],
)
def test_invalid_number_of_trainings_on_a_gpu_is_refused(run, tmp_path, arguments, message):
    code, _, err = run("train", *SMALL, *arguments, "--out", tmp_path / "runs")
    assert code == 2
    assert re.search(message, err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["--seed", "1"], ["--seeds", "x"]], ids=["with --seed", "no numbers"])
def test_conflicting_or_invalid_seed_flags_are_refused(run, tmp_path, arguments):
    code, _, err = run("train", *SMALL, "--seeds", "0-1", *arguments, "--out", tmp_path / "runs")
    assert code == 2
    assert "--seed" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("plot",), 3, "has the runs of several seeds. Give one of them"),
        (("report",), 3, "has the runs of several seeds. Give one of them"),
        (("train", *SMALL, "--out"), 2, "has the runs of several seeds. Give another folder with --out"),
        (("train", *SMALL, "--resume", "--out"), 2, "has the runs of several seeds. Give another folder with --out"),
    ],
    ids=["plot", "report", "train", "resume"],
)
def test_a_folder_of_several_runs_is_not_taken_for_a_run(run, tmp_path, command, code, message):
    text = json.dumps({"schema": 1, "seeds": [0, 1]})
    (tmp_path / "summary.json").write_text(text)
    got, _, err = run(*command, tmp_path)
    assert (got, err.count("\n")) == (code, 1)
    assert message in err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("summary.json", text)]
    with pytest.raises(DataError, match="has the runs of several seeds"):
        add([tmp_path])
