"""`fastresnet report`: HTML report of a run."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from fastresnet.arguments import Positional, parse
from fastresnet.config import Device
from fastresnet.terminal import check_output, say
from pipelines.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write an HTML report of a finished run: accuracy, curves, most confident mistakes, time and settings."""

    run: Positional[Path]
    """Run folder, such as runs/fast-resnet20-cifar10-seed0."""
    out: Path | None = None
    """File to write. Without it: report.html in the run folder."""
    data: str | None = None
    """Name or folder of the data set that the run was trained on, if it has moved."""
    root: Path | None = None
    """Folder of all data sets, if it has moved. Without it: that of the run, else $FASTRESNET_DATA, else ./data."""
    device: Device = "auto"
    """Device to compute on."""

    def __post_init__(self) -> None:
        check_output("--out", self.out)


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "report", arguments)
    from fastresnet.evaluation import predict_test_set
    from fastresnet.report import page
    from fastresnet.run_folder import read_run
    from pipelines.files import write_bytes

    finished = read_run(options.run)
    if finished.summary is None:
        run = shlex.quote(str(options.run))
        command = f"fastresnet train --config {run}/config.toml --out {run} --resume"
        raise DataError(f"{options.run} is not finished (no summary.json). Finish it: {command}")
    predictions = predict_test_set(options.run, options.data, options.root, options.device)
    path = options.out or options.run / "report.html"
    write_bytes(path, page(finished, predictions).encode())
    say(path)
    return 0
