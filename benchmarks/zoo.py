"""usage: python -m benchmarks.zoo

Write `fastresnet/zoo.json`, the figures of `fastresnet list`: the costs of all networks, and the accuracies of recipes
from `benchmarks/results/accuracy`. Then `python -m benchmarks.tables docs/models.md` makes its tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from benchmarks.accuracy import Summary, read_summaries
from fastresnet.models import MODELS, create_model
from fastresnet.recipes import RECIPES, create_config
from fastresnet.zoo import ZOO
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


def main(arguments: list[str]) -> int:
    if arguments:
        print(__doc__, end="")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    write_json(ZOO, {"networks": {name: costs(name) for name in MODELS}, "recipes": accuracies(read_summaries())})
    return 0


if __name__ == "__main__":
    from fastresnet.terminal import guarded

    sys.exit(guarded(main, sys.argv[1:]))
