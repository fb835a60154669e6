"""Device, precision and execution of a run, and explanations of their failures."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast, get_args

import torch

from fastresnet.config import CAPTURED, DEVICES, Compile, Precision
from pipelines.errors import Note, RunError, UsageError, check_choice

NVIDIA_CONTROL = Path("/dev/nvidiactl")
"""Device file of NVIDIA's driver."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Resolve `name`: `auto` is the GPU if there is one, else the CPU.

    Warns with a `Note` if the machine seems to have a GPU that PyTorch cannot use. Raises `UsageError` on an unknown
    name, or if a GPU is requested and absent.
    """
    check_choice("device", name, DEVICES)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (reason := _missing_gpu()):
            message = f"PyTorch finds no GPU that it can use, so it computes on the CPU. {reason}"
            warnings.warn(message, Note, stacklevel=1)  # located at this line, so that it is shown once
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA device here. Check nvidia-smi, or use --device cpu.")
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for fp32
        torch.backends.cudnn.allow_tf32 = True
    else:
        _keep_freed_memory()
    return torch.device(name)


def _missing_gpu() -> str:
    """Explain why PyTorch may not find a GPU, with a remedy; return "" if nothing suggests that there is one."""
    if NVIDIA_CONTROL.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # which hide it
        if torch.version.cuda is None:
            return "NVIDIA's driver is installed, but this PyTorch is built for CPUs: install PyPI's torch, with CUDA."
        return f"NVIDIA's driver is installed, probably too old for CUDA {torch.version.cuda}: see fastresnet doctor."
    if "NVIDIA_VISIBLE_DEVICES" in os.environ:  # NVIDIA's container runtime reads it
        return "To use GPUs in a container, start it with docker run --gpus all."
    return ""


def _keep_freed_memory() -> None:
    """Make glibc keep the memory of one step for the next.

    By default it returns the memory of activations to the system at every step, and getting it again costs page faults
    and zeroing: 6,500 to 15,000 faults per step of ResNet-20 at batch 128, 730 images/s instead of 950 on 2 cores.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 256 << 20)
    mallopt(mmap_threshold, 32 << 20)  # the maximum


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Resolve `name`: `auto` is bf16 if the hardware supports it, else fp32.

    On a CPU with AVX512-BF16 bf16 has 2.0x the speed of fp32.
    """
    check_choice("precision", name, get_args(Precision))
    if name == "auto":
        return "bf16" if _computes_bf16(device) else "fp32"
    if not supports(name, device):
        raise UsageError(f"--precision {name}: {torch.cuda.get_device_name(device)} does not support it. Use fp16.")
    return cast(Precision, name)


def supports(precision: str, device: torch.device) -> bool:
    """Return True if `device` supports `precision`; a CPU supports all, if slowly."""
    return precision != "bf16" or device.type != "cuda" or _computes_bf16(device)


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_compile(name: str, device: torch.device, *, single: bool = True) -> Compile:
    """Resolve `name`: `auto` stays, to be resolved by the length of the run and, on a CPU, a measurement.

    With several ranks, which exchange gradients within a step, it is `on` on a GPU and `off` on a CPU.
    """
    if name in CAPTURED:
        if device.type != "cuda":
            raise UsageError(f"--compile {name} records a CUDA graph, which needs a GPU. Use --compile on.")
        if not single:
            raise UsageError(f"--compile {name} supports only one process. Use --compile on.")
    if name == "auto" and not single:
        return "on" if device.type == "cuda" else "off"
    return cast(Compile, name)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return the context of mixed precision for the forward pass, disabled for fp32."""
    # Each weight is used once per step, and a cache of cast weights would outlive the recording of a CUDA graph.
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=False)


def recorded(
    work: Callable[[], None],
    trial: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    pool: Any = None,
) -> Callable[[], None]:
    """Record `work` as a CUDA graph and return its replay.

    Graphs with the same `pool` (`torch.cuda.graph_pool_handle`) share memory, so a replay must leave no result there.
    Three warm-up runs precede it, each in a `trial`, on a side stream, as PyTorch's notes on CUDA graphs require.
    """
    stream, graph = _side_stream(torch.cuda.current_device()), torch.cuda.CUDAGraph()
    for _ in range(3):
        with trial():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()
            torch.cuda.current_stream().wait_stream(stream)
    # Other threads, such as those of DALI and FFCV, continue to use the GPU.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


@functools.cache
def _side_stream(_device: int) -> torch.cuda.Stream:
    """Return the stream for recording, the same each time: memory is not shared between streams."""
    return torch.cuda.Stream()


def synchronize(device: torch.device) -> None:
    """Wait for the work given to `device`; a CPU has always done it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def explained_failures(out_of_memory: str) -> Iterator[None]:
    """Convert a lack of memory (`out_of_memory` is the advice), a failed compilation or kernel to `RunError`.

    PyTorch, its allocators, cuDNN and the compiler all report a lack of memory differently.
    """
    try:
        yield
    except MemoryError:
        pass
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in ("out of memory", "can't allocate memory", "ALLOC_FAILED")):
            pass
        elif "CUDA error" in text:
            raise RunError(
                f"{text.splitlines()[0]}. If this is a training, repeat it with --kernels torch; if that helps, please "
                "report this line and the output of fastresnet doctor."
            ) from error
        elif "DataLoader worker" in text:  # raised by PyTorch's handler of SIGCHLD, at any place
            raise RunError(
                f"a worker process of the torchvision pipeline ended: {text.splitlines()[0]} Or a file of the data set "
                "was truncated while it was in use; another command with the same --data tells."
            ) from error
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
            raise RunError(
                f"torch.compile failed: {reason} It needs a C and C++ compiler and Python's headers (Debian: g++ and "
                "python3-dev); or use --compile off."
            ) from error
        else:
            raise
    else:
        return
    raise RunError(f"out of memory: {out_of_memory}.")
