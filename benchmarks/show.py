"""Results shown again, and compared with one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

from tyro.conf import Positional

from benchmarks import loaders, steps, training
from benchmarks.report import Report, no_result, print_report, read_report, short, table
from pipelines.errors import UsageError

_MODULES: dict[str, ModuleType] = {"loaders": loaders, "step": steps, "train": training}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """Show the tables of a result again."""

    result: Positional[Path]
    """A file that was written with --json."""
    markdown: bool = False
    """As a table for a README."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Compare two results of the same benchmark, row by row."""

    before: Positional[Path]
    """A file that was written with --json."""
    after: Positional[Path]
    """Another one."""


def show(options: ShowOptions) -> None:
    """Print a stored result. Raises `UsageError` where the file is none."""
    report = read_report(options.result)
    module = _MODULES[report["benchmark"]]
    try:
        markdown, tables, notes = module.markdown_table(report), module.tables(report), module.notes(report)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):  # what only this benchmark has
        raise no_result(options.result) from None
    if options.markdown:
        print(markdown, end="")
    else:
        print_report(tables, notes)


def as_markdown(report: Report) -> str:
    """The main table of a result."""
    return _MODULES[report["benchmark"]].markdown_table(report)


def compare(options: CompareOptions) -> None:
    """Print the ratios of the rows that both have. Raises `UsageError` where the files cannot be compared.

    Slower or faster is only what lies beyond the spread of both: whose rounds do not overlap.
    """
    before, after = read_report(options.before), read_report(options.after)
    if before["benchmark"] != after["benchmark"]:
        raise UsageError(
            f"{options.before} is of bench {before['benchmark']}, {options.after} of bench {after['benchmark']}: they "
            "have nothing to compare."
        )
    rows = {row["name"]: row for row in before["rows"]}
    pairs = [(rows[row["name"]], row) for row in after["rows"] if row["name"] in rows]
    if not pairs:
        raise UsageError(f"{options.before} and {options.after} have no row in common.")
    made = table(f"bench {after['benchmark']}: images/s", "", "before", "after", "ratio", "")
    for old, new in pairs:
        ratio = new["images_per_s"] / old["images_per_s"]
        made.add_row(
            new["name"],
            f"{old['images_per_s']:,.0f}",
            f"{new['images_per_s']:,.0f}",
            short(ratio, 3),
            _verdict(old, new),
        )
    slower = sum(_verdict(old, new) == "SLOWER" for old, new in pairs)
    notes = [f"{slower} of {len(pairs)} slower beyond the spread" if slower else "nothing slower beyond the spread"]
    for key in ("device", "threads"):
        if before["environment"].get(key) != after["environment"].get(key):
            notes.append(f"not the same {key}: {before['environment'].get(key)}, {after['environment'].get(key)}")
    if missing := sorted(rows.keys() ^ {row["name"] for row in after["rows"]}):
        notes.append(f"in one of the two only: {', '.join(missing)}")
    print_report([made], notes)


def _verdict(old: dict, new: dict) -> str:
    if new["images_per_s_high"] < old["images_per_s_low"]:
        return "SLOWER"
    return "faster" if new["images_per_s_low"] > old["images_per_s_high"] else "within the spread"
