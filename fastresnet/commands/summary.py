"""`fastresnet summary`: the layers of a network, their parameters and multiply-adds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastresnet.arguments import JsonFile, PositionalOrFlag, parse
from fastresnet.models import MODELS, Shortcut, check_model, create_model
from fastresnet.terminal import check_json, check_output, load_torch, print_table, write_figures
from pipelines.errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Show the layers of a network: output shape, parameters and multiply-adds per image."""

    model: PositionalOrFlag[str] = "resnet20"
    """Network; `fastresnet list models` has all."""
    shortcut: Shortcut = "B"
    """Shortcut option: A (padded identity) or B (1x1 convolution)."""
    classes: int = 10
    """Number of classes."""
    json: JsonFile = None
    """Write the layers to FILE (.json), or print them as JSON."""
    graph: Path | None = None
    """Diagram to write (.svg): a box for each layer, and the shortcuts at the side."""

    def __post_init__(self) -> None:
        check_json(self.json)
        check_output("--graph", self.graph, (".svg",))
        if not 1 <= self.classes <= 1_000_000:
            raise UsageError(f"--classes {self.classes} is not in 1..1000000.")
        check_model(self.model, self.shortcut, drop_path=0.0)


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "summary", arguments)
    load_torch()
    from fastresnet.models.summary import layers

    model = create_model(options.model, num_classes=options.classes, shortcut=options.shortcut)
    found = layers(model)
    parameters, macs = sum(layer.parameters for layer in found), sum(layer.macs for layer in found)
    shortcut = f", shortcut {options.shortcut}" if MODELS[options.model].uses_shortcut else ""
    title = f"{options.model}{shortcut}, {options.classes:,} class{'' if options.classes == 1 else 'es'}"
    if options.graph is not None:
        from fastresnet.models.diagram import draw_graph, graph
        from pipelines.files import write_bytes

        costs = f"{parameters:,} parameters, {macs / 1e6:,.1f} million multiply-adds"
        write_bytes(options.graph, draw_graph(graph(model), title, costs).encode())
    figures = {
        "schema": 1,
        "model": options.model,
        "shortcut": options.shortcut,
        "parameters": parameters,
        "macs": macs,
        "layers": [dataclasses.asdict(layer) for layer in found],
    }
    if write_figures(options.json, figures):
        return 0
    print_table(
        title,
        [
            *((la.name, la.kind, "x".join(map(str, la.output)), f"{la.parameters:,}", f"{la.macs:,}") for la in found),
            ("total", "", "", f"{parameters:,}", f"{macs:,}"),
        ],
        header=("layer", "kind", "output", "parameters", "multiply-adds"),
    )
    return 0
