"""usage: python -m benchmarks.scaling FILE [--data NAME] [--rounds N]

Measure training in 1, 2 and 4 processes of one thread each on this machine's cores. Measure the exchange of gradients
separately. Write FILE, and show the measured step times and those that a model predicts. `docs/scaling.md` has the
model's predictions for GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import markdown_table
from fastresnet.provenance import environment
from pipelines.base import usable_processors
from pipelines.files import write_json

MODEL = "resnet20"
RUNS = ((1, 64), (1, 256), (2, 128), (2, 512), (4, 256), (4, 512))
"""Pairs (processes, batch size over all of them). The first two give the model its compute time."""
_STEPS = 24
_BUCKET = 25 << 20  # of DistributedDataParallel
_BACKWARD = 2 / 3  # of the arithmetic of a step is in its backward pass

# Under torchrun: seconds of an all-reduce of 1 KB and of the gradients' size, the median of many.
_EXCHANGE = """
import statistics, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
for size in (1024, int(sys.argv[1])):
    tensor, seconds = torch.ones(size // 4), []
    for _ in range(200):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - began)
        tensor.fill_(1)
    if dist.get_rank() == 0:
        print(statistics.median(seconds))
dist.destroy_process_group()
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Parameters of a machine in the model of a step."""

    overhead: float
    """Seconds of a step, independent of the number of its images."""
    per_image: float
    """Seconds for each image of a process."""
    latency: float
    """Seconds of one of the 2 (N - 1) turns of a ring all-reduce."""
    bandwidth: float
    """Bytes per second between neighbours."""
    processors: int
    """Number of processes that compute at the same time; more take turns."""

    def exchange(self, size: int, processes: int) -> float:
        """Return the seconds of a ring all-reduce of `size` bytes (Patarasuk & Yuan 2009)."""
        turns = 2 * (processes - 1)
        return turns * self.latency + turns / processes * size / self.bandwidth

    def step(self, images: float, size: int, processes: int) -> float:
        """Return the seconds of a step of `images` in each process, with `size` bytes of gradients.

        The exchange of a bucket overlaps the backward pass of later ones; that of the last one cannot.
        """
        turns = max(processes / self.processors, 1)
        compute = turns * (self.overhead + images * self.per_image)
        buckets = -(-size // _BUCKET)
        whole, last = turns * self.exchange(size, processes), turns * self.exchange(-(-size // buckets), processes)
        return compute + max(whole - _BACKWARD * compute * (buckets - 1) / buckets, last)

    def fitting_batch(self, size: int, processes: int, share: float = 0.8) -> int:
        """Return the smallest power of two of images per process that keeps `share` of a single process's speed."""
        images = 1
        while self.overhead + images * self.per_image < share * self.step(images, size, processes):
            images *= 2
        return images


# Not measured: there was one GPU at most. The images/s are the roof that memory bandwidth sets to a training step of
# unfused kernels. The links are NVLink 4's and InfiniBand NDR's, at three quarters of their nominal bandwidth.
ASSUMED = {
    8: Machine(overhead=100e-6, per_image=1 / 525_000, latency=4e-6, bandwidth=340e9, processors=8),
    64: Machine(overhead=100e-6, per_image=1 / 525_000, latency=8e-6, bandwidth=37e9, processors=64),
}


def gradient_bytes(model: str) -> int:
    """Return the bytes that a step exchanges: gradients are in fp32."""
    from fastresnet.models import create_model

    return 4 * sum(parameter.numel() for parameter in create_model(model).parameters())


