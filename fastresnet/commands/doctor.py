"""`fastresnet doctor`: findings on this machine, with remedies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from fastresnet.arguments import JsonFile, parse
from fastresnet.terminal import STANDARD_OUTPUT, check_json, load_torch, write_figures

if TYPE_CHECKING:
    from fastresnet.console import PlainConsole
    from fastresnet.doctor import Finding

_MARKS = {
    "works": ("ok", "green"),
    "untested": ("..", "default"),
    "missing": ("--", "yellow"),
    "broken": ("!!", "red"),
}
_NAME_WIDTH = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Check versions, GPU and driver, pipelines, compilers, data sets, disk and memory; print remedies."""

    all: bool = False
    """Check what takes longer too: import each library, and compile a function with torch.compile."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    json: JsonFile = None
    """Write the findings to FILE (.json), or print them as JSON."""

    def __post_init__(self) -> None:
        check_json(self.json)


def run(arguments: list[str]) -> int:
    """Return 1 if something is broken; missing optional parts do not count."""
    options: Options = parse(Options, "doctor", arguments)
    load_torch()
    from fastresnet.console import PlainConsole
    from fastresnet.doctor import examine

    console, findings = PlainConsole(quiet=options.json == STANDARD_OUTPUT), list["Finding"]()
    for finding in examine(options.root, thorough=options.all):
        findings.append(finding)
        _print(finding, console)
    console.print("ok works   .. not tried   -- missing, and optional   !! broken")
    write_figures(options.json, {"schema": 1, "findings": [dataclasses.asdict(finding) for finding in findings]})
    return int(any(finding.state == "broken" for finding in findings))


def _print(finding: Finding, console: PlainConsole) -> None:
    from rich.table import Table
    from rich.text import Text

    from fastresnet.text import for_terminal

    remedy = f"\n{for_terminal(finding.remedy)}" if finding.remedy else ""
    line = Table.grid(padding=(0, 1))
    line.add_column()
    line.add_column(min_width=_NAME_WIDTH)
    line.add_column()
    detail = Text.assemble(for_terminal(finding.detail), (remedy, "bold"))
    line.add_row(Text(*_MARKS[finding.state]), finding.what, detail)
    console.print_table(line)
