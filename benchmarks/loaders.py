"""How many images a second each loader delivers, against the peers and the copy bandwidth of the same machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import warnings
from importlib import metadata, util
from pathlib import Path
from typing import Any

from benchmarks.contestant import Contestant, Loader, Work
from benchmarks.report import SCHEMA, draw_chart, print_report
from fastresnet import cli
from fastresnet.config import DEVICES, PRECISIONS
from pipelines.errors import Note, UsageError, check_choice
from pipelines.files import write_bytes
from pipelines.sampling import IMAGE_SIZE
from pipelines.store import Dataset

PIXELS = 3 * IMAGE_SIZE * IMAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadersOptions:
    """Measure every loader on the same work: crop with padding 4, flip and normalise, in random order."""

    data: str = "cifar10"
    """Name or folder of the data set."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    batch_size: int = 512
    """Images per batch."""
    rounds: int = 7
    """Turns that each loader gets."""
    seconds: float = 2.0
    """Length of a turn."""
    quick: bool = False
    """3 rounds of half a second, for a first look."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """Data type of the images: auto, fp32, bf16 or fp16."""
    json: Path | None = None
    """Write the figures to this file."""
    chart: Path | None = None
    """Draw them in this file (.png, .svg or .pdf)."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_choice("precision", self.precision, PRECISIONS)
        cli.check_output("--json", self.json)
        cli.check_output("--chart", self.chart)
        if self.chart is not None:
            check_choice("kind of chart", self.chart.suffix, (".png", ".svg", ".pdf"))
        if self.rounds < 1 or self.seconds <= 0 or self.batch_size < 1:
            raise UsageError(
                f"--rounds {self.rounds} --seconds {self.seconds} --batch-size {self.batch_size}: there is nothing to "
                "measure."
            )


def measure_loaders(options: LoadersOptions) -> None:
    """Run the benchmark, print a table, write the JSON and draw the chart."""
    import torch

    from benchmarks.measurement import copy_bandwidth
    from fastresnet.device import DTYPES, resolve_device, resolve_precision

    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    dataset = cli.find_dataset(options.data, options.root)
    if options.batch_size > len(dataset.train):
        raise UsageError(f"batch size {options.batch_size} is larger than the training set, {len(dataset.train)}.")
    loaders = _available(dataset)
    rounds, seconds = (3, 0.5) if options.quick else (options.rounds, options.seconds)
    work = Work(
        folder=dataset.folder.absolute(),
        batch_size=options.batch_size,
        device=device.type,
        dtype=str(DTYPES[precision]).removeprefix("torch."),
    )
    limits: list[float] = []
    with contextlib.ExitStack() as stack:
        contestants = []
        for loader in loaders:
            contestants.append(Contestant(loader, work))
            stack.callback(contestants[-1].kill)
        for _ in range(rounds):
            limits.append(copy_bandwidth(device))
            for contestant in contestants:
                contestant.take_turn(seconds)
        used = [contestant.finish() for contestant in contestants]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    report = _report(contestants, used, limits, options, device, precision, dataset)
    print_report(report)
    if options.json is not None:
        write_bytes(options.json, json.dumps(report, indent=2).encode())
    if options.chart is not None:
        draw_chart(report, options.chart)


def _available(dataset: Dataset) -> list[Loader]:
    """All contestants whose libraries are installed; a `Note` names the others."""
    cores = os.cpu_count() or 1
    loaders = [
        Loader(name="resident", kind="ours", module="resident"),
        Loader(name="dali", kind="ours", module="dali"),
        Loader(name="ffcv", kind="ours", module="ffcv", compiles=True),
        Loader(name="torchvision", kind="ours", module="torchvision"),
        Loader(name="peer:torchvision-w0", kind="peer", module="torchvision_dataloader"),
        Loader(name="peer:torchvision-wN", kind="peer", module="torchvision_dataloader", workers=cores),
        Loader(name="peer:dali", kind="peer", module="dali_example", workers=cores),
        Loader(name="peer:ffcv", kind="peer", module="ffcv_example", workers=cores, compiles=True),
    ]
    missing = {library for library in ("dali", "ffcv") if not _installed(library)}
    for library in sorted(missing):
        warnings.warn(f"{library} is not installed and takes no part.", Note, stacklevel=2)
    if "ffcv" not in missing:
        from pipelines.convert import prepare

        prepare(dataset.folder.name, dataset.folder.parent, lambda *_: None, formats=("raw", "beton"))
    return [loader for loader in loaders if loader.name.removeprefix("peer:") not in missing]


def _installed(library: str) -> bool:
    return util.find_spec("nvidia" if library == "dali" else library) is not None and (
        library != "dali" or util.find_spec("nvidia.dali") is not None
    )


def _report(
    contestants: list[Contestant],
    used: list[dict[str, Any]],
    limits: list[float],
    options: LoadersOptions,
    device: Any,
    precision: str,
    dataset: Dataset,
) -> dict[str, Any]:
    from benchmarks.measurement import ratio, spread
    from fastresnet.device import DTYPES, environment

    bandwidth = statistics.median(limits)
    # Each pixel must be read as a byte and written in the output's type once.
    roof = bandwidth / (PIXELS * (1 + DTYPES[precision].itemsize))
    rows = [
        {
            "name": contestant.loader.name,
            "kind": contestant.loader.kind,
            **spread(contestant.images_per_s, "images_per_s"),
            "rounds": len(contestant.images_per_s),
            "percent_of_limit": 100 * statistics.median(contestant.images_per_s) / roof,
            **contestant.start,
            **usage,
        }
        for contestant, usage in zip(contestants, used, strict=True)
    ]
    ours, peers = ([c for c in contestants if c.loader.kind == kind] for kind in ("ours", "peer"))
    ratios = [ratio(a.loader.name, a.images_per_s, b.loader.name, b.images_per_s) for a in ours for b in peers]
    surroundings = environment(device)
    for library in ("ffcv", "nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            surroundings["versions"][library] = metadata.version(library)
    return {
        "schema": SCHEMA,
        "benchmark": "loaders",
        "environment": {
            **surroundings,
            "precision": precision,
            "batch_size": options.batch_size,
            "data": dataset.name,
            "data_mb": (dataset.train.images.nbytes + dataset.test.images.nbytes) / 1e6,
        },
        "limits": {"copy_gb_per_s": bandwidth / 1e9, "images_per_s": roof},
        "rows": rows,
        "ratios": ratios,
    }
