"""usage: python -m benchmarks.accuracy add RUN... | chart RECIPE FILE | publish RUN

`add` copies the summary and the curves of finished runs into `benchmarks/results/accuracy`. Then
`python -m benchmarks.tables` makes the tables of accuracy from them. `chart` plots the errors of plain networks beside
those of residual ones. `publish` makes the weights of a run, with their card, available to `load_pretrained`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table
from fastresnet.config import from_dict
from fastresnet.recipes import RECIPES, changed_settings
from fastresnet.seeds import format_accuracy, mean_and_spread
from pipelines.errors import DataError
from pipelines.files import sha256, write_bytes

RESULTS = Path(__file__).with_name("results") / "accuracy"

# Test error in percent: Table 6 of He et al. 2015 (the mean of ResNet-110's five runs is 6.61), and the READMEs of the
# two most used implementations.
PUBLISHED = {
    "resnet20": {"paper": 8.75, "chenyaofo": 7.40, "akamaster": 8.27},
    "resnet32": {"paper": 7.51, "chenyaofo": 6.47, "akamaster": 7.37},
    "resnet44": {"paper": 7.17, "chenyaofo": 5.99, "akamaster": 6.90},
    "resnet56": {"paper": 6.97, "chenyaofo": 5.63, "akamaster": 6.61},
    "resnet110": {"paper": 6.43, "akamaster": 6.32},
    "plain20": {},
    "plain56": {},
}
SOURCES = ("paper", "chenyaofo", "akamaster")

# Epochs, PFLOP, runs, and mean accuracy in percent in a single view and with shift TTA: from the README and the logs of
# fulcrumresearch/cifar-10-speedrun (e1; on 8,000 of the test images), hiverge/cifar10-speedrun and
# KellerJordan/cifar10-airbench. PFLOP are computed from their code, except for airbench94.py and airbench95.py.
PUBLISHED_SPEEDRUNS = {
    "cifar-10-speedrun, e1": ("8.9", "0.2245", 200, "–", "94.05 ± 0.15 %"),
    "cifar10-speedrun": ("7.65", "0.257", 200, "93.17 ± 0.17 %", "94.02 ± 0.13 %"),
    "airbench94_muon.py": ("8", "0.277", 200, "–", "94.01 %"),
    "airbench94.py": ("9.9", "0.36", 1000, "–", "94.01 %"),
    "airbench95.py": ("15", "1.39", 200, "–", "95.01 %"),
}

Summary = dict[str, Any]


def read_summaries(folder: Path = RESULTS) -> list[Summary]:
    """Read the `summary.json` of every run that counts: on CIFAR-10, with the current settings of its recipe.

    Raises `UsageError` on settings that no longer exist.
    """
    summaries = {str(path): json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return [summary for path, summary in summaries.items() if not _exclusion(summary, path)]


def _exclusion(summary: Summary, where: str) -> str:
    """Return the reason why a run does not count, or ""; `where` names its file."""
    if summary["data"] != "cifar10":
        return f"it was trained on {summary['data']}, not on cifar10"
    if "settings" not in summary:
        return "an older version wrote its summary.json, without the settings"
    changed = changed_settings(from_dict(summary["settings"], where))
    values = ", ".join(f"{name} = {value!r}" for name, value in changed.items())
    return values and f"it was trained with {values}, which are not the settings of recipe {summary['recipe']}"


def reproduction_table(summaries: Iterable[Summary]) -> str:
    """Format test errors as Markdown: a line for each network of the paper, a column for each source and recipe."""
    groups = _grouped(summaries)
    recipes = [recipe for recipe in RECIPES if recipe not in ("smoke", "speedrun")]  # those for the paper's networks
    head = ["network", *SOURCES, *(f"`{recipe}`" for recipe in recipes)]
    lines = []
    for model, published in PUBLISHED.items():
        cells = [f"{published[source]:.2f} %" if source in published else "–" for source in SOURCES]
        runs_of_recipes = [groups.get((recipe, model), []) for recipe in recipes]
        lines.append([model, *cells, *map(_error_cell, runs_of_recipes)])
    return markdown_table(head, lines)


def runs_table(summaries: Iterable[Summary]) -> str:
    """Format the runs as Markdown, a line for each recipe, network and device: accuracy, time and arithmetic."""
    head = [
        "recipe",
        "network",
        "epochs",
        "seeds",
        "test accuracy",
        "flip TTA",
        "shift TTA",
        "PFLOP",
        "minutes",
        "device",
    ]
    described = (
        _described(*key, list(runs))
        for key, group in _grouped(summaries).items()
        for _, runs in itertools.groupby(group, key=_device)
    )
    return markdown_table(head, [[cells[column] for column in head] for cells in described])


def speedrun_table(summaries: Iterable[Summary]) -> str:
    """Format the cost of 94 % as Markdown: published programs, and each network trained with `speedrun`."""
    head = ["", "epochs", "PFLOP", "runs", "single view", "flip TTA", "shift TTA"]
    lines = [
        [name, epochs, pflop, str(runs), single, "–", shift]
        for name, (epochs, pflop, runs, single, shift) in PUBLISHED_SPEEDRUNS.items()
    ]
    for (recipe, model), runs in _grouped(summaries).items():
        if recipe == "speedrun":
            cells = _described(recipe, model, runs)
            figures = [cells[column] for column in ("test accuracy", "flip TTA", "shift TTA")]
            lines.append([f"`speedrun`, {model}", cells["epochs"], cells["PFLOP"], str(len(runs)), *figures])
    return markdown_table(head, lines)


def _described(recipe: str, model: str, runs: list[Summary]) -> dict[str, str]:
    """Return cells by column. The device is that of the first run."""
    minutes = statistics.median(run["train_seconds"] for run in runs) / 60
    return {
        "recipe": f"`{recipe}`",
        "network": model,
        "epochs": _epochs(runs),
        "seeds": ", ".join(str(run["seed"]) for run in runs),
        "test accuracy": format_accuracy(runs, "test_accuracy"),
        "flip TTA": format_accuracy(runs, "test_accuracy_mirror"),
        "shift TTA": format_accuracy(runs, "test_accuracy_shift"),
        "PFLOP": f"{statistics.mean(run['flops'] for run in runs) / 1e15:.3g}",
        "minutes": f"{minutes:.0f}" if minutes >= 1 else f"{minutes:.1f}",
        "device": _device(runs[0]),
    }


def _on_gpu(run: Summary) -> bool:
    return run["settings"].get("device") == "cuda"


def _device(run: Summary) -> str:
    environment = run["environment"]
    return environment["device"] if _on_gpu(run) else f"{environment['device']}, {environment['threads']} used"


def _error_cell(runs: list[Summary]) -> str:
    if not runs:
        return "not run"
    errors = [100 - run["test_accuracy"] for run in runs]
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    return f"{mean_and_spread(errors)} % ({_epochs(runs)} epochs, {seeds})"


def _grouped(summaries: Iterable[Summary]) -> dict[tuple[str, str], list[Summary]]:
    """Group runs by recipe and model, in the order of the registry and the table.

    Groups are sorted by CPU before GPU, then by device, then by seed.
    """
    recipes, models = list(RECIPES), list(PUBLISHED)

    def sort_key(run: Summary) -> tuple:
        model = run["model"]
        number = models.index(model) if model in models else len(models)
        return recipes.index(run["recipe"]), number, model, _on_gpu(run), _device(run), run["seed"]

    groups: dict[tuple[str, str], list[Summary]] = {}
    for run in sorted(summaries, key=sort_key):
        groups.setdefault((run["recipe"], run["model"]), []).append(run)
    return groups


def _epochs(runs: list[Summary]) -> str:
    (epochs,) = {run["epochs"] for run in runs}  # the recipe's
    return str(epochs)


TABLES = {"reproduction": reproduction_table, "runs": runs_table, "speedrun": speedrun_table}
"""Tables by their names in a Markdown file."""


def add(runs: Iterable[Path]) -> None:
    """Copy the summaries and curves of all finished `runs`, or of none.

    Raises `DataError` if one is not finished, does not count or would replace another.
    """
    summaries, files = {run: _summary(run) for run in runs}, dict[Path, bytes]()
    for run, summary in summaries.items():
        if reason := _exclusion(summary, str(run)):
            command = f"fastresnet train {summary['recipe']} --model {summary['model']} --seed {summary['seed']}"
            raise DataError(f"{run} cannot be added to the tables: {reason}. Train one that can: {command}")
        name = _stem(summary)
        of_run = {
            RESULTS / f"{name}.json": (json.dumps(summary, indent=2) + "\n").encode(),
            RESULTS / f"{name}.csv": (run / "metrics.csv").read_bytes(),
        }
        for path, content in of_run.items():
            if content != files.setdefault(path, path.read_bytes() if path.exists() else content):
                raise DataError(
                    f"{path} is of another run than {run}. To replace it, remove {name}.json and {name}.csv in that "
                    "folder."
                )
    RESULTS.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write_bytes(path, content)
    for summary in summaries.values():
        print(f"{_stem(summary)}: {summary['test_accuracy']:.2f} %")


def chart(recipe: str, path: Path, folder: Path = RESULTS) -> None:
    """Plot the errors of 20 and 56 layers in training and test, as in the paper's figure 6.

    Plain networks are on the left, residual ones on the right, with the first seed of each. Raises `DataError` if
    there is no run of `recipe`.
    """
    from fastresnet.figures import Figure, MaxNLocator, NullFormatter
    from fastresnet.plotting import save_figure

    groups = _grouped(run for run in read_summaries(folder) if run["recipe"] == recipe)
    if not groups:
        raise DataError(f"{folder} has no run of recipe {recipe!r}. Add one: python -m benchmarks.accuracy add RUN")
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (family, heading) in zip(panels, (("plain", "plain networks"), ("resnet", "ResNets")), strict=True):
        for model, color in ((f"{family}20", "tab:orange"), (f"{family}56", "tab:blue")):
            if (recipe, model) in groups:
                _draw_errors(axes, groups[recipe, model][0], folder, color)
            else:
                axes.plot([], [], color=color, label=f"{model}: not run")
        axes.set(title=heading, xlabel="epoch", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks([2, 5, 10, 20, 50, 100], [2, 5, 10, 20, 50, 100])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="both", alpha=0.25)
        axes.legend(frameon=False)
    panels[0].set_ylabel("error (%)")
    figure.suptitle(f"Degradation: CIFAR-10, recipe {recipe}", fontsize=10)
    save_figure(figure, path)


def _draw_errors(axes: Any, run: Summary, folder: Path, color: str) -> None:
    with open(folder / f"{_stem(run)}.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    numbers = [int(epoch["epoch"]) for epoch in epochs]
    for split, style in (("train", "--"), ("test", "-")):
        errors = [100 - float(epoch[f"{split}_accuracy"]) for epoch in epochs]
        axes.plot(numbers, errors, style, color=color, label=f"{run['model']}, {split}: {errors[-1]:.2f} %")


def _stem(run: Summary) -> str:
    """Return the name, without its suffix, of the files of a run."""
    return f"{run['recipe']}-{run['model']}-seed{run['seed']}{'-gpu' if _on_gpu(run) else ''}"


def publish(run: Path) -> None:
    """Publish the weights of `run` as pretrained ones. Their accuracy is measured again, in fp32 on the CPU.

    Raises `DataError` if the run is not finished, or a card cannot describe its normalisation.
    """
    import torch

    from fastresnet.evaluation import evaluate, open_evaluation
    from fastresnet.pretrained import Card
    from fastresnet.pretrained import __file__ as package
    from fastresnet.weights import load_weights
    from pipelines.prepare import find_dataset

    summary, cpu, file = _summary(run), torch.device("cpu"), run / "model.safetensors"
    weights = load_weights(file)
    dataset = find_dataset("cifar10", None)
    normalization = weights.normalization
    if normalization == "pixel":
        raise DataError(f"{run} subtracts a mean for each pixel, which a card cannot describe. Publish another run.")
    pipeline = open_evaluation(dataset, normalization, "fp32", cpu)
    result = evaluate(weights.model, pipeline, dataset.classes, precision="fp32", device=cpu, tta="shift")
    mean, std = (dataset.mean, dataset.std) if normalization == "channel" else ((0.5,) * 3, (0.5,) * 3)
    card = Card(
        **{name: summary[name] for name in ("model", "recipe", "seed", "epochs")},
        **{name: summary["environment"][name] for name in ("command", "commit", "device")},
        test_accuracy=result.accuracy,
        test_accuracy_mirror=result.mirror_accuracy,  # type: ignore[arg-type]  # no None, with tta="shift"
        test_accuracy_shift=result.shift_accuracy,  # type: ignore[arg-type]
        mean=mean,
        std=std,
        sha256=sha256(file),
    )
    folder = Path(package).parent
    write_bytes(folder / f"{card.model}.safetensors", file.read_bytes())
    write_bytes(folder / f"{card.model}.json", (json.dumps(dataclasses.asdict(card), indent=2) + "\n").encode())
    print(f"{card.model}: {card.test_accuracy:.2f} %")


def _summary(run: Path) -> Summary:
    """Read `summary.json`, and remove the folder on this machine from its command."""
    from fastresnet.run_folder import read_summary  # which loads torch

    path = run / "summary.json"
    summary = read_summary(path)
    environment = summary["environment"]
    if missing := [name for name in ("command", "commit", "device", "threads") if name not in environment]:
        raise DataError(f"{path} is damaged: its environment has no {', '.join(missing)}.")
    environment["command"] = re.sub(r" --out[ =]('[^']*'|\S+)", "", str(environment["command"]))
    return summary


if __name__ == "__main__":
    from fastresnet.terminal import guarded

    def main(arguments: list[str]) -> int:
        match arguments:
            case ["add", *runs] if runs:
                add(map(Path, runs))
            case ["chart", recipe, path]:
                chart(recipe, Path(path))
            case ["publish", run]:
                publish(Path(run))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
        return 0

    sys.exit(guarded(main, sys.argv[1:]))
