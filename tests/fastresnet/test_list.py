"""Lists of names, with figures."""

import hashlib
import json
import shutil

import pytest

from fastresnet.models import list_models
from fastresnet.pretrained import list_pretrained, load_pretrained, pretrained_card, pretrained_file
from fastresnet.recipes import RECIPES, create_config
from fastresnet.zoo import read_zoo

NAMES = {
    "models": list_models(),
    "recipes": list(RECIPES),
    "data": ["cifar10", "cifar100", "shapes10"],
    "pretrained": list_pretrained(),
}


def test_without_a_word_all_names_are_listed(run, tmp_path):
    code, out, err = run("list", "--json", tmp_path / "all.json")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in out.splitlines()}
    assert {kind: lines[kind].split(", ") for kind in NAMES} == NAMES
    written = json.loads((tmp_path / "all.json").read_text())
    assert written.pop("schema") == 1
    assert {kind: [entry["name"] for entry in entries] for kind, entries in written.items()} == NAMES


@pytest.mark.parametrize("kind", NAMES)
def test_a_list_has_a_line_for_each_name(run, tmp_path, kind):
    code, out, err = run("list", kind, "--json", tmp_path / "list.json")
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│")] == NAMES[kind]
    assert json.loads((tmp_path / "list.json").read_text()).keys() == {"schema", kind}


def test_models_have_their_published_size(run):
    """He et al. 2015 count 0.85 million parameters in ResNet-56, and 1.7 million in ResNet-110."""
    _, out, _ = run("list", "models")
    (line,) = [line for line in out.splitlines() if " resnet56 " in line]
    assert line.strip("│ ").replace(" ", "").split("│") == ["resnet56", "56", "855,770", "125,747,840"]
    assert read_zoo()["networks"].keys() == set(list_models())


def test_recipes_have_their_length_and_measured_accuracy(run):
    _, out, _ = run("list", "recipes")
    cells = {line.split()[1]: [cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line}
    length = {name: row[3] for name, row in cells.items()}
    assert (length["fast"], length["paper"], length["smoke"]) == ("20 epochs", "64,000 iterations", "1 epoch")
    assert cells["smoke"][4:6] == ["not measured", "–"]
    assert cells["speedrun"][2] == create_config("speedrun").model


def test_data_sets_are_the_built_in_ones_and_all_in_the_folder(run, tmp_path, dataset):
    root = tmp_path / "root"
    for name in ("mine", "shapes10"):
        shutil.copytree(dataset.folder, root / name)
    code, out, err = run("list", "data", "--root", root)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[0] == "│"]
    assert rows == [
        ["cifar10", "downloaded on first use, 170 MB", "–", "–", "–"],
        ["cifar100", "downloaded on first use, 169 MB", "–", "–", "–"],
        ["shapes10", str(root / "shapes10"), "171", "50", "10"],
        ["mine", str(root / "mine"), "171", "50", "10"],
    ]


@pytest.mark.parametrize(
    "meta",
    [
        "",
        "[]",
        "{}",
        '{"classes": ["a"], "counts": {"train": 1e400, "test": 1}}',
        '{"classes": "ab", "counts": {"train": 1, "test": 1}}',
        '{"classes": ["a"], "counts": [1, 1]}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_a_damaged_data_set_is_left_out_with_a_note(run, tmp_path, meta):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "meta.json").write_text(meta)
    code, out, err = run("list", "data", "--root", tmp_path)
    assert code == 0
    assert "mine" not in out
    (line,) = err.splitlines()
    assert f"note: {tmp_path / 'mine' / 'meta.json'} is damaged, and left out. Prepare it again: fastresnet" in line


@pytest.mark.parametrize("name", list_pretrained())
def test_pretrained_networks_have_the_figures_of_their_file(run, tmp_path, name):
    run("list", "pretrained", "--json", tmp_path / "list.json")
    (entry,) = [each for each in json.loads((tmp_path / "list.json").read_text())["pretrained"] if each["name"] == name]
    content = pretrained_file(name).read_bytes()
    assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert entry["parameters"] == sum(parameter.numel() for parameter in load_pretrained(name).parameters())
    assert (entry["recipe"], entry["test_accuracy"]) == (
        pretrained_card(name).recipe,
        pretrained_card(name).test_accuracy,
    )
