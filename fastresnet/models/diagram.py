"""Diagram of a network: a box for each layer from top to bottom, and shortcuts at the side.

An addition is a circled plus. Equal blocks in a row are drawn once, with their number.
"""

from __future__ import annotations

import copy
import dataclasses
import html
import itertools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node, Tracer
from torch.fx.passes.shape_prop import ShapeProp

from .batchnorm import BatchNorm2d
from .resnet import SqueezeExcitation
from .speednet import PatchWhitening
from .summary import layer_kind, one_image

ADDITION = "+"
_FUNCTIONS = {
    "add": ADDITION,
    "mul": "scaling",
    "relu": "ReLU",
    "gelu": "GELU",
    "mean": "mean of all pixels",
    "amax": "maximum of all pixels",
    "max_pool2d": "2x2 max pooling",
}

# Lengths in pixels: width and height of a box, distance between rows, top margin, and left edges of the two columns.
_WIDTH, _HEIGHT, _STEP, _TOP = 460, 26, 42, 75
_MAIN, _SIDE = 50, 580
_RADIUS = 11  # of an addition
_CURVE = 70  # distance of a curve's two middle control points from the boxes; the curve itself reaches 3/4 of it

_STYLE = """text { font: 12px sans-serif; fill: #222 } .title { font-size: 16px } .block { fill: #666 }
rect { stroke: #888; fill: #eee } .frame { fill: #f7f7f7; stroke: #ddd } path { fill: none; stroke: #555 }
.conv rect { fill: #cfe2f3 } .norm rect { fill: #dcefd8 } .linear rect { fill: #fbdcc0 } .scale rect { fill: #fdf0b8 }
.shortcut, .plus, circle { stroke: #b03060; stroke-width: 1.5 } circle { fill: #fff }
.times { font-size: 14px; font-weight: bold } .end { text-anchor: end } .middle { text-anchor: middle }"""


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """Layer, or function between layers, in the graph of a network."""

    name: str
    """Name of the module, or of the module that calls the function."""
    kind: str
    """Text in the box."""
    color: str
    """CSS class of the box."""
    output: tuple[int, ...]
    """Output shape for one image."""
    parameters: int
    inputs: tuple[int, ...]
    """Numbers of the boxes from which its inputs come."""
    repeats: int = 1
    """Number of equal blocks in a row for whose layers it stands."""

    @property
    def is_beside(self) -> bool:
        """Position in the side column, as part of a shortcut."""
        return ".downsample" in self.name

    @property
    def block(self) -> str:
        """Name of its block, such as layer1.0, or of a stage without blocks; empty outside the stages."""
        found = re.match(r"layer\d+(\.\d+)?", self.name)
        return found[0] if found else ""

    @property
    def place(self) -> str:
        """Name within its block, or that of a layer outside the stages."""
        return "" if self.name == self.block else self.name.removeprefix(f"{self.block}.")


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SqueezeExcitation) or not any(m.children())


def graph(model: nn.Module) -> list[Box]:
    """List the boxes of `model` in the order of execution, for images [3, 32, 32], which are the first box."""
    copied = copy.deepcopy(model).to("meta").eval()
    traced = _Tracer().trace(copied)
    ShapeProp(GraphModule(copied, traced)).propagate(one_image())
    boxes: list[Box] = []
    numbers: dict[Node, int] = {}
    for node in traced.nodes:
        inputs = tuple(numbers[source] for source in node.all_input_nodes)
        module = copied.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Identity) and node.op != "output":
            boxes += _boxes(node, module, inputs, len(boxes))
            inputs = (len(boxes) - 1,)
        numbers[node] = inputs[0]
    return boxes


