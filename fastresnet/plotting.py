"""Plots of runs."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastresnet.figures import Axes, Figure, MaxNLocator, Text
from fastresnet.text import font_family, for_figure
from pipelines.files import write_bytes

_SHOWN_CLASSES, _NUMBERED_CLASSES = 40, 20  # of a confusion matrix; the picture of 1,000 classes would take 38 GB
_COLORS = {"train": "#4477aa", "test": "#ee6677", "val": "#228833"}


def curves(runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], str]]) -> Figure:
    """Plot loss, accuracy and learning rate of runs over their epochs.

    `runs` has, by name, the rows of `metrics.csv` and the split evaluated after every epoch. A single run has one
    colour for each split. Of several runs, each has one colour, with training dashed.
    """
    figure, several = Figure(figsize=(13, 4 + 0.12 * len(runs)), layout="constrained"), len(runs) > 1
    loss, accuracy, rate = figure.subplots(1, 3)
    for number, (name, (rows, evaluated_on)) in enumerate(runs.items()):
        own = {"color": f"C{number % 10}"}
        markers = {"marker": "o", "markersize": 3} if len(rows) < 40 and not several else {}
        epochs = [row["epoch"] for row in rows]
        for split in ("train", evaluated_on):
            style = {**own, "linestyle": "--" if split == "train" else "-"} if several else {"color": _COLORS[split]}
            values = [row[f"{split}_accuracy"] for row in rows]
            caption = f"{for_figure(name, 60)}, {split}" if several else split
            loss.plot(epochs, [row[f"{split}_loss"] for row in rows], label=split, **style, **markers)
            accuracy.plot(epochs, values, label=f"{caption} ({values[-1]:.2f} %)", **style, **markers)
        style = own if several else {"color": "#555555"}
        line = "steps-mid" if _falls_in_steps(rows) else "default"
        rate.plot(epochs, [row["lr"] for row in rows], drawstyle=line, **style, **markers)
    falls_in_steps = all(_falls_in_steps(rows) for rows, _ in runs.values())
    rate.set_yscale("log" if falls_in_steps else "linear")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(loss, "cross-entropy loss (nats)")
    _finish(accuracy, "top-1 accuracy (%)")
    _finish(rate, "learning rate at the end of the epoch")
    if several:
        lines = accuracy.get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    else:
        loss.legend(frameon=False)
        accuracy.legend(frameon=False)
        figure.suptitle(for_figure(next(iter(runs)), 100))
    return figure


def _falls_in_steps(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the learning rate has few values: stairs on a logarithmic axis, which cannot show 0, suit them."""
    rates = {row["lr"] for row in rows}
    return len(rates) <= max(len(rows) / 3, 1) and rates != {0}


def confusion(true: np.ndarray, predicted: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw the numbers of images by `true` class (rows) and `predicted` class (columns), given for each image, [N].

    Of more than 40 classes, it shows those with the most mistakes. Colours are shares of all images of the true class.
    """
    shown = _most_confused(true, predicted, len(classes))
    place = np.full(len(classes), -1)
    place[shown] = range(len(shown))
    counts, inside = np.zeros((len(shown), len(shown)), np.int64), (place[true] >= 0) & (place[predicted] >= 0)
    np.add.at(counts, (place[true][inside], place[predicted][inside]), 1)
    shares = counts / np.maximum(np.bincount(true, minlength=len(classes))[shown, None], 1)
    size = max(4.0, 0.6 * min(len(shown), _NUMBERED_CLASSES) + 2)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in itertools.product(range(len(shown)), repeat=2):
        if counts[row, column] and len(shown) <= _NUMBERED_CLASSES:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    names = [for_figure(classes[number]) for number in shown]
    axes.set_xticks(range(len(shown)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    title = for_figure(title, max(60, int(9 * size)))
    if len(shown) < len(classes):
        title += f"\nthe {len(shown)} of {len(classes):,} classes with the most mistakes (as true or predicted class)"
    axes.set_title(title, fontsize=10)
    return figure


def _most_confused(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return the numbers, in order, of the classes with the most mistakes as true or predicted class, 40 at most."""
    wrong = true != predicted
    mistakes = sum(np.bincount(numbers[wrong], minlength=classes) for numbers in (true, predicted))
    return np.sort(np.argsort(-mistakes, kind="stable")[:_SHOWN_CLASSES])


def image_grid(images: np.ndarray, titles: Sequence[str], title: str) -> Figure:
    """Draw uint8 images [N, 32, 32, 3] with one or two lines of text over each."""
    columns = 6
    rows = max(-(-len(images) // columns), 1)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows + 0.4), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, text in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image)
        axes.set_title(text, fontsize=8)
    figure.suptitle(for_figure(title, 120), fontsize=10)
    return figure


def saliency_grid(images: Tensor, saliency: Tensor, titles: Sequence[str]) -> Figure:
    """Draw images [N, 3, 32, 32] in 0..1 and, under each, its saliency [N, 32, 32] in 0..1."""
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
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` in the format of the suffix of `path`: .png, .svg or .pdf."""
    write_bytes(path, rendered(figure, path.suffix[1:]))


def rendered(figure: Figure, kind: str) -> bytes:
    """Return the contents of a `png`, `svg` or `pdf` file."""
    _use_other_fonts(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120)
    return buffer.getvalue()


def _use_other_fonts(figure: Figure) -> None:
    """Draw characters that the default font lacks with other installed fonts, which matplotlib does not look for."""
    for text in figure.findobj(Text):
        if others := sorted({family for character in text.get_text() if (family := font_family(character))}):
            text.set_fontfamily([*text.get_fontfamily(), *others])


def sweep(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: Mapping[str, float]
) -> Figure:
    """Plot losses over the learning rates of their steps; `marks` are rates to mark, by name."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="#bbbbbb", linewidth=1, label="each step")
    axes.plot(rates, smoothed, color=_COLORS["train"], label="smoothed")
    for (what, rate), color in zip(marks.items(), (_COLORS["test"], _COLORS["val"]), strict=False):
        axes.axvline(rate, color=color, linestyle="--", label=f"{what}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_ylim(top=1.2 * max(smoothed))
    axes.set_xlabel("learning rate")
    axes.legend(frameon=False)
    _finish(axes, "cross-entropy loss (nats)")
    return figure


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
