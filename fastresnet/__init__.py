"""A training pipeline for the CIFAR ResNets of He et al. 2015, with reproducible batches."""

import importlib.util as _util
import pathlib as _pathlib
import sys as _sys


def check_not_shadowed(package: str) -> None:
    """Raise `ImportError` if the name `package`, one of our own, resolves to another project's module."""
    spec, ours = _util.find_spec(package), _pathlib.Path(__file__).parents[1] / package / "__init__.py"
    if spec is not None and _pathlib.Path(spec.origin or "").resolve() != ours.resolve():
        raise ImportError(
            f"{spec.origin} is imported in place of fastresnet's own package "
            f"{package}: rename it, or start Python in another folder."
        )


try:
    check_not_shadowed("pipelines")
except ImportError as error:
    if _sys.argv[:1] != ["-m"]:
        raise
    print(f"fastresnet: {error}", file=_sys.stderr)  # under python -m fastresnet a traceback would add nothing
    _sys.exit(2)

from typing import TYPE_CHECKING  # noqa: E402

from fastresnet.api import create_dataset, evaluate, load_dataset, open_pipeline, train  # noqa: E402
from fastresnet.callbacks import Callback, StopTraining  # noqa: E402
from fastresnet.models import create_model, list_models  # noqa: E402
from fastresnet.pretrained import list_pretrained, load_pretrained  # noqa: E402
from pipelines import Augmentation, __version__  # noqa: E402
from pipelines.errors import DataError, RunError, UsageError  # noqa: E402

if TYPE_CHECKING:
    from fastresnet.config import TrainConfig
    from fastresnet.evaluation import Evaluation
    from fastresnet.recipes import create_config
    from fastresnet.run_folder import Run
    from pipelines.base import Batch, Pipeline
    from pipelines.store import Dataset

__all__ = [
    "Augmentation",
    "Batch",
    "Callback",
    "DataError",
    "Dataset",
    "Evaluation",
    "Pipeline",
    "Run",
    "RunError",
    "StopTraining",
    "TrainConfig",
    "UsageError",
    "__version__",
    "create_config",
    "create_dataset",
    "create_model",
    "evaluate",
    "list_models",
    "list_pretrained",
    "load_dataset",
    "load_pretrained",
    "open_pipeline",
    "train",
]

# The libraries that these need take long to import, and torch.hub has none of them.
_LATER = {
    "Batch": "pipelines.base",
    "Dataset": "pipelines.store",
    "Evaluation": "fastresnet.evaluation",
    "Pipeline": "pipelines.base",
    "Run": "fastresnet.run_folder",
    "TrainConfig": "fastresnet.config",
    "create_config": "fastresnet.recipes",
}

if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(__import__(_LATER[name], fromlist=[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})
