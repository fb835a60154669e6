"""Report of one or several runs: one HTML page that needs no network and no other file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from PIL import Image

from fastresnet.arguments import docstrings_of
from fastresnet.config import COMPILE, TrainConfig
from fastresnet.evaluation import Predictions
from fastresnet.figures import Figure
from fastresnet.plotting import RUN_COLORS, curve_panels, rendered
from fastresnet.recipes import changed_settings
from fastresnet.run_folder import TTA, Run, named, tta_accuracies
from fastresnet.text import for_terminal
from fastresnet.training.loggers import format_duration
from pipelines.errors import UsageError

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid #8885; }
p { overflow-wrap: anywhere; }
.notice { border-left: .3rem solid #cc7711; padding: .3rem .8rem; background: #cc771122; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile { border: 1px solid #8885; border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; }
.tile span, .muted, .meaning { opacity: .75; font-size: .85rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.wide { overflow-x: auto; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; fill: currentColor; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
.images img { width: 100%; image-rendering: pixelated; border-radius: .3rem; }
.images figcaption { font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th { text-align: left; font-weight: 600; }
td, th { padding: .2rem 1rem .2rem 0; vertical-align: top; }
td { overflow-wrap: anywhere; border-top: 1px solid #8883; }
td:first-child { white-space: nowrap; }
.runs td { overflow-wrap: normal; }
.bar { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; margin: .5rem 0; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
summary { cursor: pointer; margin: .5rem 0; }
@media (max-width: 40rem) {
  .terms tr { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); border-top: 1px solid #8883; }
  .terms td { border: 0; white-space: normal; }
  .terms td.meaning { grid-column: 1 / -1; padding-bottom: .5rem; }
  .runs tr:first-child, .runs td:empty { display: none; }
  .runs tr, .runs table, .runs tbody { display: block; }
  .runs tr { border-top: 1px solid #8883; padding: .4rem 0; }
  .runs td { display: flex; gap: 1rem; justify-content: space-between; border: 0; padding: 0; white-space: normal; }
  .runs td { overflow-wrap: anywhere; }
  .runs td::before { content: attr(data-name); opacity: .75; }
  .runs td:first-child { display: block; font-weight: 600; }
  .runs td.meaning::before, .runs td:first-child::before { content: none; }
}
"""
_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
_PHASES = {
    "import": ("imports", "loading Python's libraries"),
    "data": ("opening the data", "reading and verifying the data set, and making the first batch"),
    "model": ("building the network", "network, optimisers and, of a resumed run, their state"),
    "threads": ("choosing threads", "trial steps with several numbers of CPU threads"),
    "compile": ("compiling", "torch.compile, CUDA graphs, and the choice of kernels"),
}
_ACCURACY = """Accuracy is top-1: the share of images whose most likely class is the true one. Single view: each test
image as it is. Flip TTA (test-time augmentation) averages the logits of an image and its mirror image, shift TTA also
those of images shifted by one pixel. """
_CHOSEN_ON = {
    "validation": "The best epoch was chosen on held-out images.",
    "test": "The best epoch was chosen on the test set itself, so its accuracy is too high as an estimate.",
}


def page(runs: Sequence[Run], predictions: Predictions | None = None, notices: Sequence[str] = ()) -> str:
    """Write the HTML of one run, or of the comparison of several; some may be unfinished.

    `predictions` are those of a single finished run for the test set. `notices` are shown at the top. Raises
    `UsageError` if a run has no settings, or those of an unknown recipe.
    """
    if len(runs) == 1:
        return _document(runs[0].title, [*_progress(runs), *notices], _single(runs[0], predictions))
    return _document(f"Comparison of {len(runs)} runs", [*_progress(runs), *notices], _comparison(named(runs)))


def message(title: str, text: str) -> str:
    """Write the HTML of a page that has only a message."""
    return _document(title, [text], "")


def _document(title: str, notices: Iterable[str], body: str) -> str:
    shown = "".join(f'<p class="notice">{_html(notice)}</p>' for notice in notices)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{_html(title)}</title><style>{_STYLE}</style></head><body>
