"""Throughput of the training step and of inference alone, without data, compared with the machine's roofline.

One parameter at a time is varied from a base case: network, batch size, precision, memory format, backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.runner import BenchmarkOptions, Failures, OtherLoad
from fastresnet import terminal
from fastresnet.config import CAPTURED
from fastresnet.console import PlainConsole
from fastresnet.models import list_models
from fastresnet.threads import settled_threads
from pipelines.errors import RunError, UsageError, check_choice

if TYPE_CHECKING:
    import torch

    from benchmarks.cases import StepCase, TimedParts, TimedStep

Value = TypeVar("Value")

MODELS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
BATCH_SIZES = {"cpu": (32, 64, 128, 256, 512), "cuda": (128, 256, 512, 1024, 2048, 4096)}
BACKENDS = {"cpu": ("eager", "compile"), "cuda": ("eager", "compile", "capture", "graph")}

QUICK_MODELS = ("resnet20", "resnet56")
QUICK_BATCH_SIZES = {"cpu": (32, 128, 512), "cuda": (128, 1024)}
QUICK_BACKENDS = {"cpu": ("eager",), "cuda": ("eager", "graph")}

MEMORY_FORMATS = {"channels_last": "NHWC", "contiguous": "NCHW"}
"""Memory formats, and their names in tables."""

_BOUNDS = {"compute": "FLOPs", "memory": "bytes"}

_COMPARISONS = (
    ("precision", "bf16", "fp32"),
    ("precision", "fp16", "fp32"),
    ("memory_format", "channels_last", "contiguous"),
    ("backend", "compile", "eager"),
    ("backend", "capture", "eager"),
    ("backend", "graph", "eager"),
)
"""Field, value, and the value that it is compared with, in cases that differ in nothing else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(BenchmarkOptions):
    """Measure the optimisation step and inference alone, on random images on the device.

    One parameter at a time is varied from a base: training resnet20 on batches of 128 in the best precision and
    channels_last. The base is eager on a CPU and a CUDA graph on a GPU.
    """

    models: tuple[str, ...] = ()
    """Networks to train. Without it: resnet20, 32, 44, 56 and 110."""
    batch_sizes: tuple[int, ...] = ()
    """Images per step, in training and inference. Without it: 32 to 512 on a CPU, 128 to 4096 on a GPU."""
    precisions: tuple[Literal["fp32", "bf16", "fp16"], ...] = ()
    """fp32, bf16 or fp16. Without it: fp32 and bf16, and fp16 on a GPU."""
    backends: tuple[Literal["eager", "compile", "capture", "graph"], ...] = ()
    """eager, compile, capture or graph. Without it: all that the device supports (compiling takes a minute on 2 CPU
    cores)."""
    seconds: float = 1.0
    """Length of a turn."""
    profile: Path | None = None
    """Write a trace of a few steps of the base case to this file (.json), for chrome://tracing or ui.perfetto.dev."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for model in self.models:
            check_choice("model", model, list_models())
        terminal.check_output("--profile", self.profile, (".json",))
        if min(self.batch_sizes, default=1) < 1:
            raise UsageError(f"--batch-sizes {' '.join(map(str, self.batch_sizes))}: give 1 or more.")


def measure_steps(options: StepOptions) -> None:
    """Run the benchmark, print tables, write the JSON and draw the chart."""
    from benchmarks.cases import trial_step
    from fastresnet.device import resolve_device

    device = resolve_device(options.device)
    cases = _sweep(options, device)
    tried = dataclasses.replace(cases[0], batch_size=min(cases[0].batch_size, 128))
    with settled_threads(options.threads, device, trial_step(tried, device), tried.batch_size, 2) as reason:
        if reason:
            print(reason)
        _measure_cases(options, cases, device)


def _measure_cases(options: StepOptions, cases: Sequence[StepCase], device: torch.device) -> None:
    import torch

    from benchmarks.cases import TimedParts, TimedStep, unlimited_compilation
    from benchmarks.roofline import Limits
    from fastresnet.device import explained_failures
    from fastresnet.provenance import environment

    base, load, failures = cases[0], OtherLoad(), Failures()
    of_base = {key: value for key, value in dataclasses.asdict(base).items() if key != "mode"}
    facts = {**environment(device), **of_base}
    rounds, seconds = (3, 0.4) if options.quick else (options.rounds, options.seconds)
    limits = Limits(device, tuple(dict.fromkeys(case.precision for case in cases)))
    split = [dataclasses.replace(case, backend="eager") for case in cases if case is base or case.model != base.model]
    planned: dict[str, tuple[type[TimedStep | TimedParts], StepCase]] = {case.name: (TimedStep, case) for case in cases}
    planned |= {f"parts of {case.name}": (TimedParts, case) for case in split}
    ready: dict[str, TimedStep | TimedParts] = {}
    with unlimited_compilation(), _progress((1 + rounds) * len(planned)) as show:
        for number in range(rounds):
            limits.measure()
            for name, (kind, case) in planned.items():
                if name in failures:
                    continue
                advice = f"{case.name} does not fit; give smaller --batch-sizes"
                with failures.left_out(name), explained_failures(advice):
                    # Preparing may take half a minute: earlier cases have been measured, and written, by then.
                    if number == 0:
                        show(f"preparing {case.name}")
                        ready[name] = kind(case, device)
                    show(f"round {number + 1} of {rounds}: {name}")
                    ready[name].measure(seconds)
                if name in failures:
                    ready.pop(name, None)
                facts |= load.figures(torch.get_num_threads() if device.type == "cpu" else 1)
                result = _result(list(ready.values()), failures, limits.to_dict(), facts)
                report.write_result(result, options.json)
    for name, step in ready.items():  # last, as a profiler slows the steps down
        if isinstance(step, TimedStep):
            with failures.left_out(f"kernels of {name}"):
                step.count_kernels()
    result = _result(list(ready.values()), failures, limits.to_dict(), facts)
    report.write_result(result, options.json)
    if not result["rows"]:
        raise RunError("every case has failed: there is nothing to show.")
    profiled, operators = ready.get(base.name), list[Table]()
    if options.profile is not None and isinstance(profiled, TimedStep):
        operators.append(_operators_table(base, profiled.profile(options.profile)))
    report.show_result(result, options.chart, *operators)


# --- cases --------------------------------------------------------------------------------------------


def _sweep(options: StepOptions, device: torch.device) -> list[StepCase]:
    """List the cases, each once: the base, then those that differ from it in one parameter, or are inference."""
    from benchmarks.cases import StepCase
    from fastresnet.device import resolve_precision, supports

    quick, kind = options.quick, device.type
    models = options.models or (QUICK_MODELS if quick else MODELS)
    batch_sizes = options.batch_sizes or (QUICK_BATCH_SIZES if quick else BATCH_SIZES)[kind]
    backends = options.backends or (QUICK_BACKENDS if quick else BACKENDS)[kind]
    if kind != "cuda" and (recorded := set(CAPTURED) & set(backends)):
        raise UsageError(f"--backends {min(recorded)} records a CUDA graph, which needs a GPU. Use --backends compile.")
    usual = ("fp32", "bf16", "fp16") if kind == "cuda" else ("fp32", "bf16")
    precisions = options.precisions or [precision for precision in usual if supports(precision, device)]
    for precision in precisions:
        resolve_precision(precision, device)  # refuses one that the device does not support
    base = StepCase(
        mode="train",
        model=_preferred("resnet20", models),
        batch_size=_preferred(128, batch_sizes),
        precision=_preferred(resolve_precision("auto", device), precisions),
        memory_format="channels_last",
        backend=_preferred("graph" if kind == "cuda" else "eager", backends),
    )
    variants: list[dict[str, Any]] = [
        {},
        *({"model": model} for model in models),
        *({"batch_size": size} for size in batch_sizes),
        *({"mode": "inference", "batch_size": size} for size in batch_sizes),
        *({"precision": precision} for precision in precisions),
        *({"memory_format": memory_format} for memory_format in MEMORY_FORMATS),
        *({"backend": backend} for backend in backends),
    ]
    return list(dict.fromkeys(dataclasses.replace(base, **variant) for variant in variants))


def _preferred(value: Value, among: Sequence[Value]) -> Value:
    return value if value in among else among[0]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on a terminal, drawn only between turns: a thread that draws would disturb them."""
    console = PlainConsole(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, description=text, advance=1, refresh=True)


