"""Python interface: the commands as functions, the data as batches, and what a program may bring along.

Invalid arguments and files raise `UsageError` and `DataError`, which are also `ValueError`s here, and a failed run
`RunError`, also a `RuntimeError`. Their messages name settings as in Python: `batch_size`, not `--batch-size`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.errors import DataError, RunError, UsageError, note

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import nn

    from fastresnet.callbacks import Callback
    from fastresnet.config import Device, Precision, TrainConfig, Tta
    from fastresnet.evaluation import Evaluation
    from fastresnet.run_folder import FinishedRun
    from fastresnet.threads import Threads
    from pipelines import Augmentation, PipelineName
    from pipelines.base import Pipeline
    from pipelines.sampling import NormalizationMode
    from pipelines.sources import Report
    from pipelines.store import Dataset


class _UsageValueError(UsageError, ValueError):
    pass


class _DataValueError(DataError, ValueError):
    pass


class _RunRuntimeError(RunError, RuntimeError):
    pass


_IN_PYTHON = {UsageError: _UsageValueError, DataError: _DataValueError, RunError: _RunRuntimeError}
for _error, _named in _IN_PYTHON.items():  # as which tracebacks show them
    _named.__name__ = _named.__qualname__ = _error.__name__
    _named.__module__ = "fastresnet"


@contextlib.contextmanager
def _errors_of_python() -> Iterator[None]:
    """Raise errors of arguments, files and runs as Python's own kinds, in the words of this interface."""
    try:
        yield
    except (UsageError, DataError, RunError) as error:
        kind = next(kind for kind in _IN_PYTHON if isinstance(error, kind))
        raise _IN_PYTHON[kind](_in_words_of_python(str(error))) from None


def _in_words_of_python(message: str) -> str:
    """Write the flags in `message` as arguments: `--resume` as `resume=True`. Commands at its end stay commands."""
    from fastresnet.config import TrainConfig

    kinds = {field.name: field.type for field in dataclasses.fields(TrainConfig)} | {"weights": "str"}

    def argument(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        negated = name.removeprefix("no_")
        if kinds.get(name) == "bool":
            return f"{name}=True"
        if kinds.get(negated) == "bool":
            return f"{negated}=False"
        return name if name in kinds else match[0]

    text, *command = re.split(r"(?=\bfastresnet [a-z]+)", message, maxsplit=1)
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*[a-z])", argument, text) + "".join(command)


@contextlib.contextmanager
def _stops_of_python() -> Iterator[None]:
    """Raise the stop of a training by a signal, which has saved it, as Python does: Ctrl-C as `KeyboardInterrupt`."""
    from fastresnet.training.loop import StoppedError

    try:
        yield
    except StoppedError as error:
        message = _in_words_of_python(str(error))
        if error.exit_code == 128 + signal.SIGINT:
            raise KeyboardInterrupt(message) from None
        note(message)
        raise SystemExit(error.exit_code) from None


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Report]:
    """Show the progress of downloads and conversions, unless `quiet`."""
    from fastresnet.terminal import progress_line

    with contextlib.nullcontext(lambda *_: None) if quiet else progress_line() as report:
        yield report


