"""Programs in examples/, and the Python code of the documents, on small data."""

import ast
import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastresnet
from fastresnet import models
from fastresnet.config import from_toml
from fastresnet.run_folder import read_run
from fastresnet.training import trials
from pipelines.prepare import prepare

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def start(arguments, data_root, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTRESNET_DATA": str(data_root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


pytestmark = pytest.mark.usefixtures("quick_processes")


@pytest.mark.parametrize(("example", "library"), [("plain_pytorch.py", "torch"), ("lightning_module.py", "lightning")])
def test_an_example_trains_and_prints_an_accuracy(example, library, data_root, tmp_path):
    pytest.importorskip(library)
    done = start([EXAMPLES / example, "shapes10", 1], data_root, tmp_path)
    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(r"test accuracy (\d+\.\d\d) %", done.stdout)
    assert 0 <= float(accuracy) <= 100
    assert list(tmp_path.iterdir()) == []


def test_the_minimal_example_takes_the_steps_of_the_program(data_root, tmp_path, monkeypatch):
    """Bit for bit: it has the same initial weights, the same batches, and PyTorch's operators in the same order."""
    monkeypatch.setenv("FASTRESNET_DATA", str(data_root))
    threads, batches = torch.get_num_threads(), {"epochs": 3, "batch_size": 32}
    torch.set_num_threads(1)
    try:
        losses, accuracy = runpy.run_path(str(EXAMPLES / "minimal.py"))["train"]("shapes10", **batches)
    finally:
        torch.set_num_threads(threads)
    same = {"shortcut": "A", "kernels": "torch", "precision": "bf16", "compile": "off", "threads": 1, "device": "auto"}
    run = fastresnet.train("baseline", data="shapes10", out=tmp_path / "run", quiet=True, **batches, **same)
    assert losses == [row["train_loss"] for row in run.rows]
    assert len(set(losses)) == 3
    assert accuracy == run.rows[-1]["test_accuracy"]


def test_the_minimal_example_needs_only_torch_numpy_and_the_pipelines():
    code = ast.parse((EXAMPLES / "minimal.py").read_text())
    imports = [node for node in ast.walk(code) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert packages == {"torch", "pipelines"}


def test_the_code_of_the_page_on_python_runs_in_order(data_root, tmp_path):
    """On the drawn images, for one epoch, on the CPU."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    code = "import shutil, torch\nimport numpy as np\n" + "\n".join(blocks)
    assert code.count("import fastresnet") == 1
    for whole, part in {
        'load_dataset("cifar10")': 'load_dataset("shapes10")',
        'device="cuda"': 'device="cpu"',
        "epochs=10": "epochs=1",
        "epochs=5": "epochs=1",
        '"resnet32"': '"resnet20"',
        "/backup": str(tmp_path),
    }.items():
        assert whole in code
        code = code.replace(whole, part)
    prelude = """
import fastresnet
_train, _evaluate = fastresnet.train, fastresnet.evaluate
count = 0
def train(recipe, **settings):
    global count
    count += 1
    settings = {"data": "shapes10", "out": f"runs/{count}", "batch_size": 64, "quiet": True, "epochs": 1, **settings}
    return _train(recipe, **settings)
fastresnet.train = train
fastresnet.evaluate = lambda weights, **options: _evaluate(weights, data="shapes10", **options)
train_images, train_labels = np.zeros((64, 32, 32, 3), np.uint8), np.arange(64) % 2
test_images, test_labels, epochs = train_images, train_labels, 1
def train_step(images, labels):
    assert images.shape == (128, 3, 32, 32) and labels.shape == (128,)
"""
    imports, _, rest = code.partition("import fastresnet\n")
    script = tmp_path / "page.py"
    script.write_text(imports + prelude + rest + '\nassert run.summary["data"] == "mine"\n')
    done = start([script], data_root, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "last.ckpt").exists()


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """`sweep(trials=2)` runs examples/sweep.py in `tmp_path`, with two steps an epoch, and an LR range test of 25."""
    pytest.importorskip("optuna")
    prepare("shapes10", tmp_path / "data", lambda *_: None, train_images=360, test_images=20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTRESNET_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # nothing is tried
    monkeypatch.setitem(models.MODELS, "resnet20", dataclasses.replace(models.MODELS["resnet20"], depth=8))
    monkeypatch.setattr(trials, "STEPS", 25)
    main = runpy.run_path(str(EXAMPLES / "sweep.py"))["main"]
    return lambda **options: main(data="shapes10", val_split=100, epochs=2, **options)


def test_a_sweep_continues_and_names_the_settings_of_its_best_trial(run, sweep, tmp_path, capsys):
    sweep(trials=2)
    assert "trial 1: " in capsys.readouterr().out
    sweep(trials=3)
    out = capsys.readouterr().out
    assert re.findall(r"^trial \d+", out, re.MULTILINE) == ["trial 2"]
    folder = tmp_path / "runs" / "sweep-fast-shapes10-val100-epochs2"
    runs = [read_run(folder / f"trial{number}") for number in range(3)]
    own, *others = (from_toml(one.folder / "config.toml") for one in runs)
    assert (own.lr, own.sgd_lr, own.norm_lr, own.weight_decay, own.label_smoothing) == (0.05, 0.03, 3.0, 5e-4, 0.1)
    assert all(config.norm_lr / config.lr == pytest.approx(60, rel=0.01) for config in others)
    assert {(config.val_split, config.epochs) for config in (own, *others)} == {(100, 2)}
    accuracies = [one.rows[-1]["val_accuracy"] for one in runs]
    assert re.search(r"held-out images:\n *([\d.]+) %", out)[1] == f"{max(accuracies):.2f}"

    _, *arguments = shlex.split(out.splitlines()[-1])
    assert arguments[-2:] == ["--seeds", "0-4"]
    code, printed, _ = run(*arguments, "--print-config")
    assert code == 0
    best = from_toml(runs[accuracies.index(max(accuracies))].folder / "config.toml")
    for name in ("lr", "sgd_lr", "norm_lr", "weight_decay", "label_smoothing"):
        assert f"{name} = {json.dumps(getattr(best, name))}\n" in printed
    assert "epochs = 20\n" in printed


def test_a_sweep_stops_bad_runs_early(sweep, tmp_path, monkeypatch, capsys):
    import optuna

    class AllButTheFirst(optuna.pruners.NopPruner):
        def prune(self, study, trial):
            return trial.number > 0

    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: AllButTheFirst())
    sweep(trials=2)
    out = capsys.readouterr().out
    assert re.search(r"^trial 1: [\d.]+ % \(stopped early\)", out, re.MULTILINE)
    folder = tmp_path / "runs" / "sweep-fast-shapes10-val100-epochs2"
    assert [len(read_run(folder / f"trial{number}").rows) for number in range(2)] == [2, 1]
    assert "  trial 0 " in out
    assert "  trial 1 " not in out
