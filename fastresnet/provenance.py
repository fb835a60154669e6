"""Origin of a figure: device, versions, commit, command and time."""

from __future__ import annotations

import contextlib
import itertools
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastresnet.text import as_utf8
from pipelines import PACKAGES, __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Describe device, threads, versions, commit, command and time."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastresnet": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **versions_of("numpy", *itertools.chain.from_iterable(PACKAGES.values())),
        },
        "commit": _commit(),
        "command": _command(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions_of(*libraries: str) -> dict[str, str]:
    """Return the versions of those of `libraries` that are installed."""
    versions = {}
    for library in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def _command() -> str:
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return as_utf8(f"{name} {shlex.join(sys.argv[1:])}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.machine()


def _commit() -> str:
    """Return the commit of this code's checkout, with `+` if it has changes; `unknown` outside a checkout."""
    try:
        folder = Path(__file__).parent
        described = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
