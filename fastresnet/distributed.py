"""Communication between the processes of one training, each with a GPU or with a share of the cores.

`torchrun` starts the processes and PyTorch's `torch.distributed` connects them. A single process runs the same code, at
no extra cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from pipelines.errors import RunError, UsageError
from pipelines.sampling import rank_rows

TIMEOUT = timedelta(minutes=5)
"""Longest wait of a rank for the others, which may be compiling or writing a checkpoint."""


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """Rank of this process among those that train one network together.

    All ranks must call `sum`, `highest`, `broadcast` and `wait` at the same point.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.world_size == 1

    def rows(self, batch_size: int) -> slice:
        """Select this rank's rows of a batch."""
        return rank_rows(batch_size, self.rank, self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place."""
        if not self.is_single:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, value: int, device: torch.device) -> int:
        """Return the highest of the ranks' values. Waits for the device."""
        if self.is_single:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values to all ranks."""
        if not self.is_single:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait for all ranks."""
        if not self.is_single:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap `model` so that its gradients are averaged over the ranks during the backward pass.

        All ranks get the first rank's parameters and buffers.
        """
        if self.is_single:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.14 has a new name for this
            # Every rank has its own batch norm statistics, which `loop.train` replaces before they are used.
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


SINGLE = World()


def world_of_torchrun() -> World:
    """Read the rank and number of processes that `torchrun` sets; without it, the process is single."""
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextlib.contextmanager
def connected(device: torch.device) -> Iterator[World]:
    """Connect the ranks by NCCL on a GPU `device` and by gloo on a CPU; in the block, `cuda` is this rank's GPU.

    Raises `UsageError` if there are fewer GPUs than processes, `RunError` if another rank has failed.
    """
    world = world_of_torchrun()
    if world.is_single:
        yield world
        return
    gpu = _select_gpu(int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else None
    with _explained_disconnection():
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=_store(),
            rank=world.rank,
            world_size=world.world_size,
            timeout=TIMEOUT,
            device_id=gpu,  # NCCL would guess it at the first barrier, with a warning
        )
        yield world
        dist.destroy_process_group()  # not after a failure: it could wait for ranks that have exited


def _select_gpu(number: int) -> torch.device:
    """Make GPU `number` the current device, which `cuda` means."""
    if number >= torch.cuda.device_count():
        raise UsageError(
            f"process {number + 1} on this machine finds {torch.cuda.device_count()} GPUs. Start one process for each "
            "GPU: torchrun --nproc-per-node gpu."
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _store() -> dist.Store:
    """Open the store of the ranks' addresses, with a prefix for each of torchrun's attempts.

    Attempts may share one store, with the addresses of dead ranks (pytorch/pytorch#135712).
    """
    store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextlib.contextmanager
def _explained_disconnection() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise RunError(_LOST) from error
    except RuntimeError as error:  # gloo has no error class
        if "gloo" not in str(error) and "onnection" not in str(error):
            raise
        raise RunError(_LOST) from error


_LOST = (
    "lost the connection to another rank, which has failed or was stopped; its own message has the reason. Start again "
    "with --resume."
)
