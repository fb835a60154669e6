"""`fastresnet doctor`: findings on this machine, with remedies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastresnet.terminal import check_output, parse

_MARKS = {"works": ("ok", "green"), "missing": ("--", "yellow"), "broken": ("!!", "red")}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Check versions, GPU and driver, pipelines, compilers, data sets, disk and memory; print remedies."""

    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    json: Path | None = None
    """JSON file to write the findings to."""

    def __post_init__(self) -> None:
        check_output("--json", self.json)


def run(arguments: list[str]) -> int:
    """Return 1 if something is broken; missing optional parts do not count."""
    options: Options = parse(Options, "doctor", arguments)
    from rich.table import Table
    from rich.text import Text

    from fastresnet.console import PlainConsole
    from fastresnet.doctor import examine
    from fastresnet.text import for_terminal
    from pipelines.files import write_json

    findings = examine(options.root)
    table = Table.grid(padding=(0, 1))
    for finding in findings:
        remedy = f"\n{for_terminal(finding.remedy)}" if finding.remedy else ""
        detail = Text.assemble(for_terminal(finding.detail), (remedy, "bold"))
        table.add_row(Text(*_MARKS[finding.state]), finding.what, detail)
    PlainConsole().print_table(table)
    if options.json is not None:
        contents = {"schema": 1, "findings": [dataclasses.asdict(finding) for finding in findings]}
        write_json(options.json, contents)
    return int(any(finding.state == "broken" for finding in findings))
