"""usage: fastresnet bench COMMAND [OPTIONS], or python -m benchmarks COMMAND [OPTIONS]

Measure this program and what people would use instead of it, in turns, on this machine.

  loaders   images/s of the data pipelines, and of torchvision, DALI and FFCV as their users write them
  step      images/s of the training step and of inference alone, and how near they come to the hardware's limit
  train     images/s of training from end to end, and of other people's loops
  all       the three of them, with results and charts in a folder
  show      the tables of a result that was written with --json
  compare   the ratios of two results, and what became slower
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loaders import LoadersOptions, measure_loaders
from benchmarks.show import CompareOptions, ShowOptions, compare, show
from benchmarks.steps import StepOptions, measure_steps
from benchmarks.training import TrainingOptions, measure_training
from fastresnet import terminal
from fastresnet.config import DEVICES
from fastresnet.threads import Threads, check_threads
from pipelines.errors import check_choice


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AllOptions:
    """Run the benchmarks loaders, step and train one after the other."""

    data: str = "cifar10"
    """Name or folder of the data set."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: Threads = "auto"
    """Threads that PyTorch computes with on a CPU: a number, or auto, for which a few trial steps decide."""
    quick: bool = False
    """A first look, in under 5 minutes on 2 CPU cores."""
    out: Path = Path("bench")
    """Folder for the results, loaders.json, loaders.png and so on; made if it is not there."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_threads(self.threads)


def measure_all(options: AllOptions) -> None:
    """Run every benchmark with its own defaults."""
    options.out.mkdir(parents=True, exist_ok=True)

    def common(name: str) -> dict:
        files = {"json": options.out / f"{name}.json", "chart": options.out / f"{name}.png"}
        return {"device": options.device, "threads": options.threads, "quick": options.quick, **files}

    measure_loaders(LoadersOptions(data=options.data, root=options.root, **common("loaders")))
    measure_steps(StepOptions(**common("step")))
    measure_training(TrainingOptions(data=options.data, root=options.root, **common("train")))


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "loaders": (LoadersOptions, measure_loaders),
    "step": (StepOptions, measure_steps),
    "train": (TrainingOptions, measure_training),
    "all": (AllOptions, measure_all),
    "show": (ShowOptions, show),
    "compare": (CompareOptions, compare),
}


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, end="")
        return 0 if arguments else 2
    check_choice("benchmark", arguments[0], COMMANDS)
    options, run = COMMANDS[arguments[0]]
    run(terminal.parse(options, f"bench {arguments[0]}", arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(terminal.guarded(main, sys.argv[1:]))
