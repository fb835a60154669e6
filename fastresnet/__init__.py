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

from fastresnet.api import evaluate, train  # noqa: E402
from fastresnet.models import create_model, list_models  # noqa: E402
from fastresnet.pretrained import list_pretrained, load_pretrained  # noqa: E402
from pipelines import __version__  # noqa: E402

__all__ = ["__version__", "create_model", "evaluate", "list_models", "list_pretrained", "load_pretrained", "train"]
