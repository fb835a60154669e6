"""Results: their files, and the shared parts of the benchmarks' tables and charts."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastresnet.console import PlainConsole
from pipelines.errors import UsageError
from pipelines.files import write_json
from pipelines.texts import read_json

SCHEMA = 1
BENCHMARKS = ("loaders", "step", "train")
CHARTS = (".png", ".svg", ".pdf")
"""Suffixes of charts."""

Result = dict[str, Any]
"""Figures of a benchmark, with their environment: the contents of a --json file."""
Column = tuple[str, Callable[[dict[str, Any]], str]]
"""Heading of a column, and function that formats its cell of a row."""


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Return median, lowest and highest of `values` as `name`, `name_low` and `name_high`."""
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def row_of(name: str, kind: str, images_per_s: Sequence[float]) -> dict[str, Any]:
    """Return the entries that rows of all benchmarks have, from the throughput of every turn."""
    return {"name": name, "kind": kind, **spread(images_per_s, "images_per_s"), "rounds": len(images_per_s)}


def ratio(name: str, values: Sequence[float], over: str, others: Sequence[float]) -> dict[str, Any]:
    """Divide `values` by `others`, round by round: machines drift, ratios less so.

    One may be a turn ahead: only rounds of both count.
    """
    ratios = [value / other for value, other in zip(values, others, strict=False)]
    return {"name": name, "over": over, "median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def left_out(result: Result) -> list[str]:
    """List each case without a row, with the reason: it cannot run here, or it failed."""
    return [f"left out: {reason}" for key in ("missing", "failed") for reason in result.get(key, {}).values()]


def common_notes(result: Result) -> list[str]:
    """List each case without a row, and the load by others if it disturbed the measurement."""
    lines = left_out(result)
    environment = result["environment"]
    if environment.get("overloaded"):
        lines.append(
            f"busy machine: others kept {environment['other_load']:.2f} of {environment['processors']} processors "
            "busy; the figures are too low, and the ratios uncertain"
        )
    return lines


def read_result(path: Path) -> Result:
    """Read a result that was written with --json. Raises `UsageError` if the file is not a result."""
    try:
        result = read_json(path)
        known = result["schema"] == SCHEMA and result["benchmark"] in BENCHMARKS
        known = known and {"limits", "ratios"} <= result.keys() and isinstance(result["environment"], dict)
        known = known and all(_is_row(row) for row in result["rows"])
        known = known and all(isinstance(each[name], str) for each in result["ratios"] for name in ("name", "over"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise no_result(path)
    return result


def _is_row(row: dict[str, Any]) -> bool:
    """Return True if `row` has the entries that rows of all benchmarks have."""
    low, median, high = (row[f"images_per_s{end}"] for end in ("_low", "", "_high"))
    return isinstance(row["name"], str) and 0 < low <= median <= high


def module_of(result: Result) -> ModuleType:
    """Import the module of the benchmark that made `result`, which has the functions to show it."""
    return importlib.import_module(f"benchmarks.{result['benchmark']}")


def no_result(path: Path) -> UsageError:
    """Return the error for a file that is not a complete result."""
    return UsageError(f"{path} is not a result of schema {SCHEMA}. Write one: fastresnet bench loaders --json FILE")


def write_result(result: Result, path: Path | None) -> None:
    """Write a result to `path`, if given.

    After every round, this keeps the finished rounds in case of an interruption.
    """
    if path is not None:
        write_json(path, result)


def show_result(result: Result, chart: Path | None, *more: Table) -> None:
    """Print the tables of a result and `more`, and draw its chart in file `chart`, if given."""
    module = module_of(result)
    print_tables([*module.tables(result), *more], module.notes(result))
    if chart is not None:
        module.draw_chart(result, chart)


def print_tables(tables: Sequence[Table], notes: Sequence[str]) -> None:
    """Print tables, and lines under them."""
    console = PlainConsole()
    for table in tables:
        console.print_table(table)
        console.print()
    for note in notes:
        console.print(note, soft_wrap=True)


def title(result: Result) -> str:
    """Name the data, the batch size, the precision and the device of a result."""
    environment = result["environment"]
    return (
        f"{environment['data']}, batch {environment['batch_size']}, {environment['precision']}, {environment['device']}"
    )


def table(heading: str, *columns: str) -> Table:
    """Create an empty table, with names to the left and figures to the right.

    Names that are too long for the terminal are folded.
    """
    made = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return made


def figures_table(rows: Sequence[dict[str, Any]], heading: str, columns: Sequence[Column]) -> Table:
    """Create a table with a line for each of `rows`."""
    made = table(heading, *(name for name, _ in columns))
    for row in rows:
        made.add_row(*(text(row) for _, text in columns))
    return made


def throughput(row: dict[str, Any]) -> str:
    """Format median and extremes, in 1000 images/s."""
    median, low, high = (short(row[f"images_per_s{end}"] / 1000, 3) for end in ("", "_low", "_high"))
    return f"{median} ({low}–{high})"


def memory(rows: Sequence[dict[str, Any]]) -> Column:
    """Return the column of memory: that of the host and, if there is a GPU, PyTorch's on it."""
    if any("gpu_memory_mb" in row for row in rows):
        return "MB host/GPU", lambda row: f"{row['peak_memory_mb']:,.0f}/{row['gpu_memory_mb']:,.0f}"
    return "memory", lambda row: f"{row['peak_memory_mb']:,.0f} MB"


def ratios_table(result: Result) -> Table:
    """Create the table of ratios: the others down, ours across, with median and extremes of the rounds."""
    cells = {
        (each["name"], each["over"]): f"{short(each['median'], 2)} ({short(each['low'], 2)}–{short(each['high'], 2)})"
        for each in result["ratios"]
    }
    names, others = (list(dict.fromkeys(each[key] for each in result["ratios"])) for key in ("name", "over"))
    made = table("Speed ratio, column / row: median (lowest–highest round)", "", *names)
    for other in others:
        made.add_row(other.removeprefix("peer:"), *(cells.get((name, other), "") for name in names))
    return made


def markdown(result: Result, columns: Sequence[Column]) -> str:
    """Format `result` as Markdown: a line for each row, with the median ratios of ours to it at its end.

    Cases without a row follow.
    """
    names = list(dict.fromkeys(each["name"] for each in result["ratios"]))
    ratios = {(each["name"], each["over"]): short(each["median"], 2) for each in result["ratios"]}
    throughputs: Column = (
        "images/s (lowest–highest)",
        lambda row: "{} ({}–{})".format(*(grouped(row[f"images_per_s{end}"]) for end in ("", "_low", "_high"))),
    )

    def ratio_of(name: str) -> Column:
        return f"`{name}` / row", lambda row: ratios.get((name, row["name"]), "")

    (name, name_text), *rest = columns
    every: list[Column] = [(name, lambda row: f"`{name_text(row)}`"), throughputs, *rest, *map(ratio_of, names)]
    made = markdown_table(
        [heading for heading, _ in every], [[text(row) for _, text in every] for row in result["rows"]]
    )
    return made + "".join(f"\n{line}.\n" for line in left_out(result))


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format cells as a table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def short(value: float, digits: int) -> str:
    """Format `digits` significant digits, or all before the point, without an exponent."""
    if not value > 0:
        return "0"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(value)), 0)}f}"


