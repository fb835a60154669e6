"""Notebooks: they run, and are saved with their outputs, small and without images of CIFAR-10."""

import base64
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastresnet.pretrained import pretrained_card
from pipelines.cifar import CIFAR10_CLASSES
from pipelines.prepare import prepare
from pipelines.store import RawData, write_store

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NAMES = ("resnet", "cifar10")
NOT_SAVED = "skip-execution"
"""Tag of cells that `jupyter execute` leaves out: they show images of CIFAR-10."""
SMALLER = {
    "train_images=2000, test_images=500": "train_images=64, test_images=30",
    "epochs=3": "epochs=1",
    "torch.randn(64, 3, 32, 32)": "torch.randn(8, 3, 32, 32)",
    "torch.randint(0, 10, (64,))": "torch.randint(0, 10, (8,))",
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def executed(notebook, monkeypatch):
    """Run all cells, in a process that imports this project."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", skip_cells_with_tag="").execute()
    return code_cells(notebook)


def texts(cell):
    """What a cell prints, and its value."""
    values = [output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(output.get("text", "") for output in cell.outputs) + "".join(values)


def pictures(cell):
    data = [output.get("data", {}) for output in cell.outputs]
    return [base64.b64decode(content["image/png"]) for content in data if "image/png" in content]


def kinds(cell):
    """The kinds of its outputs: stdout, stderr, values and pictures."""
    found = {output.get("name", output.output_type) for output in cell.outputs}
    return found | {"picture"} if pictures(cell) else found


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_saved_with_small_outputs(name):
    cells = code_cells(read(name))
    for cell in cells:
        assert bool(cell.outputs) != (NOT_SAVED in cell.metadata.get("tags", []))
        assert not re.search(r"(^|[\s'\"(])/\w+/", texts(cell))  # a path of the machine
        assert all(len(picture) < 150_000 for picture in pictures(cell))
    numbers = [cell.execution_count for cell in cells if cell.outputs]
    assert numbers == list(range(1, 1 + len(numbers)))  # all of one run, from the top


def test_no_image_of_cifar10_is_saved():
    for cell in code_cells(read("cifar10")):
        shows_images = re.search(r"\.mistakes\(\)|saliency_grid\(|image_grid\(dataset", cell.source)
        assert bool(shows_images) == (NOT_SAVED in cell.metadata.get("tags", []))


def test_the_saved_accuracy_is_that_of_the_card():
    card = pretrained_card("resnet20")
    assert f"{card.test_accuracy:.2f} % of 10,000 test images\n" in "".join(map(texts, code_cells(read("cifar10"))))


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("size", ["smaller", pytest.param("full", marks=pytest.mark.slow)])
def test_the_notebook_on_shortcuts_gives_its_saved_outputs(monkeypatch, size):
    """The same texts, accuracies aside. At full size, the residual network is more accurate than the plain one."""
    notebook = read("resnet")
    for whole, part in SMALLER.items() if size == "smaller" else ():
        assert sum(whole in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(whole, part)
    cells = executed(notebook, monkeypatch)
    accuracy = r"[\d.]+ %"
    for cell, saved in zip(cells, code_cells(read("resnet")), strict=True):
        assert kinds(cell) == kinds(saved)
        assert re.sub(accuracy, "", texts(cell)) == re.sub(accuracy, "", texts(saved))
    if size == "full":
        (found,) = (text for text in map(texts, cells) if "'resnet32'" in text)
        plain, residual = (float(text.removesuffix(" %")) for text in re.findall(accuracy, found))
        assert residual > 90
        assert residual > plain + 10


@pytest.fixture
def some_images(cifar10_archive, tmp_path):
    """A data root with 500 images of CIFAR-10 to train on and 500 to test on, of its first training batch."""
    with tarfile.open(cifar10_archive) as archive:
        member = next(member for member in archive if "data_batch" in member.name)
        batch = pickle.load(archive.extractfile(member), encoding="latin1")
    images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.array(batch["labels"])
    parts = images[:500], labels[:500], images[500:1000], labels[500:1000]
    write_store(tmp_path / "cifar10", RawData(CIFAR10_CLASSES, *parts), source="a part", version="0")
    return tmp_path


@pytest.fixture
def all_images(cifar10_archive, tmp_path):
    prepare("cifar10", tmp_path, lambda *_: None, source=cifar10_archive)
    return tmp_path


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("images", ["some_images", pytest.param("all_images", marks=pytest.mark.slow)])
def test_the_notebook_on_cifar10_runs(request, monkeypatch, images):
    """Every cell runs, those with images too, and has the kinds of outputs that are saved."""
    monkeypatch.setenv("FASTRESNET_DATA", str(request.getfixturevalue(images)))
    cells = executed(read("cifar10"), monkeypatch)
    for cell, saved in zip(cells, code_cells(read("cifar10")), strict=True):
        assert kinds(cell) == (kinds(saved) or {"execute_result", "picture"})
        if images == "all_images":
            assert not saved.outputs or re.sub(r"\d", "", texts(cell)) == re.sub(r"\d", "", texts(saved))
