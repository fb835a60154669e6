"""Compilation of this program's C files for the host CPU, on first use."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import Note


class CompilerError(Exception):
    """Failure to compile or load a C file; the message has the reason and the remedy."""


def load_kernels(
    source: Path, option: str, names: Iterable[str], arguments: Sequence[Any], result: Any, fallback: str
) -> ctypes.CDLL | None:
    """Compile `source` and declare its functions `names`. On failure, warn with a `Note` and return None.

    The `Note` contains `fallback`, a clause on what is used instead and its cost.
    """
    try:
        library = compile_c(source, option)
    except CompilerError as error:
        warnings.warn(f"{fallback}: {error}.", Note, stacklevel=4)
        return None
    for name in names:
        kernel = getattr(library, name)
        kernel.argtypes, kernel.restype = arguments, result
    return library


def compile_c(source: Path, *options: str) -> ctypes.CDLL:
    """Compile `source` (in 0.2 s) with `$CC` and return its functions; the linker does not get `options`.

    Every process compiles again, without a cache, which could be stale, damaged or written by others.
    Raises `CompilerError`.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        raise _error(f"there is no C compiler {compiler[0]!r}")
    with _scratch_folder() as folder:
        binary, library = str(Path(folder) / "binary.o"), str(Path(folder) / "library.so")
        for arguments in (
            ["-O3", "-march=native", "-fPIC", *options, "-c", str(source), "-o", binary],
            ["-shared", binary, "-o", library],
        ):
            done = subprocess.run([*compiler, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
                raise _error(f"{shlex.join(compiler)} cannot compile {source.name} ({reason})")
        try:
            return _load(Path(library))
        except OSError as error:
            raise _error(f"{source.name} cannot be loaded ({error})") from error


def _scratch_folder() -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:  # none of them exists, or none can be written
        raise CompilerError(f"there is no folder to compile in ({error.strerror}); set TMPDIR to one") from error


def _load(library: Path) -> ctypes.CDLL:
    """Load `library`, from memory if its folder is mounted noexec, as by Docker's `--tmpfs /tmp`. Raises `OSError`."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        if not hasattr(os, "memfd_create"):  # only Linux has it
            raise
        memory = os.memfd_create(library.name)  # stays open: the next library under its number would be taken for it
        os.write(memory, library.read_bytes())
        return ctypes.CDLL(f"/proc/self/fd/{memory}")


def _error(reason: str) -> CompilerError:
    return CompilerError(f"{reason}; install gcc 12 or newer")