def train(
    recipe: str | TrainConfig = "fast",
    *,
    model: str | nn.Module | None = None,
    data: str | Path | Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> FinishedRun:
    """Train a network by `recipe` and return its run: `folder`, `rows` of metrics.csv, and `summary`.

    `recipe` is the name of a recipe, or a `TrainConfig`. `settings` are fields of `TrainConfig` that replace its own,
    such as `epochs=3` or `out="runs/first"`. `model` is the name of a network, or a network, which is trained in place:
    it maps images [N, 3, 32, 32] to logits [N, classes]. `data` is the name or folder of a data set, or one that
    `load_dataset` or `create_dataset` returns. `callbacks` are called during the run. With `quiet` nothing is printed.

    Raises `UsageError` on invalid settings and if `out` contains a run (unless `resume=True`), `DataError` if the data
    set is missing or damaged, and `RunError` if loss or gradients are not finite or memory runs out.
    """
    from torch import nn

    from fastresnet.callbacks import Callback
    from fastresnet.config import TrainConfig, from_dict
    from fastresnet.console import PlainConsole
    from fastresnet.models import OWN
    from fastresnet.recipes import create_config, without_replaced
    from fastresnet.run_folder import check_usable, read_finished_run, run_path
    from fastresnet.terminal import outlived_output
    from fastresnet.training.loop import train as train_run
    from fastresnet.training.network import load_saved
    from pipelines.prepare import find_dataset, store_folder
    from pipelines.store import Dataset

    with _errors_of_python():
        network = model if isinstance(model, nn.Module) else None
        name = model if isinstance(model, str) else None
        if model is not None:
            settings["model"] = model if network is None else OWN + type(network).__name__
        if data is not None:
            settings["data"] = data.name if isinstance(data, Dataset) else data
        base = recipe if isinstance(recipe, TrainConfig) else create_config(recipe, name)
        base = without_replaced(base, settings)
        values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        config = from_dict(values | settings, "fastresnet.train")
        callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks
        if wrong := [callback for callback in callbacks if not isinstance(callback, Callback)]:
            raise UsageError(f"callbacks has {wrong[0]!r:.200}, which is no instance of fastresnet.Callback.")
        if isinstance(data, Dataset):
            dataset = data
        else:
            check_usable(run_path(config, store_folder(config.data, config.root).name), resume=config.resume)
            with _progress(quiet) as report:
                dataset = find_dataset(config.data, config.root, report)
        with outlived_output(), _stops_of_python():
            train_run(config, dataset, PlainConsole(quiet=quiet), network=network, callbacks=callbacks)
        run = read_finished_run(run_path(config, dataset.name))
        if network is not None:  # with an average of the weights, or of a finished run, it has others
            load_saved(network, run.folder / "model.safetensors")
        return run


def evaluate(
    weights: nn.Module | Path | str,
    *,
    data: str | Path | Dataset | None = None,
    root: Path | str | None = None,
    normalization: NormalizationMode = "channel",
    precision: Precision = "fp32",
    device: Device = "auto",
    threads: Threads = "auto",
    tta: Tta = "none",
) -> Evaluation:
    """Measure accuracy and loss on the test set of `data`: top-1 in percent, cross-entropy in nats.

    `weights` is a network, a file as for `fastresnet eval`, `pretrained:NAME` or `hf-hub:USER/NAME`. A network maps
    images [N, 3, 32, 32] to logits [N, classes], in the order of the data set's classes; its modules keep their
    training mode. `normalization` is that of its images: `half`, `channel` or `pixel` (see `Augmentation`). Files
    contain theirs, and their classes are matched by name. `data` is a name, a folder or archive of images by class, or
    a `Dataset`; by default that of their training, else cifar10. `threads` is the number of CPU threads; for a file,
    `auto` is the fastest in trial steps. `tta` adds the accuracy with `flip` or `shift` TTA.

    Raises `UsageError` on invalid arguments and on a network with other outputs, `DataError` if a file or the data set
    is missing, damaged or does not match, `RunError` if logits are not finite.
    """
    import torch
    from torch import nn

    from fastresnet.config import plain
    from fastresnet.device import resolve_device, resolve_precision
    from fastresnet.evaluation import evaluate as evaluate_network
    from fastresnet.evaluation import evaluation_threads, find_dataset_for, note_order, open_evaluation, unchanged_modes
    from fastresnet.pretrained import find_weights
    from fastresnet.threads import check_threads
    from fastresnet.weights import load_weights
    from pipelines.prepare import find_test_data
    from pipelines.store import Dataset

    with _errors_of_python():
        check_threads(threads := plain(threads))
        data = str(data) if isinstance(data, Path) else data
        root = None if root is None else Path(root)
        if isinstance(weights, str | Path):
            loaded, dataset = find_dataset_for(load_weights(find_weights(weights)), weights, data, root)
            network = loaded.model
            normalization = loaded.normalization if loaded.training else normalization
        elif not isinstance(weights, nn.Module):
            raise UsageError(f"weights is {weights!r:.200}: give a network, a file or a name.")
        else:
            dataset = data if isinstance(data, Dataset) else find_test_data(data or "cifar10", root)
            network = weights
            note_order(dataset)
            if threads == "auto":  # no trial steps: a user's network only gets the batches of the test set
                threads = torch.get_num_threads()
        on = resolve_device(device)
        precision = resolve_precision(precision, on)
        pipeline = open_evaluation(dataset, normalization, precision, on)
        network = network.to(on)
        with (
            pipeline,
            unchanged_modes(network),
            evaluation_threads(threads, network, pipeline, precision=precision, device=on),
        ):
            return evaluate_network(network, pipeline, dataset.classes, precision=precision, device=on, tta=tta)


def load_dataset(data: str | Path = "cifar10", *, root: Path | str | None = None, quiet: bool = False) -> Dataset:
    """Open the data set named `data` in `root` ($FASTRESNET_DATA, else ./data), or the store in folder `data`.

    If missing, cifar10 and cifar100 are downloaded and shapes10 is drawn, with progress on a terminal unless `quiet`.
    Raises `DataError` if the data set is missing or damaged.
    """
    from pipelines.prepare import find_dataset

    with _errors_of_python(), _progress(quiet) as report:
        return find_dataset(str(data), None if root is None else Path(root), report)


def create_dataset(
    name: str,
    train_images: npt.ArrayLike,
    train_labels: npt.ArrayLike,
    test_images: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Create a data set in memory from arrays or tensors: images uint8 [N, 32, 32, 3], labels [N] integers from 0 on.

    `classes` are the names of the classes; by default their numbers. Raises `UsageError` on other shapes and types,
    and on labels without a class.
    """
    from pipelines.store import Dataset

    with _errors_of_python():
        return Dataset.of_arrays(name, train_images, train_labels, test_images, test_labels, classes)


def open_pipeline(
    dataset: Dataset,
    *,
    batch_size: int,
    train: bool = True,
    pipeline: PipelineName | Literal["auto"] = "auto",
    device: Device = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Pipeline:
    """Open a loader of the batches of `dataset`: of its training images, or of its test images in order.

    `loader.epoch(number)` yields the batches of an epoch: `images` [B, 3, 32, 32], channels-last, and `labels` [B],
    int64, both on `device`. They are a pure function of `seed`, number of the epoch and step. The last training images
    of an epoch that fill no batch are left out; the last test batch is filled up, and `valid` counts its real rows.

    `batch_size` counts the images of a step over all ranks. `dtype` is that of the images, by default float32, or
    uint8 for pixels that are not normalised. `augmentation` is by default crop by 4 and flip, normalised with mean =
    std = 0.5. The loader is a context manager; `close` ends its threads. Raises `UsageError` on invalid arguments or a
    missing library, and `DataError` if a file is missing or damaged.
    """
    import torch

    import pipelines
    from fastresnet.device import resolve_device
    from pipelines.store import Dataset

    with _errors_of_python():
        if not isinstance(dataset, Dataset):
            raise UsageError(f"dataset is {dataset!r:.200}: open it by fastresnet.load_dataset or create_dataset.")
        on = resolve_device(device)
        name = pipelines.choose_pipeline(dataset, on)[0] if pipeline == "auto" else pipeline
        return pipelines.open_pipeline(
            name,
            dataset,
            train=train,
            batch_size=batch_size,
            device=on,
            dtype=dtype or torch.float32,
            seed=seed,
            augmentation=augmentation or pipelines.Augmentation(),
            rank=rank,
            world_size=world_size,
        )
