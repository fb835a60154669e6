"""`fastresnet export`: export a trained network to other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastresnet.terminal import check_output, parse, say
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from fastresnet.weights import Weights

_SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Export a trained network to other programs, and check that the file computes the same."""

    weights: str = "pretrained:resnet20"
    """Checkpoint or model.safetensors of this program, state dict of another, or pretrained:NAME."""
    model: str | None = None
    """Network. Without it: the one named in the file or inferred from its shapes."""
    format: Literal["onnx", "torch-export", "safetensors"] = "onnx"
    """onnx, torch-export (a program for torch.export.load) or safetensors (the weights alone)."""
    normalize: bool = False
    """Include the normalisation in the graph, which then takes images in 0..1."""
    out: Path | None = None
    """File to write. Without it: the name of the network, in the current folder."""

    def __post_init__(self) -> None:
        check_output("--out", self.out)
        if self.normalize and self.format == "safetensors":
            raise UsageError("--normalize adds normalisation to a graph, but safetensors contain only weights.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "export", arguments)
    from fastresnet.export import export
    from fastresnet.pretrained import find_weights
    from fastresnet.weights import load_weights, note_assumptions

    weights = load_weights(find_weights(options.weights), options.model)
    note_assumptions(weights, options.weights, normalized=options.normalize)
    path = options.out or Path(f"{weights.name}{_SUFFIXES[options.format]}")
    difference = export(weights, path, options.format, normalize=options.normalize)
    say(f"{weights.name}, {path.stat().st_size / 1e6:.1f} MB in {path}; logits differ by {difference:.1e} at most")
    say(f"images  [N, 3, 32, 32] in 0..1{'' if options.normalize else f', {_normalization(weights)}'}")
    say(f"logits  [N, {weights.num_classes}]: {', '.join(weights.classes)}")
    return 0


def _normalization(weights: Weights) -> str:
    if weights.mean.shape[1] > 1:
        return "minus the mean of each pixel (--normalize includes that in the graph)"
    mean, std = (", ".join(f"{v:.4f}" for v in values.flatten().tolist()) for values in (weights.mean, weights.std))
    return f"minus {mean}, divided by {std} (--normalize includes that in the graph)"
