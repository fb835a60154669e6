"""Record of the simulated GPU. Import it first, in a process that run.sh has started.

As a program: `fakegpu.py ARGUMENTS OF fastresnet...` runs a command and lists the kernels of its training step.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_fake = ctypes.CDLL(None)
for _name in ("fake_nodes", "fake_programs", "fake_violations", "fake_logged"):
    getattr(_fake, _name).restype = ctypes.c_char_p
_fake.fake_launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p]


def nodes() -> list[str]:
    """Return the kernels of the graph recorded last, in order."""
    return _fake.fake_nodes().decode().splitlines()


def programs() -> list[int]:
    """Return the number of programs (thread blocks) of each of the `nodes`, 0 if it is unknown."""
    return [int(line) for line in _fake.fake_programs().decode().splitlines()]


def violations() -> list[str]:
    """Return the calls that CUDA forbids while a graph is recorded, since this was asked last."""
    return _fake.fake_violations().decode().splitlines()


def cooperative_launches() -> int:
    """Count the launches so far of kernels whose programs wait for each other."""
    return _fake.fake_cooperative_launches()


def host_waits() -> int:
    """Count how often the host has waited for the device so far."""
    return _fake.fake_waits()


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Give a list that holds, after the block, what it launched: kernels, GRAPH for a whole one, and copies.

    MEMCPY DD is one on the device, H is the host's memory and P what of that is pinned.
    """
    found: list[str] = []
    _fake.fake_log(1)
    try:
        yield found
    finally:
        found.extend(_fake.fake_logged().decode().splitlines())
        _fake.fake_log(0)


# --- convolutions, without cuDNN -----------------------------------------------------------------------------------


def _note(name: str) -> None:
    _fake.fake_launch(name.encode(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))


def _layout(*tensors: torch.Tensor) -> torch.memory_format:
    channels_last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)
    return torch.channels_last if channels_last else torch.contiguous_format


def _convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
    if x.dtype != w.dtype:
        raise RuntimeError(f"convolution of {x.dtype} with {w.dtype}")
    sizes = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, pad, spread, kernel, step in zip(x.shape[2:], padding, dilation, w.shape[2:], stride, strict=True)
    ]
    shape = (x.shape[0], w.shape[0], *sizes)
    _note(f"CUDNN fprop {tuple(x.shape)} {tuple(w.shape)} {shape} {x.dtype}")
    if bias is not None:
        _note(f"CUDNN bias {shape} {shape} {x.dtype}")  # reads and writes the result
    return torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=_layout(x, w))


def _convolution_backward(g, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
    gradients = [None, None, g.sum((0, 2, 3)) if mask[2] else None]
    for i, (name, like) in enumerate((("dgrad", x), ("wgrad", w))):
        if mask[i]:
            _note(f"CUDNN {name} {tuple(x.shape)} {tuple(w.shape)} {tuple(g.shape)} {x.dtype}")
            gradients[i] = torch.empty_like(like, memory_format=_layout(x, w))
    return tuple(gradients)


_library = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it takes the place of another
    _library.impl("convolution", _convolution, "CUDA")
    _library.impl("convolution_backward", _convolution_backward, "CUDA")


# --- what the host reads -------------------------------------------------------------------------------------------

# A bool is true; a whole number is -1, which says that no step has failed; another is 0.
_fake.fake_answer(1)
_int = torch.Tensor.__int__


def _answer(self: torch.Tensor) -> int:
    if not self.is_cuda:
        return _int(self)
    return 0 if self.is_floating_point() else -1


torch.Tensor.__int__ = _answer


def _answering_false(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make host reads of a bool return False: SGD tests whether its learning rate, a tensor, is negative."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        _fake.fake_answer(0)
        try:
            return function(*arguments, **options)
        finally:
            _fake.fake_answer(1)

    return wrapped


torch.optim.SGD.__init__ = _answering_false(torch.optim.SGD.__init__)


# --- tables --------------------------------------------------------------------------------------------------------


def kind(name: str) -> str:
    """Return the category of the kernel `name`."""
    if name.startswith("CUDNN"):
        return "convolution " + name.split()[1]
    if re.match(r"_[a-z]", name):
        return "Triton, this program's"
    if name.startswith("triton"):
        return "Triton, reduction" if re.match(r"triton_(red|per|spl)", name) else "Triton, pointwise"
    if name.startswith("cublas"):
        return "matrix product"
    return "copy or fill" if name.startswith("MEM") else "PyTorch's own"


def main(arguments: list[str]) -> int:
    """Run a command of fastresnet; print the kernels of its last recorded training step, else of its last graph."""
    from fastresnet.cli import main as run

    shown: list[str] = []
    end = torch.cuda.CUDAGraph.capture_end

    def capture_end(graph: torch.cuda.CUDAGraph) -> None:
        end(graph)
        if any("wgrad" in name for name in nodes()) or not any("wgrad" in name for name in shown):
            shown[:] = nodes()

    torch.cuda.CUDAGraph.capture_end = capture_end  # type: ignore[method-assign]
    code = run(arguments)
    print(*shown, sep="\n")
    for sort, count in collections.Counter(map(kind, shown)).most_common():
        print(f"{count:6d}  {sort}")
    print(f"{len(shown):6d}  kernels in all; forbidden while recording: {violations() or 'nothing'}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