def grouped(value: float) -> str:
    """Format three significant digits, with thousands separators."""
    return f"{float(f'{value:.3g}'):,.0f}"


def whiskers(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return the distances of the lowest and the highest images/s from the median, for matplotlib's error bars."""
    signs = {"_low": -1, "_high": 1}
    return [[sign * (row[f"images_per_s{end}"] - row["images_per_s"]) for row in rows] for end, sign in signs.items()]


def draw_bars(result: Result, path: Path, heading: str, limit: tuple[float, str] | None = None) -> None:
    """Draw bars of images/s from 0, with their figures and spread beside them, and the `limit` with its name."""
    from fastresnet.figures import Figure, MaxNLocator
    from fastresnet.plotting import save_figure
    from fastresnet.text import for_figure

    rows = sorted(result["rows"], key=lambda row: row["images_per_s"])
    names, colors = [row["name"] for row in rows], ["#4477aa" if row["kind"] == "ours" else "#999999" for row in rows]
    figure = Figure(figsize=(9, 0.4 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    medians = [row["images_per_s"] for row in rows]
    axes.barh(names, medians, xerr=whiskers(rows), color=colors, error_kw={"capsize": 3, "elinewidth": 1})
    for row in rows:
        median, low, high = (grouped(row[f"images_per_s{end}"]) for end in ("", "_low", "_high"))
        place, text = (row["images_per_s_high"], row["name"]), f"{median} ({low}–{high})"
        axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.bar(0, 0, color="#4477aa", label="this program")
    axes.bar(0, 0, color="#999999", label="typical code with other libraries")
    end = 1.5 * max(row["images_per_s_high"] for row in rows)
    if limit is not None:
        label = f"{limit[1]}: {grouped(limit[0])}"
        if limit[0] < 3 * end:
            end = max(end, 1.03 * limit[0])
        else:
            label += " (beyond the axis)"
        axes.axvline(limit[0], color="#cc3311", linestyle="--", label=label)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("images/s: median of the rounds (lowest–highest, as whiskers)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.02)
    figure.suptitle(for_figure(f"{heading}: {title(result)}", 110), fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
