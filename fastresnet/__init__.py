"""A training pipeline for the CIFAR ResNets of He et al. 2015, with reproducible batches."""

from fastresnet.api import evaluate, train
from fastresnet.models import create_model, list_models
from fastresnet.pretrained import list_pretrained, load_pretrained
from pipelines import __version__

__all__ = [
    "__version__",
    "create_model",
    "evaluate",
    "list_models",
    "list_pretrained",
    "load_pretrained",
    "train",
]
