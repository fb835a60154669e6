"""python -m benchmarks loaders [OPTIONS]"""

from __future__ import annotations

import sys

import tyro

from benchmarks.loaders import LoadersOptions, measure_loaders
from fastresnet import cli
from pipelines.errors import check_choice


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    benchmarks = {"loaders": (LoadersOptions, measure_loaders)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    check_choice("benchmark", arguments[0], benchmarks)
    options, measure = benchmarks[arguments[0]]
    measure(tyro.cli(options, prog=f"python -m benchmarks {arguments[0]}", args=arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main, sys.argv[1:]))
