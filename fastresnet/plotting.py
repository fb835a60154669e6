"""Plots of runs."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fastresnet.figures import Axes, Figure, MaxNLocator, Normalize, ScalarMappable, Text
from fastresnet.text import font_family, for_figure
from pipelines.files import write_bytes

_SHOWN_CLASSES, _NUMBERED_CLASSES = 40, 20  # of a confusion matrix; the picture of 1,000 classes would take 38 GB
_STAIRS = "steps-mid"
_SIGNED = "RdBu_r"  # red is positive
_COLORS = {"train": "#4477aa", "test": "#ee6677", "val": "#228833"}
RUN_COLORS = ("#4477aa", "#ee6677", "#228833", "#aa8800", "#33aacc", "#aa3377", "#888888", "#e07b00", "#7755cc")
"""Colours of several runs, legible on white and on black (after Paul Tol's bright scheme)."""


class History(Protocol):
    """Figures of a run by epoch, such as those of a `Run`."""

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Lines of metrics.csv."""

    @property
    def evaluated_on(self) -> str:
        """Split evaluated after every epoch, `test` or `val`."""

    @property
    def size_changes(self) -> Sequence[tuple[float, int]]:
        """Sides of the training images, in pixels, each with the epochs before it; none if all are whole."""


def curves(runs: Mapping[str, History]) -> Figure:
    """Plot loss, accuracy and learning rate of runs over their epochs, side by side.

    A single run has its name as title, and one colour for each split. Of several runs, each has one colour, with
    training dashed, and its name in the legend.
    """
    figure = Figure(figsize=(13, 4 + 0.08 * len(runs)), layout="constrained")
    panels = figure.subplots(1, 3)
    _draw_curves(panels, runs)
    if len(runs) > 1:
        lines = panels[1].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    else:
        figure.suptitle(for_figure(next(iter(runs)), 100))
    return figure


def curve_panels(runs: Mapping[str, History]) -> list[Figure]:
    """Plot the same as `curves` in one figure each, without a title, and without a legend of several runs."""
    figures = [Figure(figsize=(4.8, 3.8), layout="constrained") for _ in range(3)]
    _draw_curves([figure.subplots() for figure in figures], runs)
    return figures


def _draw_curves(panels: Sequence[Axes], runs: Mapping[str, History]) -> None:
    """Draw loss, accuracy and learning rate of `runs` into three panels."""
    loss, accuracy, rate = panels
    colors = itertools.cycle(RUN_COLORS) if len(runs) > 1 else [""]
    for (name, run), color in zip(runs.items(), colors, strict=False):
        _draw_run(panels, for_figure(name, 60), run, color)
    if all(line.get_drawstyle() == _STAIRS for line in rate.lines):
        rate.set_yscale("log")
    else:
        rate.set_ylim(bottom=0)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    dashed = ", training dashed" if len(runs) > 1 else ""
    _finish(loss, f"cross-entropy loss (nats){dashed}")
    _finish(accuracy, f"top-1 accuracy (%){dashed}")
    _finish(rate, "learning rate at the end of the epoch")
    if len(runs) == 1:
        loss.legend(frameon=False)
        accuracy.legend(frameon=False)
    first, *others = (run.size_changes for run in runs.values())
    if first and all(changes == first for changes in others):
        _mark_sizes((loss, accuracy), first)


def _draw_run(panels: Sequence[Axes], name: str, run: History, color: str) -> None:
    """Draw the curves of one run in `color`, or in one colour for each split if it is empty."""
    loss, accuracy, rate = panels
    rows, splits = run.rows, ("train", run.evaluated_on)
    epochs = [row["epoch"] for row in rows]
    marker: dict[str, Any] = {"marker": "o", "markersize": 6 if len(rows) == 1 else 3} if len(rows) < 40 else {}
    last = [f"{split} {rows[-1][f'{split}_accuracy']:.2f} %" for split in splits]
    for split, own_label in zip(splits, last, strict=True):
        label, line = own_label, "-"
        if color:  # matplotlib leaves labels that begin with _ out of the legend
            label, line = ("_", "--") if split == "train" else (f"{name}: {', '.join(last)}", "-")
        style = {"color": color or _COLORS[split], "linestyle": line, **marker}
        style["fillstyle"] = "none" if color and split == "train" else "full"
        loss.plot(epochs, [row[f"{split}_loss"] for row in rows], label=split, **style)
        accuracy.plot(epochs, [row[f"{split}_accuracy"] for row in rows], label=label, **style)
    rates = [row["lr"] for row in rows]
    drawstyle = _STAIRS if _fall_in_steps(rates) else "default"
    rate.plot(epochs, rates, color=color or "#777777", drawstyle=drawstyle, **marker)


def _fall_in_steps(rates: Sequence[float]) -> bool:
    """Return True if the learning rates are few values, above 0: stairs on a logarithmic axis suit them."""
    return min(rates) > 0 and 1 < len(set(rates)) <= len(rates) / 2


def _mark_sizes(panels: Sequence[Axes], changes: Sequence[tuple[float, int]]) -> None:
    """Mark the epochs at which the training images get another side, in pixels."""
    for axes in panels:
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch (dotted: training images change in size)")
        axes.set_title(axes.get_title(), fontsize=10, pad=16)
        axes.xaxis.grid(False)
        for epoch, side in changes:
            if epoch:
                axes.axvline(epoch, color="#999999", linestyle=":", linewidth=1.2)
            axes.text(epoch, 1.01, f"{side} px", transform=axes.get_xaxis_transform(), va="bottom", fontsize=7)


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
    size = max(4.0, 0.4 * min(len(shown), _NUMBERED_CLASSES) + 1.6)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in itertools.product(range(len(shown)), repeat=2):
        if counts[row, column] and len(shown) <= _NUMBERED_CLASSES:
            color = "white" if shares[row, column] > 0.5 else "#222222"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=7)
    names = [for_figure(classes[number]) for number in shown]
    axes.set_xticks(range(len(shown)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    title = for_figure(title, int(11 * size))
    if len(shown) < len(classes):
        title += f"\nthe {len(shown)} of {len(classes):,} classes with the most mistakes (as true or predicted class)"
    axes.set_title(title, fontsize=9)
    return figure


def _most_confused(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return the numbers, in order, of the classes with the most mistakes as true or predicted class, 40 at most."""
    wrong = true != predicted
    mistakes = sum(np.bincount(numbers[wrong], minlength=classes) for numbers in (true, predicted))
    return np.sort(np.argsort(-mistakes, kind="stable")[:_SHOWN_CLASSES])


def image_grid(images: np.ndarray, titles: Sequence[str], title: str) -> Figure:
    """Draw uint8 images [N, 32, 32, 3] with one or two lines of text over each; only `title` if there are none."""
    if not len(images):
        figure = Figure(figsize=(8, 1))
        figure.text(0.5, 0.5, for_figure(title, 120), ha="center", va="center")
        return figure
    columns = 6
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows + 0.4), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, text in zip(figure.axes, images, titles, strict=False):
        axes.imshow(image)
        axes.set_title(text, fontsize=8)
    figure.suptitle(for_figure(title, 120), fontsize=10)
    return figure


