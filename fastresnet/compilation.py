"""`torch.compile` and Triton with caches of compiled code that only this user can write.

PyTorch's own folder, `$TMPDIR/torchinductor_USER`, may have been created by anyone who knows the user's name. Code
that is in it runs.
"""

from __future__ import annotations

import atexit
import functools
import getpass
import hashlib
import os
import shutil
import stat
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.errors import Note, RunError

PROCESSOR = Path("/proc/cpuinfo")

_UNMAPPED = 65534
"""Owner of files of all users outside the user namespace of a container, such as the machine's own root."""


def torch_compile(function: Callable[..., Any], **options: Any) -> Any:
    """Return `torch.compile(function, **options)`, with the caches of `use_private_caches`.

    Each call may compile as many graphs as PyTorch allows a function, whatever others in this process have.
    """
    import torch

    use_private_caches()
    from torch._inductor import codecache, config

    # Inductor keeps precompiled headers in its default folder, whatever its variable says.
    if hasattr(codecache, "_HEADER_DIR"):
        folder = os.path.abspath(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        codecache._HEADER_DIR = os.path.join(folder, "precompiled_headers")
        codecache._HEADER_LOCK_DIR = os.path.join(codecache._HEADER_DIR, "locks")
    else:
        config.cpp_cache_precompile_headers = False
    return torch.compile(_with_own_code(function), **options)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function or a method: PyTorch counts graphs by code object, and refuses the ninth."""
    if isinstance(function, types.MethodType):
        return types.MethodType(_with_own_code(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    copied = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function)


def use_private_caches() -> None:
    """Set $TORCHINDUCTOR_CACHE_DIR and $TRITON_CACHE_DIR, for this process and those that it starts, unless set.

    They are in `$XDG_CACHE_HOME/fastresnet`, by default `~/.cache/fastresnet`. If others could change that folder, or
    it cannot be written, this process has a temporary one, and warns with a `Note`.
    """
    name_user()
    if not _is_chosen("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_private_folder() / f"inductor-{_instruction_set()}")
    if not _is_chosen("TRITON_CACHE_DIR"):
        os.environ["TRITON_CACHE_DIR"] = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "triton")


def name_user() -> None:
    """Name a user who has no entry in /etc/passwd, as in a container: PyTorch 2.11's optimisers require a name."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid_{os.getuid()}"


def _is_chosen(variable: str) -> bool:
    """Return True if the user has set `variable`.

    PyTorch itself sets it to its default when an optimiser is created, and other processes inherit that.
    """
    value = os.environ.get(variable, "")
    return value != "" and not value.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_"))


def _instruction_set() -> str:
    """Return a name of this processor's instruction set.

    Inductor compiles for it without noting it, and several machines may share a home folder.
    """
    try:
        with open(PROCESSOR) as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def _private_folder() -> Path:
    """Return the folder of this program's caches, or a temporary one for this process with a `Note`."""
    try:
        home = os.environ.get("XDG_CACHE_HOME", "")
        return _own_folder((Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "fastresnet")
    except OSError as error:
        reason = f"{error.filename} cannot be written ({error.strerror})"
    except RuntimeError as error:  # there is no home, or others could change it
        reason = str(error)
    folder = _temporary_folder()
    message = (
        f"the cache of compiled code is not used: {reason}. This process keeps its own in {folder}, and the next one "
        "compiles again. Set XDG_CACHE_HOME to a folder of your own."
    )
    warnings.warn(message, Note, stacklevel=4)
    return folder


def _own_folder(folder: Path) -> Path:
    """Create `folder` and its parents, mode 700, unless they exist; return its path without links.

    Raises `RuntimeError` if another user could change what is in it, also by replacing a folder above.
    """
    for level in (folder.parent, folder):  # a home or a mount that is missing is not made
        if not level.exists():
            _check_above(level.parent.resolve(strict=True) / level.name)
            level.mkdir(mode=0o700, exist_ok=True)  # another process may be first
    folder = folder.parent.resolve() / folder.name
    found, user = folder.lstat(), os.geteuid()
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeError(f"{folder} is not a folder but a link or a file")
    if found.st_uid != user:
        raise RuntimeError(f"{folder} belongs to another user ({found.st_uid})")
    if found.st_mode & 0o077:
        raise RuntimeError(f"{folder} is open to other users (mode {found.st_mode & 0o777:o}, not 700)")
    _check_above(folder)
    return folder


def _check_above(folder: Path) -> None:
    """Raise `RuntimeError` if another user could replace `folder`, which has no links above it."""
    trusted = {os.geteuid(), 0} | ({_UNMAPPED} if _in_user_namespace() else set())
    for level in folder.parents:
        found = level.stat()
        if found.st_uid not in trusted or found.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise RuntimeError(f"other users can change {level}, and {folder.name} in it")


def _in_user_namespace() -> bool:
    try:
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def _temporary_folder() -> Path:
    """Create a folder, mode 700, that is removed when this process ends; processes forked from it leave it alone."""
    try:
        folder, owner = Path(tempfile.mkdtemp(prefix="fastresnet-")).resolve(), os.getpid()
        _check_above(folder)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"there is no folder to compile in ({reason}). Set TMPDIR or XDG_CACHE_HOME.") from error

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
