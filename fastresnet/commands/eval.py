"""`fastresnet eval`: evaluate weights on a test set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastresnet.arguments import JsonFile, PositionalOrFlag, parse
from fastresnet.config import Device, Precision, Tta
from fastresnet.terminal import STANDARD_OUTPUT, check_json, load_torch, print_table, progress_line, write_figures
from fastresnet.text import as_utf8
from fastresnet.threads import Threads, check_threads
from pipelines.errors import UsageError, note


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Evaluate weights on a test set: top-1 accuracy, loss, accuracy of each class."""

    weights: PositionalOrFlag[str]
    """Run folder, checkpoint or model.safetensors of this program, or state dict saved by another (.pt, .th,
    .safetensors). pretrained:NAME, such as pretrained:resnet20, selects weights included in this program, and
    hf-hub:USER/NAME those of a repository of the Hugging Face Hub."""
    model: str | None = None
    """Network. Without it: the one named in the file or inferred from its shapes. Plain networks must be named: they
    have the shapes of residual ones."""
    data: str | None = None
    """Name or folder of the data set, or a folder or archive of images in CLASS/ or test/CLASS/. Without it: the one
    the weights were trained on, else cifar10."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    mean: tuple[float, float, float] | None = None
    """Channel means that the weights expect, in 0..1. Without it: as in training, else the data set's own."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations that the weights expect, in 0..1; given together with --mean."""
    device: Device = "auto"
    """Device to compute on."""
    threads: Threads = "auto"
    """Number of CPU threads, or auto: the fastest in a few trial steps."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16; auto: as in training, fp32 for foreign and pretrained weights."""
    tta: Tta = "none"
    """Measure with test-time augmentation too: flip averages the logits of each image and its mirror image, shift also
    those of both shifted by one pixel."""
    json: JsonFile = None
    """Write the figures to FILE (.json), or print them as JSON."""

    def __post_init__(self) -> None:
        check_json(self.json)
        check_threads(self.threads)
        if (self.mean is None) != (self.std is None):
            raise UsageError("--mean and --std must be given together.")
        for name, values in (("mean", self.mean or ()), ("std", self.std or ())):
            if not all(0 <= value <= 1 for value in values):
                raise UsageError(f"--{name} {values}: give fractions in 0..1; divide values in 0..255 by 255.")
        if self.std and min(self.std) == 0:
            raise UsageError(f"--std {self.std}: standard deviations must be above 0.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "eval", arguments)
    load_torch()
    import torch

    from fastresnet.device import explained_failures, resolve_device, resolve_precision, supports
    from fastresnet.evaluation import evaluate, evaluation_threads, find_dataset_for, open_evaluation
    from fastresnet.pretrained import find_weights, is_pretrained
    from fastresnet.provenance import environment
    from fastresnet.run_folder import tta_accuracies
    from fastresnet.weights import load_weights

    device = resolve_device(options.device)
    weights = load_weights(find_weights(options.weights), options.model)
    training = weights.training or {}
    with progress_line() as report:
        weights, dataset = find_dataset_for(weights, options.weights, options.data, options.root, report)
    normalization = weights.normalization
    if options.mean is not None and options.std is not None:
        normalization = "channel"
        dataset = dataclasses.replace(dataset, mean=options.mean, std=options.std)
    elif not training:
        whose = f"{dataset.name}'s own" if len(dataset.train) else "CIFAR-10's"
        note(f"images are normalised with {whose} mean and std; --mean and --std override them.")
    trained_in = "fp32" if is_pretrained(options.weights) else training.get("precision", "fp32")
    if options.precision != "auto":
        precision: str = resolve_precision(options.precision, device)
    elif supports(trained_in, device):
        precision = trained_in
    else:
        precision = "fp32"
        note(f"trained in {trained_in}, not supported by this GPU; evaluating in fp32.")
    pipeline = open_evaluation(dataset, normalization, precision, device)
    model = weights.model.to(device).to(memory_format=torch.channels_last)
    with (
        explained_failures("try --device cpu"),
        evaluation_threads(options.threads, model, pipeline, precision=precision, device=device) as reason,
    ):
        if reason and options.json != STANDARD_OUTPUT:
            print(reason)
        measured_on = environment(device)
        with progress_line() as report:
            result = evaluate(model, pipeline, dataset.classes, precision, device, options.tta, report=report)
    augmented = {"test_accuracy_mirror": result.mirror_accuracy, "test_accuracy_shift": result.shift_accuracy}
    augmented = {name: accuracy for name, accuracy in augmented.items() if accuracy is not None}
    figures = {
        "schema": 1,
        "model": weights.name,
        "data": dataset.name,
        "test_accuracy": result.accuracy,
        **augmented,
        "loss": result.loss,
        "per_class": {as_utf8(name): accuracy for name, accuracy in result.per_class.items()},
        "images_per_s": result.images_per_s,
        "environment": measured_on,
    }
    if write_figures(options.json, figures):
        return 0
    print_table(
        f"{weights.name} on {dataset.name}, {precision}",
        [
            ("test images", f"{len(dataset.test):,}"),
            ("accuracy, single view", f"{result.accuracy:.2f} %"),
            *((f"  with {name}", f"{accuracy:.2f} %") for name, accuracy in tta_accuracies(augmented)),
            ("loss", f"{result.loss:.4f}"),
            *((f"  {name}", f"{accuracy:.2f} %") for name, accuracy in result.per_class.items()),
            ("throughput", f"{result.images_per_s:,.0f} images/s"),
        ],
    )
    return 0
