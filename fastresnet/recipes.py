"""Named configurations. Each is a function of the model and states its accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fastresnet.config import TrainConfig, differences, is_complete, read_settings
from fastresnet.models import find_model
from pipelines.errors import UsageError, check_choice


def paper(model: str = "resnet20") -> TrainConfig:
    """Follow He et al. 2015, section 4.2, as published: 64k iterations at batch 128, shortcut A, per-pixel mean.

    Where the text is ambiguous: crops are padded with black before the mean is subtracted, the zero channels of
    shortcut A are at both ends, and BN and biases decay like all parameters.

    Paper, test error: ResNet-20 8.75 %, -32 7.51 %, -44 7.17 %, -56 6.97 %, -110 6.43 %. `fastresnet train paper`:
    8.84 % (ResNet-20, last epoch, single view, seed 0), in 2 h 16 min of training on one core of an AMD EPYC under
    other load, in bf16. `--val-split 5000` trains on 45,000 images, as the paper did to find its schedule.
    """
    spec = find_model(model)
    return TrainConfig(
        recipe="paper",
        model=model,
        shortcut=spec.shortcuts[0],  # the paper's A if it is defined
        epochs=1_000_000,  # the iterations end the run, for any size of the training set
        iterations=64_000,
        milestones=(0.5, 0.75),  # 32k and 48k
        normalization="pixel",
        # The paper trains ResNet-110 at 0.01 until its training error is below 80 %, about 400 iterations.
        warmup=400 / 64_000 if spec.depth >= 110 else 0.0,
    )


def baseline(model: str = "resnet20") -> TrainConfig:
    """Follow the usual implementation: 160 epochs at batch 128, lr 0.1 divided by 10 after 80 and 120, shortcut B.

    Images are normalised with mean = std = 0.5. `fastresnet train baseline`: 91.66 % on the test set (ResNet-20, last
    epoch, single view, seed 0).
    """
    return TrainConfig(recipe="baseline", model=model)


def fast(model: str = "resnet20") -> TrainConfig:
    """Reach the accuracy of the paper's ResNet-20 (91.25 %) for a fourteenth of its FLOPs.

    `fastresnet train fast`: 91.32 ± 0.24 % on the test set (ResNet-20, last epoch, single view, seeds 0 to 2), for
    0.145 PFLOP. That is 19 minutes of training on one core of an AMD EPYC under other load, in bf16. ResNet-56: 93.08 ±
    0.13 % (seeds 0 to 2; paper: 93.03 %), for 0.737 PFLOP. Experiments: `docs/fast-recipe.md`.

    Images are small at first, so that more epochs have the same FLOPs. Muon trains the convolutions, whose weights it
    keeps at a fixed norm. Norms learn a hundred times as fast as the linear layer: at its rate they hardly change. The
    learning rate falls linearly to 0. Crops use reflection padding, as in cifar10-airbench: with black margins, a
    network adapts to their effect on its statistics, which is absent from whole test images. In so few epochs, training
    time limits a network of 20 layers, not the number of images: its crops move by only 2 pixels. Flips alternate
    between epochs, as in airbench, so every image is seen in both orientations. Deeper networks train for longer, and
    start as shallow ones if they support it.
    """
    spec = find_model(model)
    deep = spec.depth > 20
    return TrainConfig(
        recipe="fast",
        model=model,
        epochs=33 if deep else 20,
        batch_size=128,
        optimizer="muon",
        lr=0.05,
        sgd_lr=0.03,
        norm_lr=3.0,
        momentum=0.7,
        nesterov=True,
        weight_decay=5e-4,
        decay_norms=False,
        schedule="linear",
        crop_padding=4 if deep else 2,
        padding_mode="reflect",
        flip="alternating",
        label_smoothing=0.1,
        zero_init_residual=deep and spec.supports_zero_init,
        resolutions=(16, 20, 24, 28, 32),
        normalization="channel",
    )


def best(model: str = "resnet20") -> TrainConfig:
    """Reach more accuracy: `fast` in 60 epochs of whole images.

    For variety, every network has crops of 4 pixels and cutout. `fastresnet train best`: 92.97 % on the test set
    (ResNet-20, last epoch, single view, seed 0). That is 48 minutes of training on one core of an AMD EPYC under other
    load, in bf16. Other networks: not yet measured.
    """
    return dataclasses.replace(fast(model), recipe="best", epochs=60, crop_padding=4, cutout=8, resolutions=(32,))


SPEEDNETS = ("speednet", "speednet-wide")


def speedrun(model: str = "speednet") -> TrainConfig:
    """Approach 94.0 % by the least arithmetic: with shift TTA by `speednet`, in a single view by `speednet-wide`.

    `fastresnet train speedrun`: 93.92 ± 0.08 % on the test set with shift TTA, 93.01 ± 0.26 % in a single view (last
    epoch, seeds 0 to 4), for 0.224 PFLOP. That is 13 minutes of training on one core of an AMD EPYC under other load,
    in bf16. `speednet-wide`: 94.12 ± 0.08 % in a single view, 95.04 ± 0.04 % with shift TTA (seeds 0 and 1), for 1.19
    PFLOP, in 64 minutes for seed 0.
    The least published for a mean of 94 % is 0.2245 PFLOP, with shift TTA (94.05 %).

    The settings are those of hiverge/cifar10-speedrun for cifar10-airbench's network, without weight decay, and smaller
    images at first, as in fulcrumresearch/cifar-10-speedrun. Rates differ by orders of magnitude: the biases of norms
    have the highest, as the weights of norms are constant, and the linear layer starts with small weights and has the
    lowest. The wide network learns for longer, so its images vary more. Experiments: `docs/speedrun.md`.

    Raises `UsageError` for other networks, which do not learn at these rates.
    """
    find_model(model)
    if model not in SPEEDNETS:
        raise UsageError(f"recipe speedrun is for {' and '.join(SPEEDNETS)}, not {model}. Try fast.")
    config = dataclasses.replace(
        fast(model),
        recipe="speedrun",
        epochs=9,
        iterations=282,  # 8.8 epochs
        batch_size=1536,
        lr=0.205,
        momentum=0.655,
        sgd_lr=0.0127,
        norm_lr=88.0,
        sgd_momentum=0.825,
        weight_decay=0.0,
        crop_padding=2,
        label_smoothing=0.09,
        resolutions=(24, 28, 32),
    )
    if model != "speednet-wide":
        return config
    return dataclasses.replace(
        config, epochs=32, iterations=None, crop_padding=4, cutout=8, resolutions=(20, 24, 28, 32)
    )


def smoke(model: str = "resnet20") -> TrainConfig:
    """Train one short epoch, as a smoke test: ResNet-20 on CIFAR-10 passes 40 % test accuracy.

    That takes about a minute on 2 CPU cores.
    """
    return TrainConfig(recipe="smoke", model=model, epochs=1)


def create_config(recipe: str, model: str | None = None) -> TrainConfig:
    """Create the settings of `recipe` for `model`, or its default one. Raises `UsageError` on unknown names."""
    check_choice("recipe", recipe, RECIPES)
    return RECIPES[recipe](model) if model else RECIPES[recipe]()


def without_replaced(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """Reset what depends on settings that are `given`, by name, to replace those of `config`.

    That is the limit in steps, if epochs but no such limit are given, and the digest of other weights to start from.
    """
    if "epochs" in given and "iterations" not in given:
        config = dataclasses.replace(config, iterations=None)
    return dataclasses.replace(config, init_sha256=None) if "init_from" in given else config


def read_config(path: Path, recipe: str | None = None, model: str | None = None) -> TrainConfig:
    """Read settings from a TOML file. The others are those of its recipe, else of `recipe`, else of the default one.

    Recipes depend on the network: `model`, else the file's. A file with all settings, such as that of a run, depends on
    no recipe. Raises `UsageError` as `read_settings` and `create_config` do, and if the two recipes differ.
    """
    values = read_settings(path)
    named = values.setdefault("recipe", recipe or DEFAULT_RECIPE)
    if recipe not in (None, named):
        raise UsageError(f"{path} is for recipe {named}, not {recipe}. Leave out {recipe}, or change the file.")
    if is_complete(values):
        return TrainConfig(**values)
    return dataclasses.replace(without_replaced(create_config(named, model or values.get("model")), values), **values)


# Every run chooses these itself, independent of its recipe.
_FREE = {"model", "data", "seed", "pipeline", "decode", "device", "threads", "precision", "compile", "kernels"}


def changed_settings(config: TrainConfig) -> dict[str, Any]:
    """List the settings in which `config` differs from its recipe, in plain types.

    Those are all if the recipe is not for this network. Raises `UsageError` on an unknown recipe.
    """
    check_choice("recipe", config.recipe, RECIPES)
    settings = config.to_dict()
    try:
        recipe = RECIPES[config.recipe](config.model).to_dict()
    except UsageError:
        recipe = {}
    return {name: settings.get(name) for name in differences(recipe, settings) if name not in _FREE}


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    recipe.__name__: recipe for recipe in (fast, best, speedrun, paper, baseline, smoke)
}
DEFAULT_RECIPE = "fast"
