"""`fastresnet predict`: classes of image files."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastresnet.arguments import JsonFile, Positional, parse
from fastresnet.config import Device
from fastresnet.terminal import STANDARD_OUTPUT, check_json, check_output, load_torch, print_table, write_figures
from fastresnet.text import as_utf8, for_csv, for_figure
from fastresnet.threads import Threads, check_threads, settled_threads
from pipelines.errors import DataError, RunError, UsageError, note
from pipelines.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

Prediction = tuple[str, list[tuple[str, float]]]
"""Image file, and its most likely classes with their probabilities, the most likely first."""

BATCH_SIZE = 256
_TOP = 3
_SHOWN_LINES = 40  # of the table; --csv and --json write all
_DRAWN = 16  # images of --saliency


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Classify images: the most likely classes of each file, with their probabilities."""

    images: Positional[tuple[Path, ...]]
    """Image files (PNG, JPEG, BMP, GIF, PPM, TIFF or WebP), or folders of image files."""
    weights: str = "pretrained:resnet20"
    """Run folder, checkpoint or model.safetensors of this program, state dict of another, pretrained:NAME, or
    hf-hub:USER/NAME."""
    model: str | None = None
    """Network. Without it: the one named in the file or inferred from its shapes."""
    top: int | None = None
    """Number of most likely classes of each image. Without it: 3."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and list them."""
    device: Device = "auto"
    """Device to compute on."""
    threads: Threads = "auto"
    """Number of CPU threads, or auto: the fastest in a few trial steps."""
    csv: Path | None = None
    """CSV file to write all predictions to."""
    json: JsonFile = None
    """Write all predictions to FILE (.json), or print them as JSON."""
    saliency: Path | None = None
    """Figure to write (.png or .svg): the first 16 images, and the pixels that speak for or against the most likely
    class."""

    def __post_init__(self) -> None:
        check_output("--csv", self.csv)
        check_json(self.json)
        check_output("--saliency", self.saliency, (".png", ".svg"))
        check_threads(self.threads)
        if self.top is not None and self.top < 1:
            raise UsageError(f"--top {self.top}: give 1 or more.")


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "predict", arguments)
    files = _image_files(options.images)

    load_torch()
    import torch

    from fastresnet.device import resolve_device
    from fastresnet.pretrained import find_weights
    from fastresnet.provenance import environment
    from fastresnet.weights import Normalized, load_weights, note_assumptions

    device = resolve_device(options.device)
    weights = load_weights(find_weights(options.weights), options.model)
    note_assumptions(weights, options.weights)
    files, pixels = _read(files, set(options.images), options.skip_unreadable)
    network = Normalized(weights).to(device)
    batches = pixels.split(BATCH_SIZE)

    def forward(images: int) -> None:
        network(batches[0][:images].to(device))

    with (
        torch.inference_mode(),
        settled_threads(options.threads, device, forward, len(batches[0]), len(batches)) as reason,
    ):
        if reason and options.json != STANDARD_OUTPUT:
            print(reason)
        top = min(options.top or _TOP, weights.num_classes)
        if options.top not in (None, top):
            note(f"--top {options.top}: the network has fewer classes ({top}).")
        parts = [network(batch.to(device)).softmax(1).topk(top) for batch in batches]
    probabilities, classes = (torch.cat([part[kind].cpu() for part in parts]) for kind in (0, 1))
    if not probabilities.isfinite().all():
        raise RunError(f"the logits of {options.weights} are not finite for all images: its weights overflow.")
    predictions: list[Prediction] = [
        (str(file), [(weights.classes[c], p) for c, p in zip(indices, likely, strict=True)])
        for file, indices, likely in zip(files, classes.tolist(), probabilities.tolist(), strict=True)
    ]
    lines = [(file, *(f"{name} {100 * p:.1f} %" for name, p in likely)) for file, likely in predictions]
    if options.csv is not None:
        _write_csv(options.csv, predictions)
    if options.saliency is not None:
        from fastresnet.plotting import saliency_grid, save_figure

        if len(files) > _DRAWN:
            note(f"{options.saliency} shows the first {_DRAWN} of {len(files):,} images.")
        shown = pixels[:_DRAWN]
        titles = [f"{for_figure(Path(name).name)}\n{for_figure(line)}" for name, line, *_ in lines[: len(shown)]]
        attributions = integrated_gradients(network, shown.to(device), network.mean).sum(1).cpu()
        save_figure(saliency_grid(shown, attributions, titles), options.saliency)
    described = {"schema": 1, "model": weights.name, "weights": options.weights, "environment": environment(device)}
    if write_figures(options.json, {**described, "images": list(map(_facts, predictions))}):
        return 0
    print_table(
        f"{weights.name} ({options.weights})",
        lines[:_SHOWN_LINES],
        header=("image", *(f"{n}." for n in range(1, len(lines[0])))),
    )
    if len(lines) > _SHOWN_LINES:
        print(f"and {len(lines) - _SHOWN_LINES} more; --csv FILE or --json FILE writes all")
    return 0


