"""Pictures of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pipelines.files import write_bytes

_COLORS = {"train": "#4477aa", "test": "#ee6677", "val": "#228833"}


def plot_curves(path: Path, rows: Sequence[dict[str, Any]], *, title: str, evaluated_on: str) -> None:
    """Loss, accuracy and learning rate of the rows of `metrics.csv` over the epochs, as PNG.

    `evaluated_on` is the split measured after every epoch, `test` or `val`.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in rows]
    style = {"marker": "o", "markersize": 3} if len(rows) < 40 else {}
    for split in ("train", evaluated_on):
        values = [row[f"{split}_accuracy"] for row in rows]
        loss.plot(epochs, [row[f"{split}_loss"] for row in rows], label=split, color=_COLORS[split], **style)
        accuracy.plot(epochs, values, label=f"{split} ({values[-1]:.2f} %)", color=_COLORS[split], **style)
    rate.plot(epochs, [row["lr"] for row in rows], color="#555555", drawstyle="steps-mid", **style)
    rate.set_yscale("log")
    _finish(loss, "cross-entropy loss (nats)")
    _finish(accuracy, "top-1 accuracy (%)")
    _finish(rate, "learning rate at the end of the epoch")
    for axes in (loss, accuracy):
        axes.legend(frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def plot_saliency(path: Path, images: Tensor, saliency: Tensor, titles: Sequence[str]) -> None:
    """Images [N, 3, 32, 32] in 0..1 and, under each, its saliency [N, 32, 32] in 0..1."""
    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.4 * columns, 4.6 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for number, title in enumerate(titles):
        row, column = 2 * (number // columns), number % columns
        grid[row, column].imshow(images[number].permute(1, 2, 0).numpy())
        grid[row, column].set_title(title, fontsize=9)
        grid[row + 1, column].imshow(saliency[number].numpy(), cmap="magma", vmin=0, vmax=1)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write `figure` as SVG where the name of the file says so, else as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg" if path.suffix == ".svg" else "png", dpi=120)
    write_bytes(path, buffer.getvalue())


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
