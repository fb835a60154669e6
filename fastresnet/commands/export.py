"""`fastresnet export`: export a trained network to other programs, or for upload."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastresnet.arguments import PositionalOrFlag, parse
from fastresnet.terminal import check_output, load_torch, say
from pipelines.errors import UsageError, note

if TYPE_CHECKING:
    from fastresnet.model_card import Measured
    from fastresnet.weights import Weights

_SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch-export": ".pt2", "hub": "-hub"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Export a trained network to other programs, and check that the file computes the same."""

    weights: PositionalOrFlag[str] = "pretrained:resnet20"
    """Run folder, checkpoint or model.safetensors of this program, state dict of another, pretrained:NAME, or
    hf-hub:USER/NAME."""
    model: str | None = None
    """Network. Without it: the one named in the file or inferred from its shapes."""
    format: Literal["onnx", "torch-export", "safetensors", "hub"] = "onnx"
    """onnx, torch-export (a program for torch.export.load), safetensors (the weights alone) or hub (a folder to upload
    to the Hugging Face Hub, with a model card)."""
    normalize: bool = False
    """Include the normalisation in the graph, which then takes images in 0..1."""
    out: Path | None = None
    """File to write, or new folder of hub. Without it: the name of the network, in the current folder."""

    def __post_init__(self) -> None:
        if self.format != "hub":  # a folder, which `export` checks
            check_output("--out", self.out)
        if self.normalize and self.format in ("safetensors", "hub"):
            raise UsageError(f"--normalize adds normalisation to a graph, but {self.format} contains only weights.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "export", arguments)
    load_torch()
    from fastresnet.export import export
    from fastresnet.pretrained import find_weights
    from fastresnet.weights import load_weights, note_assumptions

    file = find_weights(options.weights)
    weights = load_weights(file, options.model)
    path = options.out or Path(f"{weights.name}{_SUFFIXES[options.format]}")
    if options.format == "hub":
        return _export_repository(weights, path, _find_accuracy(weights, options.weights, file))
    note_assumptions(weights, options.weights, normalized=options.normalize)
    difference = export(weights, path, options.format, normalize=options.normalize)
    say(f"{weights.name}, {path.stat().st_size / 1e6:.1f} MB in {path}; logits differ by {difference:.1e} at most")
    say(f"images  [N, 3, 32, 32] in 0..1{'' if options.normalize else f', {_normalization(weights)}'}")
    say(f"logits  [N, {weights.num_classes}]: {', '.join(weights.classes)}")
    return 0


def _export_repository(weights: Weights, folder: Path, measured: Measured | None) -> int:
    from fastresnet.export import export_repository

    difference = export_repository(weights, folder, measured)
    size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"{weights.name}, {size / 1e6:.1f} MB in {folder}; logits differ by {difference:.1e} at most")
    say(f"card    {folder / 'README.md'}: add a license to its first lines")
    say(f"upload  hf upload USER/NAME {shlex.quote(str(folder))}")
    say("load    fastresnet eval hf-hub:USER/NAME")
    return 0


def _find_accuracy(weights: Weights, given: str, file: Path) -> Measured | None:
    """Find the accuracy of `weights`, loaded from `file`: on its card, or in the summary.json of its run.

    A `Note` says if it is not known. Raises `UsageError` if the weights do not say their training, `DataError` if
    summary.json is damaged.
    """
    from fastresnet.model_card import Measured
    from fastresnet.pretrained import PREFIX, is_pretrained, pretrained_card
    from fastresnet.run_folder import read_summary, tta_accuracies

    if weights.training is None:
        raise UsageError(
            f"--format hub describes the training, which {given} does not say. Give weights of this program, or "
            "--format safetensors."
        )
    summary = file.with_name("summary.json")
    if is_pretrained(given):
        facts = dataclasses.asdict(pretrained_card(given.removeprefix(PREFIX)))
        how, origin = "in fp32 on a CPU", facts
    elif file.name == "model.safetensors" and summary.exists():
        facts = read_summary(summary)
        how, origin = f"in {weights.training['precision']}", facts["environment"]
        if facts.get("settings") != weights.training:
            note(f"{summary} is of another training: the model card states no accuracy.")
            return None
    else:
        note(f"the accuracy of {given} is not known: no summary.json of its run is beside it, or it is a checkpoint.")
        return None
    return Measured(
        accuracies={"single view": facts["test_accuracy"], **dict(tta_accuracies(facts))},
        how=how,
        device=str(origin.get("device", "unknown")),
        commit=str(origin.get("commit", "unknown")),
    )


def _normalization(weights: Weights) -> str:
    if weights.mean.shape[1] > 1:
        return "minus the mean of each pixel (--normalize includes that in the graph)"
    mean, std = (", ".join(f"{v:.4f}" for v in values.flatten().tolist()) for values in (weights.mean, weights.std))
    return f"minus {mean}, divided by {std} (--normalize includes that in the graph)"
