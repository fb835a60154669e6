"""usage: python -m benchmarks.readme FILE...

Write the tables of `benchmarks/results` into each FILE, between `<!-- results: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.report import read_report
from benchmarks.show import as_markdown
from pipelines.files import write_bytes

RESULTS = Path(__file__).with_name("results")
_TABLE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def with_tables(text: str) -> str:
    """`text` with every table made anew from its result."""

    def table(match: re.Match[str]) -> str:
        report = read_report(RESULTS / match[2])
        return f"{match[1]}\n{as_markdown(report)}\n{_provenance(report)}\n{match[3]}"

    return _TABLE.sub(table, text)


def _provenance(report: dict) -> str:
    environment = report["environment"]
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items() if name != "fastresnet"
    )
    return f"{environment['device']}; commit {environment['commit']}; {environment['started'][:10]}; {versions}.\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in map(Path, sys.argv[1:]):
        write_bytes(path, with_tables(path.read_text()).encode())
