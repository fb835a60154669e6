"""Results as people see them: tables on a terminal and for a README, and a chart."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from pipelines.errors import DataError
from pipelines.files import replacing

SCHEMA = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """Show the tables of a result again."""

    result: Positional[Path]
    """A file that was written with --json."""
    markdown: bool = False
    """As a table for a README."""


def show(options: ShowOptions) -> None:
    """Print a stored result. Raises `DataError` where the file is none."""
    try:
        report = json.loads(options.result.read_bytes())
        known = (report["schema"], report["benchmark"]) == (SCHEMA, "loaders")
    except OSError as error:
        raise DataError(f"cannot read {options.result}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise DataError(
            f"{options.result} is no result of this benchmark. Write one: fastresnet bench loaders --json FILE"
        )
    if options.markdown:
        print(markdown_table(report), end="")
    else:
        print_report(report)


def markdown_table(report: dict[str, Any]) -> str:
    """Figures and, for our own, the ratios to the peers: Markdown."""
    peers = [row["name"] for row in report["rows"] if row["kind"] == "peer"]
    ratios = {(each["name"], each["over"]): each for each in report["ratios"]}
    headings = ["loader", "images/s (lowest–highest)", "of the limit", "first batch", "memory"]
    lines = [
        [
            f"`{row['name']}`",
            "{} ({}–{})".format(*(_grouped(row[f"images_per_s{end}"]) for end in ("", "_low", "_high"))),
            f"{row['percent_of_limit']:.1f} %",
            f"{row['first_batch_s']:.2f} s" + (f", {row['compile_s']:.1f} s of it numba" if "compile_s" in row else ""),
            f"{row['peak_memory_mb']:,.0f} MB",
            *(
                _short(ratios[row["name"], peer]["median"], 2) if (row["name"], peer) in ratios else ""
                for peer in peers
            ),
        ]
        for row in report["rows"]
    ]
    table = [[*headings, *(f"/ `{peer}`" for peer in peers)], ["---"] * (len(headings) + len(peers)), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def print_report(report: dict[str, Any]) -> None:
    """Tables of the figures and of the ratios, and what they are measured against."""
    console, limits = Console(), report["limits"]
    console.print(_figures_table(report), "")
    for row in report["rows"]:
        if "compile_s" in row:
            console.print(
                f"{row['name']}: {row['compile_s']:.1f} s of the {row['first_batch_s']:.1f} s to the first batch are "
                "numba's compilation",
                highlight=False,
            )
    console.print("", _ratios_table(report), "")
    console.print(
        f"copy limit: {limits['images_per_s']:,.0f} images/s at {limits['copy_gb_per_s']:.1f} GB/s, read and written; "
        f"memory is beyond PyTorch's own, the data set has {report['environment']['data_mb']:.0f} MB",
        highlight=False,
        soft_wrap=True,
    )


def _title(report: dict[str, Any]) -> str:
    environment = report["environment"]
    return (
        f"{environment['data']}, batches of {environment['batch_size']}, {environment['precision']}, "
        f"{environment['device']}"
    )


def _figures_table(report: dict[str, Any]) -> Table:
    table = _table(f"Loaders: {_title(report)}")
    table.add_column("loader", no_wrap=True)
    for heading in ("1000 images/s", "of limit", "1st batch", "memory", "proc/thr"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["rows"]:
        median, low, high = (row[f"images_per_s{end}"] / 1000 for end in ("", "_low", "_high"))
        table.add_row(
            row["name"],
            f"{_short(median, 3)} ({_short(low, 3)}–{_short(high, 3)})",
            f"{row['percent_of_limit']:.1f} %",
            f"{row['first_batch_s']:.2f} s",
            f"{row['peak_memory_mb']:,.0f} MB",
            f"{row['processes']}/{row['threads']}",
        )
    return table


def _ratios_table(report: dict[str, Any]) -> Table:
    """Ours down, peers across: median and extremes of the rounds."""
    table = _table("Times as fast as a peer: median (lowest–highest round)")
    cells = {
        (
            each["name"],
            each["over"],
        ): f"{_short(each['median'], 2)} ({_short(each['low'], 2)}–{_short(each['high'], 2)})"
        for each in report["ratios"]
    }
    peers = [row["name"] for row in report["rows"] if row["kind"] == "peer"]
    table.add_column("", no_wrap=True)
    for peer in peers:
        table.add_column(peer.removeprefix("peer:"), justify="right", no_wrap=True)
    for row in report["rows"]:
        if row["kind"] == "ours":
            table.add_row(row["name"], *(cells[row["name"], peer] for peer in peers))
    return table


def _table(title: str) -> Table:
    """A table that fits into 80 columns."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


def _short(value: float, digits: int) -> str:
    """`digits` significant digits, or all before the point; no exponent."""
    return f"{value:.{max(digits - 1 - math.floor(math.log10(value)), 0)}f}"


def _grouped(value: float) -> str:
    """Three significant digits, with thousands set off."""
    return f"{float(f'{value:.3g}'):,.0f}"


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """Bars of images/s on a logarithmic scale, with their spread and the copy limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(report["rows"], key=lambda row: row["images_per_s"])
    medians = [row["images_per_s"] for row in rows]
    errors = [
        [row["images_per_s"] - row["images_per_s_low"] for row in rows],
        [row["images_per_s_high"] - row["images_per_s"] for row in rows],
    ]
    colors = ["tab:blue" if row["kind"] == "ours" else "tab:gray" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.6), layout="constrained")
    bars = axes.barh([row["name"] for row in rows], medians, xerr=errors, color=colors, ecolor="black", capsize=3)
    axes.bar_label(bars, labels=[_grouped(median) for median in medians], label_type="center", color="white")
    axes.bar(0, 0, color="tab:blue", label="this program")
    axes.bar(0, 0, color="tab:gray", label="as the libraries' users write it")
    axes.axvline(report["limits"]["images_per_s"], color="tab:red", linestyle="--", label="copy limit of the machine")
    axes.set_xscale("log")
    axes.set_xlim(min(medians) / 4, report["limits"]["images_per_s"] * 1.5)
    axes.set_xlabel("images/s (median of the rounds; whiskers: lowest and highest)")
    figure.suptitle(f"Loaders: {_title(report)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
    plt.close(figure)