def _image_files(given: tuple[Path, ...]) -> list[Path]:
    """List all image files, those of a folder sorted by name. Raises `DataError` if there are none."""
    from pipelines.archives import IMAGE_SUFFIXES, is_image, list_files
    from pipelines.images import note_left_out

    files: list[Path] = []
    left_out: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError(f"{path} does not exist.")
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(path.joinpath(*file.parts) for file in list_files(path) if not file.is_folder)
        images = [file for file in found if is_image(file.name)]
        if not images:
            raise DataError(f"{path} contains no images ({', '.join(IMAGE_SUFFIXES)}).")
        files += images
        left_out += [file for file in found if not is_image(file.name)]
    note_left_out([str(file) for file in left_out], "images")
    return files


def _read(files: list[Path], named: set[Path], skip_unreadable: bool) -> tuple[list[Path], Tensor]:
    """Read images in 0..1, [N, 3, 32, 32]; return those that could be read, and the images. `named` may be pipes."""
    import torch

    from pipelines.archives import file_at
    from pipelines.images import read_images

    opened = (file_at(file, may_be_pipe=file in named) for file in files)
    pixels, is_read = read_images(enumerate(opened), len(files), skip_unreadable=skip_unreadable)
    if not is_read.any():
        raise DataError("none of the images can be read.")
    readable = [file for file, good in zip(files, is_read, strict=True) if good]
    return readable, torch.from_numpy(pixels[is_read]).permute(0, 3, 1, 2).float() / 255


def integrated_gradients(network: nn.Module, images: Tensor, baseline: Tensor, steps: int = 100) -> Tensor:
    """Attribute the logit of the most likely class to the values of `images`, [N, 3, 32, 32].

    The attributions of an image sum to the difference of that logit between the image and `baseline`, [3, H, W] or [3,
    1, 1] (Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", 2017, equation 1). The integral is a sum
    over the middles of equal `steps` of the line between both, of which the paper recommends 20 to 300.
    """
    import torch

    with torch.no_grad():
        classes = network(images).argmax(1, keepdim=True)
    total = torch.zeros_like(images)
    for step in range(steps):
        between = (baseline + (images - baseline) * (step + 0.5) / steps).requires_grad_()
        (gradient,) = torch.autograd.grad(network(between).gather(1, classes).sum(), between)
        total += gradient
    return (images - baseline) * total / steps


def _write_csv(path: Path, predictions: list[Prediction]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, len(predictions[0][1]) + 1)
    writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
    for file, likely in predictions:
        writer.writerow([for_csv(file), *(cell for name, p in likely for cell in (for_csv(name), f"{p:.6f}"))])
    write_bytes(path, text.getvalue().encode())


def _facts(prediction: Prediction) -> dict[str, Any]:
    file, likely = prediction
    return {"image": as_utf8(file), "classes": [{"class": as_utf8(name), "probability": p} for name, p in likely]}
