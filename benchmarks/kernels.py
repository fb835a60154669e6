"""Kernels of captured training steps, and the bytes that they move, counted on the simulated GPU of tests/fake_gpu.

A kernel moves the bytes of its operands, each counted once:

- Convolutions (forward: x, w and y; gradient of x: dy, w and dx; of w: x, dy and dw): from the recorded shapes.
- Inductor's kernels: its own estimate. Of an indexed tensor, such as the data set from which a batch is gathered, it
  counts the elements that are used, not the whole.
- Other kernels of Triton: the tensors passed to them. A tensor that a kernel only finds the address of in a table does
  not count.
- PyTorch's operators: their arguments and results. As in Inductor's estimate, a tensor that changes in place counts
  twice: it is read and written. Operators that this program defines count for nothing beside their kernels of Triton.

Profiles of a real GPU list its kernels with their times: `python -m benchmarks.gpu_cases steps`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import unlimited_compilation
from benchmarks.gpu_cases import CASES, Candidate, RecipeCase, TimedRecipe
from benchmarks.report import SCHEMA, Result, print_tables, table, write_result
from benchmarks.report import markdown_table as format_markdown
from benchmarks.roofline import bytes_moved, operand_bytes
from fastresnet.provenance import environment
from pipelines.errors import UsageError
from pipelines.prepare import prepare
from pipelines.store import Dataset

IMAGES = 4096
"""Number of training images: more than a batch, so that Inductor tells the images of a batch from all of them."""
OPTIMISER, OTHER = "optimiser", "everything else"

CATEGORIES = {
    "convolutions": r"(fprop|dgrad|wgrad|bias) ",
    "batch norm, statistics": r"triton_(red|per)\w*batch_norm_legit(?!\w*(relu|backward))",
    "batch norm, output": r"_batch_norm_forward|triton_\w*batch_norm_legit(?!\w*norm_backward)",
    "batch norm, gradient sums": r"_batch_norm_backward|triton_(red|per)\w*batch_norm_backward",
    "pointwise gradients": r"triton_poi\w*backward",
    "casts of weights": r"triton_poi_fused__to_copy_\d|aten\._foreach_copy_",
    "counts of batches": r"triton_poi_fused_add_copy__\d",
    "metrics, schedule, checks": r"aten\.(?!\w+\.out)",
}
"""Patterns of the names of kernels; the first that fits decides. The optimiser's are those launched in its step.

Kernels of a batch norm have the ReLU and the addition that follow it, and those of its gradients theirs.
"""


def count_kernels(path: Path | None) -> None:
    """Count the kernels of `CASES`, on shapes10, and write the result to `path`, if given.

    Raises `UsageError` without the simulated GPU.
    """
    nodes = _simulated_nodes()
    result: Result = {
        "schema": SCHEMA,
        "benchmark": "kernels",
        "environment": {**environment(torch.device("cuda")), "data": "shapes10"},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        dataset, _ = prepare("shapes10", Path(folder), lambda *_: None, train_images=IMAGES, test_images=10)
        for case in CASES:
            uncompiled = kernels_of_step(Candidate(name="", case=case, compiled=False), dataset, nodes)
            row = _row(case, kernels_of_step(Candidate(name="", case=case), dataset, nodes))
            result["rows"].append(row | {"uncompiled_kernels_per_step": _sum(uncompiled)})
            write_result(result, path)
    print_tables(tables(result), [])


def _simulated_nodes() -> Callable[[], list[str]]:
    """Return the function that lists the kernels of the graph recorded last."""
    try:
        import fakegpu
    except ImportError:
        raise UsageError(
            "kernels are counted on the simulated GPU: tests/fake_gpu/run.sh PYTHON -m benchmarks kernels. "
            "A real GPU is profiled: python -m benchmarks.gpu_cases steps --json FILE"
        ) from None
    return fakegpu.nodes


def kernels_of_step(step: Candidate, dataset: Dataset, nodes: Callable[[], list[str]]) -> list[dict[str, Any]]:
    """List the kernels of a captured `step` by name: category, calls and bytes."""
    with unlimited_compilation(), LaunchCounter(nodes) as counter:
        TimedRecipe(step.case, dataset, torch.device("cuda"), step).close()
    return counter.kernels()


class LaunchCounter(TorchDispatchMode):
    """Kernels that are launched in the block while a CUDA graph is recorded. `nodes` lists those of the graph so far.

    Inductor's compiled code, other kernels of Triton and PyTorch's operators are observed. The nodes that the graph has
    gained after one of them are its kernels.
    """

    def __init__(self, nodes: Callable[[], list[str]]) -> None:
        super().__init__()
        self._nodes, self._noted = nodes, 0
        self._found: dict[tuple[str, str], list[int]] = {}
        self._in_optimizer = False
        self._changes = contextlib.ExitStack()

    def kernels(self) -> list[dict[str, Any]]:
        """List the kernels by category and name, with their calls and bytes, in the order of their first calls."""
        found = self._found.items()
        return [{"name": name, "category": kind, "calls": n, "bytes": size} for (kind, name), (n, size) in found]

    def __enter__(self) -> LaunchCounter:
        from torch._inductor import config
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.runtime.jit import JITFunction

        for change in (
            config.patch(benchmark_kernel=True),  # writes estimated bytes into the code
            self._observed(CachingAutotuner, _inductor_bytes),
            self._observed(JITFunction, lambda _, *arguments: operand_bytes(arguments)),
        ):
            self._changes.enter_context(change)
        self._changes.callback(register_optimizer_step_pre_hook(lambda *_: self._enter_optimizer(True)).remove)
        self._changes.callback(register_optimizer_step_post_hook(lambda *_: self._enter_optimizer(False)).remove)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._changes.close()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: under another dispatch mode compiled functions would run uncompiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Kernels of Triton in an operator of this program have been noted, with their bytes.
        own = func.namespace != "aten"
        self._note(lambda: 0 if own else bytes_moved(func, args, kwargs or {}, result), str(func))
        return result

    def _observed(self, kernel_type: Any, size: Callable[..., int]) -> Any:
        """Return a context in which launches by `kernel_type` are noted; `size` gets the kernel and its arguments."""
        run = kernel_type.run

        def observed(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            launched = run(kernel, *args, **kwargs)
            self._note(lambda: size(kernel, *args, *kwargs.values()))
            return launched

        return mock.patch.object(kernel_type, "run", observed)

    def _note(self, size: Callable[[], int], operator: str = "") -> None:
        """Note the kernels launched since the last call, with the bytes of their `operator`, else of the only one."""
        if not torch.cuda.is_current_stream_capturing():
            return
        nodes = self._nodes()
        new, self._noted = nodes[self._noted :], len(nodes)
        convolutions = [node for node in new if node.startswith("CUDNN")]
        for node in convolutions:
            self._add(node.removeprefix("CUDNN "), 1, convolution_bytes(node))
        if others := len(new) - len(convolutions):
            self._add(operator or new[0], others, size())

    def _add(self, name: str, calls: int, size: int) -> None:
        total = self._found.setdefault((OPTIMISER if self._in_optimizer else category(name), name), [0, 0])
        total[0] += calls
        total[1] += size

    def _enter_optimizer(self, inside: bool) -> None:
        self._in_optimizer = inside


def category(name: str) -> str:
    """Return the category of a kernel outside the optimiser."""
    return next((kind for kind, pattern in CATEGORIES.items() if re.match(pattern, name)), OTHER)


def convolution_bytes(node: str) -> int:
    """Return the bytes of a convolution's operands, from its record: `CUDNN fprop (x) (w) (y) type`."""
    shapes = re.findall(r"\(([\d, ]+)\)", node)
    dtype = getattr(torch, node.rpartition("torch.")[2])
    return dtype.itemsize * sum(math.prod(map(int, shape.split(","))) for shape in shapes)


