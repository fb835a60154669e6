"""Configurations, recipes and learning rates: the settings of the paper, and rejection of invalid values."""

import dataclasses
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastresnet.config import TrainConfig, differences, from_dict, from_toml
from fastresnet.models import MODELS, list_models
from fastresnet.recipes import (
    DEFAULT_RECIPE,
    RECIPES,
    baseline,
    best,
    changed_settings,
    fast,
    paper,
    read_config,
    smoke,
    speedrun,
)
from fastresnet.training.optimizer import lr_factor
from pipelines import PIPELINES
from pipelines.errors import UsageError
from tests.limits import limits

FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}
NOT_PART_OF_THE_RESULT = {"root": None, "out": None, "resume": False, "checkpoint_steps": 0}
NOT_PART_OF_THE_RESULT |= dict.fromkeys(("tensorboard", "wandb", "mlflow"), False)


def rates(config, steps_per_epoch):
    """The learning rates of a run as (rate, how many steps in a row)."""
    total = config.total_steps(steps_per_epoch)
    steps = itertools.groupby(config.lr * lr_factor(config, step, total) for step in range(total))
    return [(rate, len(list(same))) for rate, same in steps]


# --- recipes and schedule ----------------------------------------------------------------------------------------


def test_every_recipe_takes_every_model_but_speedrun_only_its_own():
    for recipe, create in RECIPES.items():
        for model in list_models():
            if recipe == "speedrun" and not model.startswith("speednet"):
                with pytest.raises(UsageError, match=f"speedrun is for speednet and speednet-wide, not {model}"):
                    create(model)
            else:
                assert (create(model).recipe, create(model).model) == (recipe, model)


def test_recipes_default_to_resnet20_and_the_speedrun_to_speednet():
    models = {name: recipe().model for name, recipe in RECIPES.items()}
    assert models.pop("speedrun") == "speednet"
    assert set(models.values()) == {"resnet20"}


def test_the_default_recipe_is_fast_and_the_default_config_the_baseline():
    assert DEFAULT_RECIPE == "fast"
    assert DEFAULT_RECIPE in RECIPES
    assert baseline() == TrainConfig()


def test_fast_and_best_stay_within_the_epochs_they_claim():
    """The paper's 64k iterations are 164 epochs."""
    assert fast().epochs <= 164 / 8
    assert best().epochs <= 200
    for recipe in (fast, best):
        assert (recipe().val_split, recipe().data, recipe().iterations) == (0, "cifar10", None)


def test_an_unknown_model_is_refused_by_every_recipe():
    for recipe in RECIPES.values():
        with pytest.raises(UsageError, match="unknown model 'resnt56': did you mean 'resnet56'"):
            recipe("resnt56")


def test_the_paper_recipe_has_the_papers_settings():
    """He et al. 2015, section 4.2."""
    config = paper()
    assert (config.batch_size, config.lr, config.momentum, config.weight_decay) == (128, 0.1, 0.9, 0.0001)
    assert (config.iterations, config.milestones, config.shortcut) == (64_000, (0.5, 0.75), "A")
    assert (config.crop_padding, config.padding_mode, config.flip, config.cutout) == (4, "zeros", "random", 0)
    assert (config.normalization, config.data, config.val_split) == ("pixel", "cifar10", 0)


@pytest.mark.parametrize("model", ["resnet20", "resnet56", "resnet110", "plain110"])
@pytest.mark.parametrize("steps_per_epoch", [390, 351], ids=["50,000 images", "45,000 images"])
def test_the_paper_recipe_ends_after_64k_iterations(model, steps_per_epoch):
    assert paper(model).total_steps(steps_per_epoch) == 64_000


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001), (63_999, 0.001)]
)
@pytest.mark.parametrize("model", ["resnet20", "resnet32", "resnet44", "resnet56", "plain20", "plain56"])
def test_the_papers_learning_rate(model, step, rate):
    assert 0.1 * lr_factor(paper(model), step, 64_000) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01), (399, 0.01), (400, 0.1), (31_999, 0.1), (32_000, 0.01), (48_000, 0.001), (63_999, 0.001)],
)
@pytest.mark.parametrize("model", ["resnet110", "plain110"])
def test_the_papers_learning_rate_with_warm_up(model, step, rate):
    assert 0.1 * lr_factor(paper(model), step, 64_000) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [390, 351, 391, 7])
