"""Commands in the documents: each is run as written there, on a small data set.

Trainings end after two steps, batches have 8 images, seeds are two, and 5,000 held-out images are 50. Benchmarks,
which take minutes, are only parsed; tests/benchmarks runs them. Commands that begin with docker, torchrun, make,
srun or python -m are not run here: they need Docker, GPUs or SLURM, or run these tests.
"""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.__main__ import COMMANDS
from fastresnet import cli, models
from fastresnet.arguments import parse
from fastresnet.models import create_model
from pipelines.cifar import CIFAR10_CLASSES
from pipelines.prepare import prepare
from pipelines.store import RawData, write_store

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md",
    *sorted(f"docs/{file.name}" for file in (PROJECT / "docs").glob("*.md")),
]  # fmt: skip


def commands_in(document):
    text = (PROJECT / document).read_text()
    lines = re.findall(r"^    (fastresnet [^\n]*)$", text, re.MULTILINE)
    return [re.split(r"\s+#", line)[0].strip() for line in lines]


COMMAND_LINES = list(dict.fromkeys(line for document in DOCUMENTS for line in commands_in(document)))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Folder as the documents expect it: CIFAR-10 and CIFAR-100 (drawn images of these names), runs, weights."""
    place = tmp_path_factory.mktemp("workspace")
    drawn, _ = prepare("shapes10", place / "data", lambda *_: None, train_images=300, test_images=40)
    train, test = drawn.train, drawn.test
    data = RawData(CIFAR10_CLASSES, *(np.array(a) for a in (train.images, train.labels, test.images, test.labels)))
    write_store(place / "data" / "cifar10", data, source="drawn", version="0")
    hundred = dataclasses.replace(data, classes=tuple(map(str, range(100))))
    write_store(place / "data" / "cifar100", hundred, source="drawn", version="0")
    prepare("cifar10", place / "data", lambda *_: None, formats=("jpeg",))  # so that every command works by itself
    for split, rows in (("train", 200), ("test", 20)):
        for row in range(rows):
            folder = place / "path/to/flowers" / split / ("rose", "tulip")[row % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.train_images[row]).save(folder / f"{row}.png")
    prepare("flowers", place / "data", lambda *_: None, source=place / "path/to/flowers")
    (place / "cifar-10-python.tar.gz").touch()  # not read, as CIFAR-10 is prepared
    (place / "path/to/images").mkdir()
    Image.fromarray(data.test_images[0]).save(place / "path/to/images/a.png")
    Image.fromarray(data.test_images[1]).resize((64, 48)).save(place / "photo.jpg")
    torch.save({"state_dict": create_model("resnet20", shortcut="A").state_dict()}, place / "resnet20-12fca82f.th")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("FASTRESNET_DATA", raising=False)
        for name in ("NAME", "OTHER"):
            assert cli.main(["train", "smoke", "--iterations", "2", "--out", f"runs/{name}"]) == 0
    return place


def shortened(arguments):
    """Return `arguments` of a command, changed to take less time."""
    arguments = [{"0-9": "0-1", "5000": "50"}.get(argument, argument) for argument in arguments]
    if arguments[0] == "train":
        arguments += ["--batch-size", "8"] if "--batch-size" not in arguments else []
        arguments += ["--compile", "off"] if "--dry-run" in arguments else ["--iterations", "2"]
    return arguments


def remove_runs(workspace):
    """Remove the runs of earlier commands, whose names the next commands would use."""
    for path in (workspace / "runs").iterdir():
        if path.is_file():
            path.unlink()  # the summary of several seeds
        elif path.name not in ("NAME", "OTHER"):
            shutil.rmtree(path)


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_in_a_document_works(workspace, monkeypatch, capsys, line):
    monkeypatch.chdir(workspace)
    monkeypatch.delenv("FASTRESNET_DATA", raising=False)
    monkeypatch.delenv("FASTRESNET_RUNS", raising=False)
    _, name, *rest = shlex.split(line)
    if name == "bench":
        benchmark, *options = rest
        settings, _ = COMMANDS[benchmark]
        parse(settings, f"bench {benchmark}", options)
        return
    if name == "train":
        if "jpeg" in rest:
            pytest.importorskip("nvidia.dali")
        for model in () if "--init-from" in rest else ("resnet20", "resnet56"):
            monkeypatch.setitem(models.MODELS, model, dataclasses.replace(models.MODELS[model], depth=8))
        if "--resume" not in rest:
            remove_runs(workspace)
    if name == "export":
        pytest.importorskip("huggingface_hub" if "hub" in rest else "onnxruntime")
    if "--serve" in rest:
        rest[rest.index("--serve") + 1] = "0"  # the port may be in use
        monkeypatch.setattr("fastresnet.live.LiveServer.serve_forever", lambda _: None)
    code = cli.main(shortened([name, *rest]))
    out, err = capsys.readouterr()
    assert code == 0 or (name == "doctor" and code == 1), err
    assert out
    assert "Traceback" not in err


def test_cli_document_covers_every_command():
    assert {line.split()[1] for line in commands_in("docs/cli.md")} == {*cli.COMMANDS} - {"help", "version"}


def anchors_in(text):
    """Return the anchors that GitHub gives the headings of `text`."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_resolve(document):
    text = (PROJECT / document).read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (PROJECT / document).parent / name if name else PROJECT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors_in(path.read_text()), target
