"""Diagrams of networks, parsed and compared with the networks."""

import functools
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

from fastresnet.models import MODELS, create_model
from fastresnet.models.diagram import ADDITION, draw_graph, folded, graph, rows

SVG = "{http://www.w3.org/2000/svg}"
NETWORKS = [name for name in MODELS if MODELS[name].depth != 1202]
RESIDUAL = [name for name in NETWORKS if MODELS[name].supports_drop_path]


def on_meta(name, **settings):
    with torch.device("meta"):
        return create_model(name, **settings)


@functools.cache
def pictured(name, shortcut):
    """Return the network, its boxes and the parsed diagram."""
    model = on_meta(name, shortcut=shortcut)
    boxes = graph(model)
    return model, boxes, parsed(boxes)


def parsed(boxes):
    return ElementTree.fromstring(draw_graph(boxes, "a <b>", "c & d"))


def case(name, *rest):
    return pytest.param(name, *rest, marks=[pytest.mark.slow] if MODELS[name].depth == 110 else [])


@pytest.mark.parametrize("name", [case(name) for name in NETWORKS])
def test_each_layer_has_a_box(name):
    model, boxes, _ = pictured(name, "B")
    for kind, color in ((nn.Conv2d, "conv"), (nn.BatchNorm2d, "norm")):
        names = {path for path, module in model.named_modules() if isinstance(module, kind)}
        assert sorted(box.name for box in boxes if box.color == color) == sorted(names)
    assert sum(box.parameters for box in boxes) == sum(parameter.numel() for parameter in model.parameters())
    assert boxes[-1].name == "fc"
    assert boxes[-1].output == (10,)


@pytest.mark.parametrize(
    ("name", "shortcut"), [case(name, option) for name in RESIDUAL for option in MODELS[name].shortcuts]
)
def test_each_block_adds_its_shortcut_in_a_circle(name, shortcut):
    model, boxes, picture = pictured(name, shortcut)
    blocks = [name for name, module in model.named_modules() if hasattr(module, "drop_path")]
    assert [box.block for box in boxes if box.kind == ADDITION] == blocks
    assert [box.kind for box in boxes if len(box.inputs) == 2] == [ADDITION] * len(blocks)
    circles = picture.findall(f"{SVG}g/{SVG}circle")
    assert len(circles) == sum(box.kind == ADDITION for box in folded(boxes))
    edges = [path for path in picture.findall(f"{SVG}path") if path.get("class") == "shortcut"]
    assert len(edges) >= len(circles)


@pytest.mark.parametrize("name", [case(name) for name in NETWORKS])
def test_equal_blocks_are_drawn_once_with_their_number(name):
    _, boxes, picture = pictured(name, "B")
    kept = folded(boxes)
    assert sum(box.repeats for box in kept) == len(boxes)
    assert sum(box.repeats * box.parameters for box in kept) == sum(box.parameters for box in boxes)
    assert all(number < place for place, box in enumerate(kept) for number in box.inputs)
    drawn = [text.text for text in picture.iter(f"{SVG}text") if "times" in text.get("class", "")]
    numbers = {box.block: box.repeats for box in kept if box.repeats > 1}
    assert drawn == [f"× {number}" for number in numbers.values()]


def test_resnet110_has_five_kinds_of_blocks():
    """All 18 blocks of the first stage are equal; in the others the first one has a stride."""
    kept = folded(graph(on_meta("resnet110")))
    assert {box.block: box.repeats for box in kept if box.block} == {
        "layer1.0": 18, "layer2.0": 1, "layer2.1": 17, "layer3.0": 1, "layer3.1": 17
    }  # fmt: skip
    texts = {text.text for text in parsed(graph(on_meta("resnet110"))).iter(f"{SVG}text")}
    assert {"layer1.0 to layer1.17", "layer2.0", "layer2.1 to layer2.17"} <= texts


def test_a_stage_without_blocks_has_one_frame():
    *_, picture = pictured("speednet", "B")
    names = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") == "block middle"]
    assert names == ["layer1", "layer2", "layer3"]


def test_plain_network_is_one_chain():
    _, boxes, _ = pictured("plain32", "B")
    assert [box.inputs for box in boxes] == [(), *((i,) for i in range(len(boxes) - 1))]
    assert rows(boxes) == list(range(len(boxes)))


@pytest.mark.parametrize("name", ["resnet20", "preresnet164", "se-resnet20", "resnext29-2x16d", "resnet9", "speednet"])
def test_boxes_do_not_overlap_and_lie_inside_the_picture(name):
    *_, picture = pictured(name, "B")
    width, height = (float(picture.get(side)) for side in ("width", "height"))
    rectangles = []
    for rectangle in picture.iterfind(f"{SVG}g/{SVG}rect"):
        x, y, w, h = (float(rectangle.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        assert all(x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in rectangles)
        rectangles.append((x, y, w, h))
    for path in picture.iterfind(f"{SVG}path"):
        # A Bezier curve lies in the convex hull of its points.
        points = re.findall(r"(\d+) \d+", re.sub(r"[a-z][^A-Z]*", "", path.get("d")))
        assert all(0 <= float(x) <= width for x in points)


def test_first_block_of_resnet20_matches_the_paper():
    """He et al. 2015, section 4.2: conv, norm, conv, norm, the sum of output and input, ReLU."""
    boxes = graph(on_meta("resnet20"))
    assert [(box.name, box.kind, box.output) for box in boxes[:9]] == [
        ("", "images", (3, 32, 32)),
        ("conv1", "Conv2d 3x3", (16, 32, 32)),
        ("bn1", "BatchNorm2d, ReLU", (16, 32, 32)),
        ("layer1.0.conv1", "Conv2d 3x3", (16, 32, 32)),
        ("layer1.0.bn1", "BatchNorm2d, ReLU", (16, 32, 32)),
        ("layer1.0.conv2", "Conv2d 3x3", (16, 32, 32)),
        ("layer1.0.bn2", "BatchNorm2d", (16, 32, 32)),
        ("layer1.0", ADDITION, (16, 32, 32)),
        ("layer1.0", "ReLU", (16, 32, 32)),
    ]
    assert boxes[7].inputs == (6, 2)


def test_command_writes_the_diagram(run, tmp_path):
    path = tmp_path / "graph.svg"
    code, out, err = run("summary", "--model", "resnext29-2x16d", "--graph", path)
    assert (code, err) == (0, "")
    assert "total" in out
    text = "".join(ElementTree.parse(path).getroot().itertext())
    assert "1,935,306 parameters, 289.6 million multiply-adds" in text
    assert "Conv2d 3x3, stride 2, 2 groups" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [("graph.jpg", "give a name that ends in .svg"), ("graph", "ends in .svg"), ("no/graph.svg", "there is no folder")],
)
def test_invalid_file_name_is_an_error(run, tmp_path, name, message):
    code, out, err = run("summary", "--graph", tmp_path / name)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())
