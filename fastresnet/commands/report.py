"""`fastresnet report`: HTML report of runs, as a file or over HTTP."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from fastresnet.arguments import Positional, parse
from fastresnet.config import Device
from fastresnet.terminal import check_output, load_torch, progress_line, say
from pipelines.errors import UsageError, note


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write an HTML report of a run: accuracy, curves, mistakes, time and settings; of several, their comparison."""

    runs: Positional[tuple[Path, ...]]
    """Run folders, such as runs/fast-resnet20-cifar10-seed0."""
    out: Path | None = None
    """File to write. Without it: report.html in the run folder, or here if there are several runs."""
    serve: int | None = None
    """Show the page at this port of 127.0.0.1 instead, up to date while the runs are trained; 0: a free port."""
    data: str | None = None
    """Name or folder of the data set that the run was trained on, if it has moved."""
    root: Path | None = None
    """Folder of all data sets, if it has moved. Without it: that of the run, else $FASTRESNET_DATA, else ./data."""
    device: Device = "auto"
    """Device to compute on."""

    def __post_init__(self) -> None:
        check_output("--out", self.out)
        if self.serve is not None and not 0 <= self.serve < 1 << 16:
            raise UsageError(f"--serve {self.serve} is not a port, 0..65535.")
        if self.serve is not None and (self.out or self.data or self.root or self.device != "auto"):
            raise UsageError("--serve cannot be combined with --out, --data, --root or --device: it writes no page.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "report", arguments)
    load_torch()
    if options.serve is not None:
        return _serve(options.runs, options.serve)
    from fastresnet.evaluation import predict_test_set
    from fastresnet.report import page
    from fastresnet.run_folder import read_run
    from pipelines.files import write_bytes

    runs = [read_run(folder) for folder in options.runs]
    for each in runs:
        if each.summary is None:
            folder = shlex.quote(str(each.folder))
            command = f"fastresnet train --config {folder}/config.toml --out {folder} --resume"
            note(f"{each.folder} is not finished. Finish it: {command}")
    predictions = None
    if len(runs) == 1 and runs[0].summary is not None:
        with progress_line() as report:
            predictions = predict_test_set(options.runs[0], options.data, options.root, options.device, report)
    path = options.out or (options.runs[0] if len(runs) == 1 else Path()) / "report.html"
    write_bytes(path, page(runs, predictions).encode())
    say(path)
    return 0


def _serve(runs: tuple[Path, ...], port: int) -> int:
    from fastresnet.live import LiveServer

    with LiveServer(runs, port) as server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0
