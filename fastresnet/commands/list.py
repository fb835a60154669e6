"""`fastresnet list`: names that other commands take, with figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastresnet.arguments import JsonFile, Positional, parse
from fastresnet.models import MODELS
from fastresnet.pretrained import PREFIX, list_pretrained, pretrained_card, pretrained_file
from fastresnet.recipes import RECIPES, create_config
from fastresnet.seeds import mean_and_spread
from fastresnet.terminal import check_json, print_table, write_figures
from fastresnet.text import as_utf8
from fastresnet.zoo import read_zoo
from pipelines.cifar import CIFARS
from pipelines.errors import UsageError, check_choice, note
from pipelines.prepare import data_root
from pipelines.store import BUILT_IN, are_class_names, prepare_again_command
from pipelines.texts import read_json

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """List networks, recipes, data sets and pretrained networks: the names that other commands take."""

    kind: Positional[str | None] = None
    """models, recipes, data or pretrained, with figures. Without it: the names of all four."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    json: JsonFile = None
    """Write names and figures to FILE (.json), or print them as JSON."""

    def __post_init__(self) -> None:
        check_json(self.json)
        if self.kind is not None:
            check_choice("list", self.kind, LISTS)
        if self.root is not None and self.kind not in (None, "data"):
            raise UsageError(f"--root {self.root} is where data sets are, not {self.kind}. Leave it out.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "list", arguments)
    lists = LISTS if options.kind is None else {options.kind: LISTS[options.kind]}
    found = {kind: of_kind.entries(data_root(options.root)) for kind, of_kind in lists.items()}
    if write_figures(options.json, {"schema": 1, **found}):
        return 0
    if options.kind is None:
        _print_names(found)
    else:
        shown = lists[options.kind]
        print_table(shown.title, [shown.line(entry) for entry in found[options.kind]], shown.header, shown.texts)
        if options.kind == "recipes":
            _print_entries({entry["name"]: entry["about"] for entry in found["recipes"]})
    return 0


def _print_entries(texts: dict[str, str]) -> None:
    """Print a line for each name and its text."""
    from rich.table import Table

    from fastresnet.console import PlainConsole

    for name, text in texts.items():
        line = Table.grid(padding=(0, 1))
        line.add_column(width=max(map(len, texts)))
        line.add_row(name, text)
        PlainConsole().print_table(line)


def _print_names(found: dict[str, list[Entry]]) -> None:
    _print_entries({kind: ", ".join(entry["name"] for entry in entries) for kind, entries in found.items()})
    *others, last = list(found)
    print(f"For figures: fastresnet list {', '.join(others)} or {last}")


@dataclasses.dataclass(frozen=True, slots=True)
class _List:
    """One of the lists, and its table."""

    title: str
    header: tuple[str, ...]
    texts: int
    """Number of columns that are not figures."""
    entries: Callable[[Path], list[Entry]]
    """Function from the folder of all data sets to names and figures, in JSON types."""
    line: Callable[[Entry], tuple[str, ...]]
    """Function that formats an entry."""


def _models(_: Path) -> list[Entry]:
    costs = read_zoo()["networks"]
    return [{"name": name, "depth": spec.depth, **costs[name]} for name, spec in MODELS.items()]


def _recipes(_: Path) -> list[Entry]:
    accuracies, entries = read_zoo()["recipes"], []
    for name, recipe in RECIPES.items():
        config = create_config(name)
        length = {"iterations": config.iterations} if config.iterations else {"epochs": config.epochs}
        about = (recipe.__doc__ or "").partition("\n")[0].replace("`", "").removesuffix(".")
        entries.append(
            {"name": name, "about": about, "model": config.model, **length, "test_accuracy": accuracies[name]}
        )
    return entries


def _recipe_line(entry: Entry) -> tuple[str, ...]:
    (unit,) = entry.keys() & {"iterations", "epochs"}
    length = f"{entry[unit]:,} {unit}" if entry[unit] > 1 else "1 epoch"
    accuracy, seeds = entry["test_accuracy"], len(entry["test_accuracy"])
    measured = (f"{mean_and_spread(accuracy)} %", str(seeds)) if seeds else ("not measured", "–")
    return (entry["name"], entry["model"], length, *measured)


def _data(root: Path) -> list[Entry]:
    """List the built-in data sets, and all that are prepared in `root`; their files are not verified.

    A `Note` names a damaged one, which is left out.
    """
    found: dict[str, Entry] = {name: {"name": name, "folder": None} for name in BUILT_IN}
    for file in sorted(root.glob("*/meta.json")):
        try:
            counts = _counts(read_json(file))
        except (OSError, ValueError, KeyError, TypeError):
            note(f"{file} is damaged, and left out. Prepare it again: {prepare_again_command(file.parent)}")
            continue
        name, folder = (as_utf8(str(text)) for text in (file.parent.name, file.parent.absolute()))
        found[name] = {"name": name, "folder": folder, **counts}
    return list(found.values())


def _counts(meta: Any) -> Entry:
    """Return the numbers of images and classes in a meta.json. Raises `ValueError` or the like if it has none."""
    train, test, classes = meta["counts"]["train"], meta["counts"]["test"], meta["classes"]
    if type(train) is not int or type(test) is not int or not are_class_names(classes):
        raise ValueError
    return {"train_images": train, "test_images": test, "classes": len(classes)}


def _data_line(entry: Entry) -> tuple[str, ...]:
    name = entry["name"]
    if entry["folder"] is None:
        how = (
            f"downloaded on first use, {CIFARS[name].archive.size / 1e6:.0f} MB"
            if name in CIFARS
            else "drawn on first use"
        )
        return (name, how, "–", "–", "–")
    return (name, entry["folder"], *(f"{entry[key]:,}" for key in ("train_images", "test_images", "classes")))


def _pretrained(_: Path) -> list[Entry]:
    costs = read_zoo()["networks"]
    return [
        {
            "name": name,
            **dataclasses.asdict(card := pretrained_card(name)),
            "parameters": costs[card.model]["parameters"],
            "bytes": pretrained_file(name).stat().st_size,
        }
        for name in list_pretrained()
    ]


LISTS = {
    "models": _List(
        "networks, for --model; parameters and multiply-adds with shortcut B and 10 classes",
        ("network", "depth", "parameters", "multiply-adds"),
        1,
        _models,
        lambda entry: (entry["name"], str(entry["depth"]), f"{entry['parameters']:,}", f"{entry['macs']:,}"),
    ),
    "recipes": _List(
        "recipes, for train; accuracy on CIFAR-10, last epoch, single view",
        ("recipe", "network", "length", "test accuracy", "seeds"),
        2,
        _recipes,
        _recipe_line,
    ),
    "data": _List(
        "data sets, for --data",
        ("data set", "where", "training images", "test images", "classes"),
        2,
        _data,
        _data_line,
    ),
    "pretrained": _List(
        f"pretrained networks, for eval {PREFIX}NAME; accuracy on CIFAR-10, single view",
        ("name", "network", "recipe", "test accuracy", "parameters", "size", "SHA-256"),
        3,
        _pretrained,
        lambda entry: (
            *(entry[key] for key in ("name", "model", "recipe")),
            f"{entry['test_accuracy']:.2f} %",
            f"{entry['parameters']:,}",
            f"{entry['bytes'] / 1e6:.1f} MB",
            entry["sha256"][:12],
        ),
    ),
}
"""Lists by their names."""
