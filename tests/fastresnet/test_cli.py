"""Command line: help, arguments, exit codes and error messages."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

import benchmarks.__main__
from fastresnet import cli, terminal
from fastresnet.recipes import RECIPES
from pipelines.errors import RunError


def one_or_two_lines(err):
    return "Traceback" not in err and 1 <= len(err.strip().splitlines()) <= 2


def test_help_does_not_load_torch():
    """Loading torch takes seconds; the overview, version and every command's help must not."""
    helps = [[command, "--help"] for command in ("prepare", "train", "eval", "bench")]
    lines = [["--help"], ["--version"], ["completion", "bash"], ["list"], *helps, ["bench", "loaders", "--help"]]
    program = (
        f"import sys\nfrom fastresnet import cli\nfor arguments in {lines}:\n"
        "    try: cli.main(arguments)\n    except SystemExit as stop: assert not stop.code\n    print('end of it')\n"
        "assert not {'torch', 'torchvision', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *answers, rest = done.stdout.split("end of it\n")
    assert len(answers) == len(lines)
    assert all(answers)
    assert not rest


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python before 3.11 does not know PYTHONSAFEPATH")
@pytest.mark.parametrize(
    "start", ["[sys.executable, '-m', 'json.tool', '/dev/null']", "[sys.executable, '-c', 'import json']"]
)
def test_processes_import_nothing_from_the_working_folder(tmp_path, start):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "json.py").write_text("print('planted')")
    run = f"lambda _: print(subprocess.run({start}, capture_output=True, text=True).stdout) or 0"
    (tmp_path / "program.py").write_text(
        f"import subprocess, sys\nfrom fastresnet.terminal import guarded\nguarded({run}, [])\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], cwd=tmp_path / "work", capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n", done.stderr


def test_settings_of_matplotlib_in_the_working_folder_are_not_read(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    program = (
        "import os, fastresnet.figures, matplotlib; print(matplotlib.rcParams['text.usetex'], os.path.exists('.'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"


def signal_in_cleanup():
    os.kill(os.getpid(), signal.SIGTERM)


def signal_in_generator_cleanup():
    def batches():
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.closing(batches()) as opened:
        next(opened)


@pytest.mark.parametrize("clean_up", [signal_in_cleanup, signal_in_generator_cleanup])
def test_pending_error_is_reported_despite_a_signal(capsys, clean_up):
    """Torchrun sends SIGTERM to the other ranks once one has failed."""

    def command(_):
        try:
            raise RunError("what went wrong")
        finally:
            clean_up()

    assert terminal.guarded(command, []) == 1
    assert capsys.readouterr().err.endswith("what went wrong\n")


def test_second_signal_ends_a_command_that_hangs_in_cleanup():
    def command(_):
        try:
            raise RunError("what went wrong")
        finally:
            while True:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        terminal.guarded(command, [])
    assert ended.value.code == 143


def test_the_overview_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in cli.COMMANDS)
    (trained_by,) = [line for line in out.splitlines() if line.startswith("  train ")]
    assert set(RECIPES) <= set(re.findall(r"\w+", trained_by))
    assert run()[0] == 2


def test_the_help_of_bench_names_every_benchmark(run):
    code, out, _ = run("bench", "--help")
    assert code == 0
    assert all(f"\n  {benchmark} " in out for benchmark in benchmarks.__main__.COMMANDS)
    assert run("bench")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["list", "modles"], ["unknown list 'modles'", "did you mean 'models'?"]),
        (["list", "models", "--root", "x"], ["--root x is where data sets are, not models"]),
        (["list", "--json", "no/such/f.json"], ["there is no folder no/such"]),
        (["train", "papre"], ["unknown recipe 'papre'", "did you mean 'paper'?"]),
        (["train", "--model", "resnet21"], ["unknown model 'resnet21'", "did you mean 'resnet20'?", "plain110"]),
        (["train", "smoke", "--model=rennet56"], ["did you mean 'resnet56'?"]),
        (["train", "--shortcut", "C"], ["unknown shortcut 'C'", "A, B"]),
        (["train", "--pipeline", "residnt"], ["did you mean 'resident'?"]),
        (["train", "--precision", "bf61"], ["did you mean 'bf16'?"]),
        (["train", "--device", "gpu"], ["unknown device 'gpu'", "cuda"]),
        (["train", "--flip", "randon"], ["did you mean 'random'?"]),
        (["train", "--padding-mode", "reflct"], ["did you mean 'reflect'?"]),
        (["train", "--normalization", "chanel"], ["did you mean 'channel'?"]),
        (["train", "--compile", "yes"], ["unknown compile 'yes'", "auto, off, on, capture, graph"]),
        (["train", "--epochs", "0"], ["--epochs 0"]),
        (["train", "--lr", "-1"], ["--lr -1"]),
        (["train", "--lr", "nan"], ["--lr nan"]),
        (["train", "--milestones", "0.7", "0.2"], ["--milestones"]),
        (["train", "--crop-padding", "40"], ["--crop-padding 40"]),
        (["train", "--optimizer", "moun"], ["did you mean 'muon'?"]),
        (["train", "--schedule", "cosin"], ["did you mean 'cosine'?"]),
        (["train", "--mixup", "1", "--batch-size", "127"], ["--batch-size 127", "mix pairs", "even number"]),
        (["train", "baseline", "--optimizer", "adamw", "--nesterov"], ["--nesterov needs --optimizer sgd or muon"]),
        (["train", "--model", "wrn16-2", "--shortcut", "A"], ["shortcut A is not defined for wrn16-2", "shortcut B"]),
        (["train", "--model", "preresnet164", "--shortcut", "A"], ["widens in its first stage too", "shortcut B"]),
        (["train", "--model", "plain56", "--drop-path", "0.1"], ["plain56 has no shortcuts", "Use 0"]),
        (["train", "--model", "wrn16-2", "--zero-init-residual"], ["wrn16-2 has no residual branches", "Leave it out"]),
        (["train", "smoke", "--data", "shapes10", "--batch-size", "172"], ["batch size 172", "171 images"]),
        (
            ["train", "smoke", "--data", "shapes10", "--val-split", "171"],
            ["--val-split 171 leaves nothing of"],
        ),
        (["train", "--config", "nowhere.toml"], ["cannot read the config nowhere.toml"]),
        (["prepare", "--data", "shapes10", "--train-images", "0"], ["--train-images 0"]),
        (["prepare", "--data", "a/b"], ["'a/b' is not a name"]),
        (["prepare", "--data", "a", "--source", "b", "--split", "20"], ["--split 20.0 is not between 0 and 1"]),
        (["eval", "--weights", "x", "--precision", "fp61"], ["did you mean 'fp16'?"]),
        (["eval", "--weights", "x", "--mean", "0.5", "0.5", "0.5"], ["--mean and --std must be given together"]),
        (["eval", "--weights", "x", "--mean", "0", "0", "0", "--std", "0", "1", "1"], ["above 0"]),
        (["eval", "--weights", "x", "--mean", "125", "123", "114", "--std", "1", "1", "1"], ["125", "by 255"]),
        (["eval", "--weights", "x", "--mean", "0", "0", "0", "--std", "nan", "1", "1"], ["nan", "in 0..1"]),
        (["eval", "--weights", "x", "--json", "no/such/folder/f.json"], ["there is no folder no/such/folder"]),
        (["prepare", "--data", "shapes10", "--test-images", "1000001"], ["--test-images 1000001", "1..1000000"]),
        (["prepare", "--data", "shapes10", "--formats", "rwa"], ["unknown format 'rwa'", "did you mean 'raw'?"]),
        (["prepare", "--data", "shapes10", "--formats", "raw,jpg"], ["unknown format 'jpg'", "raw, beton, jpeg"]),
        (["prepare", "--data", "shapes10", "--formats", ""], ["unknown format ''", "raw, beton, jpeg"]),
        (["prepare", "--data", "shapes10", "--jpeg-quality", "0"], ["JPEG quality 0 is not in 1..100"]),
        (["prepare", "--data", "shapes10", "--jpeg-subsampling", "420"], ["did you mean '4:2:0'?"]),
        (["train", "--decode", "jpg"], ["unknown decode 'jpg'", "did you mean 'jpeg'?"]),
        (["train", "--decode", "jpeg", "--pipeline", "ffcv"], ["--decode jpeg needs --pipeline dali, not ffcv"]),
        (["bench", "nonsense"], ["unknown benchmark 'nonsense'", "loaders, step, train, all, kernels, show, compare"]),
        (["bench", "loader"], ["did you mean 'loaders'?"]),
        (["bench", "loaders", "--device", "gpu"], ["unknown device 'gpu'", "cuda"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_exit_with_2_and_name_the_nearest_right_one(run, tmp_path, monkeypatch, arguments, messages):
    monkeypatch.setenv("FASTRESNET_RUNS", str(tmp_path / "runs"))
    code, _, err = run(*arguments)
    assert code == 2
    assert one_or_two_lines(err)
    for message in messages:
        assert message in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "command",
    [["train", "smoke"], ["train", "smoke", "--seeds", "0-1"], ["eval", "--weights", "x"], ["bench", "loaders"]],
    ids=" ".join,
)
def test_device_cuda_without_a_gpu_is_a_usage_error(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("FASTRESNET_RUNS", str(tmp_path / "runs"))
    code, _, err = run(*command, "--data", "shapes10", "--device", "cuda")
    assert code == 2
    assert one_or_two_lines(err)
    assert "--device cuda" in err
    assert "--device cpu" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epoch", "3"], "--epochs"),
        (["train", "--epochs", "many"], "many"),
        (["prepare", "--sorce", "x"], "--source"),
        (["eval"], "eval needs WEIGHTS"),
        (["predict"], "predict needs IMAGE ..."),
        (["eval", "x", "--weights", "y"], "WEIGHTS is given twice"),
        (["train", "--resume=3"], "--resume takes no value"),
        (["eval", "x", "--mean", "1"], "--mean needs 3 values"),
        (["train", "fast", "best"], "unexpected argument best"),
        (["train", "resnet20"], "train --model resnet20"),
        (["train", "run.toml"], "train --config run.toml"),
        (["eval", "--weights", "x", "--jsn", "y"], "--json"),
    ],
)
def test_unknown_flags_and_values_of_the_wrong_kind_exit_with_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert one_or_two_lines(err)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["train", "--data", "cats"], ["no prepared data set in", "cats", "fastresnet prepare --data cats"]),
        (["train", "--data", "./nowhere/cats"], ["nowhere/cats", "fastresnet prepare --data cats --root "]),
        (["train", "--data", "./"], [". is not a prepared data set", "fastresnet prepare --data NAME --source ."]),
        (["prepare", "--source", "nowhere.tar.gz"], ["nowhere.tar.gz does not exist"]),
        (["prepare", "--data", "cats"], ["--source PATH"]),
        (["eval", "--weights", "nowhere.ckpt"], ["nowhere.ckpt is not a readable file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_missing_files_exit_with_3_and_name_the_remedy(run, arguments, messages):
    code, _, err = run(*arguments)
    assert code == 3
    assert one_or_two_lines(err)
    for message in messages:
        assert message in err


def test_parent_folder_given_as_data_set_names_the_data_set_inside(run, dataset):
    code, _, err = run("train", "smoke", "--data", f"{dataset.folder.parent}/")
    assert code == 3
    assert f"there is one in {dataset.folder}" in err


@pytest.mark.parametrize(
    "command",
    [["prepare"], ["train"], ["train", "smoke"], ["eval", "--weights", "pretrained:resnet20"], ["bench", "loaders"]],
    ids=" ".join,
)
def test_a_failed_download_names_the_url_and_both_alternatives(run, tmp_path, monkeypatch, command):
    monkeypatch.setenv("FASTRESNET_MIRROR", "http://127.0.0.1:9")
    code, _, err = run(*command, "--root", tmp_path / "data")
    assert code == 3
    assert "could not download CIFAR-10" in err
    for message in ("http://127.0.0.1:9/cifar-10-python.tar.gz", "--source", "--data shapes10"):
        assert message in err
    assert "Traceback" not in err
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert left == []


def test_a_damaged_store_exits_with_3_and_names_file_and_remedy(run, data_root, tmp_path):
    shutil.copytree(data_root / "shapes10", tmp_path / "shapes10")
    path = tmp_path / "shapes10" / "train_images.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    code, _, err = run("train", "smoke", "--data", tmp_path / "shapes10", "--out", tmp_path / "run")
    assert code == 3
    assert f"{path} is damaged" in err
    assert "fastresnet prepare" in err
    assert not (tmp_path / "run").exists()


def test_a_tilde_that_no_shell_expands_is_the_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("prepare", "--data", "shapes10", "--root=~/a", "--train-images", 20, "--test-images", 10)[0] == 0
    assert run("doctor", "--json", "~/doctor.json")[0] in (0, 1)
    assert {path.name for path in tmp_path.iterdir()} >= {"a", "doctor.json"}


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_folder_that_cannot_be_written_is_named(run, command, tmp_path):
    """A file stands where a folder would have to be: unlike permissions, that stops root, too."""
    (tmp_path / "file").write_text("not a folder")
    where = {
        "train": ["smoke", "--data", "shapes10", "--out", tmp_path / "file" / "run"],
        "prepare": ["--data", "shapes10", "--root", tmp_path / "file" / "data"],
    }[command]
    code, _, err = run(command, *where)
    assert code == 1
    assert one_or_two_lines(err)
    assert str(tmp_path / "file") in err


def test_prepare_reports_a_new_and_an_existing_data_set(run, tmp_path):
    arguments = (
        "prepare", "--data", "shapes10", "--root", tmp_path, "--train-images", 30, "--test-images", 20,
    )  # fmt: skip
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "30 training and 20 test images, 10 classes, prepared and verified" in out
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "already prepared" in out
    code, out, err = run("prepare", "--data", "shapes10", "--root", tmp_path)
    assert code == 0
    assert "30 training" in out
    assert f"nothing was read or drawn; remove {tmp_path / 'shapes10'}" in err


@pytest.mark.parametrize(
    ("pipeline", "kind", "arguments"), [("ffcv", "beton", []), ("dali", "jpeg", ["--decode", "jpeg"])]
)
def test_command_named_for_missing_pipeline_files_makes_them(run, need, tmp_path, pipeline, kind, arguments):
    need(pipeline)
    run("prepare", "--data", "shapes10", "--root", tmp_path, "--train-images", 64, "--test-images", 20)
    train = (
        "train", "smoke", "--data", "shapes10", "--root", tmp_path, "--pipeline", pipeline, *arguments,
        "--iterations", 1, "--batch-size", 32, "--out", tmp_path / "run",
    )  # fmt: skip
    code, _, err = run(*train)
    assert code == 3
    assert one_or_two_lines(err)
    remedy = f"fastresnet prepare --data shapes10 --root {tmp_path} --formats {kind}"
    assert f"{tmp_path / 'shapes10'} has no {kind} files. Make them: {remedy}\n" in err
    assert not (tmp_path / "run").exists()
    assert run(*remedy.split()[1:])[0] == 0
    code, _, err = run(*train)
    assert (code, err) == (0, "")


def test_prepare_reports_psnr_and_exact_pixels_of_jpeg(run, tmp_path):
    sizes = ("--train-images", 30, "--test-images", 20)
    arguments = ("--data", "shapes10", "--root", tmp_path, *sizes, "--formats", "jpeg", "--jpeg-quality", 80)
    code, out, err = run("prepare", *arguments)
    assert (code, err) == (0, "")
    with tarfile.open(tmp_path / "shapes10" / "train.tar") as archive:
        files = [archive.extractfile(member) for member in archive if member.name.endswith(".jpg")]
        decoded = np.stack([np.asarray(Image.open(file)) for file in files]).astype(np.float64)
    error = decoded - np.load(tmp_path / "shapes10" / "train_images.npy")
    psnr, exact = 10 * np.log10(255**2 / np.mean(error**2)), 100 * np.mean((error == 0).all(axis=-1))
    assert f"PSNR {psnr:.1f} dB, {exact:.1f} % of the pixels exact" in out
    assert run("prepare", *arguments)[1] == out.replace("prepared and", "already prepared, and")


def test_train_generates_missing_shapes10(run, tmp_path, monkeypatch):
    from pipelines import prepare as preparation

    drawn = []
    original = preparation.draw_shapes10

    def small(train_images, test_images, report):
        drawn.append((train_images, test_images))
        return original(128, 50, report)

    monkeypatch.setattr(preparation, "draw_shapes10", small)
    arguments = ("--root", tmp_path, "--out", tmp_path / "run", "--iterations", 1, "--precision", "fp32")
    code, *_ = run("train", "smoke", "--data", "shapes10", *arguments)
    assert code == 0
    assert drawn == [(50_000, 10_000)]


def test_weights_for_another_number_of_classes_are_refused(run, tmp_path):
    import torch

    from fastresnet.models import create_model

    torch.save(create_model("resnet20", num_classes=7).state_dict(), tmp_path / "seven.pt")
    code, _, err = run("eval", "--weights", tmp_path / "seven.pt", "--data", "shapes10")
    assert code == 3
    assert "7 classes" in err


def test_eval_normalises_foreign_weights_by_the_given_mean_and_std(run, tmp_path):
    """Weights with mean = std = 0.5 given by hand have the loss of the run's own file."""
    import json

    import torch
    from safetensors.torch import load_file

    run("train", "smoke", "--data", "shapes10", "--precision", "fp32", "--out", tmp_path / "run")
    torch.save(load_file(tmp_path / "run" / "model.safetensors"), tmp_path / "foreign.pt")
    run("eval", "--weights", tmp_path / "run" / "model.safetensors", "--json", tmp_path / "own.json")
    half = ("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5)
    foreign = ("eval", "--weights", tmp_path / "foreign.pt", "--data", "shapes10")
    code, _, err = run(*foreign, *half, "--json", tmp_path / "foreign.json")
    assert code == 0
    own, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "foreign"))
    assert own["loss"] == other["loss"]
    assert "own mean and std" not in err
    code, _, err = run(*foreign)
    assert code == 0
    assert "normalised with shapes10's own mean and std" in err


def test_eval_falls_back_to_fp32_where_the_gpu_lacks_the_precision_of_the_training(run, tmp_path, monkeypatch):
    from fastresnet import device
    from fastresnet.checkpoint import save_tensors
    from fastresnet.config import TrainConfig
    from fastresnet.models import create_model

    config = TrainConfig(precision="bf16", data="shapes10")
    save_tensors(tmp_path / "w.ckpt", create_model("resnet20").state_dict(), {"config": config.to_dict()})
    assert "on shapes10, bf16" in run("eval", tmp_path / "w.ckpt")[1]
    monkeypatch.setattr(device, "supports", lambda precision, _: precision != "bf16")
    code, out, err = run("eval", "--weights", tmp_path / "w.ckpt")
    assert code == 0
    assert "on shapes10, fp32" in out
    assert "trained in bf16" in err


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "fastresnet", "train", "papre"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean 'paper'?" in done.stderr


RECIPES_AND_SWITCHES = {
    (recipe, switch)
    for recipe in ("fast", "best", "speedrun", "paper", "baseline", "smoke")
    for switch in ("nesterov", "decay-norms", "zero-init-residual", "sync-bn")
} - {("speedrun", "zero-init-residual")}  # the networks of speedrun have no such branches


@pytest.mark.parametrize(("recipe", "switch"), sorted(RECIPES_AND_SWITCHES))
def test_a_switch_takes_both_forms_whatever_the_recipe_has_set(run, recipe, switch):
    for flag, value in ((f"--{switch}", "true"), (f"--no-{switch}", "false")):
        code, out, err = run("train", recipe, flag, "--print-config")
        assert (code, err) == (0, "")
        assert f"\n{switch.replace('-', '_')} = {value}\n" in out


@pytest.mark.parametrize("arguments", [["--config"], ["fast", "--model"], ["--seeds", "--dry-run"], ["--find-lr"]])
def test_missing_value_is_a_usage_error(run, arguments):
    code, _, err = run("train", *arguments)
    assert code == 2
    assert f"{arguments[-1] if len(arguments) < 2 or arguments[0] == 'fast' else arguments[0]} needs a value" in err


def test_last_of_repeated_options_counts(run, tmp_path):
    for epochs in (1, 2):
        (tmp_path / f"{epochs}.toml").write_text(f"epochs = {epochs}\nlr = {epochs}")
    configs = ["--config", tmp_path / "1.toml", f"--config={tmp_path / '2.toml'}"]
    _, out, _ = run("train", *configs, "--lr", "3", "--lr=4", "--print-config")
    assert "\nepochs = 2\n" in out
    assert "\nlr = 4.0\n" in out


def test_recipe_may_follow_its_settings(run):
    code, out, _ = run("train", "--data", "shapes10", "best", "--print-config")
    assert code == 0
    assert 'recipe = "best"' in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast", "--resume", "best"], "unexpected argument best"),
        (["fast", "--config", "config.toml", "best"], "unexpected argument best"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_second_recipe_is_a_usage_error(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").touch()
    code, _, err = run("train", *arguments)
    assert code == 2
    assert one_or_two_lines(err)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_folder_may_have_the_name_of_a_recipe(run):
    code, out, err = run("train", "smoke", "--data", "best", "--root", "paper", "--print-config")
    assert (code, err) == (0, "")
    assert 'data = "best"' in out


SETTINGS = {
    'recipe = "best"': ["best"],
    "epochs = 3": ["fast", "--epochs", "3"],
    "": ["fast"],
    'model = "resnet56"': ["fast", "--model", "resnet56"],
    'recipe = "paper"\nmodel = "resnet110"': ["paper", "--model", "resnet110"],
    'recipe = "speedrun"\ncutout = 0': ["speedrun", "--cutout", "0"],
    'model = "wrn16-2"\nnorm_lr = 2': ["fast", "--model", "wrn16-2", "--norm-lr", "2"],
}


@pytest.mark.parametrize(("text", "arguments"), SETTINGS.items(), ids=lambda value: " ".join(value).strip() or "empty")
def test_file_of_some_settings_changes_those_of_its_recipe(run, tmp_path, text, arguments):
    """The expected settings are those of the same changes as flags."""
    (tmp_path / "config.toml").write_text(text)
    _, expected, _ = run("train", *arguments, "--print-config")
    assert run("train", "--config", tmp_path / "config.toml", "--print-config") == (0, expected, "")
    assert run("train", arguments[0], "--config", tmp_path / "config.toml", "--print-config") == (0, expected, "")


def test_flags_precede_a_file_and_a_file_precedes_its_recipe(run, tmp_path):
    (tmp_path / "config.toml").write_text('model = "resnet20"\nepochs = 3\nlr = 0.5\n')
    for recipe in RECIPES:
        arguments = ["--config", tmp_path / "config.toml", "--lr", "0.7", "--model", "resnet32"]
        _, out, _ = run("train", recipe, *arguments, "--print-config")
        flags = ["--model", "resnet32", "--epochs", "3", "--lr", "0.7"]  # recipes depend on the network
        assert out == run("train", recipe, *flags, "--print-config")[1]


def test_file_for_another_recipe_than_the_given_one_is_refused(run, tmp_path):
    (tmp_path / "config.toml").write_text('recipe = "best"')
    code, _, err = run("train", "fast", "--config", tmp_path / "config.toml", "--print-config")
    assert code == 2
    assert one_or_two_lines(err)
    assert f"{tmp_path / 'config.toml'} is for recipe best, not fast" in err
    (tmp_path / "config.toml").write_text('recipe = "bets"')
    code, _, err = run("train", "--config", tmp_path / "config.toml", "--print-config")
    assert code == 2
    assert "did you mean 'best'" in err


def test_file_of_all_settings_keeps_its_values_that_are_none(run, tmp_path):
    """TOML has no None, so such settings are not in it; the recipe has values for them."""
    for recipe, option in (("best", "--norm-lr"), ("paper", "--iterations")):
        _, out, _ = run("train", recipe, option, "None", "--print-config")
        assert option[2:].replace("-", "_") not in out
        (tmp_path / "config.toml").write_text(out)
        assert run("train", "--config", tmp_path / "config.toml", "--print-config") == (0, out, "")


@pytest.mark.parametrize("other", [["--dry-run"], ["--print-config"], []], ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,a"], "--seeds 0,a: give numbers and ranges"),
        (["--seeds", "1,1"], "--seeds 1,1 names a seed twice"),
        (["--seeds", "0-1", "--seed", "1"], "--seeds cannot be combined with --seed"),
        (["--per-gpu", "0", "--seeds", "1"], "--per-gpu 0 is not in 1.."),
        (["--find-lr", "rates.bmp"], "ends in .png or .svg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_are_checked_whatever_the_command_does_with_them(run, arguments, message, other):
    code, _, err = run("train", "smoke", "--data", "shapes10", *arguments, *other)
    assert code == 2
    assert message in err


# --- output whose reader has ended, and warnings --------------------------------------------------------------------


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("command", [["--help"], ["summary", "--model", "resnet20"]], ids=" ".join)
def test_command_ends_silently_with_the_reader_of_its_output(command):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastresnet", *command]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("command", [["--help"], ["summary", "--model", "resnet20"]], ids=" ".join)
def test_full_disk_of_the_output_is_named(command):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastresnet", *command]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    message = "fastresnet: cannot read or write standard output: No space left on device.\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.usefixtures("quick_processes")
def test_error_has_its_exit_code_where_nobody_reads_it():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastresnet", "trian"]
    assert subprocess.run(command, stdout=writing, stderr=writing, check=False).returncode == 2
    os.close(writing)


def test_note_stays_a_note_where_warnings_are_errors(run, recwarn):
    """As with PYTHONWARNINGS=error; preparing again has nothing to read, and says so in a note."""
    warnings.simplefilter("error")
    code, out, err = run("prepare", "--data", "shapes10")
    assert code == 0
    assert "already prepared" in out
    assert err.startswith("fastresnet: note: nothing was read or drawn")


def test_warning_of_a_library_that_is_an_error_ends_in_words(capsys):
    def command(_):
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert terminal.guarded(command, []) == 1
    assert capsys.readouterr().err == "fastresnet: DeprecationWarning, an error by PYTHONWARNINGS or -W: old\n"


def test_command_named_for_a_custom_data_set_prepares_it(run, tmp_path):
    for split, name in (("train", "rose"), ("train", "tulip"), ("test", "rose"), ("test", "tulip")):
        (tmp_path / "images" / split / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / split / name / "a.png")
    arguments = ("--data", "flowers", "--root", tmp_path, "--out", tmp_path / "run")
    for what in ("Prepare it", "Prepare it again"):
        code, _, err = run("train", "smoke", *arguments)
        assert code == 3
        remedy = err.partition(f"{what}: ")[2]
        assert run(*remedy.replace("PATH", str(tmp_path / "images")).split()[1:])[0] == 0
        (tmp_path / "flowers" / "test_labels.npy").write_bytes(b"")


def test_the_help_of_summary_does_not_load_torch():
    program = (
        "import sys\nfrom fastresnet import cli\n"
        "try: cli.main(['summary', '--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "resnet20" in done.stdout


REIMPORT = """
import runpy, sys
for name in list(sys.modules):
    if name.partition(".")[0] in ("fastresnet", "pipelines", "torchvision", "sitecustomize"):
        del sys.modules[name]
import sitecustomize
runpy.run_module("fastresnet", run_name="__main__")
"""


def test_training_needs_no_torchvision(python, data_root, tmp_path, without_torchvision):
    """The process has imported PyTorch already; it imports this program again."""
    arguments = ["train", "smoke", "--data", "shapes10", "--root", data_root, "--iterations", "1", "--batch-size", "16"]
    command = [python, "-c", REIMPORT, *map(str, arguments), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=without_torchvision, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    environment = json.loads((tmp_path / "run" / "summary.json").read_text())["environment"]
    assert environment["versions"].get("torchvision") is None
    assert environment["versions"]["torch"]


@pytest.mark.parametrize("arguments", [["--epochs", "x"], ["foo", "bar"], ["--epochs"]])
def test_help_of_train_is_printed_whatever_values_are_wrong(run, arguments):
    code, out, err = run("train", *arguments, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: fastresnet train [RECIPE] [OPTIONS]")
