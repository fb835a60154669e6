"""How many images a second each pipeline delivers, against the copy bandwidth of the same machine."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastresnet import cli
from fastresnet.config import DEVICES, PRECISIONS
from fastresnet.device import DTYPES, environment, resolve_device, resolve_precision
from pipelines import PIPELINES, Augmentation, Pipeline, open_pipeline
from pipelines.errors import UsageError, check_choice
from pipelines.files import write_bytes
from pipelines.sampling import IMAGE_SIZE

PIXELS = 3 * IMAGE_SIZE * IMAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadersOptions:
    """Measure every pipeline on the same work: crop with padding 4, flip and normalise, in training order."""

    data: str = "cifar10"
    """Name or folder of the data set."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    batch_size: int = 512
    """Images per batch."""
    rounds: int = 7
    """Turns that each pipeline gets."""
    seconds: float = 1.0
    """Length of a turn."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """Data type of the images: auto, fp32, bf16 or fp16."""
    json: Path | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_choice("precision", self.precision, PRECISIONS)
        cli.check_output("--json", self.json)
        if self.rounds < 1 or self.seconds <= 0:
            raise UsageError(f"--rounds {self.rounds} --seconds {self.seconds}: there is nothing to measure.")


def measure_loaders(options: LoadersOptions) -> None:
    """Run the benchmark, print a table and write the JSON."""
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    dataset = cli.find_dataset(options.data, options.root)
    contestants = {name: _Contestant(name, dataset, options, device, DTYPES[precision]) for name in PIPELINES}
    limits: list[float] = []
    for _ in range(options.rounds):
        limits.append(_copy_bandwidth(device))
        for contestant in contestants.values():
            contestant.take_turn(options.seconds)
    for contestant in contestants.values():
        contestant.close()
    report = _report(contestants, limits, options, device, precision)
    _print_report(report, dataset.name)
    if options.json is not None:
        write_bytes(options.json, json.dumps(report, indent=2).encode())


class _Contestant:
    """A pipeline that goes through epoch after epoch, whenever it has its turn."""

    def __init__(self, name, dataset, options: LoadersOptions, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._batch_size = device, options.batch_size
        started = time.perf_counter()
        self.pipeline: Pipeline = open_pipeline(
            name,
            dataset,
            train=True,
            batch_size=options.batch_size,
            device=device,
            dtype=dtype,
            seed=0,
            augmentation=Augmentation(),
        )
        self._batches = self._endless()
        next(self._batches)
        self._wait()
        self.first_batch_s = time.perf_counter() - started
        self.images_per_s: list[float] = []

    def _endless(self):
        epoch = 0
        while True:
            yield from self.pipeline.epoch(epoch)
            epoch += 1

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        """Let go of what the pipeline holds, worker processes above all."""
        self._batches.close()
        self.pipeline.close()

    def take_turn(self, seconds: float) -> None:
        """Deliver batches for about `seconds`, after a third of that untimed, which uses up what was prefetched."""
        self._deliver(seconds / 3)
        self.images_per_s.append(self._deliver(seconds))

    def _deliver(self, seconds: float) -> float:
        """Images per second over at least `seconds` and one batch."""
        started, batches = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds or not batches:
            next(self._batches)
            self._wait()
            batches += 1
        return batches * self._batch_size / elapsed


def _copy_bandwidth(device: torch.device, size: int = 256 << 20) -> float:
    """Bytes a second that a large copy reads and writes together on `device`; the best of 5."""
    source = torch.ones(size, dtype=torch.uint8, device=device)  # pages never written would all be one cached page
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def _report(
    contestants: dict[str, _Contestant],
    limits: list[float],
    options: LoadersOptions,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    bandwidth = statistics.median(limits)
    # Each pixel must be read as a byte and written in the output's type once.
    roof = bandwidth / (PIXELS * (1 + DTYPES[precision].itemsize))
    rows = [
        {
            "name": name,
            "kind": "ours",
            **_spread(contestant.images_per_s, "images_per_s"),
            "rounds": len(contestant.images_per_s),
            "first_batch_s": contestant.first_batch_s,
            "percent_of_limit": 100 * statistics.median(contestant.images_per_s) / roof,
        }
        for name, contestant in contestants.items()
    ]
    first, *others = contestants
    ratios = [
        {"name": first, "over": other, **_spread(_ratios(contestants[first], contestants[other]), "median")}
        for other in others
    ]
    return {
        "schema": 1,
        "benchmark": "loaders",
        "environment": {**environment(device), "precision": precision, "batch_size": options.batch_size},
        "limits": {"copy_gb_per_s": bandwidth / 1e9, "images_per_s": roof},
        "rows": rows,
        "ratios": ratios,
    }


def _ratios(a: _Contestant, b: _Contestant) -> list[float]:
    return [x / y for x, y in zip(a.images_per_s, b.images_per_s, strict=True)]


def _spread(values: list[float], name: str) -> dict[str, float]:
    prefix = "" if name == "median" else f"{name}_"
    return {name: statistics.median(values), f"{prefix}low": min(values), f"{prefix}high": max(values)}


def _print_report(report: dict[str, Any], data: str) -> None:
    surroundings = report["environment"]
    table = Table(
        title=f"Loaders: {data}, batches of {surroundings['batch_size']}, {surroundings['precision']}, "
        f"{surroundings['device']}",
        title_justify="left",
    )
    for heading in ("pipeline", "images/s", "lowest", "highest", "of the copy limit", "first batch"):
        table.add_column(heading, justify="left" if heading == "pipeline" else "right")
    for row in report["rows"]:
        table.add_row(
            row["name"],
            *(f"{row[key]:,.0f}" for key in ("images_per_s", "images_per_s_low", "images_per_s_high")),
            f"{row['percent_of_limit']:.1f} %",
            f"{row['first_batch_s']:.2f} s",
        )
    console = Console()
    console.print(table)
    for ratio in report["ratios"]:
        console.print(
            f"{ratio['name']} / {ratio['over']}: {ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f})",
            highlight=False,
        )
    limits = report["limits"]
    console.print(
        f"copy limit: {limits['images_per_s']:,.0f} images/s at {limits['copy_gb_per_s']:.1f} GB/s, read and written",
        highlight=False,
    )
