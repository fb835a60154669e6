"""`fastresnet train`: train a network by a recipe, with one seed or many."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastresnet.terminal import check_output, parse, print_table, progress_line
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from fastresnet.config import TrainConfig
    from pipelines.store import Dataset

FLAGS = {"--seeds": "str", "--config": "Path", "--find-lr": "Path", "--dry-run": "bool", "--print-config": "bool"}
"""What the command takes beside the settings, and the types of the values."""


def run(arguments: list[str]) -> int:
    began = time.perf_counter()
    from fastresnet.config import TrainConfig, from_toml
    from fastresnet.recipes import DEFAULT_RECIPE, RECIPES, create_config

    modes = [name for name in ("--dry-run", "--print-config") if name in arguments]
    arguments = [argument for argument in arguments if argument not in modes]
    seeds, arguments = _take_option(arguments, "--seeds")
    picture, arguments = _take_option(arguments, "--find-lr")
    if picture is not None:
        check_output("--find-lr", Path(picture), (".png", ".svg"))
        if modes or seeds is not None or "RANK" in os.environ:
            raise UsageError("--find-lr goes neither with --seeds, --dry-run or --print-config nor with torchrun.")
    given = list(arguments)
    config_file, arguments = _take_option(arguments, "--config")
    if config_file is not None:
        base = from_toml(Path(config_file))
    else:
        recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
        base = create_config(recipe, _take_option(arguments, "--model")[0])
    read = functools.partial(
        parse,
        TrainConfig,
        "train [RECIPE]",
        arguments,
        default=base,
        description=f"Train a network. RECIPE is one of {', '.join(RECIPES)} (without it: {DEFAULT_RECIPE}) and sets "
        "the defaults below; --config FILE takes them from the config.toml of a run instead. --seeds 0-9 trains with "
        "each of these seeds, on as many GPUs as there are, and ends with a table of all. --dry-run tells what to "
        "expect of a run after 20 steps that leave nothing behind; --find-lr FILE draws the loss (.png or .svg) while "
        "--lr grows from 1e-5 to 10 in 100 steps, and leaves no run; --print-config shows the settings as TOML.",
    )
    config: TrainConfig
    config, unknown = read(return_unknown_args=True)
    if misplaced := [word for word in unknown if word in RECIPES]:
        raise UsageError(
            f"{misplaced[0]} is out of place: a recipe is the first word after train, and goes not with --config."
        )
    if unknown:
        read()  # exits, with words on what may have been meant
    if "--print-config" in modes:
        print(config.to_toml(), end="")
        return 0
    if modes:
        return _dry_run(config)
    if picture is not None:
        return _find_lr(config, Path(picture))
    if seeds is not None:
        return _train_seeds(config, seeds, given)

    from rich.console import Console

    from fastresnet.distributed import world_of_torchrun
    from fastresnet.training.loop import train

    imported = time.perf_counter()
    dataset = _find_dataset(config)
    spent = {"import": imported - began, "data": time.perf_counter() - imported}
    main = world_of_torchrun().is_main
    summary = train(config, dataset, Console(quiet=not main), spent)
    if main:
        print_table("result", _summary_lines(summary))
    return 0


def _dry_run(config: TrainConfig) -> int:
    from rich.console import Console

    from fastresnet.models import create_model
    from fastresnet.models.summary import layers
    from fastresnet.training.loggers import format_duration
    from fastresnet.training.trials import dry_run

    dataset = _find_dataset(config)
    expected = dry_run(config, dataset, Console())
    found = layers(create_model(config.model, num_classes=len(dataset.classes), shortcut=config.shortcut))
    train, evaluation = expected["train_seconds"], expected["evaluation_seconds"]
    print_table(
        "what to expect; nothing was written",
        [
            ("network", config.model),
            ("parameters", f"{sum(layer.parameters for layer in found):,}"),
            ("multiply-adds for an image", f"{sum(layer.macs for layer in found):,}"),
            ("time training", format_duration(train)),
            ("time evaluating", format_duration(evaluation)),
            ("in all, without compilation", format_duration(train + evaluation)),
            ("memory", f"{expected['memory_bytes'] / 1e9:.1f} GB"),
        ],
    )
    return 0


def _find_lr(config: TrainConfig, picture: Path) -> int:
    from fastresnet.plotting import save_figure, sweep
    from fastresnet.training.trials import find_lr

    dataset = _find_dataset(config)
    with progress_line() as report:
        found = find_lr(config, dataset, report)
    told = {"steepest descent": found.steepest, "a tenth of the lowest loss's": found.tenth_of_lowest}
    save_figure(sweep(found.rates, found.losses, found.smoothed.tolist(), told), picture)
    others = {"--sgd-lr": config.sgd_lr, "--norm-lr": config.norm_lr} if config.optimizer == "muon" else {}
    given = {name: rate / config.lr for name, rate in others.items() if rate is not None}
    beside = "".join(f"; {name} was {times:g} times as high" for name, times in given.items())
    print_table(
        f"--lr{beside}",
        [*((what, f"{rate:.2g}") for what, rate in told.items()), (f"of {config.recipe} as given", f"{config.lr:g}")],
    )
    print(picture)
    return 0


def _train_seeds(config: TrainConfig, text: str, arguments: list[str]) -> int:
    from fastresnet.seeds import parse_seeds, train_seeds

    seeds = parse_seeds(text)
    _, rest = _take_option(arguments, "--seed")
    if rest != arguments or "RANK" in os.environ:
        raise UsageError("--seeds goes neither with --seed nor with torchrun.")
    import torch

    from fastresnet.device import resolve_device
    from fastresnet.run_folder import run_path

    device = resolve_device(config.device)
    dataset = _find_dataset(config)
    folders = {
        seed: config.out / f"seed{seed}" if config.out else run_path(dataclasses.replace(config, seed=seed), dataset)
        for seed in seeds
    }
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    where = f"{gpus} at once, one on each GPU" if gpus else "one after the other, on the CPU"
    print(
        f"{len(seeds)} trainings, {where}; each tells its progress in train.log in its folder: {folders[seeds[0]]} ..."
    )
    _, rest = _take_option(arguments, "--out")
    print_table(
        f"{config.recipe}, {config.model} on {dataset.name}, last epoch, single view",
        _seed_lines(train_seeds(rest, folders, gpus)),
        header=("seed", "test accuracy", "mirrored views averaged", "time training"),
    )
    return 0


def _find_dataset(config: TrainConfig) -> Dataset:
    from pipelines.prepare import find_dataset

    with progress_line() as report:
        return find_dataset(config.data, config.root, report)


def _seed_lines(summaries: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each run, and one for all of them."""
    from fastresnet.seeds import mean_and_spread
    from fastresnet.training.loggers import format_duration

    measures = ("test_accuracy", "test_accuracy_mirror")
    lines = [
        (str(run["seed"]), *(f"{run[measure]:.2f} %" for measure in measures), format_duration(run["train_seconds"]))
        for run in summaries
    ]
    if len(summaries) > 1:
        columns = [[run[measure] for run in summaries] for measure in measures]
        spread = (f"{mean_and_spread(column)} %" for column in columns)
        lines.append(("mean ± standard deviation", *spread, ""))
    return lines


def _take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of option `name` (as `name VALUE` or `name=VALUE`), and the arguments without it. Raises `UsageError`
    where the value is missing.
    """
    for i, argument in enumerate(arguments):
        if argument == name:
            if i + 1 == len(arguments):
                raise UsageError(f"{name} needs {'a file' if FLAGS.get(name) == 'Path' else 'a value'}.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments


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