def saliency_grid(images: Tensor, attributions: Tensor, titles: Sequence[str]) -> Figure:
    """Draw images [N, 3, 32, 32] in 0..1 and, beside each, its attributions [N, 32, 32] over it.

    These are averaged over neighbours, as they differ much from pixel to pixel, and scaled to -1..1 in each image.
    """
    smooth = avg_pool2d(avg_pool2d(attributions[:, None], 3, 1, 1), 3, 1, 1)[:, 0]
    scaled = smooth / smooth.abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
    columns = min(len(images), 3)
    rows = -(-len(images) // columns)
    width = max(4.4 * columns, 5.5)
    figure = Figure(figsize=(width, (width / columns / 2 + 0.5) * rows + 1.5), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    pairs = grid.reshape(-1, 2)
    for (plain, overlaid), image, shares, title in zip(pairs, images, scaled, titles, strict=False):
        plain.imshow(image.permute(1, 2, 0).numpy())
        plain.set_title(title, fontsize=9, loc="left")
        overlaid.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
        overlaid.imshow(shares.numpy(), cmap=_SIGNED, vmin=-1, vmax=1, alpha=shares.abs().sqrt().numpy())
    colors = ScalarMappable(Normalize(-1, 1), _SIGNED)
    bar = figure.colorbar(colors, ax=grid, location="bottom", shrink=0.6, aspect=40)
    bar.set_ticks([-1, 0, 1], labels=["against the class", "no effect", "for the class"])
    bar.set_label(
        "pixels that speak for or against the class named:\nintegrated gradients of its logit, "
        "from the mean colour to the image\n(Sundararajan et al. 2017), averaged over 5x5 pixels",
        fontsize=9,
    )
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
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _finish(axes, "range test: cross-entropy loss (nats) of steps whose learning rate grows")
    return figure


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