def _inductor_bytes(kernel: Any, *arguments: Any) -> int:
    """Return Inductor's estimate for a `kernel`; kernels that a user wrote have none."""
    gigabytes = kernel.inductor_meta.get("kernel_num_gb")
    return operand_bytes(arguments) if gigabytes is None else round(1e9 * gigabytes)


def _row(case: RecipeCase, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": case.name, **dataclasses.asdict(case), "kernels_per_step": _sum(kernels)}
    kinds = [*CATEGORIES, OPTIMISER, OTHER]
    row["categories"] = {kind: _sum([each for each in kernels if each["category"] == kind]) for kind in kinds}
    return row | {"kernels": kernels}


def _sum(kernels: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(kernel[key] for kernel in kernels) for key in ("calls", "bytes")}


# --- tables ------------------------------------------------------------------------------------------------------


def markdown_table(*results: Result) -> str:
    """Format a result as Markdown, or several: then a cell shows how its figures changed from one to the next."""
    head, *lines = _cells(results)
    return format_markdown(head, lines)


def tables(result: Result) -> list[Table]:
    """Create the table of a result."""
    (heading, *steps), *lines = _cells([result])
    made = table("", heading, *(step.replace("/", "\n") for step in steps))
    for line in lines:
        made.add_row(*line)
    return [made]


def _cells(results: Sequence[Result]) -> list[list[str]]:
    """Return the cells of a table: categories down, and across the steps that all `results` have."""
    rows = [{row["name"]: row for row in result["rows"]} for result in results]
    steps = [
        [of_result[name] for of_result in rows] for name in rows[-1] if all(name in of_result for of_result in rows)
    ]
    none = {"calls": 0, "bytes": 0}
    lines = [
        [kind, *(_cell([row["categories"].get(kind, none) for row in step]) for step in steps)]
        for kind in (*CATEGORIES, OPTIMISER, OTHER)
    ]
    total = ["total", *(_cell([row["kernels_per_step"] for row in step]) for step in steps)]
    return [["kernels of a step; MB", *(step[-1]["name"] for step in steps)], *lines, total]


def _cell(figures: Sequence[dict[str, int]]) -> str:
    calls, megabytes = ([f"{each['calls']:,}" for each in figures], [f"{each['bytes'] / 1e6:,.0f}" for each in figures])
    return "; ".join(" → ".join(dict.fromkeys(texts)) for texts in (calls, megabytes))
