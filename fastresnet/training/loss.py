"""Loss of a training: cross-entropy with smoothed labels and weights of the classes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.store import Split


class CrossEntropy:
    """Cross-entropy with label smoothing (Szegedy et al. 2016, section 7); each class may count by a weight."""

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        """Create a loss; `class_weights` [classes] are factors of the terms of a smoothed label."""
        self._label_smoothing, self._class_weights = label_smoothing, class_weights

    def mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the images."""
        if self._class_weights is not None:  # PyTorch's mean divides by the weights of the labels in the batch
            return self.each(logits, labels).mean()
        return F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image [B]; `logits` are [B, classes] and `labels` int64 [B]."""
        smoothing = self._label_smoothing
        return F.cross_entropy(logits, labels, self._class_weights, label_smoothing=smoothing, reduction="none")


def balanced_weights(split: Split, classes: int, device: torch.device) -> Tensor:
    """Compute weights [classes] in inverse proportion to the images of each class, with a mean of 1 over the images.

    They are those of scikit-learn's `class_weight="balanced"`. A class without images has 0.
    """
    counts = np.bincount(split.labels[split.ids], minlength=classes)
    weights = np.where(counts, counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0)
    return torch.tensor(weights, dtype=torch.float32, device=device)