def measure(data: str, rounds: int) -> dict[str, Any]:
    """Measure the images/s of each of `RUNS`, in turns, and the time of exchanges."""
    facts = environment(torch.device("cpu"))
    seen: dict[tuple[int, int], list[float]] = {run: [] for run in RUNS}
    for number in range(rounds):
        for run in RUNS:
            seen[run].append(_images_per_s(*run, data))
            print(f"round {number + 1}: {run[0]} processes, batch {run[1]}: {seen[run][-1]:,.0f} images/s", flush=True)
    size = gradient_bytes(MODEL)
    small, large = map(float, _torchrun(2, ["-c", _EXCHANGE, str(size)]).split())
    return {
        "schema": 1,
        "report": "scaling",
        "environment": facts,
        "model": MODEL,
        "gradient_bytes": size,
        "processors": usable_processors(),
        "exchange_s": {"bytes": [1024, size], "seconds": [small, large]},
        "runs": [{"processes": n, "batch_size": b, "images_per_s": values} for (n, b), values in seen.items()],
    }


def _images_per_s(processes: int, batch_size: int, data: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "fastresnet", "train", "baseline", "--model", MODEL, "--data", data, "--device", "cpu"]
        command += ["--batch-size", str(batch_size), "--iterations", str(_STEPS), "--compile", "off"]
        _torchrun(processes, [*command, "--out", f"{folder}/run"])
        return json.loads(Path(folder, "run", "summary.json").read_bytes())["images_per_s"]


def _torchrun(processes: int, program: Sequence[str]) -> str:
    if program[0] == "-c":
        program = ["--no-python", sys.executable, *program]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def fitted(result: dict[str, Any]) -> Machine:
    """Fit the machine of a result to its single-process steps at two sizes, and to its exchanges at two sizes."""
    seconds = {(run["processes"], run["batch_size"]): _step_seconds(run) for run in result["runs"]}
    (_, few), (_, many) = RUNS[:2]
    per_image = (seconds[1, many] - seconds[1, few]) / (many - few)
    (small_size, large_size), (small, large) = result["exchange_s"]["bytes"], result["exchange_s"]["seconds"]
    bandwidth = (large_size - small_size) / (large - small)  # of two processes: each byte is sent once
    return Machine(
        overhead=max(seconds[1, few] - few * per_image, 0),
        per_image=per_image,
        latency=(small - small_size / bandwidth) / 2,
        bandwidth=bandwidth,
        processors=result["processors"],
    )


def _step_seconds(run: dict[str, Any]) -> float:
    return run["batch_size"] / statistics.median(run["images_per_s"])


def measured_table(result: dict[str, Any]) -> str:
    """Format the measured and predicted steps of every run, as Markdown."""
    machine, lines = fitted(result), []
    for run in result["runs"]:
        processes, batch_size, speeds = run["processes"], run["batch_size"], run["images_per_s"]
        predicted = machine.step(batch_size / processes, result["gradient_bytes"], processes)
        spread = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f})"
        source = "fitted" if (processes, batch_size) in RUNS[:2] else f"{1000 * predicted:.0f} ms"
        step = _step_seconds(run)
        steps = [f"{1000 * step:.0f} ms", source, f"{step / predicted:.2f}"]
        lines.append([str(processes), str(batch_size), spread, *steps])
    head = ["processes", "batch size", "images/s (lowest–highest)"]
    return markdown_table([*head, "step, measured", "predicted", "measured / predicted"], lines)


def predicted_table() -> str:
    """Format the steps on GPUs that the model predicts, as Markdown."""
    lines, size = [], gradient_bytes(MODEL)
    for processes, machine in ASSUMED.items():
        for each in (16, 128, 1024):
            seconds = machine.step(each, size, processes)
            alone = machine.overhead + each * machine.per_image
            lines.append(
                [
                    str(processes),
                    f"{each * processes:,}",
                    f"{1e6 * alone:,.0f} µs",
                    f"{1e6 * (seconds - alone):,.0f} µs",
                    f"{each * processes / seconds / 1e6:.1f} million",
                    f"{alone / seconds:.0%}",
                    f"{machine.fitting_batch(size, processes) * processes:,}",
                ]
            )
    head = ["GPUs", "batch size", "computing", "exchanging", "images/s", "of the GPUs' speed", "80 % from batch size"]
    return markdown_table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result = measure(options.data, options.rounds)
    write_json(options.file, result)
    print(measured_table(result))


if __name__ == "__main__":
    main()
