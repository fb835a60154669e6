"""Diagram of a network: a box for each layer from top to bottom, and shortcuts at the side."""

from __future__ import annotations

import copy
import dataclasses
import html
from collections.abc import Sequence

from torch import nn
from torch.fx import GraphModule, Node, Tracer
from torch.fx.passes.shape_prop import ShapeProp

from .batchnorm import BatchNorm2d
from .resnet import SqueezeExcitation
from .speednet import PatchWhitening
from .summary import layer_kind, one_image

_FUNCTIONS = {
    "add": "sum",
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
_CURVE = 70  # distance of a curve's two middle control points from the boxes; the curve itself reaches 3/4 of it

_STYLE = """text { font: 12px sans-serif; fill: #222 } .title { font-size: 16px } .block { fill: #666 }
rect { stroke: #888; fill: #eee } .frame { fill: #f7f7f7; stroke: #ddd } path { fill: none; stroke: #555 }
.conv rect { fill: #cfe2f3 } .norm rect { fill: #dcefd8 } .linear rect { fill: #fbdcc0 } .scale rect { fill: #fdf0b8 }
.shortcut { stroke: #b03060; stroke-width: 1.5 } .end { text-anchor: end } .middle { text-anchor: middle }"""


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
    row: int
    """Row number from the top."""
    is_beside: bool
    """Position in the side column, as part of a shortcut."""

    @property
    def block(self) -> str:
        """Name of its block, such as layer1.0; empty outside the stages."""
        return ".".join(self.name.split(".")[:2]) if self.name.startswith("layer") else ""


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
        if isinstance(module, nn.Identity) or node.op == "output":
            numbers[node] = inputs[0]
            continue
        numbers[node] = len(boxes)
        boxes.append(_box(node, module, inputs, boxes))
    return boxes


def _box(node: Node, module: nn.Module | None, inputs: tuple[int, ...], before: Sequence[Box]) -> Box:
    owner = next(reversed(node.meta.get("nn_module_stack", {})), "")
    color = {
        nn.Conv2d: "conv",
        PatchWhitening: "conv",
        BatchNorm2d: "norm",
        nn.Linear: "linear",
        SqueezeExcitation: "scale",
    }
    beside = ".downsample" in owner
    return Box(
        name=owner,
        kind=_kind(node, module),
        color=color.get(type(module), "function"),
        output=tuple(node.meta["tensor_meta"].shape[1:]),
        parameters=sum(parameter.numel() for parameter in module.parameters()) if module else 0,
        inputs=inputs,
        row=before[inputs[0]].row + 1 if beside else sum(not box.is_beside for box in before),
        is_beside=beside,
    )


def _kind(node: Node, module: nn.Module | None) -> str:
    if module is None:
        function = getattr(node.target, "__name__", str(node.target))
        return "images" if node.op == "placeholder" else _FUNCTIONS.get(function, function)
    if isinstance(module, BatchNorm2d):
        return (
            "BatchNorm2d" + (" + shortcut" if len(node.all_input_nodes) > 1 else "") + (", ReLU" if module.relu else "")
        )
    return layer_kind(module)


def draw_graph(boxes: Sequence[Box], title: str, subtitle: str) -> str:
    """Draw the boxes that `graph` returns as a self-contained SVG."""
    right = (_SIDE if any(box.is_beside for box in boxes) else _MAIN) + _WIDTH + 30
    if any(len(box.inputs) > 1 for box in boxes):
        right = max(right, _MAIN + _WIDTH + _CURVE)
    bottom = _TOP + _STEP * (max(box.row for box in boxes) + 1)
    edges = [_edge(boxes[source], box) for box in boxes for source in box.inputs]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{bottom}" '
            f'viewBox="0 0 {right} {bottom}">',
            f"<style>{_STYLE}</style>",
            '<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
            'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" style="fill: #555; stroke: none"/></marker>',
            f'<rect width="{right}" height="{bottom}" style="fill: #fff; stroke: none"/>',
            f'<text class="title" x="{_MAIN}" y="30">{html.escape(title)}</text>',
            f'<text x="{_MAIN}" y="50">{html.escape(subtitle)}</text>',
            *_frames(boxes, right),
            *edges,
            *map(_drawn, boxes),
            "</svg>\n",
        ]
    )


def _y(row: int) -> int:
    """Return the vertical centre of a row's boxes."""
    return _TOP + _STEP * row + _HEIGHT // 2


def _frames(boxes: Sequence[Box], right: int) -> list[str]:
    """Draw a frame around each block, with its name at the left."""
    frames = []
    for block in dict.fromkeys(box.block for box in boxes if box.block):
        rows = [box.row for box in boxes if box.block == block]
        top, bottom = _y(min(rows)) - _STEP / 2 + 2, _y(max(rows)) + _STEP / 2 - 2
        frames.append(
            f'<rect class="frame" x="15" y="{top}" width="{right - 30}" height="{bottom - top}" rx="6"/>'
            f'<text class="block middle" transform="translate(35 {(top + bottom) / 2}) rotate(-90)">{block}</text>'
        )
    return frames


def _edge(source: Box, target: Box) -> str:
    """Draw an arrow from box to box. An arrow that skips boxes is a curve to the right of the main path."""
    main, side = _MAIN + _WIDTH, _SIDE + _WIDTH // 2
    start, end = _y(source.row), _y(target.row)
    kind = "shortcut"
    if source.is_beside == target.is_beside and target.row == source.row + 1:
        x = side if target.is_beside else _MAIN + _WIDTH // 2
        path, kind = f"M{x} {start + _HEIGHT // 2}V{end - _HEIGHT // 2}", "shortcut" if target.is_beside else "path"
    elif target.is_beside:
        path = f"M{main} {start + 5}H{side - 12}q12 0 12 12V{end - _HEIGHT // 2}"
    elif source.is_beside:
        path = f"M{side} {start + _HEIGHT // 2}V{end - 17}q0 12 -12 12H{main}"
    else:
        path = f"M{main} {start + 5}C{main + _CURVE} {start + 5} {main + _CURVE} {end - 5} {main} {end - 5}"
    return f'<path class="{kind}" d="{path}" marker-end="url(#arrow)"/>'


def _drawn(box: Box) -> str:
    x, y = _SIDE if box.is_beside else _MAIN, _y(box.row)
    name = box.name.removeprefix(f"{box.block}.") if box.name != box.block else ""
    shape = "x".join(map(str, box.output))
    parameters = f"{box.parameters:,}" if box.parameters else ""
    return (
        f'<g class="{box.color}"><title>{box.name or box.kind}</title>'
        f'<rect x="{x}" y="{y - _HEIGHT // 2}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f'<text x="{x + 10}" y="{y + 4}">{name}</text><text x="{x + 105}" y="{y + 4}">{box.kind}</text>'
        f'<text class="end" x="{x + _WIDTH - 80}" y="{y + 4}">{shape}</text>'
        f'<text class="end" x="{x + _WIDTH - 10}" y="{y + 4}">{parameters}</text></g>'
    )