def test_the_baseline_drops_the_learning_rate_after_epochs_80_and_120_of_160(steps_per_epoch):
    found = rates(baseline(), steps_per_epoch)
    assert [steps / steps_per_epoch for _, steps in found] == [80, 40, 40]
    assert [rate for rate, _ in found] == pytest.approx([0.1, 0.01, 0.001], rel=1e-12)


@pytest.mark.parametrize("model", list_models())
def test_own_recipes_zero_init_deep_networks_that_support_it(model):
    """The recipes fast and best do; paper and baseline keep the usual initialisation."""
    deep = not any(model.startswith(f"{family}20") for family in ("resnet", "se-resnet", "plain", "preresnet"))
    normed = model.startswith(("resnet", "se-resnet", "resnext"))
    for recipe in (fast, best):
        assert recipe(model).zero_init_residual == (deep and normed and model not in ("resnet9", "resnet18"))
    for recipe in (paper, baseline):
        assert not recipe(model).zero_init_residual


def test_the_baseline_has_the_usual_settings():
    config = baseline()
    assert (config.epochs, config.iterations, config.batch_size) == (160, None, 128)
    assert (config.lr, config.momentum, config.weight_decay, config.warmup) == (0.1, 0.9, 0.0001, 0)
    assert (config.optimizer, config.schedule, config.nesterov, config.decay_norms) == ("sgd", "step", False, True)
    assert (config.shortcut, config.normalization) == ("B", "half")
    assert (config.crop_padding, config.padding_mode, config.flip, config.cutout) == (4, "zeros", "random", 0)


def test_smoke_is_one_epoch():
    assert smoke().total_steps(390) == 390


@pytest.mark.parametrize(
    ("epochs", "iterations", "steps"), [(3, None, 30), (3, 29, 29), (3, 30, 30), (3, 31, 30), (3, 1, 1), (1, None, 10)]
)
def test_a_run_ends_with_its_epochs_or_iterations_whichever_is_first(epochs, iterations, steps):
    assert TrainConfig(epochs=epochs, iterations=iterations).total_steps(10) == steps


def test_the_learning_rate_follows_peak_milestones_and_warm_up():
    config = TrainConfig(lr=8.0, epochs=10, milestones=(0.2, 0.5, 0.9), warmup=0.15)
    found = rates(config, 2)
    assert [steps for _, steps in found] == [3, 1, 6, 8, 2]
    assert [rate for rate, _ in found] == pytest.approx([0.8, 8, 0.8, 0.08, 0.008], rel=1e-12)


def test_cosine_and_linear_rise_to_the_peak_and_fall_to_zero():
    """One-cycle and cosine annealing by their formulas: 40 steps, of which 10 warm up."""
    falling = np.arange(30) / 30
    for schedule, after in (("linear", 1 - falling), ("cosine", (1 + np.cos(np.pi * falling)) / 2)):
        config = TrainConfig(schedule=schedule, warmup=0.25)
        factors = [lr_factor(config, step, 40) for step in range(40)]
        assert factors[:10] == pytest.approx(np.arange(1, 11) / 11)
        assert factors[10:] == pytest.approx(after)


def test_without_milestones_the_learning_rate_stays():
    assert rates(TrainConfig(epochs=3, milestones=()), 5) == [(0.1, 15)]


