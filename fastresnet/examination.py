"""Closer look at a trained network on a test set: its confusion matrix and its most confident mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fastresnet.device import resolve_device, supports
from fastresnet.evaluation import find_dataset_for, open_evaluation, probabilities
from fastresnet.plotting import confusion, image_grid
from fastresnet.weights import load_weights

SHOWN = 24


@dataclasses.dataclass(frozen=True, slots=True)
class Examined:
    """Probabilities that a network gives for every image of a test set."""

    name: str
    classes: tuple[str, ...]
    images: np.ndarray
    """Pixels, uint8 [N, 32, 32, 3]."""
    labels: np.ndarray
    """True classes, int64 [N]."""
    probabilities: np.ndarray
    """Probabilities of all classes, float32 [N, classes]."""

    @property
    def counts(self) -> np.ndarray:
        """Numbers of images by true class (rows) and predicted class (columns), int64 [classes, classes]."""
        counts = np.zeros((len(self.classes),) * 2, np.int64)
        np.add.at(counts, (self.labels, self.probabilities.argmax(1)), 1)
        return counts

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, percent."""
        return 100 * float(np.trace(self.counts)) / len(self.labels)

    def confusion(self) -> Figure:
        """Draw the matrix of `counts`."""
        return confusion(
            self.counts, self.classes, f"{self.name}: {self.accuracy:.2f} % of {len(self.labels):,} images"
        )

    def worst(self) -> np.ndarray:
        """Return the rows of the most confident mistakes, the worst first."""
        predicted = self.probabilities.argmax(1)
        wrong = np.flatnonzero(predicted != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong, predicted[wrong]], kind="stable")][:SHOWN]

    def mistakes(self) -> Figure:
        """Draw the most confident mistakes."""
        rows = self.worst()
        titles = [self._title(row) for row in rows]
        return image_grid(self.images[rows], titles, f"{self.name}: most confident mistakes; true / predicted class")

    def _title(self, row: int) -> str:
        predicted = int(self.probabilities[row].argmax())
        share = 100 * self.probabilities[row, predicted]
        return f"{self.classes[self.labels[row]]}\n{self.classes[predicted]} {share:.0f} %"


def examine(path: Path, data: str | None, root: Path | None, device: str) -> Examined:
    """Run the network in file `path` on the test set of `data`, or of the data set of its training.

    Raises `DataError` where the file or the data set are missing, damaged or do not fit together.
    """
    weights = load_weights(path)
    dataset, on = find_dataset_for(weights, path, data, root), resolve_device(device)
    precision = (weights.training or {}).get("precision", "fp32")
    precision = precision if supports(precision, on) else "fp32"
    pipeline = open_evaluation(dataset, weights.normalization, pipeline="resident", precision=precision, device=on)
    with contextlib.closing(pipeline):
        likely, labels = probabilities(weights.model.to(on), pipeline, precision=precision, device=on)
    return Examined(
        f"{weights.name} on {dataset.name}", dataset.classes, np.asarray(dataset.test.images), labels, likely
    )