# --- figures -----------------------------------------------------------------------------------------------------


def _result(
    ready: list[TimedStep | TimedParts], failures: Failures, limits: dict[str, Any], facts: dict[str, Any]
) -> report.Result:
    from benchmarks.cases import TimedParts, TimedStep

    steps = [each for each in ready if isinstance(each, TimedStep)]
    return {
        "schema": report.SCHEMA,
        "benchmark": "step",
        "environment": facts,
        "limits": limits,
        "rows": [step.row(limits) for step in steps],
        "splits": [each.row() for each in ready if isinstance(each, TimedParts)],
        "ratios": _ratios(steps),
        "failed": failures,
    }


def _ratios(steps: list[TimedStep]) -> list[dict[str, Any]]:
    by_case = {step.case: step for step in steps}
    ratios = []
    for field, value, over in _COMPARISONS:
        changed: dict[str, Any] = {field: over}
        for case, step in by_case.items():
            other = by_case.get(dataclasses.replace(case, **changed))
            if getattr(case, field) == value and other is not None:
                ratios.append(report.ratio(case.name, step.images_per_s, other.case.name, other.images_per_s))
    return ratios


# --- tables and chart --------------------------------------------------------------------------------------------


def tables(result: report.Result) -> list[Table]:
    """Create the tables of training, inference, the parts of a training step, and the ratios."""
    made = [_figures_table(result, "Training step", "train"), _figures_table(result, "Inference", "inference")]
    return [*made, _splits_table(result), _ratios_table(result)]


