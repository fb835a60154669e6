"""The command line. torch and everything that needs it is imported inside the commands, so that `--help` is instant."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastresnet import __version__
from pipelines.errors import DataError, Note, UsageError, UserError, check_choice

if TYPE_CHECKING:
    from fastresnet.config import TrainConfig
    from pipelines.sources import Report
    from pipelines.store import Dataset

_OVERVIEW = """usage: fastresnet COMMAND [OPTIONS]

Train the CIFAR ResNets of He et al. 2015, fast and reproducibly.

commands:
  prepare   make a data set: download and convert CIFAR-10, read your own files, or draw shapes10
  train     train a network by a recipe: fast (the default), best, paper, baseline or smoke
  eval      measure weights: this program's, or another repository's state dict
  bench     measure the speed of this program and of what people would use instead

fastresnet COMMAND --help tells the options of a command.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """Make a data set once: verified, in plain NumPy files. What is there and whole is left as it is."""

    data: str = "cifar10"
    """Its name: cifar10 (downloaded unless --source is given), shapes10 (drawn), or one of your own for --source."""
    source: Path | None = None
    """A CIFAR-10 archive (python or binary version; .tar, .tar.gz, .tar.xz or .zip), its unpacked folder, or a folder
    of images: train/CLASS/*.png and test/CLASS/*.png (or .jpg)."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    train_images: int = 50_000
    """How many training images of shapes10 to draw."""
    test_images: int = 10_000
    """How many test images of shapes10 to draw."""
    formats: str = "raw"
    """What to make beside the store itself (raw), with commas between: beton (for FFCV), jpeg (for DALI's decoder)."""
    jpeg_quality: int = 95
    """Quality of the JPEG files, 1..100."""
    jpeg_subsampling: str = "4:4:4"
    """Resolution of their colours: 4:4:4 (full), 4:2:2 or 4:2:0."""

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is not in 1..1000000.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Measure weights on a test set: top-1 accuracy, loss, accuracy of each class."""

    weights: Path
    """A checkpoint or model.safetensors of this program, a state dict saved by another (.pt, .th, .safetensors), or
    pretrained:NAME, such as pretrained:resnet20, for what comes with this program."""
    model: str | None = None
    """Network; without it, what the file says, or what its shapes fit. Plain networks must be named."""
    data: str | None = None
    """Name or folder of the data set. Without it: the one the weights were trained on, else cifar10."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    mean: tuple[float, float, float] | None = None
    """Channel means that the weights expect, in 0..1. Without it: as in training, else the data set's own."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations that the weights expect, in 0..1; given together with --mean."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """fp32, bf16 or fp16; auto: as in training, fp32 for foreign and pretrained weights."""
    mirror: bool = False
    """Beside the single view, average the logits of each image and its mirror image (test-time augmentation)."""
    json: Path | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        check_output("--json", self.json)
        if (self.mean is None) != (self.std is None):
            raise UsageError("--mean and --std go together.")
        for name, values in (("mean", self.mean or ()), ("std", self.std or ())):
            if not all(0 <= value <= 1 for value in values):
                raise UsageError(f"--{name} {values}: give fractions in 0..1; figures for 0..255 are divided by 255.")
        if self.std and min(self.std) == 0:
            raise UsageError(f"--std {self.std}: standard deviations are above 0.")


def check_output(option: str, path: Path | None) -> None:
    """Raise `UsageError` where a file to be written has no folder to lie in: before the work, not after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    return guarded(_dispatch, list(sys.argv[1:] if argv is None else argv))


def guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run `command`; what a user can mend becomes one line on stderr and the documented exit code."""
    speaker = f"fastresnet: rank {os.environ['RANK']}" if "RANK" in os.environ else "fastresnet"  # under torchrun
    try:
        with _notes_on_stderr(), _orderly_sigterm():
            return command(arguments)
    except UserError as error:
        print(f"{speaker}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        print(f"{speaker}: cannot read or write{name}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{speaker}: interrupted.", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "prepare": _prepare,
        "train": _train,
        "eval": _eval,
        "bench": _bench,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_OVERVIEW, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastresnet {__version__}")
        return 0
    check_choice("command", arguments[0], commands)
    return commands[arguments[0]](arguments[1:])


def parse(options: Any, command: str, arguments: list[str], **settings: Any) -> Any:
    """`options` (a dataclass) filled from the command line; tyro exits with 2 on unknown flags and unfit values."""
    import tyro

    return tyro.cli(
        options, prog=f"fastresnet {command}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,), **settings
    )


# --- prepare -----------------------------------------------------------------------------------------------------


def _prepare(arguments: list[str]) -> int:
    options: PrepareOptions = parse(PrepareOptions, "prepare", arguments)
    from pipelines.convert import SHAPES10, data_root, prepare
    from pipelines.derived import read_manifest
    from pipelines.shards import JpegSettings, facts_text

    formats = [name.strip() for name in options.formats.split(",")]
    with _progress_line() as report:
        dataset, made = prepare(
            options.data,
            data_root(options.root),
            report,
            source=options.source,
            train_images=options.train_images,
            test_images=options.test_images,
            formats=formats,
            jpeg=JpegSettings(quality=options.jpeg_quality, subsampling=options.jpeg_subsampling),
        )
    counts = f"{len(dataset.train):,} training and {len(dataset.test):,} test images, {len(dataset.classes)} classes"
    print(f"{dataset.name}: {counts}, {'prepared' if made else 'already there,'} and verified in {dataset.folder}")
    if "jpeg" in formats:
        print(
            f"JPEG against the original training images: {facts_text(read_manifest(dataset, 'jpeg')['facts']['train'])}"
        )
    asked = (options.train_images, options.test_images)
    resized = dataset.name == SHAPES10 and asked != (len(dataset.train), len(dataset.test))
    if not made and (options.source is not None or resized):
        warnings.warn(f"nothing was read or drawn; remove {dataset.folder} to make it anew.", Note, stacklevel=2)
    return 0


def find_dataset(data: str, root: Path | None) -> Dataset:
    """Open the data set called `data`, or the store in folder `data`; make cifar10 and shapes10 if they are missing."""
    from pipelines.convert import CIFAR10, SHAPES10, data_root, prepare
    from pipelines.store import open_store

    if Path(data).name != data or (Path(data) / "meta.json").exists():
        return open_store(Path(data))
    folder = data_root(root) / data
    if data not in (CIFAR10, SHAPES10) or (folder / "meta.json").exists():
        return open_store(folder)
    with _progress_line() as report:
        return prepare(data, data_root(root), report)[0]


@contextlib.contextmanager
def _progress_line() -> Iterator[Report]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    with Progress(console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        yield report


# --- train -------------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    began = time.perf_counter()
    from fastresnet.config import TrainConfig, from_toml
    from fastresnet.recipes import DEFAULT_RECIPE, RECIPES

    seeds, arguments = _take_option(arguments, "--seeds")
    given = list(arguments)
    config_file, arguments = _take_option(arguments, "--config")
    if config_file is not None:
        base = from_toml(Path(config_file))
    else:
        recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
        check_choice("recipe", recipe, RECIPES)
        model, _ = _take_option(arguments, "--model")
        base = RECIPES[recipe](model) if model else RECIPES[recipe]()
    config: TrainConfig = parse(
        TrainConfig,
        "train [RECIPE]",
        arguments,
        default=base,
        description=f"Train a network. RECIPE is one of {', '.join(RECIPES)} (without it: {DEFAULT_RECIPE}) and sets "
        "the defaults below; --config FILE takes them from the config.toml of a run instead. --seeds 0-9 trains with "
        "each of these seeds, on as many GPUs as there are, and ends with a table of all.",
    )
    if seeds is not None:
        return _train_seeds(config, seeds, given)

    from rich.console import Console

    from fastresnet.distributed import ranks_of_torchrun
    from fastresnet.training.trainer import train

    imported = time.perf_counter()
    dataset = find_dataset(config.data, config.root)
    cold_start = {"import": imported - began, "data": time.perf_counter() - imported}
    first = ranks_of_torchrun().first
    summary = train(config, dataset, Console(quiet=not first), cold_start)
    if first:
        _print_table("result", _summary_lines(summary))
    return 0


def _train_seeds(config: TrainConfig, text: str, arguments: list[str]) -> int:
    from fastresnet.seeds import parse_seeds, train_seeds

    seeds = parse_seeds(text)
    _, rest = _take_option(arguments, "--seed")
    if rest != arguments or "RANK" in os.environ:
        raise UsageError("--seeds goes neither with --seed nor with torchrun.")
    import torch

    from fastresnet.training.trainer import run_folder

    dataset = find_dataset(config.data, config.root)
    folders = {
        seed: config.out / f"seed{seed}" if config.out else run_folder(dataclasses.replace(config, seed=seed), dataset)
        for seed in seeds
    }
    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    where = f"{gpus} at once, one on each GPU" if gpus else "one after the other, on the CPU"
    print(
        f"{len(seeds)} trainings, {where}; each tells its progress in train.log in its folder: {folders[seeds[0]]} ..."
    )
    _, rest = _take_option(arguments, "--out")
    _print_table(
        f"{config.recipe}, {config.model} on {dataset.name}, last epoch, single view",
        _seed_lines(train_seeds(rest, folders, gpus)),
        header=("seed", "test accuracy", "mirrored views averaged", "time training"),
    )
    return 0


def _seed_lines(summaries: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each run, and one for all of them."""
    from fastresnet.training.loggers import format_duration

    measures = ("test_accuracy", "test_accuracy_mirror")
    lines = [
        (str(run["seed"]), *(f"{run[measure]:.2f} %" for measure in measures), format_duration(run["train_seconds"]))
        for run in summaries
    ]
    if len(summaries) > 1:
        columns = [[run[measure] for run in summaries] for measure in measures]
        spread = (f"{statistics.mean(column):.2f} ± {statistics.stdev(column):.2f} %" for column in columns)
        lines.append(("mean ± standard deviation", *spread, ""))
    return lines


def _take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of option `name` (as `name VALUE` or `name=VALUE`), and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments


# --- eval --------------------------------------------------------------------------------------------------------


def _eval(arguments: list[str]) -> int:
    options: EvalOptions = parse(EvalOptions, "eval", arguments)
    from fastresnet.config import DEVICES, PRECISIONS

    check_choice("device", options.device, DEVICES)
    check_choice("precision", options.precision, PRECISIONS)

    import torch

    from fastresnet.device import environment, explained_failures, resolve_device, resolve_precision, supports
    from fastresnet.evaluation import evaluate, open_evaluation
    from fastresnet.pretrained import PREFIX, pretrained_file
    from fastresnet.weights import load_weights

    device = resolve_device(options.device)
    source, default_precision = options.weights, None
    if str(source).startswith(PREFIX):
        source, default_precision = pretrained_file(str(source).removeprefix(PREFIX)), "fp32"
    weights = load_weights(source, options.model)
    training = weights.training or {}
    dataset = find_dataset(options.data or training.get("data", "cifar10"), options.root)
    if weights.num_classes != len(dataset.classes):
        raise DataError(
            f"{options.weights} tells {weights.num_classes} classes apart, {dataset.name} has {len(dataset.classes)}."
        )
    normalization = training.get("normalization", "channel")
    if options.mean is not None:
        normalization = "channel"
        dataset = dataclasses.replace(dataset, mean=options.mean, std=options.std)
    elif not training:
        print(f"normalising with {dataset.name}'s own mean and std; --mean and --std give others")
    trained_in = default_precision or training.get("precision", "fp32")
    if options.precision != "auto":
        precision = resolve_precision(options.precision, device)
    elif supports(trained_in, device):
        precision = trained_in
    else:
        precision = "fp32"
        warnings.warn(f"trained in {trained_in}, which this GPU lacks; measured in fp32", Note, stacklevel=2)
    pipeline = open_evaluation(dataset, normalization, pipeline="resident", precision=precision, device=device)
    model = weights.model.to(device, memory_format=torch.channels_last)
    surroundings = environment(device)
    with explained_failures("try --device cpu"):
        result = evaluate(model, pipeline, dataset.classes, precision=precision, device=device, mirror=options.mirror)
    _print_table(
        f"{weights.name} on {len(dataset.test):,} test images of {dataset.name}, single view, {precision}",
        [
            ("top-1 accuracy", f"{result.accuracy:.2f} %"),
            *([("  with mirrored views averaged", f"{result.mirror_accuracy:.2f} %")] if options.mirror else ()),
            ("loss", f"{result.loss:.4f}"),
            *((f"  {name}", f"{accuracy:.2f} %") for name, accuracy in result.per_class.items()),
            ("throughput", f"{result.images_per_s:,.0f} images/s"),
        ],
    )
    if options.json is not None:
        from pipelines.files import write_bytes

        figures = {
            "schema": 1,
            "model": weights.name,
            "data": dataset.name,
            "test_accuracy": result.accuracy,
            **({"test_accuracy_mirror": result.mirror_accuracy} if options.mirror else {}),
            "loss": result.loss,
            "per_class": result.per_class,
            "images_per_s": result.images_per_s,
            "environment": surroundings,
        }
        write_bytes(options.json, json.dumps(figures, indent=2).encode())
    return 0


# --- bench -------------------------------------------------------------------------------------------------------


def _bench(arguments: list[str]) -> int:
    from benchmarks.__main__ import main  # builds on this package, which names it nowhere else

    return main(arguments)


# --- what people see ---------------------------------------------------------------------------------------------


def _print_table(title: str, lines: Sequence[tuple[str, ...]], header: Sequence[str] = ("", "")) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=any(header), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of `summary.json`, as (what, value)."""
    from fastresnet.training.loggers import format_duration

    chosen_on = "the held-out split" if summary["best_chosen_on"] == "validation" else "the test set itself"
    return [
        ("data", summary["data"]),
        ("model", summary["model"]),
        ("test accuracy, last epoch", f"{summary['test_accuracy']:.2f} %"),
        ("  the same with mirrored views averaged", f"{summary['test_accuracy_mirror']:.2f} %"),
        (f"test accuracy, best epoch (chosen on {chosen_on})", f"{summary['best_accuracy']:.2f} %"),
        ("epochs / steps", f"{summary['epochs']} / {summary['steps']:,}"),
        ("training throughput", f"{summary['images_per_s']:,.0f} images/s"),
        (
            "time training / in all",
            f"{format_duration(summary['train_seconds'])} / {format_duration(summary['total_seconds'])}",
        ),
    ]


@contextlib.contextmanager
def _orderly_sigterm() -> Iterator[None]:
    """End with SIGTERM as after an error: half-written files are removed. A training has a better way to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Show this program's notes as one line each; other libraries' warnings as ever."""
    with warnings.catch_warnings():
        show_other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, Note):
                print(f"fastresnet: note: {message}", file=sys.stderr)
            else:
                show_other(message, category, *rest)

        warnings.showwarning = show
        yield
