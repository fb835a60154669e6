"""usage: python -m benchmarks.zoo

Write `fastresnet/zoo.json`, the figures of `fastresnet list`: the costs of all networks, and the accuracies of recipes
from `benchmarks/results/accuracy`. Then `python -m benchmarks.tables docs/models.md` makes its tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from benchmarks.accuracy import Summary, read_summaries
from benchmarks.report import markdown_table
from fastresnet.models import MODELS, create_model
from fastresnet.pretrained import list_pretrained, pretrained_card, pretrained_file
from fastresnet.recipes import RECIPES, create_config
from fastresnet.seeds import format_accuracy
from fastresnet.zoo import ZOO, read_zoo
from pipelines.files import write_json


def costs(model: str) -> dict[str, int]:
    """Count the parameters of network `model`, and its multiply-adds for one image."""
    import torch

    from fastresnet.models.summary import layers

    with torch.device("meta"):
        found = layers(create_model(model))
    return {"parameters": sum(layer.parameters for layer in found), "macs": sum(layer.macs for layer in found)}


def accuracies(summaries: Iterable[Summary]) -> dict[str, list[float]]:
    """Return the accuracies of each recipe's runs with its default network, in the order of their seeds."""
    found: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    for run in sorted(summaries, key=lambda run: run["seed"]):
        if run["model"] == create_config(run["recipe"]).model:
            found[run["recipe"]].append(run["test_accuracy"])
    return found


def networks_table() -> str:
    """Format all networks as Markdown: costs, and the accuracies of each recipe's runs."""
    runs: dict[str, dict[str, list[Summary]]] = {model: {recipe: [] for recipe in RECIPES} for model in MODELS}
    for run in read_summaries():
        runs[run["model"]][run["recipe"]].append(run)
    lines = []
    for model, cost in read_zoo()["networks"].items():
        millions = (f"{cost['parameters'] / 1e6:,.2f}", f"{cost['macs'] / 1e6:,.1f}")
        measured = ", ".join(_accuracy(recipe, of_recipe) for recipe, of_recipe in runs[model].items() if of_recipe)
        lines.append([f"`{model}`", *millions, measured or "not run"])
    return markdown_table(["network", "million parameters", "million multiply-adds", "test accuracy"], lines)


def _accuracy(recipe: str, runs: list[Summary]) -> str:
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    return f"`{recipe}` {format_accuracy(runs, 'test_accuracy')} ({seeds})"


def pretrained_table() -> str:
    """Format all pretrained networks as Markdown: training, accuracies, size and SHA-256."""
    head = ["name", "recipe", "seed", "single view", "flip TTA", "shift TTA", "size", "SHA-256"]
    lines = []
    for name in list_pretrained():
        card, size = pretrained_card(name), pretrained_file(name).stat().st_size
        accuracies = (card.test_accuracy, card.test_accuracy_mirror, card.test_accuracy_shift)
        training, percent = (f"`{card.recipe}`", str(card.seed)), (f"{accuracy:.2f} %" for accuracy in accuracies)
        lines.append([f"`{name}`", *training, *percent, f"{size / 1e6:.1f} MB", f"`{card.sha256}`"])
    return markdown_table(head, lines)


TABLES = {"networks": networks_table, "pretrained": pretrained_table}
"""Tables by their names in a Markdown file."""


def main(arguments: list[str]) -> int:
    if arguments:
        print(__doc__, end="")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    write_json(ZOO, {"networks": {name: costs(name) for name in MODELS}, "recipes": accuracies(read_summaries())})
    return 0


if __name__ == "__main__":
    from fastresnet.terminal import guarded

    sys.exit(guarded(main, sys.argv[1:]))
