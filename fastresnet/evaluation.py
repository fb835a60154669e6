"""Accuracy and loss on a split: single view, every image counted once; optionally with TTA too."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastresnet.config import Tta
from fastresnet.device import DTYPES, autocast, recorded, resolve_device, supports
from fastresnet.distributed import SINGLE, World
from fastresnet.pretrained import find_weights
from fastresnet.run_folder import find_run_data, root_of_run
from fastresnet.text import for_figure
from fastresnet.threads import Threads, settled_threads
from fastresnet.weights import Weights, load_weights
from pipelines import Augmentation, open_pipeline
from pipelines.augment import reflect
from pipelines.base import GatheringPipeline, Pipeline
from pipelines.cifar import CIFAR10_CLASSES
from pipelines.errors import DataError, Note, RunError, UsageError, check_choice, list_some
from pipelines.images import Report
from pipelines.prepare import find_test_data
from pipelines.sampling import NormalizationMode
from pipelines.store import CIFAR10, CIFAR100, Dataset

if TYPE_CHECKING:
    from fastresnet.figures import Figure

SHOWN_MISTAKES = 24
_LISTED_NAMES = 12  # in messages

_MOST_CONFUSED = 2048
"""Number of classes up to which a confusion matrix, of 34 MB then, is counted."""
BATCH_SIZE, _MOST_LOGITS = 1000, 1 << 22
"""Images per evaluation batch, less if the split is smaller or has very many classes; the result does not depend on
it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy and loss of a network on a split."""

    accuracy: float
    """Top-1 accuracy, percent."""
    loss: float
    """Mean cross-entropy, nats."""
    per_class: dict[str, float]
    """Top-1 accuracy of each class, percent; classes without images are left out."""
    images_per_s: float
    mirror_accuracy: float | None = None
    """Top-1 accuracy with flip TTA, percent."""
    shift_accuracy: float | None = None
    """Top-1 accuracy with shift TTA, percent."""
    confusion: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    """Numbers of images by true class (rows) and predicted class (columns), int64 [C, C]; None of over 2,048
    classes."""


def find_dataset_for(
    weights: Weights, given: object, data: str | Dataset | None, root: Path | None, report: Report = lambda *_: None
) -> tuple[Weights, Dataset]:
    """Find the data set on which to evaluate `weights`, loaded from `given`; return both, with the same classes.

    It is `data`, a data set or its name (see `find_test_data`), else the one of their training, in the folder of
    data sets that their run has recorded if `root` is None, else cifar10, or cifar100 for 100 classes. It is
    normalised with the constants of their training if these are known. The network's outputs are in the order of
    its classes, matched by name. Raises `DataError` if it has other classes.
    """
    usual = CIFAR100 if weights.num_classes == 100 else CIFAR10
    if isinstance(data, Dataset):
        dataset = data
    else:
        root = root_of_run(Path(str(given))) if root is None and data is None else root
        dataset = find_test_data(data or (weights.training or {}).get("data", usual), root, report)
    if data is None and weights.data_sha256 not in (None, dataset.digest):
        text = f"{dataset.folder} is not the {dataset.name} on which {given} was trained: data and root name another."
        warnings.warn(text, Note, stacklevel=3)
    if not len(dataset.train):  # images in folders, perhaps not of all classes
        dataset = _with_all_classes(dataset, weights.classes)
    return match_classes(weights, given, dataset), weights.as_in_training(dataset)


def match_classes(weights: Weights, given: object, dataset: Dataset) -> Weights:
    """Return `weights`, loaded from `given`, with outputs in the order of the classes of `dataset`.

    Ten outputs without names are taken for the classes of CIFAR-10 if those of `dataset` are. Where else one side has
    no names, or numbers for names, the order is taken to be the same, that of the numbers. A `Note` says so. Raises
    `DataError` if the classes are others.
    """
    names = dataset.classes
    is_known = weights.named or weights.classes == CIFAR10_CLASSES
    order = _find_order(weights.classes, names) if is_known else None
    if order is None:
        order = _assume_order(weights, given, dataset)
    elif not weights.named:
        warnings.warn(f"{given} does not name its classes: CIFAR-10's are assumed", Note, stacklevel=3)
    if order != list(range(len(names))):
        weights = dataclasses.replace(weights, model=Reordered(weights.model, order))
    return dataclasses.replace(weights, classes=names)


def _assume_order(weights: Weights, given: object, dataset: Dataset) -> list[int]:
    """Assume an order of outputs for classes that lack names on one side; raise `DataError` if both sides have them."""
    names = dataset.classes
    weights_have_names = weights.named and _has_names(weights.classes)
    if weights_have_names and _has_names(names):
        theirs, ours = _listed(weights.classes, names), _listed(names, weights.classes)
        raise DataError(
            f"{given} was trained on other classes ({theirs}) than those of {dataset.name} ({ours}). "
            "Train it on them with --init-from."
        )
    if weights.num_classes != len(names):
        raise DataError(f"{given} has {weights.num_classes} classes, but {dataset.name} has {len(names)}.")
    nameless, other = (dataset.name, given) if weights_have_names else (given, dataset.name)
    warnings.warn(f"{nameless} does not name its classes: taken in the order of {other}'s", Note, stacklevel=4)
    if not weights.named:
        return list(range(len(names)))
    order = zip(_numbered(names), _numbered(weights.classes), strict=True)
    return [output for _, output in sorted(order)]


def _numbered(names: Sequence[str]) -> list[int]:
    """List the places of `names` in the order of their numbers, which are not sorted as text: 10 is before 2."""
    places = range(len(names))
    return list(places) if _has_names(names) else sorted(places, key=lambda place: int(names[place]))


def note_order(dataset: Dataset) -> None:
    """Say in a `Note` how a user's network is evaluated if `dataset` has CIFAR-10's classes in another order."""
    order = _find_order(CIFAR10_CLASSES, dataset.classes)
    if order is not None and order != sorted(order):
        names = ", ".join(dataset.classes)
        warnings.warn(f"the network's outputs are taken in the order of {dataset.name}'s: {names}", Note, stacklevel=3)


def _has_names(classes: Sequence[str]) -> bool:
    return not all(name.strip().isdecimal() for name in classes)


# Names that users of CIFAR-10 and STL-10 give to the same classes.
_ALIASES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "auto": "automobile", "lorry": "truck"}


def _with_all_classes(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Return `dataset` with `classes` for its own, if all of these are among them."""
    numbers = _find_numbers(classes, dataset.classes)
    if numbers is None:
        return dataset
    labels = np.array(numbers)[dataset.test.labels]
    return dataclasses.replace(dataset, classes=classes, test=dataclasses.replace(dataset.test, labels=labels))


