"""usage: fastresnet bench COMMAND [OPTIONS], or python -m benchmarks COMMAND [OPTIONS]

Measure this program and what people would use instead of it, in turns, on this machine.

  loaders   images/s of the data pipelines, and of torchvision, DALI and FFCV as their users write them
  show      the tables of a result that was written with --json
"""

from __future__ import annotations

import sys

from benchmarks.loaders import LoadersOptions, measure_loaders
from benchmarks.report import ShowOptions, show
from fastresnet import cli
from pipelines.errors import check_choice


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    benchmarks = {"loaders": (LoadersOptions, measure_loaders), "show": (ShowOptions, show)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, end="")
        return 0 if arguments else 2
    check_choice("benchmark", arguments[0], benchmarks)
    options, measure = benchmarks[arguments[0]]
    measure(cli.parse(options, f"bench {arguments[0]}", arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main, sys.argv[1:]))
