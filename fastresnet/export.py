"""Export of a trained network: ONNX, safetensors, a program of `torch.export`, or a repository of weights."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastresnet.checkpoint import save_tensors
from fastresnet.hub import WEIGHTS
from fastresnet.model_card import Measured, config_json, describe, model_card
from fastresnet.weights import Normalized, Weights, load_weights
from pipelines.errors import RunError, UsageError
from pipelines.files import replacing, sync_folder, temporary_folder, write_bytes, write_json
from pipelines.sampling import IMAGE_SIZE

TOLERANCE = 1e-4
"""Largest difference allowed between logits of an exported network and those of the original."""


def export(weights: Weights, path: Path, kind: str, *, normalize: bool) -> float:
    """Write the network to `path` in format `kind`, one of `FORMATS`, and check the output of the file.

    The batch size is dynamic. With `normalize`, the input is images in 0..1. Returns the largest difference of a logit
    on random images in batches of 1 and of 7. Raises `UsageError` if a library is missing, `RunError` if the
    difference is above `TOLERANCE`; `path` is then unchanged.
    """
    network = (Normalized(weights) if normalize else weights.model).cpu().eval()
    with replacing(path) as temporary:
        return _compare(FORMATS[kind](network, temporary), network, kind, path)


Loaded = Callable[[Tensor], Tensor]


def _compare(loaded: Loaded, network: nn.Module, kind: str, path: Path) -> float:
    """Return the largest difference of a logit on random images; raise `RunError` if it is above `TOLERANCE`."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for count in (1, 7)]
    with torch.inference_mode():
        difference = max(float((loaded(batch) - network(batch)).abs().max()) for batch in batches)
    if not difference <= TOLERANCE:
        raise RunError(f"logits of {kind} differ from the network's by {difference:g}; {path} was not written.")
    return difference


def _onnx(network: nn.Module, path: Path) -> Loaded:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime from 1.29 on reports each session to its maker
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--format onnx needs {error.name}: pip install 'fastresnet[onnx]'") from None
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as quiet:
        warnings.simplefilter("ignore")
        quiet.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        program = torch.onnx.export(
            network,
            (_example(),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    # torch declares that it may return None, as it does without dynamo.
    path.write_bytes(program.model_proto.SerializeToString())  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def _torch_export(network: nn.Module, path: Path) -> Loaded:
    program = torch.export.export(network, (_example(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with open(path, "wb") as file:
        torch.export.save(program, file)
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _safetensors(network: nn.Module, path: Path) -> Loaded:
    import safetensors.torch

    safetensors.torch.save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    empty = copy.deepcopy(network)
    for tensor in empty.state_dict().values():
        tensor.zero_()
    empty.load_state_dict(safetensors.torch.load_file(path))
    return empty


def _example() -> Tensor:
    return torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)  # a batch size of 1 would become a constant


FORMATS: dict[str, Callable[[nn.Module, Path], Loaded]] = {
    "onnx": _onnx,
    "safetensors": _safetensors,
    "torch-export": _torch_export,
}


def export_repository(weights: Weights, folder: Path, measured: Measured | None) -> float:
    """Write the new folder `folder`, to be uploaded as a repository of weights: model.safetensors and its model card.

    `weights` are of this program. Returns the largest difference of a logit. Raises `UsageError` if `folder` has files
    or a library is missing, `RunError` as `export` does. The folder is complete or unchanged.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder. Remove it, or give another with --out.")
    network = weights.model.cpu().eval()
    with temporary_folder(folder.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        save_tensors(new / WEIGHTS, network.state_dict(), describe(weights))
        difference = _compare(load_weights(new / WEIGHTS).model, network, "hub", folder)
        write_json(new / "config.json", config_json(weights))
        write_bytes(new / "README.md", model_card(weights, measured).encode())
        os.rename(new, folder)
        sync_folder(folder.parent)
    return difference