def notes(result: report.Result) -> list[str]:
    """Explain the limits that the tables refer to."""
    limits = result["limits"]
    rates = ", ".join(f"{report.short(rate, 3)} TFLOP/s in {name}" for name, rate in limits["matmul_tflops"].items())
    lines = [
        f"limits: {limits['copy_gb_per_s']:.1f} GB/s copied, read and written; matrix products at {rates}",
        "roof: the images/s at which the FLOPs counted at that rate, or the bytes that eager operators read and write "
        "at that speed, take all of the time, whichever takes longer (named beside the percentage)",
    ]
    if faster := [row["name"] for row in result["rows"] if row["percent_of_roof"] > 100]:
        lines.append(
            f"faster than its roof: {', '.join(faster)}; small tensors stay in the caches, and fused operators do not "
            "write intermediate tensors"
        )
    return lines + report.common_notes(result)


def _base(result: report.Result) -> str:
    environment = result["environment"]
    return (
        f"{environment['model']}, batches of {environment['batch_size']}, {environment['precision']}, "
        f"{environment['memory_format']}, {environment['backend']}"
    )


def _figures_table(result: report.Result, heading: str, mode: str) -> Table:
    columns: list[report.Column] = [
        ("", _short_name),
        ("1000 images/s", report.throughput),
        ("ms/step", lambda row: report.short(row["ms_per_step"], 3)),
        ("of roof", lambda row: f"{row['percent_of_roof']:.0f} % {_BOUNDS[row['bound']]}"),
    ]
    rows = [row for row in result["rows"] if row["mode"] == mode]
    if any("kernels_per_step" in row for row in rows):
        columns.append(("MB, eager", lambda row: f"{row['bytes_per_image'] * row['batch_size'] / 1e6:,.0f}"))
        columns.append(("kernels", lambda row: f"{row['kernels_per_step']['calls']:,.0f}"))
    if any("gpu_memory_mb" in row for row in rows):
        columns.append(("GPU memory", lambda row: f"{row['gpu_memory_mb']:,.0f} MB"))
    return report.figures_table(rows, f"{heading}: {result['environment']['device']}", columns)


def _short_name(row: dict[str, Any]) -> str:
    memory_format = MEMORY_FORMATS[row["memory_format"]]
    return f"{row['model']} b{row['batch_size']} {row['precision']} {memory_format} {row['backend']}"


def _splits_table(result: report.Result) -> Table:
    environment = result["environment"]
    where = f"batches of {environment['batch_size']}, {environment['precision']}, {environment['memory_format']}"
    made = report.table(f"Parts of an eager step: {where}", "model", "forward", "backward", "optimizer", "total")
    for split in result["splits"]:
        parts = _split_ms(split)
        cells = (f"{report.short(ms, 3)} ms ({100 * ms / sum(parts):.0f} %)" for ms in parts)
        made.add_row(split["model"], *cells, f"{report.short(sum(parts), 3)} ms")
    return made


def _split_ms(split: dict[str, Any]) -> list[float]:
    return [split[f"{part}_ms"] for part in ("forward", "backward", "optimizer")]


