"""What the campaigns of `tests/faults` found, as Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.report import markdown_table


def kills_table(report: dict[str, Any]) -> str:
    """Kills by the moment at which they came."""
    moments = sorted(report["moments"].items(), key=lambda item: -item[1])
    rows = [[moment, str(count)] for moment, count in moments]
    return markdown_table(["killed", "times"], [*rows, ["in all", str(report["kills"])]])


def fuzz_table(report: dict[str, Any]) -> str:
    """What became of damaged files of each kind."""
    head = ["files", "refused in words", "read, with the right content", "read, with another content"]
    outcomes = ("refused", "right", "other")
    rows = [[kind, *(f"{of_kind.get(o, 0):,}" for o in outcomes)] for kind, of_kind in report["outcomes"].items()]
    totals = [sum(of_kind.get(o, 0) for of_kind in report["outcomes"].values()) for o in outcomes]
    return markdown_table(head, [*rows, ["in all", *(f"{total:,}" for total in totals)]])


TABLES = {"kills": kills_table, "fuzz": fuzz_table}