<h1>{_html(title)}</h1>
{shown}{body}
</body></html>
"""


def _progress(runs: Sequence[Run]) -> Iterator[str]:
    """Say how far each unfinished run is."""
    for run in runs:
        if run.summary is None:
            name = f"{run.name} is not finished" if len(runs) > 1 else "Not finished"
            yield f"{name}: {len(run.rows):,} of {_planned_epochs(run):,} epochs."


def _planned_epochs(run: Run) -> int:
    epoch_steps = max(int(run.rows[0]["step"]), 1)
    return -(-_config(run).total_steps(epoch_steps) // epoch_steps)


def _config(run: Run) -> TrainConfig:
    if run.config is None:
        raise UsageError(f"{run.folder} has no config.toml, the settings of the run.")
    return run.config


# --- one run -----------------------------------------------------------------------------------------------------


def _single(run: Run, predictions: Predictions | None) -> str:
    sections = [_origin(run), _tiles(run), f"<h2>Curves</h2>{_curves({run.title: run})}"]
    if predictions is not None:
        sections += [
            "<h2>Confusion matrix</h2><p class='muted'>Each row has the test images of one true class, by predicted "
            "class. Colours are shares of the row.</p>",
            _matrix(predictions.confusion()),
            f"<h2>Most confident mistakes</h2>{_mistakes(predictions)}",
        ]
    if run.summary is not None:
        sections.append(f"<h2>Where the time went</h2>{_times(run.summary)}")
    sections.append(f"<h2>Computation</h2>{_terms(_computation(run))}")
    sections.append(f"<h2>Settings</h2>{_settings(run)}")
    if run.summary is not None:
        sections.append(f"<h2>Origin</h2>{_terms(_environment(run.summary))}")
    return "\n".join(sections)


def _origin(run: Run) -> str:
    environment = {} if run.summary is None else run.summary["environment"]
    parts = [str(run.folder), *(str(environment[name]) for name in ("device", "started") if name in environment)]
    return f'<p class="muted">{_html("; ".join(parts))}</p>'


def _tiles(run: Run) -> str:
    """Show the main figures, of the last epoch so far if the run is not finished, and define them."""
    summary, last = run.summary, run.rows[-1]
    if summary is None:
        split = run.evaluated_on
        best = max(row[f"{split}_accuracy"] for row in run.rows)
        kind = "held-out images" if split == "val" else "test"
        tiles = [
            (f"{last[f'{split}_accuracy']:.2f} %", f"accuracy, {kind}, single view"),
            (f"{best:.2f} %", "highest so far"),
            (f"{last['train_accuracy']:.2f} %", "accuracy in training"),
            (f"{last['train_loss']:.4g}", "loss in training, nats"),
            (f"{last['lr']:.3g}", "learning rate"),
        ]
        text = "Figures are of the last finished epoch. Accuracy is top-1: the share of images whose most likely class "
        text += "is the true one; in training, of augmented images while the weights change."
    else:
        tiles = [
            (f"{summary['test_accuracy']:.2f} %", "test accuracy, last epoch, single view"),
            *((f"{accuracy:.2f} %", f"with {name}") for name, accuracy in tta_accuracies(summary)),
            (f"{summary['best_accuracy']:.2f} %", "best epoch, single view"),
            (f"{summary['epochs']:,}", f"epochs, {summary['steps']:,} steps"),
            (f"{summary['images_per_s']:,.0f}", "images/s in training steps"),
            (format_duration(summary["total_seconds"]), "in all"),
        ]
        text = _ACCURACY + _CHOSEN_ON.get(summary["best_chosen_on"], "")
    shown = "".join(f'<div class="tile"><b>{_html(b)}</b><span>{_html(what)}</span></div>' for b, what in tiles)
    return f'<div class="tiles">{shown}</div><p class="muted">{_html(text)}</p>'


def _matrix(figure: Figure) -> str:
    """Draw a figure that becomes a little smaller on a small screen, and scrolls sideways if that is not enough."""
    width = 96 * figure.get_size_inches()[0]
    shown = _figure(figure, "confusion matrix")
    return f'<div class="wide"><div style="min-width:{0.6 * width:.0f}px;max-width:{width:.0f}px">{shown}</div></div>'


def _mistakes(predictions: Predictions) -> str:
    """Show the images with their true and predicted classes, or say that there are none."""
    rows = predictions.worst()
    if not len(rows):
        return f"<p>None: all {len(predictions.labels):,} test images are right.</p>"
    shown = []
    for row in rows:
        file = io.BytesIO()
        Image.fromarray(predictions.images[row]).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        caption = [line.replace(" %", "&nbsp;%") for line in predictions.caption(row, _html)]
        shown.append(
            f'<figure><img alt="{", ".join(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{'<br>'.join(caption)}</figcaption></figure>"
        )
    text = "Percentages are the network's probabilities of the predicted class."
    return f'<p class="muted">{text}</p><div class="images">{"".join(shown)}</div>'


def _times(summary: dict[str, Any]) -> str:
    """Draw start, training and the rest (evaluation, checkpoints) as one bar, and define its parts."""
    cold = summary["cold_start"]
    start = [(*texts, cold.get(phase, 0.0)) for phase, texts in _PHASES.items()]  # older runs have fewer phases
    rest = summary["total_seconds"] - summary["train_seconds"] - sum(seconds for *_, seconds in start)
    parts = [
        *start,
        ("training steps", "batches, forward and backward passes, updates", summary["train_seconds"]),
        ("other", "evaluation, checkpoints and, of a resumed run, its earlier starts", max(rest, 0.0)),
    ]
    whole = sum(seconds for *_, seconds in parts) or 1.0
    bars = "".join(
        f'<div style="width:{100 * seconds / whole:.2f}%;background:{color}" title="{what}"></div>'
        for (what, _, seconds), color in zip(parts, _COLORS, strict=True)
    )
    lines = "".join(
        f'<tr><td><i class="key" style="background:{color}"></i>{what}</td><td>{seconds:,.1f} s, '
        f'{100 * seconds / whole:.1f} %</td><td class="meaning">{meaning}</td></tr>'
        for (what, meaning, seconds), color in zip(parts, _COLORS, strict=True)
    )
    return f'<div class="bar">{bars}</div><table class="terms">{lines}</table>'


def _computation(run: Run) -> Iterator[tuple[str, Any, str]]:
    """List how the run was computed: name, value and meaning."""
    config, summary = _config(run), run.summary or {}
    environment = summary.get("environment", {})
    yield "device", environment.get("device", config.device), "processor or GPU"
    yield "threads", environment.get("threads", config.threads), "CPU threads of PyTorch's operators"
    if "ranks" in environment:
        yield "processes", environment["ranks"], "processes of torchrun that share each batch"
    yield "precision", config.precision, "number format of the forward pass; weights and updates are in fp32"
    backend = COMPILE.get(config.compile, config.compile)
    yield (
        "backend",
        backend,
        "eager: operator by operator; compile: torch.compile; capture: one CUDA graph; graph: both",
    )
    yield "kernels", config.kernels, "batch norm and Muon: torch (PyTorch's) or own; auto on a CPU is own"
    yield "pipeline", config.pipeline, "source of the batches"
    if summary.get("flops") is not None:
        rate = summary["flops"] / max(summary["train_seconds"], 1e-9) / 1e12
        yield "arithmetic", f"{summary['flops'] / 1e15:.4g} PFLOP", "of convolutions and linear layers in training"
        yield "arithmetic rate", f"{rate:.4g} TFLOP/s", "arithmetic by the time of the training steps"


def _settings(run: Run) -> str:
    config, meanings = _config(run), docstrings_of(TrainConfig)
    changed, settings = changed_settings(config), config.to_dict()
    first = f"<p>All as in recipe {_html(config.recipe)}.</p>"
    if changed:
        lines = _terms((name, value, meanings.get(name, "")) for name, value in sorted(changed.items()))
        first = f"<p>Changed from recipe {_html(config.recipe)}:</p>{lines}"
    every = _terms((name, value, meanings.get(name, "")) for name, value in settings.items())
    return f"{first}<details><summary>All {len(settings)} settings</summary>{every}</details>"


def _environment(summary: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    meanings = {
        "commit": "of this program; + for a changed checkout",
        "command": "of the last start",
        "started": "last start, UTC",
    }
    for name, value in summary["environment"].items():
        if name not in ("device", "threads", "ranks"):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            yield name, text, meanings.get(name, "")


# --- several runs ------------------------------------------------------------------------------------------------


def _comparison(runs: dict[str, Run]) -> str:
    return "\n".join(
        [
            f"<h2>Results</h2>{_results(runs)}",
            f"<h2>Curves</h2><p class='muted'>Colours are those of the table.</p>{_curves(runs)}",
            f"<h2>Settings that differ</h2>{_differences(runs)}",
        ]
    )


def _results(runs: dict[str, Run]) -> str:
    """Tabulate accuracies and times; of an unfinished run, those of its last epoch."""
    head = ["accuracy", *TTA.values(), "best epoch", "epochs", "images/s", "training", "in all"]
    lines = []
    for name, run in runs.items():
        if run.summary is None:
            evaluated = [row[f"{run.evaluated_on}_accuracy"] for row in run.rows]
            cells = [f"{evaluated[-1]:.2f} %", *[""] * len(TTA), f"{max(evaluated):.2f} %"]
            cells += [f"{len(run.rows):,} of {_planned_epochs(run):,}", "", "", "not finished"]
        else:
            summary = run.summary
            views = dict(tta_accuracies(summary))
            cells = [f"{summary['test_accuracy']:.2f} %"]
            cells += [f"{views[view]:.2f} %" if view in views else "" for view in TTA.values()]
            cells += [f"{summary['best_accuracy']:.2f} %", f"{summary['epochs']:,}", f"{summary['images_per_s']:,.0f}"]
            cells += [format_duration(summary[f"{part}_seconds"]) for part in ("train", "total")]
        lines.append([name, *cells])
    text = f"Accuracies are of the test set after the last epoch, in percent. {_ACCURACY}The best epoch is the highest "
    text += "of those measured after each epoch, of held-out images if the run has some. Images/s are those of the "
    text += "training steps, and so is the time in training. Times compare only on one machine."
    return f'{_table(["run", *head], lines, list(runs))}<p class="muted">{_html(text)}</p>'


def _differences(runs: dict[str, Run]) -> str:
    """Tabulate the settings that are not the same in all runs, and the machine if it is not."""
    settings = [_config(run).to_dict() for run in runs.values()]
    values = {
        name: [_value(each.get(name, "")) for each in settings]
        for name in sorted({n for each in settings for n in each})
    }
    machines = [(run.summary or {}).get("environment", {}).get("device", "") for run in runs.values()]
    if len({*machines} - {""}) > 1:
        values["machine"] = machines
    meanings = {**docstrings_of(TrainConfig), "machine": "Processor or GPU of the run."}
    lines = [[name, *each, meanings.get(name, "")] for name, each in values.items() if len({*each}) > 1]
    if not lines:
        return "<p>None: the runs have the same settings.</p>"
    return _table(["setting", *runs, "meaning"], lines, list(runs))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], runs: Sequence[str]) -> str:
    """Make a table, in which the names of `runs` have their colours.

    On a small screen, it has a block for each line, with the heads beside its cells.
    """

    def marked(text: str) -> str:
        color = RUN_COLORS[runs.index(text) % len(RUN_COLORS)] if text in runs else None
        return (f'<i class="key" style="background:{color}"></i>' if color else "") + _html(text)

    def cell(name: str, text: str) -> str:
        kind = ' class="meaning"' if name == "meaning" else ""
        return f'<td data-name="{_html(name)}"{kind}>{marked(text) if name == head[0] else _html(text)}</td>'

    top = "".join(f"<th>{marked(name) if number else _html(name)}</th>" for number, name in enumerate(head))
    rows = "".join(f"<tr>{''.join(map(cell, head, line))}</tr>" for line in lines)
    return f'<div class="wide runs"><table><tr>{top}</tr>{rows}</table></div>'


# --- parts of both -----------------------------------------------------------------------------------------------


def _html(text: object) -> str:
    return escape(for_terminal(str(text)))


def _curves(runs: dict[str, Run]) -> str:
    names = ("loss", "accuracy", "learning rate")
    panels = [_figure(figure, f"{name} by epoch") for figure, name in zip(curve_panels(runs), names, strict=True)]
    return f'<div class="panels">{"".join(panels)}</div>'


def _figure(figure: Figure, text: str) -> str:
    """Draw a figure without background, and what is black in the colour of the page's text."""
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    svg = rendered(figure, "svg").decode().replace("#000000", "currentColor")
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    # Identifiers of all figures share the page, and matplotlib's could collide.
    mark = f"f{id(figure):x}-"
    svg = re.sub(r'(id="|href="#|url\(#)', lambda match: match[0] + mark, svg)
    return f"<figure>{svg}</figure>"


def _terms(lines: Iterable[tuple[str, Any, str]]) -> str:
    """Make a table of names, values and meanings."""
    cells = "".join(
        f'<tr><td>{_html(name)}</td><td>{_html(_value(value))}</td><td class="meaning">{_html(meaning)}</td></tr>'
        for name, value, meaning in lines
    )
    return f'<table class="terms">{cells}</table>'


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
