"""Settings of a training run, in one validated dataclass; also the options of `fastresnet train`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from fastresnet.arguments import Hidden
from fastresnet.models import OWN, Shortcut, check_model
from fastresnet.threads import Threads, check_threads
from pipelines import Augmentation, Decoder, PipelineName
from pipelines.errors import UsageError, check_choice, check_literals
from pipelines.sampling import IMAGE_SIZE, Flip, NormalizationMode, PaddingMode
from pipelines.texts import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LONGEST, _MOST_DOTS = 64 << 10, 1000
"""Limits of a TOML file: the time to read a name of many parts grows with the square of their number."""

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
DEVICES = get_args(Device)
Compile = Literal["auto", "off", "on", "capture", "graph"]
COMPILE: dict[Compile, str] = {"off": "eager", "on": "compile", "capture": "capture", "graph": "graph"}
"""Values of --compile, and their backends."""
CAPTURED = ("capture", "graph")
"""Backends, and values of --compile, that replay a step as a CUDA graph."""
Kernels = Literal["auto", "torch", "own"]
Tta = Literal["none", "flip", "shift"]
"""Test-time augmentation, measured beside the single view: its logits are those of several views, averaged.

`flip`: the image and its mirror image. `shift`: these count half; the other half are the image shifted by one pixel
towards either end of the diagonal, its edges reflected, and the mirror images of these (Jordan's cifar10-airbench).
`shift` measures `flip` too.
"""

SMALLEST_IMAGE = 16
"""Side in pixels, of which SpeedNet's poolings leave one."""

_MOST_RESOLUTIONS = 8  # as many graphs torch.compile makes of a step

_ADDED_LATER = {"resolutions", "freeze_backbone", "class_weights", "early_stop", "accumulate"}
"""Settings without which runs were saved in the past."""

ENDING = {"epochs", "iterations", "milestones", "warmup", "early_stop"}
"""Settings of a run's end, which it may change when it is resumed (`training/extension.py`)."""

# These may differ between a run and its resumption, because they do not affect the result: the checkpoint identifies
# the data by its digest, not by its folder.
_FREE_ON_RESUME = {"root", "out", "resume", "checkpoint_steps", "tensorboard", "wandb", "mlflow"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. Raises `UsageError` on invalid values."""

    recipe: Hidden[str] = "baseline"
    init_sha256: Hidden[str | None] = None
    """SHA-256 of the file of `init_from`, once it has been read."""

    model: str = "resnet20"
    """Network, such as resnet20, preresnet110 or wrn16-8; `fastresnet list models` has all."""
    shortcut: Shortcut = "B"
    """Shortcuts at a change of width: A (padded identity, as in the paper) or B (1x1 convolution and batch norm)."""
    init_from: str | None = None
    """Weights to start from: a run folder or a file as for `eval`, or pretrained:NAME. Other classes get a new linear
    layer."""
    freeze_backbone: bool = False
    """Train the linear layer alone, on the features of --init-from."""

    data: str = "cifar10"
    """cifar10, cifar100, shapes10 (drawn, no download), another prepared name, or a prepared folder."""
    root: Path | None = None
    """Folder of all data sets. Without it: $FASTRESNET_DATA, else ./data."""
    pipeline: Literal["auto", PipelineName] = "auto"
    """Source of the batches; auto: resident if the data set fits in memory."""
    decode: Decoder = "raw"
    """raw, or jpeg: train on the JPEG shards of `prepare --formats jpeg`, decoded by the dali pipeline."""
    val_split: int = 0
    """Training images held out to choose the best checkpoint; the paper holds out 5000."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the training loss; balanced: in inverse proportion to their number of images."""

    epochs: int = 160
    """Passes over the training set. Given alone, they replace the --iterations of a recipe too."""
    iterations: int | None = None
    """Stop after this many optimisation steps, even within an epoch. Without it: after --epochs."""
    early_stop: int = 0
    """Stop after so many epochs without a higher accuracy on the images of --val-split; 0: never."""
    batch_size: int = 128
    """Images per step, over all processes of torchrun."""
    accumulate: int = 1
    """Number of equal parts of a batch that are computed one after the other, for less memory. Batch norm sees each
    part by itself."""
    sync_bn: bool = False
    """Compute batch norm over the images of all processes, not of each separately."""
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """Optimiser; muon trains convolutions, and SGD at --sgd-lr the rest."""
    lr: float = 0.1
    """Peak learning rate; with muon that of convolutions: the relative change of their weights in a step."""
    sgd_lr: float = 0.1
    """Peak learning rate of SGD with muon: for the linear layer, norms and biases."""
    norm_lr: float | None = None
    """Peak learning rate of norms and biases with muon, which tolerate more than the linear layer. Without it:
    --sgd-lr."""
    lr_batch_size: int | None = None
    """Batch size for which the learning rates are given: they scale in proportion to --batch-size (the linear scaling
    rule of Goyal et al. 2017). Without it: no scaling."""
    schedule: Literal["step", "cosine", "linear"] = "step"
    """step (divided by 10 at each milestone), cosine or linear (both to 0)."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the run after which --schedule step divides the learning rate by 10."""
    warmup: float = 0.0
    """Fraction of the run in which the learning rate grows linearly to its peak (with step: stays at a tenth of it)."""
    momentum: float = 0.9
    """Momentum of SGD and muon."""
    sgd_momentum: float | None = None
    """Momentum of SGD with muon. Without it: --momentum."""
    nesterov: bool = False
    """Nesterov's momentum for SGD; what muon orthogonalises always has it."""
    weight_decay: float = 1e-4
    """L2 penalty (sgd), or decay relative to the learning rate (adamw); muon scales weights to a fixed norm instead."""
    decay_norms: bool = True
    """Weight decay on norms and biases too."""
    clip_norm: float = 0.0
    """Largest global norm of the gradients; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which is then evaluated and saved; 0: none."""

    crop_padding: int = 4
    """Pixels of padding for the random crop; 0: no crop."""
    padding_mode: PaddingMode = "zeros"
    """Padding of the random crop: zeros (black) or reflect (mirrored)."""
    flip: Flip = "random"
    """none, random, or alternating (inverted every epoch)."""
    cutout: int = 0
    """Side of the square masked in each training image, in pixels."""
    mixup: float = 0.0
    """Alpha of mixup, which averages neighbours in a batch (1 in the paper); 0: none."""
    cutmix: float = 0.0
    """Alpha of CutMix, which exchanges a box between neighbours (1 in the paper); 0: none. Of both, a pair gets one."""
    label_smoothing: float = 0.0
    """Share of the label that is spread evenly over all classes."""
    drop_path: float = 0.0
    """Stochastic depth: drop rate of the last block, decreasing linearly towards the first; 0: none."""
    zero_init_residual: bool = False
    """Start every residual branch at zero, by the weights of its last batch norm."""
    resolutions: tuple[int, ...] = (IMAGE_SIZE,)
    """Sides of the training images in equal parts of the run, in pixels: 24 28 32 trains on small images first, which
    are shrunk bilinearly."""
    normalization: NormalizationMode = "half"
    """half (mean = std = 0.5), channel (the data set's mean and std) or pixel (the paper's per-pixel mean)."""

    seed: int = 0
    """Seed of initial weights, order and augmentation."""
    device: Device = "auto"
    """Device to compute on."""
    threads: Threads = "auto"
    """Number of CPU threads, or auto: the fastest of 1, half and all of the usable processors in a few trial steps. The
    last bits of a run depend on it."""
    precision: Precision = "auto"
    """Precision of the forward pass; fp16 uses a gradient scaler."""
    compile: Compile = "auto"
    """torch.compile: off, on, capture (the whole step as one CUDA graph, without torch.compile), graph (with it), or
    auto: on a GPU capture or, in a run long enough to pay for compilation, graph; on a CPU off or, in such a run, the
    faster of off and on."""
    kernels: Kernels = "auto"
    """Kernels of batch norm and muon: torch (PyTorch's), own (this program's) or auto: on a CPU own; on a GPU the
    faster ones in a few trial steps, own only if they agree with PyTorch's."""

    out: Path | None = None
    """Run folder. Without it: RECIPE-MODEL-DATA-seedN in $FASTRESNET_RUNS or ./runs."""
    resume: bool = False
    """Continue the run in its folder, bit-exactly; start one if there is none."""
    checkpoint_steps: int = 0
    """Steps between checkpoints that the training waits for; 0: none. Others are written in the background at the end
    of an epoch, at most every 10 s."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases, configured by its own settings and environment variables."""
    mlflow: bool = False
    """Log to MLflow, configured by its environment variables."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        check_literals(self)
        for name in ("data", "root", "out", "init_from"):
            _check_path(name, getattr(self, name))
        if self.decode == "jpeg" and self.pipeline not in ("auto", "dali"):
            raise UsageError(f"--decode jpeg needs --pipeline dali, not {self.pipeline}.")
        check_threads(self.threads)
        for name, low, high in (
            ("epochs", 1, 1_000_000),
            ("batch_size", 1, 1 << 20),
            ("accumulate", 1, 1 << 20),
            ("early_stop", 0, 1 << 62),
            ("lr_batch_size", 1, 1 << 20),
            ("iterations", 1, 1 << 62),
            ("val_split", 0, 1 << 62),
            ("checkpoint_steps", 0, 1 << 62),
            ("seed", 0, (1 << 63) - 1),
            ("lr", 0, 1e6),
            ("sgd_lr", 0, 1e6),
            ("norm_lr", 0, 1e6),
            ("warmup", 0, 1),
            ("momentum", 0, 1),
            ("sgd_momentum", 0, 1),
            ("weight_decay", 0, 1),
            ("clip_norm", 0, 1e6),
            ("ema_decay", 0, 1 - 1e-9),
            ("crop_padding", 0, IMAGE_SIZE - 1),
            ("cutout", 0, IMAGE_SIZE),
            ("mixup", 0, 100),
            ("cutmix", 0, 100),
            ("label_smoothing", 0, 1),
            ("drop_path", 0, 1 - 1e-9),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} {value} is not in {low}..{high}.")
        check_model(self.model, self.shortcut, self.drop_path, self.zero_init_residual)
        _ = self.augmentation  # checks its own fields
        if self.early_stop and not self.val_split:
            raise UsageError("--early-stop needs images held out with --val-split: the test set must not end a run.")
        if self.batch_size % self.accumulate:
            raise UsageError(f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}.")
        if self.init_from == "":
            raise UsageError("--init-from is empty. It takes a file, or pretrained:NAME.")
        if self.init_from is not None and self.model.startswith(OWN):
            raise UsageError("--init-from is for networks of this program. Load the weights of your own yourself.")
        if self.freeze_backbone and self.init_from is None:
            raise UsageError(
                "--freeze-backbone trains the linear layer alone: give the other weights with --init-from."
            )
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulate % 2:
            parts = f" in {self.accumulate} parts (--accumulate)" if self.accumulate > 1 else ""
            raise UsageError(f"--batch-size {self.batch_size}{parts}: mixup and CutMix mix pairs; give an even number.")
        if self.nesterov and (self.optimizer == "adamw" or not self.momentum_of_sgd):
            raise UsageError("--nesterov needs --optimizer sgd or muon, and a --momentum (or --sgd-momentum) above 0.")
        if not 0 < len(self.resolutions) <= _MOST_RESOLUTIONS:
            raise UsageError(f"--resolutions {_words(self.resolutions)}: give one to {_MOST_RESOLUTIONS} sides.")
        if any(not SMALLEST_IMAGE <= side <= IMAGE_SIZE for side in self.resolutions):
            sides = f"sides of {SMALLEST_IMAGE}..{IMAGE_SIZE} pixels"
            raise UsageError(f"--resolutions {_words(self.resolutions)}: give {sides}.")
        if any(not 0 < m < 1 for m in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            fractions = "increasing fractions of the run between 0 and 1"
            raise UsageError(f"--milestones {_words(self.milestones)}: give {fractions}.")

    @property
    def augmentation(self) -> Augmentation:
        """Settings of the pipelines."""
        return Augmentation(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Augmentation)})

    @property
    def momentum_of_sgd(self) -> float:
        """Momentum of SGD, alone or with muon."""
        return self.momentum if self.sgd_momentum is None or self.optimizer != "muon" else self.sgd_momentum

    @property
    def lr_scale(self) -> float:
        """Factor of all learning rates."""
        return self.batch_size / (self.lr_batch_size or self.batch_size)

    def sides(self, total_steps: int) -> list[int]:
        """List the side of the images of each step of the run, in pixels."""
        return [self.side(step, total_steps) for step in range(total_steps)]

    def side(self, step: int, total_steps: int) -> int:
        """Return the side of the images of step `step`, from 0, of a run of `total_steps`, in pixels."""
        return self.resolutions[step * len(self.resolutions) // total_steps]

    def total_steps(self, steps_per_epoch: int) -> int:
        """Compute the optimisation steps of the whole run."""
        return min(self.epochs * steps_per_epoch, self.iterations or sys.maxsize)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that affect the result, in plain types, without those that are None: TOML has no None."""
        values = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and name not in _FREE_ON_RESUME
        }

    def to_toml(self) -> str:
        """Format `config.toml`: the fields that affect the result, and the root of the data if given.

        Characters that are not printable become TOML's escapes, which a terminal shows and a reader returns.
        """
        text = tomli_w.dumps({**self.to_dict(), **({"root": str(self.root)} if self.root else {})})
        return "".join(char if char.isprintable() or char == "\n" else f"\\U{ord(char):08x}" for char in text)


def from_dict(values: dict[str, Any], where: str) -> TrainConfig:
    """Build a config from plain values that were read from `where`; the others have their defaults.

    Raises `UsageError` that names an invalid one.
    """
    return TrainConfig(**_typed(values, where))


def from_toml(path: Path) -> TrainConfig:
    """Read the `config.toml` of a run: settings newer than the run have their defaults. Raises as `read_settings`."""
    return TrainConfig(**read_settings(path, may_be_pipe=False))


def read_settings(path: Path, *, may_be_pipe: bool = True) -> dict[str, Any]:
    """Read the settings in a TOML file, some or all.

    Raises `UsageError` if the file is missing, damaged or has unknown settings or values of another type.
    """
    try:
        text = read_text(path, _LONGEST, may_be_pipe=may_be_pipe).decode()
        if text.count(".") > _MOST_DOTS:
            raise ValueError("it has very many dots")
        values = tomllib.loads(text)
        if huge := [name for name, value in values.items() if type(value) is int and abs(value) >= 1 << 63]:
            raise ValueError(f"{huge[0][:60]} is a number of over 64 bits")
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a TOML file: {error}.") from None
    return _typed(values, str(path))


def _words(values: Sequence[float]) -> str:
    """Format the values of an option as on the command line."""
    return " ".join(map(str, values)) or "without a value"


def in_turn(resolutions: Sequence[int]) -> str:
    """Return the words for the sizes of training images, which follow "images"; none if all images are whole."""
    if set(resolutions) == {IMAGE_SIZE}:
        return ""
    return f" of {', '.join(map(str, resolutions)).replace(', ', ', then ', 1)} pixels (test: {IMAGE_SIZE})"


def is_complete(values: dict[str, Any]) -> bool:
    """Return True if `values` has every setting that affects the result, but for those that may be None.

    Those of runs from before a setting was added are complete too: its default is what they did.
    """
    return TrainConfig().to_dict().keys() - _ADDED_LATER <= values.keys()


def _typed(values: dict[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(TrainConfig)
    for name in values:
        check_choice(f"setting in {where}", name, hints)
    return {name: _coerce(name, plain(value), hints[name], where) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Return the numbers of NumPy and PyTorch as Python's."""
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def _check_path(name: str, value: Path | str | None) -> None:
    """Raise `UsageError` if no file can have this name, or config.toml cannot contain it."""
    text = str(value)
    flag = f"--{name.replace('_', '-')}"
    if "\0" in text:
        raise UsageError(f"{flag} {text!r} contains a NUL, which no file name can.")
    try:
        text.encode()
    except UnicodeEncodeError:
        if name != "out":
            raise UsageError(f"{flag} {text!r} is not UTF-8, as config.toml is. Rename it, or use a link.") from None


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Name the settings in which two `to_dict` results differ."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):  # a huge number, deep lists
        return f"a {type(value).__name__}"


def _coerce(name: str, value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        hint = str  # `TrainConfig` checks the value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where}: {name} = {_shown(value)}: expected a list.")
        element = get_args(hint)[0]
        return tuple(_coerce(name, item, element, where) for item in value)
    kinds = get_args(hint) or (hint,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if value in words:
        return value
    if float in kinds and type(value) is int and abs(value) < 1 << 63:
        return float(value)
    if Path in kinds and isinstance(value, str | Path):
        return Path(os.path.expanduser(value))
    if str in kinds and isinstance(value, Path):
        return str(value)
    if type(value) not in kinds:
        names = [kind.__name__ for kind in kinds if isinstance(kind, type) and kind is not type(None)]
        expected = " or ".join([*names, *words])
        raise UsageError(f"{where}: {name} = {_shown(value)}: expected {expected}.")
    return value
