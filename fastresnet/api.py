"""Python interface for training and evaluation, for example in notebooks: the commands as functions."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fastresnet.config import Tta
    from fastresnet.evaluation import Evaluation
    from fastresnet.run_folder import Run
    from fastresnet.threads import Threads
    from pipelines.sampling import NormalizationMode


def train(recipe: str = "fast", *, quiet: bool = False, **settings: Any) -> Run:
    """Train a network by `recipe` and return its run: `folder`, `rows` of metrics.csv, and `summary`.

    `settings` are fields of `fastresnet.config.TrainConfig`, such as `model="resnet56"`, `data="shapes10"`,
    `epochs=3` or `out="runs/first"`. With `quiet` nothing is printed. Raises `UsageError` on invalid settings and
    if `out` contains a run (unless `resume=True`). Raises `DataError` if the data set is missing or damaged. Raises
    `RunError` if loss or gradients are not finite or memory runs out.
    """
    from fastresnet.config import from_dict
    from fastresnet.console import PlainConsole
    from fastresnet.recipes import create_config, without_replaced
    from fastresnet.run_folder import read_run, run_path
    from fastresnet.terminal import outlived_output
    from fastresnet.training.loop import train as train_run
    from pipelines.prepare import find_dataset

    base = without_replaced(create_config(recipe, settings.get("model")), settings)
    config = from_dict(base.to_dict() | settings, "fastresnet.train")
    dataset = find_dataset(config.data, config.root)
    with outlived_output():
        train_run(config, dataset, PlainConsole(quiet=quiet))
    return read_run(run_path(config, dataset))


def evaluate(
    weights: nn.Module | Path | str,
    *,
    data: str | None = None,
    root: Path | None = None,
    normalization: NormalizationMode = "channel",
    precision: str = "fp32",
    device: str = "auto",
    threads: Threads = "auto",
    tta: Tta = "none",
) -> Evaluation:
    """Measure accuracy and loss on the test set of `data`: top-1 in percent, cross-entropy in nats.

    `weights` is a network, a file as for `fastresnet eval`, or `pretrained:NAME`. A network maps images [N, 3, 32, 32]
    to logits [N, classes], in the order of the data set's classes; its modules keep their training mode.
    `normalization` is that of its images: `half`, `channel` or `pixel` (see `pipelines.Augmentation`). Files contain
    theirs, and their classes are matched by name. `data` is a name, or a folder or archive of images by class; by
    default that of their training, else cifar10. `threads` is the number of CPU threads; for a file, `auto` is the
    fastest in trial steps. `tta` adds the accuracy with `flip` or `shift` TTA. Raises `UsageError` on invalid
    arguments and on a network with other outputs, `DataError` if a file or the data set is missing, damaged or does
    not match, `RunError` if logits are not finite.
    """
    import torch

    from fastresnet.config import plain
    from fastresnet.device import resolve_device, resolve_precision
    from fastresnet.evaluation import evaluate as evaluate_network
    from fastresnet.evaluation import evaluation_threads, find_dataset_for, note_order, open_evaluation, unchanged_modes
    from fastresnet.pretrained import find_weights
    from fastresnet.threads import check_threads
    from fastresnet.weights import load_weights
    from pipelines.prepare import find_test_data

    check_threads(threads := plain(threads))
    if isinstance(weights, str | Path):
        loaded, dataset = find_dataset_for(load_weights(find_weights(weights)), weights, data, root)
        network = loaded.model
        normalization = loaded.normalization if loaded.training else normalization
    else:
        dataset, network = find_test_data(data or "cifar10", root), weights
        note_order(dataset)
        if threads == "auto":  # no trial steps: a user's network only gets the batches of the test set
            threads = torch.get_num_threads()
    on = resolve_device(device)
    precision = resolve_precision(precision, on)
    pipeline = open_evaluation(dataset, normalization, precision, on)
    network = network.to(on)
    with (
        contextlib.closing(pipeline),
        unchanged_modes(network),
        evaluation_threads(threads, network, pipeline, precision=precision, device=on),
    ):
        return evaluate_network(network, pipeline, dataset.classes, precision=precision, device=on, tta=tta)
