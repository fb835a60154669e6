"""Command line. Each command is a module, imported when it is called, so that `--help` is instant."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

from fastresnet import check_not_shadowed
from fastresnet.arguments import HELP
from fastresnet.terminal import guarded
from pipelines import __version__
from pipelines.errors import UsageError, check_choice

_OVERVIEW = """usage: fastresnet COMMAND [OPTIONS]

Train the CIFAR ResNets of He et al. 2015, fast and reproducibly.

commands:
  prepare     prepare a data set: CIFAR-10, your own images, or drawn shapes10
  train       train: fast (default), best, speedrun, paper, baseline or smoke
  eval        evaluate weights of this program or of another repository
  predict     classify image files
  plot        plot curves of runs, a confusion matrix, or mistakes
  report      write an HTML report of a run, or compare several
  list        list networks, recipes, data sets and pretrained networks
  summary     list the layers of a network, with parameters and multiply-adds
  export      export weights: ONNX, safetensors, torch.export, Hugging Face Hub
  doctor      check this machine, and print a remedy for each problem
  bench       measure the speed of this program and of its peers
  completion  print the completion script for bash or zsh
  help        print this page, or with the name of a command its options
  version     print the version

First steps: fastresnet doctor, then fastresnet train smoke --data shapes10,
which needs no download and takes a minute.
"""
COMMANDS = tuple(re.findall(r"^  (\w+)", _OVERVIEW, re.MULTILINE))
_SYNONYMS = {**dict.fromkeys(HELP, "help"), "-V": "version", "--version": "version"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    return guarded(_dispatch, list(sys.argv[1:] if argv is None else argv))


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_OVERVIEW, end="")
        return 2
    name, *rest = arguments
    name = _SYNONYMS.get(name, name)
    check_choice("command", name, COMMANDS)
    if name == "help" and rest and rest[0] in COMMANDS:
        return _dispatch([*rest, "--help"])
    if name == "help" and rest and rest[0] not in HELP:
        check_choice("command", rest[0], COMMANDS)
    if name in ("help", "version"):
        print(_OVERVIEW if name == "help" else f"fastresnet {__version__}\n", end="")
        return 0
    if name == "bench":
        return load_bench().main(rest)
    return importlib.import_module(f"fastresnet.commands.{name}").run(rest)


def load_bench() -> ModuleType:
    """Import the benchmarks by their entry point: they depend on this package, not the reverse."""
    for entry in metadata.entry_points(group="fastresnet.commands", name="bench"):
        try:
            check_not_shadowed("benchmarks")
        except ImportError as error:
            raise UsageError(str(error)) from None
        return importlib.import_module(entry.module)
    raise UsageError("fastresnet is not installed, so bench is not found: use python -m benchmarks.")
