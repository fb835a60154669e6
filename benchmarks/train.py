"""Throughput of end-to-end training, compared with the same network in other training loops."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks import report
from benchmarks.runner import Case, Epochs, WaitTimer, Work, Worker, WorkerOptions, describe_work, measure_workers
from fastresnet.config import CAPTURED, COMPILE, Compile
from fastresnet.models import list_models
from pipelines.base import usable_processors
from pipelines.errors import check_choice

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(WorkerOptions):
    """Measure end-to-end training: batches, steps and metrics, without evaluation.

    The plain loop computes in fp32, the timm-style one in bf16, regardless of --precision.
    """

    model: str = "resnet20"
    """Network that every loop trains."""
    seconds: float = 8.0
    """Length of a turn."""
    compile: Compile = "auto"
    """Compilation of this program: off, on, graph or auto: graph on a GPU, on a CPU the faster of off and on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model", self.model, list_models())


def measure_training(options: TrainingOptions) -> None:
    """Run the benchmark, print a table, write the JSON and draw the chart."""
    dataset, device, work = describe_work(options)
    work, backend = _settle(options, work, device)
    ours = {"model": options.model, "backend": backend}
    peers = {"model": options.model, "workers": usable_processors()}
    cases = [
        Case(name="resident", opener=f"{__name__}:open_ours", options=ours | {"data": True}, needed=True),
        Case(name="step-only", opener=f"{__name__}:open_ours", options=ours | {"data": False}),
        Case(name="peer:plain-torch", opener=f"{__name__}:open_peer", options=peers | {"module": "plain_torch"}),
        Case(name="peer:timm-style", opener=f"{__name__}:open_peer", options=peers | {"module": "timm_style"}),
    ]
    summarize = functools.partial(_result, options.batch_size)
    measure_workers(options, 3.0, cases, work, {"data": dataset.name, **ours}, summarize)


def _settle(options: TrainingOptions, work: Work, device: torch.device) -> tuple[Work, str]:
    """Choose the threads of the work, and the backend, as `fastresnet train` does for a long run."""
    import torch

    from benchmarks.cases import create_step
    from fastresnet.device import explained_failures, resolve_compile
    from fastresnet.threads import settled_threads
    from fastresnet.training.execution import PAYS_AFTER_STEPS, choose_backend

    compile_ = resolve_compile(options.compile, device)
    if device.type != "cpu":
        return work, COMPILE["graph" if compile_ == "auto" else compile_]
    with explained_failures("give a smaller --batch-size"), contextlib.closing(work.open_pipeline("resident")) as data:
        batch, step = next(data.epoch(0)), create_step(options.model, work.precision, device, [1.0] * len(data))

        def trial(images: int) -> None:
            step.trial(batch.images[:images], batch.labels[:images])

        with settled_threads(options.threads, device, trial, options.batch_size, 2) as reason:
            if reason:
                print(reason)
            work = dataclasses.replace(work, threads=torch.get_num_threads())
            if compile_ != "auto":
                return work, COMPILE[compile_]
            return work, "eager" if options.quick else choose_backend(step, batch, PAYS_AFTER_STEPS[device.type])[0]


def open_ours(work: Work, timer: WaitTimer, *, model: str, backend: str, data: bool) -> Epochs:
    """Open this program's loop, as `fastresnet train` runs it; without `data`, on one batch repeatedly."""
    from benchmarks.cases import SameBatch, create_step
    from fastresnet.device import resolve_device
    from fastresnet.training.execution import Execution
    from fastresnet.training.kernels import choose_kernels
    from fastresnet.training.loop import STATUS_EVERY

    device = resolve_device(work.device)
    pipeline = work.open_pipeline("resident")
    batch = next(pipeline.epoch(0))
    if not data:
        pipeline = SameBatch(batch, len(pipeline))
    step = create_step(model, work.precision, device, [1.0] * len(pipeline))
    if device.type == "cuda":
        choose_kernels(step, batch, captured=backend in CAPTURED)
    execution = Execution(step, pipeline, backend)
    execution.prepare(batch)

    def epoch(number: int) -> Iterator[None]:
        step.count.zero_()  # restart the learning rates
        for taken, _ in enumerate(execution.steps(number, 0, len(pipeline))):
            if taken % STATUS_EVERY[device.type] == 0:
                step.failed_at()
                step.metrics()
            timer.seconds = execution.wait_seconds
            yield

    return epoch


def open_peer(work: Work, timer: WaitTimer, *, module: str, model: str, workers: int) -> Epochs:
    """Open a loop of `benchmarks.peers` on the same network."""
    import torch

    from fastresnet.models import create_model
    from pipelines.store import open_store

    return importlib.import_module(f"benchmarks.peers.{module}").open_training(
        open_store(work.folder),
        create_model(model),
        timer,
        batch_size=work.batch_size,
        device=torch.device(work.device),
        workers=workers,
    )


def _result(batch_size: int, workers: list[Worker]) -> report.Result:
    rows = [
        worker.row(ms_per_step=1000 * batch_size / statistics.median(worker.images_per_s), waiting_percent=0.0)
        for worker in workers
    ]
    resident, *others = workers
    step_only = [row["images_per_s"] for row in rows if row["name"] == "step-only"]
    compare = functools.partial(report.ratio, resident.case.name, resident.images_per_s)
    return {
        "benchmark": "train",
        "limits": {"step_only_images_per_s": step_only[0]} if step_only else {},
        "rows": rows,
        "ratios": [compare(other.case.name, other.images_per_s) for other in others],
    }


def tables(result: report.Result) -> list[Table]:
    """Create the tables of figures and of ratios to the other loops."""
    columns = [
        ("loop", lambda row: row["name"]),
        ("1000 images/s", report.throughput),
        ("per step", lambda row: f"{row['ms_per_step']:.1f} ms"),
        ("waiting", lambda row: f"{row['waiting_percent']:.1f} %"),
        ("1st step", lambda row: f"{row['first_batch_s']:.1f} s"),
        report.memory(result["rows"]),
    ]
    environment = result["environment"]
    heading = f"Training {environment['model']}, {environment['backend']}: {report.title(result)}"
    return [report.figures_table(result["rows"], heading, columns), report.ratios_table(result)]


def notes(result: report.Result) -> list[str]:
    """Explain waiting and memory, which the tables do not."""
    return [
        "waiting: share of the time in which the loop waits for its next batch; memory excludes PyTorch's own",
        *report.common_notes(result),
    ]


def markdown_table(result: report.Result) -> str:
    """Format figures and ratios as Markdown."""
    columns = [
        ("loop", lambda row: row["name"]),
        ("waiting for data", lambda row: f"{row['waiting_percent']:.1f} %"),
        report.memory(result["rows"]),
    ]
    return report.markdown(result, columns)


def draw_chart(result: report.Result, path: Path) -> None:
    """Draw bars of images/s."""
    report.draw_bars(result, path, f"Training {result['environment']['model']}")
