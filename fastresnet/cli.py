"""Command line. Each command is a module, imported when it is called, so that `--help` is instant."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

from fastresnet import check_not_shadowed
from fastresnet.terminal import guarded
from pipelines import __version__
from pipelines.errors import UsageError, check_choice

_OVERVIEW = """usage: fastresnet COMMAND [OPTIONS]

Train the CIFAR ResNets of He et al. 2015, fast and reproducibly.

commands:
  prepare     prepare a data set: download and convert CIFAR-10, read your own files, or draw shapes10
  train       train a network by a recipe: fast (the default), best, speedrun, paper, baseline or smoke
  eval        evaluate weights of this program, or a state dict of another repository
  predict     classify image files
  plot        plot runs: curves of one or several, confusion matrix, most confident mistakes
  report      write an HTML report of a run
  list        list networks, recipes, data sets and pretrained networks
  summary     list the layers of a network with their parameters and multiply-adds
  export      export a trained network as ONNX, safetensors, a program for torch.export.load or a model of the Hub
  doctor      check this machine, and print a remedy for each problem
  bench       measure the speed of this program and of alternatives
  completion  print the completion script for bash or zsh

fastresnet COMMAND --help lists the options of a command.
"""
COMMANDS = tuple(re.findall(r"^  (\w+)", _OVERVIEW, re.MULTILINE))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    return guarded(_dispatch, list(sys.argv[1:] if argv is None else argv))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_OVERVIEW, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"fastresnet {__version__}")
        return 0
    check_choice("command", name, COMMANDS)
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
