"""Checks of this machine, with a remedy for each problem."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from fastresnet.compilation import torch_compile
from fastresnet.device import NVIDIA_CONTROL, resolve_precision
from fastresnet.provenance import environment, versions_of
from pipelines import LIBRARIES, PACKAGES, PIPELINES, pipeline_class
from pipelines.base import free_memory, is_installed
from pipelines.compiler import CompilerError, compile_c
from pipelines.errors import UserError
from pipelines.prepare import CIFAR10, data_root
from pipelines.store import open_store, prepare_again_command, prepare_command

_NEEDED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check."""

    what: str
    state: str
    """State: `works`, `untested` (it takes too long), `missing` (an optional part is absent) or `broken`."""
    detail: str
    remedy: str = ""
    """Advice; empty if there is nothing to do."""


def examine(root: Path | None = None, *, thorough: bool = False) -> Iterator[Finding]:
    """Run all checks, one after the other; those that take longer only if `thorough`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from _versions(device)
    yield from _gpu(device)
    yield from _pipelines(thorough)
    yield from _compilers(device, thorough)
    yield from _data(data_root(root))
    yield from _space(data_root(root), device)


def _versions(device: torch.device) -> Iterator[Finding]:
    facts = environment(device)
    versions = {**facts["versions"], **versions_of("tensorboard", "onnx")}
    libraries = (f"{name} {versions[name]}" for name in versions if name not in ("fastresnet", "python"))
    yield Finding("fastresnet", "works", f"{versions['fastresnet']}, commit {facts['commit']}")
    yield Finding("Python", "works", f"{versions['python']} on {platform.platform()}")
    yield Finding("processor", "works", f"{facts['device'] if device.type == 'cpu' else os.cpu_count()}")
    yield Finding("libraries", "works", ", ".join(libraries))


def _gpu(device: torch.device) -> Iterator[Finding]:
    precision = resolve_precision("auto", device)
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Finding("GPU", "works", f"{', '.join(names)}; CUDA {torch.version.cuda}, driver {_driver()}")
    else:
        reason, remedy = _without_gpu()
        yield Finding("GPU", "missing", f"none that PyTorch can use: {reason}", remedy)
    yield Finding("precision", "works", f"auto is {precision} on this {'GPU' if device.type == 'cuda' else 'CPU'}")


def _driver() -> str | None:
    """Read the version of NVIDIA's driver; None if there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _without_gpu() -> tuple[str, str]:
    """Return the reason why PyTorch finds no GPU, and the remedy."""
    if torch.version.cuda is None:
        return "this PyTorch is built for CPUs", "pip install torch from PyPI, which has CUDA, if there is a GPU"
    if (driver := _driver()) is None and not NVIDIA_CONTROL.exists():
        return (
            "nvidia-smi finds no driver",
            "install NVIDIA's driver if there is a GPU; in Docker, run with --gpus all; a CPU works too, more slowly",
        )
    reason = f"driver {driver or 'of unknown version'}, with which PyTorch's CUDA {torch.version.cuda} does not start"
    return reason, "install a newer driver, or a PyTorch for the CUDA version that nvidia-smi shows"


def _pipelines(thorough: bool) -> Iterator[Finding]:
    for name in PIPELINES:
        if not thorough and is_installed(LIBRARIES.get(name, "torch")):
            yield Finding(f"pipeline {name}", "works", "installed" if name in LIBRARIES else "")
            continue
        threads = torch.get_num_threads()
        try:
            pipeline_class(name, torch.device("cpu"))
        except UserError as error:  # the problem, a colon, and the remedy
            problem, _, remedy = str(error).rpartition(": ")
            yield Finding(f"pipeline {name}", "missing", problem, remedy)
        except (ImportError, OSError) as error:
            package = PACKAGES.get(name, ("torch",))[0]
            yield Finding(f"pipeline {name}", "broken", str(error), f"pip install --force-reinstall {package}")
        else:
            yield Finding(f"pipeline {name}", "works", "")
        finally:
            torch.set_num_threads(threads)  # importing FFCV sets it to 1


def _compilers(device: torch.device, thorough: bool) -> Iterator[Finding]:
    remedy = "install gcc 12 or newer; without it PyTorch's slower operators are used"
    try:
        compile_c(Path(__file__).parents[1] / "pipelines" / "augment.c", "-fopenmp")
        yield Finding("C loops", "works", "compiled for this processor")
    except CompilerError as error:
        yield Finding("C loops", "missing", str(error), remedy)
    if not thorough:
        yield Finding(
            "torch.compile", "untested", "not tried, as it takes some seconds", "fastresnet doctor --all tries it"
        )
        return
    try:
        compiled = torch_compile(lambda x: x.sin() + 1, fullgraph=True)
        torch.testing.assert_close(compiled(torch.ones(8, device=device)).cpu(), torch.ones(8).sin() + 1)
        yield Finding("torch.compile", "works", "")
    except Exception as error:  # noqa: BLE001  the compiler may raise anything
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = "install a C++ compiler and Python's headers (Debian: g++ and python3-dev), or use --compile off"
        yield Finding("torch.compile", "broken", reason, remedy)


def _data(root: Path) -> Iterator[Finding]:
    names = sorted({meta.parent.name for meta in root.glob("*/meta.json")} | {CIFAR10})
    for name in names:
        if not (root / name / "meta.json").exists():
            remedy = f"{prepare_command(root / name)}; train does this automatically"
            yield Finding(f"data {name}", "missing", f"not in {root.absolute()}", remedy)
            continue
        try:
            dataset = open_store(root / name)
        except UserError as error:
            yield Finding(f"data {name}", "broken", str(error), prepare_again_command(root / name))
        else:
            counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
            yield Finding(f"data {name}", "works", f"{counts}, verified, in {dataset.folder.absolute()}")


def _space(root: Path, device: torch.device) -> Iterator[Finding]:
    place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    disk, memory = shutil.disk_usage(place).free, free_memory(torch.device("cpu"))
    yield _free("disk", disk, "free some: a data set takes 0.2 GB, a run of ResNet-20 10 MB")
    yield _free("memory", memory, "close other programs, or train with a smaller --batch-size")
    if device.type == "cuda":
        yield _free("GPU memory", free_memory(device), "see nvidia-smi for the processes that use it")


def _free(what: str, free: int, remedy: str) -> Finding:
    state = "works" if free > _NEEDED_BYTES else "broken"
    return Finding(what, state, f"{free / 1e9:.1f} GB free", "" if free > _NEEDED_BYTES else remedy)
