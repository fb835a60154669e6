"""The examples and the Python code of the documents run as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(arguments, data_root, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTRESNET_DATA": str(data_root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(("example", "library"), [("plain_pytorch.py", "torch"), ("lightning_module.py", "lightning")])
def test_an_example_trains_and_prints_an_accuracy(example, library, data_root, tmp_path):
    pytest.importorskip(library)
    done = start([ROOT / "examples" / example, "shapes10", 1], data_root, tmp_path)
    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(r"test accuracy (\d+\.\d\d) %", done.stdout)
    assert 0 <= float(accuracy) <= 100
    assert list(tmp_path.iterdir()) == []


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
