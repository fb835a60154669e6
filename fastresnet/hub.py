"""Weights in repositories of the Hugging Face Hub. `huggingface_hub`, an optional extra, is imported only here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

from pipelines import __version__
from pipelines.errors import DataError, UsageError, note, reason_of

PREFIX = "hf-hub:"
"""Prefix of the name of a repository given instead of a file: `hf-hub:USER/NAME` or `hf-hub:USER/NAME@REVISION`."""

WEIGHTS = "model.safetensors"
"""File of the weights in a repository."""

_LIMIT = 1 << 30  # bytes of weights; the largest network takes 0.15 GB


def is_repository(given: str | Path) -> bool:
    """Return True if `given` names a repository, not a file."""
    return str(given).startswith(PREFIX)


def library(needed_for: str) -> ModuleType:
    """Import `huggingface_hub`. Raises `UsageError` if it is not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # versions of libraries, and what starts this program
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(f"{needed_for} needs {error.name}: pip install 'fastresnet[hub]'") from None
    return huggingface_hub


def download(given: str) -> Path:
    """Download the weights of repository `given`, see `PREFIX`, into the cache of `huggingface_hub`; return the file.

    What is in the cache is not downloaded again, and is taken if the Hub cannot be reached. A `Note` announces a
    download. Raises `UsageError` if `given` is no name or the library is missing, `DataError` if there are no weights,
    or they cannot be downloaded.
    """
    match = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", given, re.ASCII)
    if match is None:
        raise UsageError(f"{given!r:.200} is no repository. Give {PREFIX}USER/NAME, or {PREFIX}USER/NAME@REVISION.")
    name, revision = match.groups()
    hub = library(f"{PREFIX}{name}")
    of_weights = {"repo_id": name, "filename": WEIGHTS, "revision": revision}
    ours = {"library_name": "fastresnet", "library_version": __version__}
    try:
        found = hub.hf_hub_download(**of_weights, **ours, dry_run=True)
        if found.will_download:
            size = found.file_size or 0
            if size > _LIMIT:
                raise DataError(f"{given}: {WEIGHTS} has {size / 1e9:.1f} GB, more than any network of this program.")
            note(f"downloading {WEIGHTS} ({size / 1e6:.1f} MB) of {name} from {hub.constants.ENDPOINT}.")
        return Path(hub.hf_hub_download(**of_weights, **ours))
    except hub.errors.HFValidationError as error:
        raise UsageError(f"{given}: {reason_of(error)}") from None
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  whatever the library of its connections raises, which has changed
        raise DataError(f"{given}: {_reason(error, hub)}") from None


def _reason(error: Exception, hub: ModuleType) -> str:
    """Write why a download failed, and what to do."""
    errors, log_in = hub.errors, "log in with hf auth login"
    match error:
        case errors.GatedRepoError():
            return f"the repository is gated. Ask for access on its page, and {log_in}."
        case errors.RepositoryNotFoundError():
            return f"there is no such repository, or it is private. Check the name, or {log_in}."
        case errors.RevisionNotFoundError():
            return "the repository has no such revision. Give a branch, a tag or a commit after @."
        case errors.RemoteEntryNotFoundError():
            return f"the repository has no {WEIGHTS}. Download its weights by hand, and give the file."
        case errors.LocalEntryNotFoundError():
            cause = reason_of(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            return f"it is not in the cache, and {hub.constants.ENDPOINT} cannot be reached: {cause}"
    return f"it cannot be downloaded: {reason_of(error)}"