def _find_order(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Find, for each name of `ours`, the number of the same one in `theirs`; None if the sets differ."""
    return _find_numbers(theirs, ours) if len(theirs) == len(ours) else None


def _find_numbers(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Do as `_find_order` does, where `ours` may be some of `theirs`."""
    for simplify in (str, _folded, _unaliased):
        known = {simplify(name): number for number, name in enumerate(theirs)}
        numbers = [known[simple] for simple in map(simplify, ours) if simple in known]
        if len(known) == len(theirs) and len(numbers) == len(set(numbers)) == len(ours):
            return numbers
    return None


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _unaliased(name: str) -> str:
    singular = _folded(name).removesuffix("s")
    return _ALIASES.get(singular, singular)


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    """List `names`; of many, only some of those that are not among `others`."""
    if len(names) > _LISTED_NAMES:
        names = [name for name in names if name not in others]
    return list_some(names, _LISTED_NAMES)


class Reordered(nn.Module):
    """Network whose outputs are in another order: output i is output `order[i]` of `network`."""

    order: Tensor

    def __init__(self, network: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("order", torch.tensor(order))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, classes]."""
        return self.network(images).index_select(1, self.order)


def check_logits(logits: object, images: Tensor, classes: Sequence[str]) -> None:
    """Raise `UsageError` unless `logits`, to which a network has mapped `images`, are one for each of `classes`."""
    if isinstance(logits, Tensor) and logits.shape == (len(images), len(classes)):
        return
    got = f"{list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise UsageError(
        f"the network maps {len(images)} images to {got}; expected are logits {[len(images), len(classes)]}, one for "
        "each class of the data set."
    )


@contextlib.contextmanager
def unchanged_modes(model: nn.Module) -> Iterator[None]:
    """Restore training or evaluation mode of each module of `model` at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def open_evaluation(
    dataset: Dataset,
    normalization: NormalizationMode,
    precision: str,
    device: torch.device,
    pipeline: str = "resident",
    world: World = SINGLE,
) -> Pipeline:
    """Open a pipeline over the test split of `dataset`, without augmentation.

    With several ranks, it covers the share of this one.
    """
    return open_pipeline(
        pipeline,
        dataset,
        train=False,
        batch_size=max(min(BATCH_SIZE, len(dataset.test), _MOST_LOGITS // len(dataset.classes)), world.world_size),
        device=device,
        dtype=DTYPES[precision],
        seed=0,
        augmentation=Augmentation(normalization=normalization),
        rank=world.rank,
        world_size=world.world_size,
    )


class Evaluator:
    """Evaluation of a network on a pipeline, as often as its weights change.

    With several ranks, each evaluates its share of the images. The result covers all images.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: Pipeline,
        classes: tuple[str, ...],
        precision: str,
        device: torch.device,
        *,
        tta: Tta = "none",
        captured: bool = False,
        world: World = SINGLE,
    ) -> None:
        """Create an evaluator of `model`, which its calls set to evaluation mode.

        `tta` adds the accuracy with `flip`, at twice the cost, or `shift`, at six times. `captured` records the
        evaluation of a batch as a CUDA graph in the first call, at the cost of four batches, if the pipeline gathers
        batches on the GPU. Weights then have to change in place.
        """
        check_choice("tta", tta, get_args(Tta))
        self._model, self._pipeline, self._classes = model, pipeline, classes
        self._precision, self._device, self._tta = precision, device, tta
        self._captured, self._world = captured, world
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._cells = len(classes) ** 2 if len(classes) <= _MOST_CONFUSED else 0
        self._counts = torch.zeros(2 + 2 * len(classes) + self._cells, dtype=torch.int64, device=device)
        self._mirror_correct, self._shift_correct = self._counts[:2]
        self._correct, self._count = self._counts[2 : 2 + 2 * len(classes)].view(2, -1)
        self._confusion = self._counts[2 + 2 * len(classes) :]
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def __call__(self, after_batch: Callable[[], None] = lambda: None) -> Evaluation:
        """Evaluate the network as it is now. `after_batch` may raise to stop early."""
        self._model.eval()
        started = time.perf_counter()
        if self._captured and self._replay is None and isinstance(self._pipeline, GatheringPipeline):
            self._replay = recorded(self._gathering_step(self._pipeline))
        for tensor in (self._loss, self._counts, self._step):
            tensor.zero_()
        for _ in self._batches():
            after_batch()
        for tensor in (self._loss, self._counts):
            self._world.sum(tensor)
        total = int(self._count.sum())
        return Evaluation(
            accuracy=100 * int(self._correct.sum()) / total,
            loss=float(self._loss) / total,
            per_class={
                name: 100 * hits / images
                for name, hits, images in zip(self._classes, self._correct.tolist(), self._count.tolist(), strict=True)
                if images
            },
            images_per_s=total / (time.perf_counter() - started),
            mirror_accuracy=100 * int(self._mirror_correct) / total if self._tta != "none" else None,
            shift_accuracy=100 * int(self._shift_correct) / total if self._tta == "shift" else None,
            confusion=self._confusion.reshape(len(self._classes), -1).cpu().numpy().copy() if self._cells else None,
        )

    def _batches(self) -> Iterator[None]:
        """Evaluate the batches; yield after each, which a GPU may not have finished."""
        if self._replay is not None:
            for _ in range(len(self._pipeline)):
                self._replay()
                yield
            return
        for batch in self._pipeline.epoch(0):
            self._add(batch.images, batch.labels, batch.valid)
            yield

    def _add(self, images: Tensor, labels: Tensor, valid: int | Tensor) -> None:
        """Add the first `valid` images of a batch to loss and counts."""
        logits = self._logits(images)
        real = torch.arange(len(labels), device=self._device) < valid

        def hits(logits: Tensor) -> Tensor:
            return (logits.argmax(1) == labels) & real

        self._loss += (F.cross_entropy(logits, labels, reduction="none") * real).sum()
        self._correct.index_add_(0, labels, hits(logits).long())
        self._count.index_add_(0, labels, real.long())
        if self._cells:
            self._confusion.index_add_(0, labels * len(self._classes) + logits.argmax(1), real.long())
        if self._tta != "none":
            logits = logits + self._logits(images.flip(3))
            self._mirror_correct += hits(logits).sum()
        if self._tta == "shift":
            logits = 2 * logits
            for pixels in (-1, 1):
                view = shifted(images, pixels)
                logits = logits + self._logits(view) + self._logits(view.flip(3))
            self._shift_correct += hits(logits).sum()

    def _logits(self, images: Tensor) -> Tensor:
        with autocast(self._precision, self._device):
            logits = self._model(images)
        check_logits(logits, images, self._classes)
        return logits.float()

    def _gathering_step(self, pipeline: GatheringPipeline) -> Callable[[], None]:
        """Return the evaluation of the next batch, which needs nothing from the host."""
        pipeline.load(0)
        valid = torch.tensor([pipeline.valid(step) for step in range(len(pipeline))], device=self._device)

        def add_next() -> None:
            step = self._step % len(pipeline)
            self._add(*pipeline.gather(step), valid[step])
            self._step += 1

        return add_next


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Shift `images` [N, C, H, W] up and to the left by `pixels`, down and to the right if negative.

    The edges are reflected.
    """
    for side in (2, 3):
        size = images.shape[side]
        images = images.index_select(side, reflect(torch.arange(size, device=images.device) + pixels, size))
    return images


def evaluate(
    model: nn.Module,
    pipeline: Pipeline,
    classes: tuple[str, ...],
    precision: str,
    device: torch.device,
    tta: Tta = "none",
    world: World = SINGLE,
    report: Report = lambda *_: None,
) -> Evaluation:
    """Evaluate `model` once; see `Evaluator`. Raises `RunError` if its logits are not finite."""
    done = itertools.count(1)
    evaluator = Evaluator(model, pipeline, classes, precision, device, tta=tta, world=world)
    result = evaluator(lambda: report("evaluating batches", next(done), len(pipeline)))
    if not math.isfinite(result.loss):
        remedy = "" if precision == "fp32" else "; try --precision fp32"
        raise RunError(f"the network's logits are not finite in {precision}: its accuracy has no meaning{remedy}.")
    return result


@contextlib.contextmanager
def evaluation_threads(
    threads: Threads, model: nn.Module, pipeline: Pipeline, *, precision: str, device: torch.device
) -> Iterator[str]:
    """Set the number of threads that evaluate `model` in the block; see `settled_threads`."""
    batch = next(iter(pipeline.epoch(0)))
    model.eval()

    @torch.no_grad()
    def forward(images: int) -> None:
        with autocast(precision, device):
            model(batch.images[:images])

    with settled_threads(threads, device, forward, len(batch.labels), len(pipeline)) as reason:
        yield reason


@torch.inference_mode()
def predict(
    model: nn.Module, pipeline: Pipeline, precision: str, device: torch.device, report: Report = lambda *_: None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predict the most likely class of each image of the split, in its order.

    Returns these classes, int64 [N], their probabilities, float32 [N], and the labels, int64 [N].
    """
    model.eval()
    parts = []
    for done, batch in enumerate(pipeline.epoch(0), 1):
        with autocast(precision, device):
            logits = model(batch.images).float()
        likely, predicted = logits.softmax(1).max(1)
        parts.append([part[: batch.valid].cpu() for part in (predicted, likely, batch.labels)])
        report("evaluating batches", done, len(pipeline))
    predicted, likely, labels = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return predicted, likely, labels


@dataclasses.dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions of a network for every image of a test set."""

    name: str
    classes: tuple[str, ...]
    images: np.ndarray
    """Pixels, uint8 [N, 32, 32, 3]."""
    labels: np.ndarray
    """True classes, int64 [N]."""
    predicted: np.ndarray
    """Most likely classes, int64 [N]."""
    likely: np.ndarray
    """Their probabilities, float32 [N]."""

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, percent."""
        return 100 * float((self.labels == self.predicted).sum()) / len(self.labels)

    def confusion(self) -> Figure:
        """Draw the numbers of images by true class (rows) and predicted class (columns)."""
        from fastresnet.plotting import confusion  # matplotlib takes half a second to load

        title = f"{self.name}: {self.accuracy:.2f} % of {len(self.labels):,} images"
        return confusion(self.labels, self.predicted, self.classes, title)

    def worst(self) -> np.ndarray:
        """Return the rows of the most confident mistakes, the worst first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.likely[wrong], kind="stable")][:SHOWN_MISTAKES]

    def mistakes(self) -> Figure:
        """Draw the most confident mistakes, or say that there are none."""
        from fastresnet.plotting import image_grid

        rows = self.worst()
        captions = ["\n".join(self.caption(row, lambda name: for_figure(name, 16).lstrip())) for row in rows]
        heading = "most confident mistakes" if len(rows) else f"no mistakes: all {len(self.labels):,} images are right"
        return image_grid(self.images[rows], captions, f"{self.name}: {heading}")

    def caption(self, row: int, shown: Callable[[str], str]) -> tuple[str, str]:
        """Name true and predicted class of an image, as `shown` writes names, and the probability of the latter."""
        true, predicted = (shown(self.classes[number]) for number in (self.labels[row], self.predicted[row]))
        return f"true: {true}", f"predicted: {predicted} {100 * self.likely[row]:.0f} %"


def predict_test_set(
    run: Path, data: str | None, root: Path | None, device: str, report: Report = lambda *_: None
) -> Predictions:
    """Run the network of a run, finished or not, on the test set of its data; `data` and `root` as in `find_run_data`.

    Raises `DataError` if the weights or the data set are missing or damaged, or do not match.
    """
    file = run / "model.safetensors" if (run / "summary.json").exists() else find_weights(run)
    weights, on = load_weights(file), resolve_device(device)
    dataset = find_run_data(run, weights.data_sha256, data, root)
    weights = match_classes(weights, run, dataset)
    dataset = weights.as_in_training(dataset)
    precision = (weights.training or {}).get("precision", "fp32")
    precision = precision if supports(precision, on) else "fp32"
    pipeline = open_evaluation(dataset, weights.normalization, precision, on)
    with contextlib.closing(pipeline):
        predicted, likely, labels = predict(weights.model.to(on), pipeline, precision, on, report)
    return Predictions(
        f"{weights.name} on {dataset.name}", dataset.classes, np.asarray(dataset.test.images), labels, predicted, likely
    )
