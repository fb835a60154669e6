"""`fastresnet predict`: classes of image files."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from fastresnet.config import Device
from fastresnet.terminal import check_output, parse, print_table
from fastresnet.threads import Threads, check_threads, settled_threads
from pipelines.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH_SIZE = 256
_SHOWN_LINES = 40  # lines of the table on a terminal; --csv writes all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Classify images: the most likely classes of each file, with their probabilities."""

    images: Positional[tuple[Path, ...]]
    """Image files (.png, .jpg), or folders of image files."""
    weights: str = "pretrained:resnet20"
    """Checkpoint or model.safetensors of this program, state dict of another, or pretrained:NAME."""
    model: str | None = None
    """Network. Without it: the one named in the file or inferred from its shapes."""
    top: int = 3
    """Number of classes to print for each image."""
    device: Device = "auto"
    """Device to compute on."""
    threads: Threads = "auto"
    """Number of CPU threads, or auto: the fastest in a few trial steps."""
    csv: Path | None = None
    """CSV file to write all predictions to."""
    saliency: Path | None = None
    """Figure to write (.png or .svg): the images, and the pixels on which the most likely class depends."""

    def __post_init__(self) -> None:
        check_output("--csv", self.csv)
        check_output("--saliency", self.saliency, (".png", ".svg"))
        check_threads(self.threads)
        if self.top < 1:
            raise UsageError(f"--top {self.top}: give 1 or more.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "predict", arguments)
    files = _image_files(options.images)

    import torch

    from fastresnet.device import resolve_device
    from fastresnet.pretrained import find_weights
    from fastresnet.weights import Normalized, load_weights, note_missing_names

    device = resolve_device(options.device)
    weights = load_weights(find_weights(options.weights), options.model)
    note_missing_names(weights, options.weights)
    pixels = _read(files)
    network = Normalized(weights).to(device)
    batches = pixels.split(BATCH_SIZE)

    def forward(images: int) -> None:
        network(batches[0][:images].to(device))

    with (
        torch.inference_mode(),
        settled_threads(options.threads, device, forward, len(batches[0]), len(batches)) as reason,
    ):
        if reason:
            print(reason)
        parts = [network(batch.to(device)).softmax(1).cpu() for batch in batches]
    probabilities, classes = torch.cat(parts).topk(min(options.top, weights.num_classes))
    lines = [
        (str(file), *(f"{weights.classes[c]} {100 * p:.1f} %" for c, p in zip(indices, likely, strict=True)))
        for file, indices, likely in zip(files, classes.tolist(), probabilities.tolist(), strict=True)
    ]
    print_table(
        f"{weights.name} ({options.weights})",
        lines[:_SHOWN_LINES],
        header=("image", *(f"{n}." for n in range(1, len(lines[0])))),
    )
    if len(lines) > _SHOWN_LINES:
        print(f"and {len(lines) - _SHOWN_LINES} more; --csv FILE writes all")
    if options.csv is not None:
        _write_csv(options.csv, files, [[weights.classes[c] for c in row] for row in classes.tolist()], probabilities)
    if options.saliency is not None:
        from fastresnet.plotting import saliency_grid, save_figure

        shown = pixels[:16]
        titles = [f"{Path(line[0]).name}\n{line[1]}" for line in lines]
        saliency = _saliency(network, shown.to(device)).cpu()
        save_figure(saliency_grid(shown, saliency, titles[:16]), options.saliency)
    return 0


def _image_files(given: tuple[Path, ...]) -> list[Path]:
    """List all image files, those of a folder sorted by name. Raises `DataError` if there are none."""
    from pipelines.sources import IMAGE_SUFFIXES

    if not given:
        raise UsageError("predict needs images: fastresnet predict FILE OR FOLDER ...")
    files: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError(f"{path} does not exist.")
        inside = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise DataError(f"{path} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        files += inside
    return files


def _read(files: list[Path]) -> Tensor:
    """Read images in 0..1, [N, 3, 32, 32]."""
    import numpy as np
    import torch

    from pipelines.sources import note_resized, read_image

    images, resized = zip(*map(read_image, files), strict=True)
    note_resized(sum(resized), len(files))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def _saliency(network: nn.Module, images: Tensor) -> Tensor:
    """Compute the saliency of each pixel for the most likely class, [N, 32, 32], at most 1.

    It is the largest absolute gradient of the logit over the pixel's colours (Simonyan, Vedaldi & Zisserman, "Deep
    Inside Convolutional Networks", 2013, section 3).
    """
    import torch

    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(images).amax(1).sum(), images)
    gradient = gradient.abs().amax(1)
    return gradient / gradient.amax((1, 2), keepdim=True).clamp_min(1e-12)


def _write_csv(path: Path, files: list[Path], classes: list[list[str]], probabilities: Tensor) -> None:
    from pipelines.files import write_bytes

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, probabilities.shape[1] + 1)
    writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
    for file, names, values in zip(files, classes, probabilities.tolist(), strict=True):
        pairs = zip(names, values, strict=True)
        writer.writerow([file, *(cell for name, value in pairs for cell in (name, f"{value:.6f}"))])
    write_bytes(path, text.getvalue().encode())
