"""Report of a run: one HTML page that needs no network and no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from html import escape
from typing import Any

from fastresnet.config import TrainConfig, from_toml
from fastresnet.evaluation import Predictions
from fastresnet.figures import Figure
from fastresnet.plotting import curves, rendered
from fastresnet.recipes import changed_settings
from fastresnet.run_folder import Run, tta_accuracies
from fastresnet.text import for_terminal
from fastresnet.training.loggers import format_duration

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid #8885; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile { border: 1px solid #8885; border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; }
.tile span, .muted { color: #777; font-size: .85rem; }
.wide { overflow-x: auto; }
.wide figure { min-width: 40rem; }
.wide figure.square { min-width: 32rem; }
figure { margin: 1rem 0; background: #fff; border-radius: .5rem; padding: .5rem; }
figure svg, figure img { display: block; width: 100%; height: auto; max-width: 60rem; margin: auto; }
figure.square svg { max-width: 40rem; }
table { border-collapse: collapse; font-size: .9rem; }
td { padding: .15rem .9rem .15rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child, .number { white-space: nowrap; }
.bar { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; margin: .5rem 0; }
.bar div { min-width: 1px; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
"""
_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")


def page(run: Run, predictions: Predictions) -> str:
    """Write the HTML of a finished `run`; `predictions` are of the test set. Raises as `from_toml` does."""
    summary = run.summary or {}
    config = from_toml(run.folder / "config.toml")
    title = f"{summary['model']} on {summary['data']}, recipe {summary['recipe']}, seed {summary['seed']}"
    chosen_on = "held-out images" if summary["best_chosen_on"] == "validation" else "the test set itself"
    tiles = [
        (f"{summary['test_accuracy']:.2f} %", "test accuracy, last epoch, single view"),
        *((f"{accuracy:.2f} %", f"with {name}") for name, accuracy in tta_accuracies(summary)),
        (f"{summary['best_accuracy']:.2f} %", f"best epoch, chosen on {chosen_on}"),
        (f"{summary['epochs']}", f"epochs, {summary['steps']:,} steps"),
        (f"{summary['images_per_s']:,.0f}", "images/s in training"),
        (format_duration(summary["train_seconds"]), "training"),
    ]
    shown = "".join(f'<div class="tile"><b>{_html(b)}</b><span>{_html(text)}</span></div>' for b, text in tiles)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_html(title)}</title><style>{_STYLE}</style></head><body>
<h1>{_html(title)}</h1>
<p class="muted">{_html(summary["environment"]["device"])}; started {_html(summary["environment"]["started"])}</p>
<div class="tiles">{shown}</div>
<h2>Curves</h2>{_figure(curves({run.name: (run.rows, run.evaluated_on)}))}
<h2>Confusion matrix</h2>{_figure(predictions.confusion(), "square")}
<h2>Most confident mistakes</h2>{_picture(predictions.mistakes())}
<h2>Time</h2>{_times(summary)}
<h2>Settings</h2>{_settings(config)}
<h2>Environment</h2>{_table(_environment(summary))}
</body></html>
"""


def _html(text: object) -> str:
    return escape(for_terminal(str(text)))


def _figure(figure: Figure, kind: str = "") -> str:
    svg = rendered(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    # Identifiers of all figures share the page, and matplotlib's could collide.
    mark = f"f{id(figure):x}-"
    svg = re.sub(r'(id="|href="#|url\(#)', lambda match: match[0] + mark, svg)
    return f'<div class="wide"><figure class="{kind}">{svg}</figure></div>'


def _picture(figure: Figure) -> str:
    data = base64.b64encode(rendered(figure, "png")).decode()
    text = "images with their true and predicted classes"
    return f'<div class="wide"><figure><img alt="{text}" src="data:image/png;base64,{data}"></figure></div>'


def _times(summary: dict[str, Any]) -> str:
    """Draw start, training and the rest (evaluation, checkpoints) as one bar."""
    cold = summary["cold_start"]
    names = {
        "import": "imports",
        "data": "opening the data",
        "model": "building the network",
        "threads": "choosing threads",
        "compile": "compiling",
    }
    start = [(text, cold.get(phase, 0.0)) for phase, text in names.items()]  # older runs have fewer phases
    rest = summary["total_seconds"] - summary["train_seconds"] - sum(seconds for _, seconds in start)
    parts = [
        *start,
        ("training steps", summary["train_seconds"]),
        ("evaluation, checkpoints, other", max(rest, 0.0)),
    ]
    whole = sum(seconds for _, seconds in parts) or 1.0
    bars = "".join(
        f'<div style="width:{100 * seconds / whole:.2f}%;background:{color}" title="{what}"></div>'
        for (what, seconds), color in zip(parts, _COLORS, strict=True)
    )
    lines = "".join(
        f'<tr><td><i class="key" style="background:{color}"></i>{what}</td>'
        f'<td class="number">{seconds:,.1f} s</td><td class="number">{100 * seconds / whole:.1f} %</td></tr>'
        for (what, seconds), color in zip(parts, _COLORS, strict=True)
    )
    return f'<div class="bar">{bars}</div><table>{lines}</table>'


def _settings(config: TrainConfig) -> str:
    changed = changed_settings(config)
    note = "All as in the recipe." if not changed else f"Changed from the recipe: {', '.join(sorted(changed))}."
    return f"<p>{_html(note)}</p>{_table(config.to_dict().items())}"


def _environment(summary: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in summary["environment"].items():
        yield name, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
    yield "arithmetic", f"{summary['flops'] / 1e15:.4f} PFLOP"


def _table(lines: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><td>{_html(name)}</td><td>{_html(value)}</td></tr>" for name, value in lines)
    return f"<table>{cells}</table>"