def _boxes(node: Node, module: nn.Module | None, inputs: tuple[int, ...], number: int) -> list[Box]:
    """Return the boxes of `node`, the first of which gets `number`: one, or those of a norm that adds a shortcut."""
    color = {
        nn.Conv2d: "conv",
        PatchWhitening: "conv",
        BatchNorm2d: "norm",
        nn.Linear: "linear",
        SqueezeExcitation: "scale",
    }
    box = Box(
        name=next(reversed(node.meta.get("nn_module_stack", {})), ""),
        kind=_kind(node, module),
        color=color.get(type(module), "function"),
        output=tuple(node.meta["tensor_meta"].shape[1:]),
        parameters=sum(parameter.numel() for parameter in module.parameters()) if module else 0,
        inputs=inputs,
    )
    if not isinstance(module, BatchNorm2d) or len(inputs) == 1:
        return [box]
    # The module normalises, adds and applies ReLU in this order, in one pass.
    norm = dataclasses.replace(box, kind="BatchNorm2d", inputs=inputs[:1])
    added = Box(box.block, ADDITION, "function", box.output, 0, (number, inputs[1]))
    relu = dataclasses.replace(added, kind=_FUNCTIONS["relu"], inputs=(number + 1,))
    return [norm, added, relu] if module.relu else [norm, added]


def _kind(node: Node, module: nn.Module | None) -> str:
    if module is None:
        function = getattr(node.target, "__name__", str(node.target))
        return "images" if node.op == "placeholder" else _FUNCTIONS.get(function, function)
    return "BatchNorm2d, ReLU" if isinstance(module, BatchNorm2d) and module.relu else layer_kind(module)


def folded(boxes: Sequence[Box]) -> list[Box]:
    """Return `boxes` with one block in place of equal ones in a row, which `repeats` counts."""
    kept: list[Box] = []
    numbers: list[int] = []  # of all boxes, those of the boxes kept for them
    before: list[Any] = []
    for block, members in itertools.groupby(boxes, key=lambda box: box.block):
        group, first = list(members), len(numbers)
        # Equal blocks have the same layers, with inputs from the same distance.
        shape = [
            (box.place, box.kind, box.output, box.parameters, [first + place - number for number in box.inputs])
            for place, box in enumerate(group)
        ]
        if block and shape == before:
            kept[-len(group) :] = [dataclasses.replace(box, repeats=box.repeats + 1) for box in kept[-len(group) :]]
            numbers += range(len(kept) - len(group), len(kept))
        else:
            for box in group:
                numbers.append(len(kept))
                kept.append(dataclasses.replace(box, inputs=tuple(numbers[number] for number in box.inputs)))
        before = shape
    return kept


def rows(boxes: Sequence[Box]) -> list[int]:
    """Return the row of each box, from the top: the main path has one box in each, and a shortcut begins beside it."""
    found: list[int] = []
    for box in boxes:
        main = sum(not other.is_beside for other in boxes[: len(found)])
        found.append(found[box.inputs[0]] + 1 if box.is_beside else main)
    return found


def draw_graph(boxes: Sequence[Box], title: str, subtitle: str) -> str:
    """Draw the boxes that `graph` returns as a self-contained SVG, equal blocks once."""
    boxes = folded(boxes)
    places = rows(boxes)
    right = (_SIDE if any(box.is_beside for box in boxes) else _MAIN) + _WIDTH + 30
    if any(len(box.inputs) > 1 for box in boxes):
        right = max(right, _MAIN + _WIDTH + _CURVE)
    bottom = _TOP + _STEP * (max(places) + 1)
    edges = [
        _edge(boxes[source], places[source], box, row)
        for box, row in zip(boxes, places, strict=True)
        for source in box.inputs
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{bottom}" '
            f'viewBox="0 0 {right} {bottom}">',
            f"<style>{_STYLE}</style>",
            '<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
            'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" style="fill: #555; stroke: none"/></marker>',
            f'<rect width="{right}" height="{bottom}" style="fill: #fff; stroke: none"/>',
            f'<text class="title" x="{_MAIN}" y="30">{html.escape(title)}</text>',
            f'<text x="{_MAIN}" y="48">{html.escape(subtitle)}</text>',
            f'<text class="block end" x="{_MAIN + _WIDTH - 80}" y="70">output</text>',
            f'<text class="block end" x="{_MAIN + _WIDTH - 10}" y="70">parameters</text>',
            *_frames(boxes, places, right),
            *edges,
            *map(_drawn, boxes, places),
            "</svg>\n",
        ]
    )


