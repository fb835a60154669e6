"""Tensors and metadata in one file: safetensors with a JSON description and a SHA-256 over both.

No pickle is involved, so opening a file can never run code from it. Any safetensors reader can read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from fastresnet.tensors import StoredTensor, place
from pipelines.errors import DataError
from pipelines.files import write_bytes
from pipelines.texts import LONGEST_TEXT, parse_json

SCHEMA = 1
_DESCRIPTION, _DIGEST = "fastresnet", "fastresnet.sha256"
_Any = TypeVar("_Any")


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
        with open(path, "rb") as file:
            tensors, description = open_tensors(file, path)
            return {name: tensor.read() for name, tensor in tensors.items()}, description
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


def open_tensors(file: BinaryIO, path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any] | None]:
    """Find what `load_tensors` reads in `file`, open at `path`. Raises `DataError` if it is damaged or of another kind.

    Its own reader, unlike that of safetensors, does not map the whole file into memory, nor copy what is not needed.
    """
    try:
        tensors, metadata = _read_header(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or not a safetensors file: {str(error)[:200]}.") from None
    if not metadata.keys() & {_DESCRIPTION, _DIGEST}:
        return tensors, None
    text = metadata.get(_DESCRIPTION, "")
    if metadata.get(_DIGEST) != _digest(tensors, text):
        raise DataError(f"{path} is damaged: its contents do not match their SHA-256.")
    try:
        description = parse_json(text.encode())
    except ValueError:
        description = None
    schema = description.get("schema") if isinstance(description, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path} was written by another version (schema {reprlib.repr(schema)}).")
    return tensors, description


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _read_header(file: BinaryIO) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the tensors and the metadata in the header. Raises `ValueError` or the like if it is not valid."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    begin = 8 + int.from_bytes(file.read(8), "little")
    if not 8 < begin <= min(size, LONGEST_TEXT):
        raise ValueError("it does not begin with a header")
    text = file.read(begin - 8)
    header = parse_json(text)
    metadata, tensors = header.pop("__metadata__", None) or {}, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if type(first) is not int or type(last) is not int:
            raise ValueError("its tensors are at places that are not whole numbers")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has values of type {entry['dtype']}")
        tensors[name] = place(file, begin, begin + last - first, _DTYPES[entry["dtype"]], 0, entry["shape"])
        if tensors[name].size != last - first:
            raise ValueError(f"{name} has another size than its shape")
        begin += last - first
    if begin != size:
        raise ValueError("its tensors do not fill it")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    for word in (*tensors, *metadata.values()):
        word.encode()  # half a character raises `ValueError`
    return tensors, metadata


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with `prefix.` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def take_prefix(prefix: str, tensors: dict[str, _Any]) -> dict[str, _Any]:
    """Select the tensors named `prefix.<name>`, by <name>."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def _digest(tensors: Mapping[str, Tensor | StoredTensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in [tensor.reshape(-1)] if isinstance(tensor, Tensor) else tensor.pieces():
            digest.update(piece.view(torch.uint8).numpy().data)
    return digest.hexdigest()
