"""`fastresnet train`: train a network by a recipe, with one seed or many."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastresnet.arguments import HELP, Positional, as_arguments, asks_for_help, given_values, show_help
from fastresnet.config import TrainConfig
from fastresnet.seeds import format_accuracy, parse_seeds
from fastresnet.terminal import check_output, load_torch, outlived_output, print_table, progress_line, say
from pipelines.errors import UsageError, check_choice

if TYPE_CHECKING:
    from pipelines.store import Dataset

_MAX_PER_GPU = 100

_COMMON = {
    *("model", "data", "root", "val_split", "epochs", "batch_size", "lr", "seed", "device"),
    *("out", "resume", "tensorboard", "config", "seeds", "dry_run", "quiet"),
}
"""Settings that --help describes."""
_GROUPS = {
    "model": "network",
    "data": "data",
    "epochs": "optimisation",
    "crop_padding": "augmentation and regularisation",
    "seed": "execution",
    "out": "run folder and logs",
    "config": "files and modes",
}
"""Headings of the help, by the first setting of each group."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options(TrainConfig):
    """Train a network. A setting is that of its flag, else of the file --config, else of the recipe."""

    recipe: Positional[str] = "fast"
    """fast, best, speedrun, paper, baseline or smoke; `fastresnet list recipes` describes them."""
    config: Path | None = None
    """TOML file of some or all settings, such as that of a run."""
    seeds: str | None = None
    """Train with each of these seeds, such as 0-9 or 0-4,7, on all GPUs, and summarise the runs."""
    per_gpu: int = 1
    """Number of trainings of --seeds that share each GPU at a time."""
    find_lr: Path | None = None
    """Plot the loss (.png or .svg) while --lr grows from 1e-5 to 10 in 100 steps, without a run folder."""
    dry_run: bool = False
    """Measure 20 steps, and print the expected cost of the run."""
    quiet: bool = False
    """Print nothing but notes and errors; train.log in the run folder has the rest."""
    print_config: bool = False
    """Print the settings as TOML."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)  # `super()` fails in dataclasses with slots
        if not 1 <= self.per_gpu <= _MAX_PER_GPU:
            raise UsageError(f"--per-gpu {self.per_gpu} is not in 1..{_MAX_PER_GPU}.")
        if self.per_gpu > 1 and self.seeds is None:
            raise UsageError(
                f"--per-gpu {self.per_gpu} is for the trainings of --seeds. Give --seeds, or leave it out."
            )
        if self.seeds is not None:
            parse_seeds(self.seeds)
        if self.find_lr is not None:
            check_output("--find-lr", self.find_lr, (".png", ".svg"))
            if self.dry_run or self.print_config or self.seeds is not None or "RANK" in os.environ:
                raise UsageError("--find-lr cannot be combined with --seeds, --dry-run, --print-config or torchrun.")


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a training alone, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}


def run(arguments: list[str]) -> int:
    began = time.perf_counter()
    options, given = _parse(arguments)
    config = TrainConfig(**_settings(options))
    if options.print_config:
        say(config.to_toml().removesuffix("\n"))
        return 0
    if options.dry_run:
        return _dry_run(config, "expected cost of each training" if options.seeds else "expected cost")
    if options.find_lr is not None:
        return _find_lr(config, options.find_lr)
    load_torch()
    if options.quiet:
        os.environ.setdefault("WANDB_SILENT", "true")
    shown = contextlib.redirect_stdout(io.StringIO()) if options.quiet else contextlib.nullcontext()
    with outlived_output(), shown:
        if options.seeds is not None:
            return _train_seeds(config, parse_seeds(options.seeds), options.per_gpu, given)
        return _train(config, began)


def _train(config: TrainConfig, began: float) -> int:
    from fastresnet.console import PlainConsole
    from fastresnet.distributed import world_of_torchrun
    from fastresnet.run_folder import run_path
    from fastresnet.training.loop import train

    imported = time.perf_counter()
    _check_before_data(config, [run_path(config, _data_name(config))])
    dataset = _find_dataset(config)
    spent = {"import": imported - began, "data": time.perf_counter() - imported}
    main = world_of_torchrun().is_main
    summary = train(config, dataset, PlainConsole(quiet=not main), spent)
    if main:
        print_table("result", _summary_lines(summary))
    return 0


def _parse(arguments: list[str]) -> tuple[Options, dict[str, Any]]:
    """Read the options, whose defaults a recipe or a config file decides; return those given by themselves too."""
    from fastresnet.recipes import DEFAULT_RECIPE, create_config, read_config, without_replaced

    given = dict[str, Any]()
    with contextlib.suppress(*[UsageError] * asks_for_help(arguments)):  # help has the defaults of what can be read
        given = given_values(Options, "train", [argument for argument in arguments if argument not in HELP])
    if "seeds" in given and ("seed" in given or "RANK" in os.environ):
        raise UsageError("--seeds cannot be combined with --seed or torchrun.")
    recipe, model = given.get("recipe"), given.get("model")
    if recipe is not None:
        _check_recipe(recipe)
    if "config" in given:
        base = read_config(given["config"], recipe, model)
    else:
        base = create_config(recipe or DEFAULT_RECIPE, model)
    settings = _settings(without_replaced(base, given.keys()))
    show_help(Options, "train", arguments, default=Options(**settings), groups=_GROUPS, common=_COMMON)
    return Options(**{**settings, **given}), given


def _check_recipe(name: str) -> None:
    """Raise `UsageError` unless `name` is a recipe; it may be what another option takes."""
    from fastresnet.models import MODELS
    from fastresnet.recipes import RECIPES

    if name in MODELS:
        raise UsageError(f"{name} is a network, not a recipe: fastresnet train --model {name}")
    if name.endswith(".toml"):
        raise UsageError(f"{name} is a file of settings, not a recipe: fastresnet train --config {name}")
    check_choice("recipe", name, RECIPES)


def _dry_run(config: TrainConfig, title: str) -> int:
    from fastresnet.console import PlainConsole
    from fastresnet.models import create_model
    from fastresnet.models.summary import layers
    from fastresnet.training.loggers import format_duration
    from fastresnet.training.trials import dry_run

    dataset = _find_dataset(config)
    expected = dry_run(config, dataset, PlainConsole())
    found = layers(create_model(config.model, num_classes=len(dataset.classes), shortcut=config.shortcut))
    train, evaluation = expected["train_seconds"], expected["evaluation_seconds"]
    print_table(
        f"{title}; nothing was written",
        [
            ("network", config.model),
            ("parameters", f"{sum(layer.parameters for layer in found):,}"),
            ("multiply-adds per image", f"{sum(layer.macs for layer in found):,}"),
            ("training time", format_duration(train)),
            ("evaluation time", format_duration(evaluation)),
            ("total time, without compilation", format_duration(train + evaluation)),
            ("memory", f"{expected['memory_bytes'] / 1e9:.1f} GB"),
        ],
    )
    return 0


def _find_lr(config: TrainConfig, picture: Path) -> int:
    from fastresnet.plotting import save_figure, sweep
    from fastresnet.recipes import create_config
    from fastresnet.training.trials import find_lr

    dataset = _find_dataset(config)
    with progress_line() as report:
        found = find_lr(config, dataset, report)
    marks = {"steepest descent": found.steepest, "a tenth of the rate at the lowest loss": found.tenth_of_lowest}
    save_figure(sweep(found.rates, found.losses, found.smoothed.tolist(), marks), picture)
    others = {"--sgd-lr": config.sgd_lr, "--norm-lr": config.norm_lr} if config.optimizer == "muon" else {}
    given = {name: rate / config.lr for name, rate in others.items() if rate is not None}
    scaled = "".join(f"; {name} was {times:g} times as high" for name, times in given.items())
    print_table(
        f"--lr{scaled}",
        [
            *((what, f"{rate:.2g}") for what, rate in marks.items()),
            ("recipe default", f"{create_config(config.recipe, config.model).lr:g}"),
        ],
    )
    say(picture)
    return 0


def _train_seeds(config: TrainConfig, seeds: list[int], per_gpu: int, given: dict[str, Any]) -> int:
    import torch

    from fastresnet.device import resolve_device
    from fastresnet.provenance import environment
    from fastresnet.run_folder import run_path
    from fastresnet.seeds import common_summary_path, finished_seeds, format_seeds, summarize, train_seeds
    from pipelines.files import write_json

    device = resolve_device(config.device)
    if per_gpu > 1 and device.type == "cpu":
        raise UsageError(
            f"--per-gpu {per_gpu}: the trainings run on the CPU, one after the other, as each uses all cores. Leave "
            "--per-gpu out."
        )
    data = _data_name(config)
    own = {name: value for name, value in given.items() if name not in ("seeds", "out", "per_gpu", "quiet")}
    arguments = as_arguments(Options, own)
    folders = {
        seed: config.out / f"seed{seed}" if config.out else run_path(dataclasses.replace(config, seed=seed), data)
        for seed in seeds
    }
    common = common_summary_path(config.out, folders)
    _check_before_data(config, folders.values())
    dataset = _find_dataset(config)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    each = "one" if per_gpu == 1 else f"up to {per_gpu}"
    at_once = min(len(seeds), gpus * per_gpu)
    where = f"{at_once} in parallel, {each} on each GPU" if gpus else "one after the other, on the CPU"
    say(f"{len(seeds)} trainings, {where}; each logs to train.log in its folder: {folders[seeds[0]]} ...")
    epoch_steps = max((len(dataset.train) - config.val_split) // config.batch_size, 1)
    steps = config.total_steps(epoch_steps)
    if config.resume and (finished := finished_seeds(folders, steps)):
        say(f"finished before, and not trained again: seeds {format_seeds(finished)} ({len(finished)} of {len(seeds)})")
    sys.stdout.flush()  # the trainings may take hours
    summaries = train_seeds(arguments, folders, gpus, per_gpu, epochs=-(-steps // epoch_steps), steps=steps)
    command = environment(torch.device("cpu"))["command"]  # this process uses no GPU
    write_json(common, summarize(summaries, folders, command))
    print_table(
        f"{config.recipe}, {config.model} on {dataset.name}, last epoch, single view",
        _seed_lines(summaries),
        header=("seed", "test accuracy", "with flip TTA", "with shift TTA", "training time"),
    )
    say(common)
    return 0


def _data_name(config: TrainConfig) -> str:
    from pipelines.prepare import store_folder

    return store_folder(config.data, config.root).name


def _check_before_data(config: TrainConfig, folders: Iterable[Path]) -> None:
    """Raise the errors of machine and run folders, before a data set is downloaded or drawn."""
    from fastresnet.device import resolve_device
    from fastresnet.run_folder import check_usable
    from fastresnet.training.network import with_identified_weights

    resolve_device(config.device)
    with_identified_weights(config, started=config.resume)  # a run that has started does without them
    for folder in folders:
        check_usable(folder, resume=config.resume)


def _find_dataset(config: TrainConfig) -> Dataset:
    from pipelines.prepare import find_dataset

    with progress_line() as report:
        return find_dataset(config.data, config.root, report)


def _seed_lines(summaries: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Format a line for each run, and one for all of them."""
    from fastresnet.run_folder import TTA
    from fastresnet.training.loggers import format_duration

    def accuracies(runs: list[dict[str, Any]]) -> list[str]:
        return [format_accuracy(runs, figure) for figure in ("test_accuracy", *TTA)]

    lines = [(str(run["seed"]), *accuracies([run]), format_duration(run["train_seconds"])) for run in summaries]
    if len(summaries) > 1:
        lines.append(("mean ± SD", *accuracies(summaries), ""))
    return lines


def _summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Format the main figures of `summary.json`, as (name, value)."""
    from fastresnet.run_folder import tta_accuracies
    from fastresnet.training.loggers import format_duration

    chosen_on = "the held-out split" if summary["best_chosen_on"] == "validation" else "the test set itself"
    return [
        ("data", summary["data"]),
        ("model", summary["model"]),
        ("test accuracy, last epoch", f"{summary['test_accuracy']:.2f} %"),
        *((f"  with {name}", f"{accuracy:.2f} %") for name, accuracy in tta_accuracies(summary)),
        (f"test accuracy, best epoch (chosen on {chosen_on})", f"{summary['best_accuracy']:.2f} %"),
        ("epochs / steps", f"{summary['epochs']} / {summary['steps']:,}"),
        ("training throughput", f"{summary['images_per_s']:,.0f} images/s"),
        (
            "training time / total time",
            f"{format_duration(summary['train_seconds'])} / {format_duration(summary['total_seconds'])}",
        ),
    ]