def _y(row: int) -> int:
    """Return the vertical centre of a row's boxes."""
    return _TOP + _STEP * row + _HEIGHT // 2


def _frames(boxes: Sequence[Box], places: Sequence[int], right: int) -> list[str]:
    """Draw a frame around each block, with its name at the left and its number of repetitions."""
    frames = []
    for (block, repeats), members in itertools.groupby(
        zip(boxes, places, strict=True), key=lambda pair: (pair[0].block, pair[0].repeats)
    ):
        inside = [row for _, row in members]
        if not block:
            continue
        top, bottom = _y(min(inside)) - _STEP / 2 + 2, _y(max(inside)) + _STEP / 2 - 2
        stage, _, number = block.partition(".")
        name = f"{block} to {stage}.{int(number) + repeats - 1}" if repeats > 1 else block
        frames.append(
            f'<rect class="frame" x="15" y="{top}" width="{right - 30}" height="{bottom - top}" rx="6"/>'
            f'<text class="block middle" transform="translate(35 {(top + bottom) / 2}) rotate(-90)">{name}</text>'
        )
        if repeats > 1:
            frames.append(f'<text class="times end" x="{right - 24}" y="{top + 20}">× {repeats}</text>')
    return frames


def _edge(source: Box, above: int, target: Box, row: int) -> str:
    """Draw an arrow from box to box, in rows `above` and `row`.

    One that skips boxes is a curve to the right of the main path.
    """
    main, side, middle = _MAIN + _WIDTH, _SIDE + _WIDTH // 2, _MAIN + _WIDTH // 2
    start, end = _y(above), _y(row)
    is_addition, kind = target.kind == ADDITION, "shortcut"
    reach = middle + _RADIUS if is_addition else main  # where an arrow from the right ends
    if source.is_beside == target.is_beside and row == above + 1:
        x = side if target.is_beside else middle
        begin, stop = (_RADIUS if box.kind == ADDITION else _HEIGHT // 2 for box in (source, target))
        path, kind = f"M{x} {start + begin}V{end - stop}", "shortcut" if target.is_beside else "path"
    elif target.is_beside:
        path = f"M{main} {start + 5}H{side - 12}q12 0 12 12V{end - _HEIGHT // 2}"
    elif source.is_beside:
        path = f"M{side} {start + _HEIGHT // 2}V{end - 12}q0 12 -12 12H{reach}"
    else:
        begin, start = (middle + 8, start + 8) if source.kind == ADDITION else (main, start + 5)
        over = main + _CURVE
        path = f"M{begin} {start}H{main}C{over} {start} {over} {end} {main} {end}H{reach}"
    return f'<path class="{kind}" d="{path}" marker-end="url(#arrow)"/>'


def _drawn(box: Box, row: int) -> str:
    x, y = _SIDE if box.is_beside else _MAIN, _y(row)
    if box.kind == ADDITION:
        middle, arm = x + _WIDTH // 2, 6
        return (
            f'<g class="addition"><title>addition</title><circle cx="{middle}" cy="{y}" r="{_RADIUS}"/>'
            f'<path class="plus" d="M{middle - arm} {y}h{2 * arm}M{middle} {y - arm}v{2 * arm}"/></g>'
        )
    shape = "x".join(map(str, box.output))
    parameters = f"{box.parameters:,}" if box.parameters else ""
    return (
        f'<g class="{box.color}"><title>{box.name or box.kind}</title>'
        f'<rect x="{x}" y="{y - _HEIGHT // 2}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f'<text x="{x + 10}" y="{y + 4}">{box.place}</text><text x="{x + 105}" y="{y + 4}">{box.kind}</text>'
        f'<text class="end" x="{x + _WIDTH - 80}" y="{y + 4}">{shape}</text>'
        f'<text class="end" x="{x + _WIDTH - 10}" y="{y + 4}">{parameters}</text></g>'
    )
