"""Throughput of every loader, compared with its peers and the copy bandwidth of the same machine."""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks import report
from benchmarks.runner import Case, Epochs, WaitTimer, Work, Worker, WorkerOptions, describe_work, measure_workers
from pipelines import LIBRARIES, PIPELINES
from pipelines.base import is_installed, usable_processors
from pipelines.errors import Note
from pipelines.prepare import prepare
from pipelines.sampling import IMAGE_SIZE
from pipelines.store import Dataset

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.base import GatheringPipeline

PIXELS = 3 * IMAGE_SIZE * IMAGE_SIZE

PEERS = {
    "torchvision-w0": ("torchvision_dataloader", "torchvision"),
    "torchvision-wN": ("torchvision_dataloader", "torchvision"),
    "torchvision-v2-batch": ("torchvision_v2_batch", "torchvision"),
    "torchdata-nodes": ("torchdata_nodes", "torchdata"),
    "spdl": ("spdl_threads", "spdl"),
    "dali": ("dali_example", "dali"),
    "dali-torchvision": ("dali_torchvision", "dali"),
    "ffcv": ("ffcv_example", "ffcv"),
    "airbench": ("airbench_loader", "airbench"),
}
"""Peers: the module in `benchmarks.peers` and the library that it needs."""
MODULES = {**LIBRARIES, "airbench": "airbench", "spdl": "spdl", "torchdata": "torchdata"}
"""Modules of the libraries that pipelines and peers need."""
EXTRAS = {"dali": "dali", "ffcv": "ffcv", "airbench": "peers", "spdl": "peers", "torchdata": "peers"}
"""Extras of this package that install them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadersOptions(WorkerOptions):
    """Measure every loader on the same work: crop with padding 4, flip and normalise, in random order."""

    batch_size: int = 512
    """Images per batch."""


def measure_loaders(options: LoadersOptions) -> None:
    """Run the benchmark, print a table, write the JSON and draw the chart."""
    from benchmarks.roofline import copy_bandwidth
    from fastresnet.provenance import versions_of

    dataset, device, work = describe_work(options)
    limits = list[float]()

    def summarize(workers: list[Worker]) -> report.Result:
        limits.append(copy_bandwidth(device))
        return {"missing": missing, **_result(workers, statistics.median(limits), work.precision)}

    cases, missing = _available(dataset, device.type)
    data_mb = (dataset.train.images.nbytes + dataset.test.images.nbytes) / 1e6
    facts = {"data": dataset.name, "data_mb": data_mb, "versions": versions_of("airbench", "spdl_core", "torchdata")}
    measure_workers(options, 0.5, cases, work, facts, summarize)


def open_ours(work: Work, _: WaitTimer, *, pipeline: str) -> Epochs:
    """Open a pipeline of this program, with batches delivered as in training."""
    from pipelines.base import GatheringPipeline

    opened = work.open_pipeline(pipeline)
    return _recorded_epochs(opened) if isinstance(opened, GatheringPipeline) else opened.epoch


def _recorded_epochs(pipeline: GatheringPipeline) -> Epochs:
    """Record the gathering of a batch as a CUDA graph, like the start of a training step; replay it for each batch."""
    import torch

    from fastresnet.compilation import torch_compile
    from fastresnet.device import recorded

    gather = torch_compile(pipeline.gather, fullgraph=True, dynamic=False)
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    batch: list[Tensor] = []

    def gather_next() -> None:
        batch[:] = gather(step % len(pipeline))
        step.add_(1)

    replay = recorded(gather_next)

    def epoch(number: int) -> Iterator[list[Tensor]]:
        pipeline.load(number)
        step.zero_()
        for _ in range(len(pipeline)):
            replay()
            yield batch

    return epoch


def open_peer(work: Work, _: WaitTimer, *, module: str, workers: int) -> Epochs:
    """Open a loader of `benchmarks.peers` with `workers` processes or threads."""
    import torch

    from fastresnet.device import DTYPES
    from pipelines.store import open_store

    loader = importlib.import_module(f"benchmarks.peers.{module}").open_loader(
        open_store(work.folder),
        batch_size=work.batch_size,
        device=torch.device(work.device),
        dtype=DTYPES[work.precision],
        workers=workers,
    )
    return lambda _: loader


def _available(dataset: Dataset, device: str) -> tuple[list[Case], dict[str, str]]:
    """List the cases that can run here, and the reasons of the others by name; a `Note` names these."""
    every = [*(_ours(name, device) for name in PIPELINES), *map(_peer, PEERS)]
    reasons = {case.name: _reason(case.name) for case in every}
    missing = {name: f"{name}: {reason}" for name, reason in reasons.items() if reason}
    if missing:
        warnings.warn(f"left out, for the reasons below the table: {', '.join(missing)}", Note, stacklevel=2)
    if "ffcv" not in missing:
        folder = dataset.folder.absolute()
        prepare(folder.name, folder.parent, lambda *_: None, formats=("raw", "beton"))
    return [case for case in every if case.name not in missing], missing


def _reason(name: str) -> str:
    """Return the reason for which the case `name` cannot run here, if any."""
    import torch

    peer = name.removeprefix("peer:")
    library = PEERS[peer][1] if peer != name else name
    if library in MODULES and not is_installed(MODULES[library]):
        package = f"'fastresnet[{EXTRAS[library]}]'" if library in EXTRAS else library
        return f"{library} is not installed (pip install {package})"
    if peer == "dali-torchvision" and not torch.cuda.is_available():
        return "DALI's Compose needs an NVIDIA driver, also on the CPU"
    return ""


def _ours(name: str, device: str) -> Case:
    compiles = name == "ffcv" or (name, device) == ("resident", "cuda")
    return Case(name=name, opener=f"{__name__}:open_ours", options={"pipeline": name}, compiles=compiles)


def _peer(name: str) -> Case:
    return Case(
        name=f"peer:{name}",
        opener=f"{__name__}:open_peer",
        options={"module": PEERS[name][0], "workers": 0 if name == "torchvision-w0" else usable_processors()},
        compiles=name == "ffcv",
        whole_epochs=name == "airbench",
    )


def _result(workers: list[Worker], bandwidth: float, precision: str) -> report.Result:
    from fastresnet.device import DTYPES

    # Each pixel must be read as a byte and written in the output's type once.
    roof = bandwidth / (PIXELS * (1 + DTYPES[precision].itemsize))
    rows = [worker.row(percent_of_limit=100 * statistics.median(worker.images_per_s) / roof) for worker in workers]
    ours, peers = ([c for c in workers if c.case.kind == kind] for kind in ("ours", "peer"))
    ratios = [report.ratio(a.case.name, a.images_per_s, b.case.name, b.images_per_s) for a in ours for b in peers]
    limits = {"copy_gb_per_s": bandwidth / 1e9, "images_per_s": roof}
    return {"benchmark": "loaders", "limits": limits, "rows": rows, "ratios": ratios}


def tables(result: report.Result) -> list[Table]:
    """Create the tables of figures and of ratios to the peers."""
    columns = [
        ("loader", lambda row: row["name"]),
        ("1000 images/s", report.throughput),
        ("of limit", lambda row: f"{row['percent_of_limit']:.1f} %"),
        ("1st batch", lambda row: f"{row['first_batch_s']:.2f} s"),
        report.memory(result["rows"]),
        ("proc/thr", lambda row: f"{row['processes']}/{row['threads']}"),
    ]
    figures = report.figures_table(result["rows"], f"Loaders: {report.title(result)}", columns)
    return [figures, report.ratios_table(result)]


def notes(result: report.Result) -> list[str]:
    """Explain compilations, the limit and memory, which the tables do not."""
    limits = result["limits"]
    return [
        *(
            f"{row['name']}: {row['compile_s']:.1f} s of the {row['first_batch_s']:.1f} s to the first batch are "
            f"{_compiler(row)}'s compilation"
            for row in result["rows"]
            if "compile_s" in row
        ),
        f"copy limit: {limits['images_per_s']:,.0f} images/s at {limits['copy_gb_per_s']:.1f} GB/s, read and written; "
        f"memory excludes PyTorch's own; the data set has {result['environment']['data_mb']:.0f} MB",
        *report.common_notes(result),
    ]


def markdown_table(result: report.Result) -> str:
    """Format figures and ratios as Markdown."""
    columns = [
        ("loader", lambda row: row["name"]),
        ("of the limit", lambda row: f"{row['percent_of_limit']:.1f} %"),
        ("first batch", _first_batch),
        report.memory(result["rows"]),
    ]
    return report.markdown(result, columns)


def _compiler(row: dict[str, Any]) -> str:
    return "numba" if "ffcv" in row["name"] else "torch.compile"


def _first_batch(row: dict[str, Any]) -> str:
    compilation = f", {row['compile_s']:.1f} s of it {_compiler(row)}" if "compile_s" in row else ""
    return f"{row['first_batch_s']:.2f} s{compilation}"


def draw_chart(result: report.Result, path: Path) -> None:
    """Draw bars of images/s, and the copy limit."""
    report.draw_bars(result, path, "Loaders", (result["limits"]["images_per_s"], "copy limit of the machine"))
