"""`fastresnet plot`: plots of runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastresnet.arguments import Positional, parse
from fastresnet.config import Device
from fastresnet.terminal import check_output, load_torch, progress_line, say
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from fastresnet.figures import Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Plot the curves of one or several runs, or the confusion matrix or most confident mistakes of one."""

    runs: Positional[tuple[Path, ...]]
    """Run folders, such as runs/fast-resnet20-cifar10-seed0."""
    kind: Literal["curves", "confusion", "mistakes"] = "curves"
    """curves, confusion (matrix of the test set), or mistakes (most confident mistakes on the test set)."""
    out: Path | None = None
    """File to write, .png or .svg. Without it: KIND.png in the run folder, or here if there are several runs."""
    data: str | None = None
    """Name or folder of the data set that the run was trained on, if it has moved."""
    root: Path | None = None
    """Folder of all data sets, if it has moved. Without it: that of the run, else $FASTRESNET_DATA, else ./data."""
    device: Device = "auto"
    """Device to compute on."""

    def __post_init__(self) -> None:
        check_output("--out", self.out, (".png", ".svg"))
        if self.kind != "curves" and len(self.runs) > 1:
            raise UsageError(f"--kind {self.kind} takes only one run.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "plot", arguments)
    load_torch()
    from fastresnet.plotting import save_figure

    folder = options.runs[0] if len(options.runs) == 1 else Path()
    path = options.out or folder / f"{options.kind}.png"
    save_figure(_figure(options), path)
    say(path)
    return 0


def _figure(options: Options) -> Figure:
    from fastresnet.plotting import curves
    from fastresnet.run_folder import named, read_run

    if options.kind == "curves":
        return curves(named([read_run(folder) for folder in options.runs]))

    from fastresnet.evaluation import predict_test_set

    with progress_line() as report:
        predictions = predict_test_set(options.runs[0], options.data, options.root, options.device, report)
    return predictions.confusion() if options.kind == "confusion" else predictions.mistakes()
