"""Tensors and metadata in one file: safetensors with a JSON description and a SHA-256 over both.

No pickle is involved, so opening a file can never run code from it. Any safetensors reader can read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastresnet.text import as_utf8
from pipelines.errors import DataError
from pipelines.files import write_bytes

SCHEMA = 1
_DESCRIPTION, _DIGEST = "fastresnet", "fastresnet.sha256"


def save_tensors(
    path: Path, tensors: dict[str, Tensor], description: dict[str, Any], *, previous: Path | None = None
) -> None:
    """Write `tensors` (any device) and `description` (JSON types) atomically.

    The old file is renamed to `previous`, if given. Raises `OSError` and leaves `path` unchanged.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"schema": SCHEMA, **description})
    contents = safetensors.torch.save(tensors, {_DESCRIPTION: text, _DIGEST: _digest(tensors, text)})
    write_bytes(path, contents, previous=previous)


HostCopy = Callable[[], dict[str, Tensor]]
"""Function that waits for copies of tensors and returns them, in any thread."""


def copy_to_host(tensors: dict[str, Tensor]) -> HostCopy:
    """Copy `tensors` as they are now; a GPU copies its own to pinned memory, and the caller does not wait for it."""
    copies = {
        name: tensor.detach().to("cpu", copy=True, non_blocking=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return lambda: copies
    copied = torch.cuda.Event(blocking=True)
    copied.record()

    def wait() -> dict[str, Tensor]:
        copied.synchronize()
        return copies

    return wait


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a safetensors file: its tensors, and the description if this program wrote it (None otherwise).

    Raises `DataError` if the file is missing, damaged or not a safetensors file.
    """
    try:
        with _opened(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except OSError as error:
        raise DataError(f"cannot read {path}: {str(error).partition(':')[0]}.") from None
    except SafetensorError as error:
        raise DataError(f"{path} is damaged or not a safetensors file: {error}.") from None
    if not metadata.keys() & {_DESCRIPTION, _DIGEST}:
        return tensors, None
    text = metadata.get(_DESCRIPTION, "")
    if metadata.get(_DIGEST) != _digest(tensors, text):
        raise DataError(f"{path} is damaged: its contents do not match their SHA-256.")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError):
        description = None
    schema = description.get("schema") if isinstance(description, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path} was written by another version (schema {schema!r}).")
    return tensors, description


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[str]:
    """Yield a name by which safetensors, which takes only UTF-8, can open `path`."""
    if as_utf8(str(path)) == str(path):
        yield str(path)
        return
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}"


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with `prefix.` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def take_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors named `prefix.<name>`, by <name>."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
