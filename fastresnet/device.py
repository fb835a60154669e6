"""Which device and precision a run uses, and the description of both that every figure carries."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastresnet import __version__
from fastresnet.config import DEVICES
from pipelines.errors import Note, RunError, UsageError, check_choice

NVIDIA_CONTROL = Path("/dev/nvidiactl")
"""There where NVIDIA's driver is."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; where one seems to be meant that PyTorch cannot use, a `Note` says so.
    Raises `UsageError` where a GPU is asked for and absent, and on an unknown name.
    """
    check_choice("device", name, DEVICES)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (reason := _missing_gpu()):
            told = f"no GPU here that PyTorch can use, so the CPU computes. {reason}"
            warnings.warn(told, Note, stacklevel=1)  # of this line, so that it is shown once
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA device here. Check nvidia-smi, or use --device cpu.")
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked for
        torch.backends.cudnn.allow_tf32 = True
    else:
        _keep_freed_memory()
    return torch.device(name)


def _missing_gpu() -> str:
    """Why there may be a GPU that PyTorch does not find, and what to do; empty where nothing speaks for one."""
    if NVIDIA_CONTROL.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # which hide it
        if torch.version.cuda is None:
            return "NVIDIA's driver is there, but this PyTorch is built for CPUs: pip install torch from PyPI has CUDA."
        return f"NVIDIA's driver is there, most likely too old for CUDA {torch.version.cuda}: see fastresnet doctor."
    if "NVIDIA_VISIBLE_DEVICES" in os.environ:  # NVIDIA's container runtime reads it
        return "A container sees GPUs after docker run --gpus all."
    return ""


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of one step for the next.

    Left to itself it gives activations back to the system at every step, to get them again as pages that fault and are
    zeroed: 6,500 to 15,000 faults a step of ResNet-20 at batch 128, 730 images/s instead of 950 on 2 cores.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 256 << 20)
    mallopt(mmap_threshold, 32 << 20)  # the most that it takes


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes it (2.0x the speed of fp32 on a CPU with AVX512-BF16), else fp32."""
    if name == "auto":
        return "bf16" if _computes_bf16(device) else "fp32"
    if not supports(name, device):
        raise UsageError(f"--precision {name}: {torch.cuda.get_device_name(device)} lacks it. Use fp16.")
    return name


def supports(precision: str, device: torch.device) -> bool:
    """Whether `device` computes in `precision` at all; a CPU does, if slowly."""
    return precision != "bf16" or device.type != "cuda" or _computes_bf16(device)


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_compile(name: str, device: torch.device, *, alone: bool = True) -> str:
    """`auto` is `graph` on a GPU; on a CPU it stays, for measurement to decide. Where there are several ranks, which
    exchange gradients within a step, it is `on` and `off`.
    """
    if name == "graph" and device.type != "cuda":
        raise UsageError("--compile graph records a CUDA graph, which needs a GPU. Use --compile on.")
    if name == "graph" and not alone:
        raise UsageError("--compile graph is for a training in one process. Use --compile on.")
    if name != "auto":
        return name
    if alone:
        return "graph" if device.type == "cuda" else name
    return "on" if device.type == "cuda" else "off"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision for the forward pass; nothing for fp32."""
    # Each weight is used once in a step, and a cache of cast weights would outlive the recording of a CUDA graph.
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=False)


@contextlib.contextmanager
def explained_failures(out_of_memory: str) -> Iterator[None]:
    """Turn a lack of memory (`out_of_memory` is the advice) and a failed compilation into `RunError`.

    PyTorch, its allocators, cuDNN and the compiler all report a lack of memory in words of their own.
    """
    try:
        yield
    except MemoryError:
        pass
    except RuntimeError as error:
        signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
        if not any(sign in str(error) for sign in signs):
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise RunError(
                    f"torch.compile failed: {reason} It needs a C and C++ compiler and Python's headers (Debian: g++ "
                    "and python3-dev); or use --compile off."
                ) from error
            raise
    else:
        return
    raise RunError(f"out of memory: {out_of_memory}.")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, commit, command and time."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastresnet": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **versions_of("torchvision", "numpy"),
        },
        "commit": _commit(),
        "command": _command(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions_of(*libraries: str) -> dict[str, str]:
    """Versions of those of `libraries` that are installed."""
    versions = {}
    for library in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def _command() -> str:
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return f"{name} {shlex.join(sys.argv[1:])}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.machine()


def _commit() -> str:
    """The commit of the checkout this code runs from, `+` where it has been changed; `unknown` outside one."""
    try:
        folder = Path(__file__).parent
        described = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
