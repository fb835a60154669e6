"""usage: fastresnet bench COMMAND [OPTIONS], as python -m benchmarks COMMAND

Measure this program and its peers, in turns, on this machine.

  loaders   images/s of the data pipelines, and of loaders of other libraries
  step      images/s of the training step and of inference, and the roofline
  train     images/s of whole trainings, and of other training loops
  all       all three benchmarks, with results and charts in a folder
  kernels   kernels of captured steps, and their bytes, on a simulated GPU
  show      print the tables of a result that was written with --json
  compare   compare two results: ratios, and rows that became slower
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loaders import LoadersOptions, measure_loaders
from benchmarks.report import CHARTS, module_of, no_result, print_tables, read_result, short, table
from benchmarks.runner import MachineOptions
from benchmarks.step import StepOptions, measure_steps
from benchmarks.train import TrainingOptions, measure_training
from fastresnet import terminal
from fastresnet.arguments import Positional, parse
from pipelines.errors import UsageError, check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllOptions(MachineOptions):
    """Run the benchmarks loaders, step and train, one after the other; --quick takes under 5 minutes on 2 CPU cores."""

    data: str = "cifar10"
    """Name or folder of the data set."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    out: Path = Path("bench")
    """Folder for the results, loaders.json, loaders.png and so on; created if missing."""


def measure_all(options: AllOptions) -> None:
    """Run every benchmark with its own defaults."""
    options.out.mkdir(parents=True, exist_ok=True)

    def common(name: str) -> dict:
        files = {"json": options.out / f"{name}.json", "chart": options.out / f"{name}.png"}
        return {"device": options.device, "threads": options.threads, "quick": options.quick, **files}

    measure_loaders(LoadersOptions(data=options.data, root=options.root, **common("loaders")))
    measure_steps(StepOptions(**common("step")))
    measure_training(TrainingOptions(data=options.data, root=options.root, **common("train")))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelsOptions:
    """Count the kernels of captured training steps and the bytes that they move, on a simulated GPU."""

    json: Path | None = None
    """Write the figures to this file, updated after each step."""

    def __post_init__(self) -> None:
        terminal.check_output("--json", self.json)


def count(options: KernelsOptions) -> None:
    """Count kernels. Raises `UsageError` without the simulated GPU."""
    from benchmarks.kernels import count_kernels  # with PyTorch, which takes seconds

    count_kernels(options.json)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """Show the tables of a result."""

    result: Positional[Path]
    """File that was written with --json."""
    markdown: bool = False
    """Print a Markdown table."""
    chart: Path | None = None
    """Draw the chart again in this file (.png, .svg or .pdf)."""

    def __post_init__(self) -> None:
        terminal.check_output("--chart", self.chart, CHARTS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Compare two results of the same benchmark, row by row."""

    before: Positional[Path]
    """File that was written with --json."""
    after: Positional[Path]
    """Later result, also written with --json."""


def show(options: ShowOptions) -> None:
    """Print a stored result. Raises `UsageError` if the file is not a result."""
    result = read_result(options.result)
    module = module_of(result)
    try:
        markdown, tables, notes = module.markdown_table(result), module.tables(result), module.notes(result)
        if options.chart is not None:
            module.draw_chart(result, options.chart)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):  # entries of this benchmark only
        raise no_result(options.result) from None
    if options.markdown:
        terminal.say(markdown.removesuffix("\n"))
    else:
        print_tables(tables, notes)


def compare(options: CompareOptions) -> None:
    """Print the ratios of the rows that both have. Raises `UsageError` if the files cannot be compared.

    A row is slower or faster only if its rounds do not overlap: beyond the spread of both.
    """
    before, after = read_result(options.before), read_result(options.after)
    if before["benchmark"] != after["benchmark"]:
        raise UsageError(
            f"{options.before} is of bench {before['benchmark']}, {options.after} of bench {after['benchmark']}: they "
            "cannot be compared."
        )
    rows = {row["name"]: row for row in before["rows"]}
    pairs = [(rows[row["name"]], row) for row in after["rows"] if row["name"] in rows]
    if not pairs:
        raise UsageError(f"{options.before} and {options.after} have no row in common.")
    made = table(f"bench {after['benchmark']}: images/s", "", "before", "after", "ratio", "")
    for old, new in pairs:
        ratio = new["images_per_s"] / old["images_per_s"]
        speeds = (f"{row['images_per_s']:,.0f}" for row in (old, new))
        made.add_row(new["name"], *speeds, short(ratio, 3), _verdict(old, new))
    slower = sum(_verdict(old, new) == "SLOWER" for old, new in pairs)
    notes = [f"{slower} of {len(pairs)} slower beyond the spread" if slower else "nothing slower beyond the spread"]
    for key in ("device", "threads"):
        if before["environment"].get(key) != after["environment"].get(key):
            notes.append(f"not the same {key}: {before['environment'].get(key)}, {after['environment'].get(key)}")
    if missing := sorted(rows.keys() ^ {row["name"] for row in after["rows"]}):
        notes.append(f"in only one of the two: {', '.join(missing)}")
    print_tables([made], notes)


def _verdict(old: dict, new: dict) -> str:
    if new["images_per_s_high"] < old["images_per_s_low"]:
        return "SLOWER"
    return "faster" if new["images_per_s_low"] > old["images_per_s_high"] else "within the spread"


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "loaders": (LoadersOptions, measure_loaders),
    "step": (StepOptions, measure_steps),
    "train": (TrainingOptions, measure_training),
    "all": (AllOptions, measure_all),
    "kernels": (KernelsOptions, count),
    "show": (ShowOptions, show),
    "compare": (CompareOptions, compare),
}


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, end="")
        return 0 if arguments else 2
    check_choice("benchmark", arguments[0], COMMANDS)
    options, run = COMMANDS[arguments[0]]
    run(parse(options, f"bench {arguments[0]}", arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(terminal.guarded(main, sys.argv[1:]))