# --- invalid values ----------------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    *(("epochs", value) for value in (0, -1, 1_000_001)),
    *(("batch_size", value) for value in (0, -128, 2**21)),
    *(("accumulate", value) for value in (0, -2, 2**21)),
    *(("early_stop", value) for value in (-1, 2**63)),
    *(("lr_batch_size", value) for value in (0, -128, 2**21)),
    *(("iterations", value) for value in (0, -1, 2**63)),
    *(("val_split", value) for value in (-1, 2**63)),
    *(("warmup", value) for value in (-0.1, 1.1, math.nan)),
    *(("sgd_lr", value) for value in (-0.1, 1e7, math.nan)),
    *(("norm_lr", value) for value in (-0.1, 1e7, math.nan)),
    *(("mixup", value) for value in (-0.1, 101.0, math.nan)),
    *(("cutmix", value) for value in (-0.1, 101.0, math.nan)),
    *(("label_smoothing", value) for value in (-0.1, 1.1, math.nan)),
    *(("drop_path", value) for value in (-0.1, 1.0, math.nan)),
    *(("checkpoint_steps", value) for value in (-1, 2**63)),
    *(("seed", value) for value in (-1, 2**63)),
    *(("lr", value) for value in (-0.1, 1e7, math.inf, math.nan)),
    *(("momentum", value) for value in (-0.1, 1.1, math.nan)),
    *(("sgd_momentum", value) for value in (-0.1, 1.1, math.nan)),
    *(("resolutions", value) for value in ((), (15,), (33,), (24, 0, 32), (32,) * 9)),
    *(("weight_decay", value) for value in (-1e-4, 1.1, math.inf, math.nan)),
    *(("clip_norm", value) for value in (-0.1, 1e7, math.inf, math.nan)),
    *(("ema_decay", value) for value in (-0.1, 1.0, math.nan)),
    *(("milestones", value) for value in ((0.0,), (1.0,), (-0.5,), (0.75, 0.5), (0.5, 0.5), (0.5, math.nan))),
    *(("crop_padding", value) for value in (-1, 32)),
    *(("cutout", value) for value in (-1, 33)),
]
LIMITS = [
    *(("epochs", value) for value in (1, 1_000_000)),
    *(("batch_size", value) for value in (1, 2**20)),
    *(("accumulate", value) for value in (1, 128)),
    *(("early_stop", value) for value in (0,)),
    *(("lr_batch_size", value) for value in (None, 1, 2**20)),
    *(("iterations", value) for value in (None, 1, 2**62)),
    *(("val_split", value) for value in (0, 2**62)),
    *(("warmup", value) for value in (0.0, 1.0)),
    *(("sgd_lr", value) for value in (0.0, 1e6)),
    *(("norm_lr", value) for value in (None, 0.0, 1e6)),
    *(("mixup", value) for value in (0.0, 100.0)),
    *(("cutmix", value) for value in (0.0, 100.0)),
    *(("label_smoothing", value) for value in (0.0, 1.0)),
    *(("drop_path", value) for value in (0.0, 0.9)),
    *(("checkpoint_steps", value) for value in (0, 2**62)),
    *(("seed", value) for value in (0, 2**63 - 1)),
    *(("lr", value) for value in (0.0, 1e6)),
    *(("momentum", value) for value in (0.0, 1.0)),
    *(("sgd_momentum", value) for value in (None, 0.0, 1.0)),
    *(("resolutions", value) for value in ((16,), (32, 32), (24, 28, 32))),
    *(("weight_decay", value) for value in (0.0, 1.0)),
    *(("clip_norm", value) for value in (0.0, 1e6)),
    *(("ema_decay", value) for value in (0.0, 0.9999)),
    *(("milestones", value) for value in ((), (0.001,), (0.1, 0.5, 0.999))),
    *(("crop_padding", value) for value in (0, 31)),
    *(("cutout", value) for value in (0, 32)),
]


def is_number(annotation):
    return "int" in annotation or "float" in annotation


