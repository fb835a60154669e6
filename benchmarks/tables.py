"""usage: python -m benchmarks.tables FILE...

Write the tables of `benchmarks/results` into each FILE, between one of these lines and `<!-- end -->`:

  <!-- results: FILE -->        a benchmark
  <!-- kernels: FILE,FILE -->   kernels of a step, before and after a change; of one FILE without the change
  <!-- accuracy: TABLE -->      accuracies of all runs
  <!-- zoo: TABLE -->           all networks, or the pretrained ones
  <!-- reliability: NAME -->    a campaign of `tests/faults`
  <!-- scaling: NAME -->        training in several processes; `predicted` names the prediction for GPUs
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import accuracy, kernels, scaling, zoo
from benchmarks.report import markdown_table, module_of, read_result
from fastresnet import terminal
from pipelines.errors import UsageError
from pipelines.files import write_bytes

RESULTS = Path(__file__).with_name("results")
_TABLE = re.compile(
    r"(<!-- (results|kernels|accuracy|zoo|reliability|scaling): (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL
)


def with_tables(text: str) -> str:
    """Return `text` with every table made again from its result."""

    def table(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        if kind == "accuracy":
            return f"{begin}\n{accuracy.TABLES[name](accuracy.read_summaries())}\n{end}"
        if kind == "zoo":
            return f"{begin}\n{zoo.TABLES[name]()}\n{end}"
        if kind == "scaling" and name == "predicted":
            return f"{begin}\n{scaling.predicted_table()}\n{end}"
        if kind == "kernels":
            changes = [json.loads((RESULTS / file).read_bytes()) for file in name.split(",")]
            return f"{begin}\n{kernels.markdown_table(*changes)}\n{''.join(map(_provenance, changes))}\n{end}"
        if kind == "results":
            result = read_result(RESULTS / name)
            made = module_of(result).markdown_table(result)
        else:
            result = json.loads((RESULTS / kind / f"{name}.json").read_bytes())
            made = (scaling.measured_table if kind == "scaling" else _RELIABILITY[name])(result)
        return f"{begin}\n{made}\n{_provenance(result)}\n{end}"

    return _TABLE.sub(table, text)


def _provenance(result: dict) -> str:
    environment = result["environment"]
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items() if name != "fastresnet"
    )
    return f"{environment['device']}; commit {environment['commit']}; {environment['started'][:10]}; {versions}.\n"


def _kills_table(result: dict[str, Any]) -> str:
    """Format the numbers of kills in each scenario, by their way."""
    ways = ("event", "alone", "all")
    head = ["killed", "at an event", "at a random time", "all, with their children", "compared ends"]
    counts = {**result["scenarios"], "total": sum(map(Counter, result["scenarios"].values()), Counter[str]())}
    return markdown_table(
        head, [[name, *(str(of.get(key, 0)) for key in (*ways, "ends"))] for name, of in counts.items()]
    )


def _fuzz_table(result: dict[str, Any]) -> str:
    """Format the outcomes of damaged files of each kind."""
    head = ["files", "refused with a message", "read, with the right content", "read, with another content"]
    outcomes = ("refused", "right", "other")
    rows = [[kind, *(f"{of_kind.get(o, 0):,}" for o in outcomes)] for kind, of_kind in result["outcomes"].items()]
    totals = [sum(of_kind.get(o, 0) for of_kind in result["outcomes"].values()) for o in outcomes]
    return markdown_table(head, [*rows, ["total", *(f"{total:,}" for total in totals)]])


_RELIABILITY = {"kills": _kills_table, "fuzz": _fuzz_table}


def main(arguments: list[str]) -> int:
    """Write the tables into the files that `arguments` name. Raises `UsageError` if one cannot be read."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, end="")
        return 0 if arguments else 2
    for path in map(Path, arguments):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}.") from None
        write_bytes(path, with_tables(text).encode())
    return 0


if __name__ == "__main__":
    sys.exit(terminal.guarded(main, sys.argv[1:]))
