"""Description of trained weights for others: for programs, in a safetensors file and JSON, and as a model card."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from fastresnet import hub
from fastresnet.models import MODELS
from fastresnet.text import as_utf8, for_terminal
from fastresnet.weights import Weights
from pipelines.cifar import CIFARS
from pipelines.errors import list_some
from pipelines.sampling import IMAGE_SIZE

_SHOWN_CLASSES = 100  # of the card; config.json has all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Accuracies of a network, and their origin."""

    accuracies: dict[str, float]
    """Accuracy on the test set by view, such as `flip TTA`, in percent. The first is that of the single view."""
    how: str
    """Precision and place of the measurement, such as `in fp32 on a CPU`."""
    device: str
    """Device of the training."""
    commit: str
    """Commit of this program that trained the network."""


def describe(weights: Weights) -> dict[str, Any]:
    """Return the description in JSON types that `load_weights` reads, of weights that have one.

    Settings that are paths on this machine lose their folders.
    """
    settings = {
        name: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in (weights.training or {}).items()
    }
    return {
        "config": settings,
        "data": settings["data"],
        "data_sha256": weights.data_sha256,
        **({"classes": list(weights.classes)} if weights.named else {}),
        "mean": weights.mean.permute(1, 2, 0).squeeze().tolist(),
        "std": weights.std.flatten().tolist(),
    }


def config_json(weights: Weights) -> dict[str, Any]:
    """Return the contents of config.json: the network, its input, its classes and the settings of its training."""
    described = describe(weights)
    return {
        "library_name": "fastresnet",
        "architecture": weights.name,
        "shortcut": weights.shortcut,
        "num_classes": weights.num_classes,
        "image_size": IMAGE_SIZE,
        "classes": [as_utf8(name) for name in weights.classes],
        "mean": described["mean"],
        "std": described["std"],
        "training": described["config"],
    }


def model_card(weights: Weights, measured: Measured | None) -> str:
    """Write the card as Markdown, with metadata in front. Raises `UsageError` if `huggingface_hub` is missing."""
    settings = describe(weights)["config"]
    data = settings["data"]
    parameters = sum(parameter.numel() for parameter in weights.model.parameters())
    length = f"{settings['iterations']} steps" if "iterations" in settings else f"{settings.get('epochs')} epochs"
    training = f"{length}, batch size {settings.get('batch_size')}, seed {settings.get('seed')}"
    network = f"{weights.name}, shortcut {weights.shortcut}" if MODELS[weights.name].uses_shortcut else weights.name
    facts = {
        "network": f"{network}: {parameters:,} parameters",
        "data": f"{_code(data)}" + (f", SHA-256 {_code(weights.data_sha256)}" if weights.data_sha256 else ""),
        "recipe": f"{_code(settings.get('recipe'))}: {_plain(training)}; all settings are in config.json",
        **_measured_facts(measured),
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    classes = list_some([_code(name) for name in weights.classes], _SHOWN_CLASSES)
    return f"""---
{_metadata(weights, data, measured)}
---

# {weights.name} on {_code(data)}

| | |
| --- | --- |
{table}

## Use

With `pip install 'fastresnet[hub]'`, and the owner and name of this repository for `USER/NAME`:

```python
import torch
from fastresnet import load_pretrained

network = load_pretrained("{hub.PREFIX}USER/NAME")  # in evaluation mode
{_normalization(weights)}
logits = network((images - mean) / std)  # of images [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}] in 0..1
```

    fastresnet eval {hub.PREFIX}USER/NAME

## Classes

In the order of the logits: {classes}.
"""


def _metadata(weights: Weights, data: str, measured: Measured | None) -> str:
    library = hub.library("--format hub")
    results = [
        library.EvalResult(
            task_type="image-classification",
            dataset_type=data,
            dataset_name=CIFARS[data].title if data in CIFARS else data,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"accuracy ({view})",
            metric_value=round(accuracy / 100, 6),
        )
        for view, accuracy in (measured.accuracies if measured else {}).items()
    ]
    return library.ModelCardData(
        library_name="fastresnet",
        pipeline_tag="image-classification",
        tags=["fastresnet", "pytorch", weights.name],
        datasets=[data] if data in CIFARS else None,
        metrics=["accuracy"],
        model_name=weights.name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _measured_facts(measured: Measured | None) -> dict[str, str]:
    if measured is None:
        return {"test accuracy": "not measured"}
    accuracies = ", ".join(f"{accuracy:.2f} % ({view})" for view, accuracy in measured.accuracies.items())
    return {
        "test accuracy": f"{accuracies}, after the last epoch, {measured.how}",
        "trained on": f"{_plain(measured.device)}, with commit {_code(measured.commit)} of fastresnet",
    }


def _normalization(weights: Weights) -> str:
    """Write the statements that set `mean` and `std`, [3, 1, 1] or a mean of each pixel."""
    mean, std = (
        f"torch.tensor([{', '.join(f'{value:.6g}' for value in values.flatten().tolist())}]).view(3, 1, 1)"
        if values.numel() == 3
        else 'torch.tensor(config["mean"]).permute(2, 0, 1)  # of config.json'
        for values in (weights.mean, weights.std)
    )
    return f"mean = {mean}\nstd = {std}"


def _code(text: object) -> str:
    """Return `text`, which may be from outside, as code: Markdown and HTML in it have no effect."""
    return f"`{_plain(text)}`"


def _plain(text: object) -> str:
    return as_utf8(for_terminal(str(text))).translate(str.maketrans("\n`|<>", " '/()"))