@pytest.mark.parametrize("table", [OUT_OF_RANGE, LIMITS])
def test_range_tables_cover_every_numeric_setting(table):
    assert {name for name, _ in table} == {f.name for f in dataclasses.fields(TrainConfig) if is_number(str(f.type))}


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_its_flag(name, value):
    with pytest.raises(UsageError) as caught:
        TrainConfig(**{name: value})
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    assert f"--{name.replace('_', '-')} {shown}" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("name", "value"), LIMITS)
def test_a_value_at_its_limit_is_accepted(name, value):
    assert getattr(TrainConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("model", "resnet-56", "resnet56"),
        ("model", "plain1022", "plain1202"),
        ("model", "resnet2O", "resnet20"),
        ("shortcut", "BB", "B"),
        ("pipeline", "residnt", "resident"),
        ("decode", "jpg", "jpeg"),
        ("device", "cdua", "cuda"),
        ("precision", "bf-16", "bf16"),
        ("compile", "onn", "on"),
        ("padding_mode", "reflection", "reflect"),
        ("flip", "alternate", "alternating"),
        ("normalization", "per-pixel", "pixel"),
        ("class_weights", "balance", "balanced"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_nearest_valid_one(name, value, nearest):
    with pytest.raises(UsageError) as caught:
        TrainConfig(**{name: value})
    assert f"unknown {name.replace('_', ' ').removesuffix('s')} {value!r}: did you mean {nearest!r}? Valid: " in str(
        caught.value
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("pipeline", ["resident", "ffcv", "torchvision"])
def test_decode_jpeg_needs_the_dali_pipeline(pipeline):
    assert {TrainConfig(pipeline=name, decode="jpeg").decode for name in ("auto", "dali")} == {"jpeg"}
    with pytest.raises(UsageError, match=f"--decode jpeg needs --pipeline dali, not {pipeline}") as caught:
        TrainConfig(pipeline=pipeline, decode="jpeg")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze_backbone": True}, "--freeze-backbone trains the linear layer alone"),
        ({"early_stop": 5}, "--early-stop needs images held out with --val-split"),
        ({"accumulate": 3}, "--accumulate 3 does not divide --batch-size 128"),
        (
            {"batch_size": 6, "accumulate": 2, "mixup": 1.0},
            "--batch-size 6 in 2 parts (--accumulate): mixup and CutMix",
        ),
        ({"init_from": "a\0b"}, "--init-from 'a\\x00b' contains a NUL"),
    ],
)
def test_settings_that_need_others_name_them(values, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        TrainConfig(**values)
    assert caught.value.exit_code == 2


# --- config.toml -------------------------------------------------------------------------------------------------


def written(folder, text):
    path = folder / "config.toml"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_round_trips_through_toml(tmp_path, recipe):
    for model in ("speednet", "speednet-wide") if recipe == "speedrun" else ("resnet20", "resnet110", "plain56"):
        config = RECIPES[recipe](model)
        assert from_toml(written(tmp_path, config.to_toml())) == config


CHANGED = {
    "recipe": "paper",
    "init_sha256": "0" * 64,
    "init_from": "weights.pt",
    "freeze_backbone": True,
    "class_weights": "balanced",
    "early_stop": 5,
    "accumulate": 3,
    "model": "se-resnet56",
    "shortcut": "A",
    "data": 'my "data" \\ é',
    "pipeline": "dali",
    "decode": "jpeg",
    "val_split": 5000,
    "epochs": 3,
    "iterations": 17,
    "batch_size": 96,
    "lr_batch_size": 128,
    "sync_bn": True,
    "lr": 0.3,
    "milestones": (0.25, 0.5, 0.875),
    "optimizer": "muon",
    "sgd_lr": 0.2,
    "norm_lr": 0.4,
    "schedule": "cosine",
    "warmup": 0.25,
    "nesterov": True,
    "decay_norms": False,
    "mixup": 0.2,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "drop_path": 0.2,
    "zero_init_residual": True,
    "momentum": 0.85,
    "sgd_momentum": 0.8,
    "resolutions": (24, 28, 32),
    "weight_decay": 5e-4,
    "clip_norm": 1.5,
    "ema_decay": 0.99,
    "crop_padding": 3,
    "padding_mode": "reflect",
    "flip": "alternating",
    "cutout": 16,
    "normalization": "channel",
    "seed": 2**63 - 1,
    "device": "cpu",
    "threads": 3,
    "precision": "bf16",
    "compile": "off",
    "kernels": "torch",
}


def test_result_relevant_settings_round_trip_through_toml(tmp_path):
    assert set(CHANGED) | set(NOT_PART_OF_THE_RESULT) == FIELDS
    config, default = TrainConfig(**CHANGED), TrainConfig()
    assert [name for name in CHANGED if getattr(config, name) == getattr(default, name)] == []
    assert from_toml(written(tmp_path, config.to_toml())) == config


def test_toml_omits_result_irrelevant_settings_except_the_data_root(tmp_path):
    free = {"root": Path("r"), "out": Path("o"), "resume": True, "checkpoint_steps": 5}
    free |= dict.fromkeys(("tensorboard", "wandb", "mlflow"), True)
    assert set(free) == set(NOT_PART_OF_THE_RESULT)
    assert TrainConfig(**free).to_dict() == TrainConfig().to_dict()
    assert from_toml(written(tmp_path, TrainConfig(**free).to_toml())) == TrainConfig(root=Path("r"))


def test_printed_settings_have_no_raw_characters_and_round_trip(run, tmp_path):
    """A no-break space, C1 and direction marks: `repr` would escape them in ways that TOML does not know."""
    name = "a\u00a0b\x85\u202e\U000e0001\x1b\\猫"
    code, out, _ = run("train", "--data", name, "--print-config")
    assert (code, out.replace("\n", "").isprintable()) == (0, True)
    assert from_toml(written(tmp_path, out)).data == name


def test_settings_left_out_of_the_toml_file_have_their_defaults(tmp_path):
    assert from_toml(written(tmp_path, "")) == TrainConfig()
    assert from_toml(written(tmp_path, "epochs = 3\nmilestones = []")) == TrainConfig(epochs=3, milestones=())


@pytest.mark.parametrize(
    ("line", "config"),
    [
        ("lr = 1", TrainConfig(lr=1.0)),
        ("milestones = [0.25, 0.5]", TrainConfig(milestones=(0.25, 0.5))),
        ('root = "/data"', TrainConfig(root=Path("/data"))),
        ('out = "here"', TrainConfig(out=Path("here"))),
        ("tensorboard = true", TrainConfig(tensorboard=True)),
        ("threads = 3", TrainConfig(threads=3)),
        ('threads = "auto"', TrainConfig(threads="auto")),
    ],
)
def test_toml_values_get_the_fields_type(tmp_path, line, config):
    read = from_toml(written(tmp_path, line))
    assert read == config
    for field in dataclasses.fields(TrainConfig):
        assert type(getattr(read, field.name)) is type(getattr(config, field.name))


@pytest.mark.parametrize(
    ("line", "nearest"),
    [("batchsize = 3", "batch_size"), ("learning_rate = 0.1\nepoch = 1", None), ("epoch = 1", "epochs")],
)
def test_an_unknown_setting_is_refused_with_the_nearest_valid_one(tmp_path, line, nearest):
    path = written(tmp_path, line)
    with pytest.raises(UsageError) as caught:
        from_toml(path)
    assert str(path) in str(caught.value)
    assert f"'{line.split()[0]}'" in str(caught.value)
    assert nearest is None or f"did you mean {nearest!r}" in str(caught.value)
    assert all(name in str(caught.value) for name in FIELDS)
    assert caught.value.exit_code == 2


WRONG_TYPES = [
    "epochs = 1.0",
    'epochs = "1"',
    "epochs = true",
    "epochs = [1]",
    "iterations = 1.5",
    "seed = 1979-05-27",
    "seed = {a = 1}",
    'lr = "0.1"',
    "lr = true",
    "lr = [0.1]",
    "lr = 1" + 400 * "0",
    "model = 20",
    "model = []",
    "data = 1",
    'resume = "yes"',
    "tensorboard = 1",
    "root = 3",
    'threads = "3"',
    "threads = 1.0",
    "threads = true",
    "out = false",
    "milestones = 0.5",
    "milestones = 1",
    'milestones = "0.5"',
    "milestones = true",
    'milestones = ["0.5"]',
    "milestones = [true]",
    "milestones = [[0.5]]",
    "milestones = {a = 0.5}",
]


@pytest.mark.parametrize("line", WRONG_TYPES, ids=[line[:25] for line in WRONG_TYPES])
def test_a_value_of_the_wrong_type_is_refused(tmp_path, line):
    path = written(tmp_path, line)
    with pytest.raises(UsageError) as caught:
        from_toml(path)
    assert str(path) in str(caught.value)
    assert line.split()[0] in str(caught.value)
    assert caught.value.exit_code == 2


NO_TOML = {
    "many dots": b"a." * 30_000 + b"a = 1",
    "a table with many dots": b"[" + b"a." * 30_000 + b"a]",
    "large": b"# a" * 1_000_000,
    "large value": b'epochs = "' + b"a" * 60_000 + b'"',
    "a huge number": b"epochs = 0x" + 50_000 * b"f",
    "a huge number in a list": b"milestones = [0x" + 50_000 * b"f" + b"]",
    "text": b"hello world",
    "open bracket": b"milestones = [0.5",
    "twice": b"epochs = 1\nepochs = 2",
    "json": b'{"epochs": 1}',
    "yaml": b"epochs: 1\n",
    "latin-1": "data = 'é'".encode("latin-1"),
    "zeros": bytes(100),
    "a pickle": b"\x80\x04K\x01.",
    "half a file": TrainConfig().to_toml().encode()[:-20],
    "deep": b"milestones = " + 5000 * b"[" + 5000 * b"]",
}


@pytest.mark.parametrize("content", NO_TOML.values(), ids=NO_TOML)
def test_invalid_toml_file_is_refused(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with limits(len(content)), pytest.raises(UsageError) as caught:
        from_toml(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["absent.toml", ".", "file/config.toml", 300 * "x"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        from_toml(tmp_path / name)
    assert f"cannot read the config {tmp_path / name}" in str(caught.value)
    assert caught.value.exit_code == 2


def test_impossible_values_in_a_file_are_refused_like_those_of_flags(tmp_path):
    with pytest.raises(UsageError, match="--lr nan"):
        from_toml(written(tmp_path, "lr = nan"))
    with pytest.raises(UsageError, match="unknown flip 'randm': did you mean 'random'"):
        from_toml(written(tmp_path, 'flip = "randm"'))


def test_numbers_of_numpy_and_pytorch_are_plain_ones(tmp_path):
    """As fields, as values from Python, and in the files."""
    values = {
        "lr": np.float64(0.25),
        "momentum": np.float32(0.5),
        "epochs": np.int64(3),
        "seed": np.uint8(7),
        "batch_size": torch.tensor(64),
        "warmup": torch.tensor(0.125),
        "nesterov": np.bool_(True),
        "milestones": np.array([0.25, 0.5]),
        "model": np.str_("resnet32"),
        "threads": np.int32(2),
        "norm_lr": np.array(0.75),
    }
    plain = {
        "lr": 0.25,
        "momentum": 0.5,
        "epochs": 3,
        "seed": 7,
        "batch_size": 64,
        "warmup": 0.125,
        "nesterov": True,
        "milestones": (0.25, 0.5),
        "model": "resnet32",
        "threads": 2,
        "norm_lr": 0.75,
    }
    for config in (from_dict(values, "a test"), TrainConfig(**values | {"milestones": tuple(values["milestones"])})):
        assert config == TrainConfig(**plain)
        for name, value in plain.items():
            assert type(getattr(config, name)) is type(value)
        assert all(type(share) is float for share in config.milestones)
        assert json.loads(json.dumps(config.to_dict())) == config.to_dict() | {"milestones": [0.25, 0.5]}
        assert from_toml(written(tmp_path, config.to_toml())) == config


@pytest.mark.parametrize("value", [np.float64(1), np.array([1]), np.bool_(True), torch.tensor(1.0)], ids=repr)
def test_number_of_numpy_or_pytorch_of_another_kind_is_refused(value):
    with pytest.raises(UsageError, match="epochs"):
        from_dict({"epochs": value}, "a test")


@pytest.mark.parametrize("name", ["data", "root", "out"])
def test_a_path_with_a_nul_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=f"--{name} 'a.x00b' contains a NUL"):
        from_toml(written(tmp_path, f'{name} = "a\\u0000b"'))


@pytest.mark.parametrize("name", ["data", "root"])
def test_a_path_that_config_toml_cannot_contain_is_refused(name):
    path = os.fsdecode(b"caf\xe9")
    with pytest.raises(UsageError, match=f"--{name} 'caf.udce9' is not UTF-8"):
        from_dict({name: path}, "a test")
    assert TrainConfig(out=Path(path)).out == Path(path)


def test_differences_are_named_in_order():
    base = TrainConfig()
    other = dataclasses.replace(base, seed=1, iterations=5, lr=0.2, out=Path("x"))
    assert differences(base.to_dict(), base.to_dict()) == []
    assert differences(base.to_dict(), other.to_dict()) == ["iterations", "lr", "seed"]


# --- any config --------------------------------------------------------------------------------------------------


def fractions():
    inside = st.floats(0, 1, exclude_min=True, exclude_max=True)
    return st.lists(inside, unique=True, max_size=4).map(lambda values: tuple(sorted(values)))


def paths():
    return st.none() | st.sampled_from([Path("runs"), Path("/data/x")])


VALID = {
    "recipe": st.sampled_from(sorted(RECIPES)),
    "init_sha256": st.none() | st.just("0" * 64),
    "init_from": st.none() | st.text(min_size=1).filter(lambda text: "\0" not in text),
    "freeze_backbone": st.booleans(),
    "class_weights": st.sampled_from(["none", "balanced"]),
    "early_stop": st.integers(0, 2**62),
    "accumulate": st.integers(1, 8),
    "model": st.sampled_from(list_models()),
    "shortcut": st.sampled_from(["A", "B"]),
    "data": st.text(min_size=1).filter(lambda text: "\0" not in text),
    "root": paths(),
    "pipeline": st.sampled_from(["auto", *PIPELINES]),
    "decode": st.sampled_from(["raw", "jpeg"]),
    "val_split": st.integers(0, 2**62),
    "epochs": st.integers(1, 1_000_000),
    "iterations": st.none() | st.integers(1, 2**62),
    "batch_size": st.integers(1, 2**16),
    "lr_batch_size": st.none() | st.integers(1, 2**20),
    "sync_bn": st.booleans(),
    "lr": st.floats(0, 1e6),
    "milestones": fractions(),
    "optimizer": st.sampled_from(["sgd", "adamw", "muon"]),
    "sgd_lr": st.floats(0, 1e6),
    "norm_lr": st.none() | st.floats(0, 1e6),
    "schedule": st.sampled_from(["step", "cosine", "linear"]),
    "warmup": st.floats(0, 1),
    "nesterov": st.booleans(),
    "decay_norms": st.booleans(),
    "mixup": st.floats(0, 100),
    "cutmix": st.floats(0, 100),
    "label_smoothing": st.floats(0, 1),
    "drop_path": st.floats(0, 0.99),
    "zero_init_residual": st.booleans(),
    "momentum": st.floats(0, 1),
    "sgd_momentum": st.none() | st.floats(0, 1),
    "resolutions": st.lists(st.integers(16, 32), min_size=1, max_size=4).map(tuple),
    "weight_decay": st.floats(0, 1),
    "clip_norm": st.floats(0, 1e6),
    "ema_decay": st.floats(0, 0.9999),
    "crop_padding": st.integers(0, 31),
    "padding_mode": st.sampled_from(["zeros", "reflect"]),
    "flip": st.sampled_from(["none", "random", "alternating"]),
    "cutout": st.integers(0, 32),
    "normalization": st.sampled_from(["half", "channel", "pixel"]),
    "seed": st.integers(0, 2**63 - 1),
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "threads": st.just("auto") | st.integers(1, 1024),
    "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    "compile": st.sampled_from(["auto", "off", "on", "capture", "graph"]),
    "kernels": st.sampled_from(["auto", "torch", "own"]),
    "out": paths(),
    "resume": st.booleans(),
    "checkpoint_steps": st.integers(0, 2**62),
    "tensorboard": st.booleans(),
    "wandb": st.booleans(),
    "mlflow": st.booleans(),
}


def configs():
    return st.fixed_dictionaries(VALID).map(made_valid).map(lambda values: TrainConfig(**values))


def made_valid(values):
    """Return `values` with incompatible ones reset."""
    if not MODELS[values["model"]].supports_drop_path:
        values["drop_path"] = 0.0
    if values["model"].startswith(("plain", "preresnet", "wrn", "speednet")):
        values["zero_init_residual"] = False
    if not values["model"].startswith(("resnet", "plain", "se-resnet")):
        values["shortcut"] = "B"
    if values["pipeline"] not in ("auto", "dali"):
        values["decode"] = "raw"
    if values["optimizer"] == "adamw" or 0 in (values["momentum"], values["sgd_momentum"]):
        values["nesterov"] = False
    values["freeze_backbone"] &= values["init_from"] is not None
    values["early_stop"] = min(values["early_stop"], values["val_split"])
    values["batch_size"] *= 2 * values["accumulate"]
    return values


def test_config_strategy_generates_every_field():
    assert set(VALID) == FIELDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@settings(deadline=None)
@given(config=configs())
def test_any_config_round_trips_through_dict_and_toml(folder, config):
    expected = dataclasses.replace(config, **NOT_PART_OF_THE_RESULT)
    assert from_dict(config.to_dict(), "a test") == expected
    assert from_toml(written(folder, config.to_toml())) == dataclasses.replace(expected, root=config.root)


@settings(deadline=None)
@given(config=configs(), total=st.integers(1, 2**40), data=st.data())
def test_after_warm_up_the_learning_rate_never_grows(config, total, data):
    steps = st.integers(min(round(config.warmup * total), total), total)
    early, late = sorted([data.draw(steps), data.draw(steps)])
    assert 1 >= lr_factor(config, early, total) >= lr_factor(config, late, total) >= 0


def test_settings_of_a_run_from_before_small_images_are_complete_without_them(tmp_path):
    """They depend on no recipe, and its images were whole."""
    old = dataclasses.replace(fast(), norm_lr=None, resolutions=(32,))
    saved = {name: value for name, value in old.to_dict().items() if name != "resolutions"}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(saved))
    assert read_config(tmp_path / "config.toml") == old


def test_a_run_of_a_network_that_the_recipe_is_not_for_differs_in_all_settings():
    config = dataclasses.replace(speedrun(), model="resnet20")
    assert {"epochs", "lr", "norm_lr", "resolutions"} <= changed_settings(config).keys()


@pytest.mark.parametrize(
    ("flags", "limit"),
    [((), 282), (("--epochs", 30), None), (("--epochs", 30, "--iterations", 5), 5), (("--batch-size", 512), 282)],
)
def test_epochs_alone_lift_a_recipes_limit_in_steps(run, tmp_path, flags, limit):
    code, out, err = run("train", "speedrun", *flags, "--print-config")
    assert (code, err) == (0, "")
    (tmp_path / "config.toml").write_text(out)
    assert from_toml(tmp_path / "config.toml").iterations == limit


def test_momentum_of_sgd_is_the_only_one_unless_muon_has_its_own():
    assert TrainConfig(optimizer="sgd", momentum=0.9, sgd_momentum=0.5).momentum_of_sgd == 0.9
    assert TrainConfig(optimizer="muon", momentum=0.9, sgd_momentum=0.5).momentum_of_sgd == 0.5
    assert TrainConfig(optimizer="muon", momentum=0.9).momentum_of_sgd == 0.9