def _ratios_table(result: report.Result) -> Table:
    """Create the table of ratios, which names only the field in which two cases differ."""
    made = report.table("Speed ratios, round by round", "", "over", "median", "lowest–highest")
    for each in result["ratios"]:
        ours, others = each["name"].split("/"), each["over"].split("/")
        ((name, over),) = [pair for pair in zip(ours, others, strict=True) if len(set(pair)) == 2]
        made.add_row(
            name,
            over,
            report.short(each["median"], 3),
            f"{report.short(each['low'], 3)}–{report.short(each['high'], 3)}",
        )
    return made


def _operators_table(case: StepCase, operators: list[tuple[str, float, float]]) -> Table:
    """Create the table of the ten slowest operators, by their own time."""
    made = report.table(f"Operators of {case.name}", "", "ms/step", "share", "calls")
    everything = sum(ms for _, ms, _ in operators)
    for name, ms, calls in operators[:10]:
        made.add_row(name[:50], report.short(ms, 3), f"{100 * ms / everything:.1f} %", f"{calls:.0f}")
    return made


def markdown_table(result: report.Result) -> str:
    """Format the figures, and the ratios of each case to others, as Markdown."""
    others = {(each["name"], each["over"]): each["median"] for each in result["ratios"]}

    def compared(row: dict[str, Any]) -> str:
        found = [(over, median) for (name, over), median in others.items() if name == row["name"]]
        parts = [set(over.split("/")) - set(row["name"].split("/")) for over, _ in found]
        return ", ".join(
            f"{report.short(median, 3)}× {part.pop()}" for (_, median), part in zip(found, parts, strict=True)
        )

    columns: list[report.Column] = [
        ("case", lambda row: row["name"]),
        ("step", lambda row: f"{report.short(row['ms_per_step'], 3)} ms"),
        ("of the roof", lambda row: f"{row['percent_of_roof']:.0f} % ({row['bound']})"),
        ("times as fast as", compared),
    ]
    return report.markdown({**result, "ratios": []}, columns)  # the last column has them


def draw_chart(result: report.Result, path: Path) -> None:
    """Draw images/s by batch size with the roofs, and the parts of a training step by network."""
    from fastresnet.figures import Figure
    from fastresnet.plotting import save_figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_throughput(result, left)
    _draw_splits(result, right)
    figure.suptitle(f"Steps: {_base(result)}; {result['environment']['device']}", fontsize=10)
    save_figure(figure, path)


def _draw_throughput(result: report.Result, axes: Any) -> None:
    from benchmarks.roofline import roof

    environment, limits = result["environment"], result["limits"]
    fixed = ("model", "precision", "memory_format", "backend")
    rows = [row for row in result["rows"] if all(row[key] == environment[key] for key in fixed)]
    for mode, heading, color in (("train", "training", "tab:blue"), ("inference", "inference", "tab:orange")):
        line = sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["batch_size"])
        sizes, medians = [row["batch_size"] for row in line], [row["images_per_s"] for row in line]
        axes.errorbar(sizes, medians, report.whiskers(line), color=color, marker="o", capsize=3, label=heading)
        roofs = [roof(row, limits)[0] for row in line]
        axes.plot(sizes, roofs, color=color, linestyle="--", marker=".", label=f"roof of {heading}")
        for row in line:
            axes.annotate(
                report.grouped(row["images_per_s"]),
                (row["batch_size"], row["images_per_s"]),
                (7, -11),
                textcoords="offset points",
                fontsize=8,
            )
    sizes = sorted({row["batch_size"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "125" else "")
    axes.margins(x=0.15, y=0.12)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images/s")
    axes.set_title("throughput (median of the rounds; whiskers: lowest and highest)", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def _draw_splits(result: report.Result, axes: Any) -> None:
    models = [split["model"] for split in result["splits"]]
    if not models:  # all have failed
        return
    parts = list(zip(*map(_split_ms, result["splits"]), strict=True))
    bottom = [0.0] * len(models)
    colors = ("tab:blue", "tab:cyan", "tab:red")
    for part, values, color in zip(("forward", "backward", "optimizer"), parts, colors, strict=True):
        axes.bar(models, values, bottom=bottom, width=0.6, color=color, label=part)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    for model, total in zip(models, bottom, strict=True):
        axes.annotate(f"{report.short(total, 3)} ms", (model, total), (0, 4), textcoords="offset points", ha="center")
    axes.margins(y=0.1)
    axes.set_ylabel("ms per step")
    axes.set_title(f"parts of an eager training step of {result['environment']['batch_size']} images", fontsize=10)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
