"""Texts in files from outside: read and parsed within limits of size, memory and depth."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

LONGEST_TEXT = 8 << 20
_MEMORY, _DEEPEST = 32 << 20, 100


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file that is no pipe or device, which could block for ever or never end. Raises `ValueError` if it is."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115  the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is a pipe or a device")
    return file


def read_text(path: Path, longest: int = LONGEST_TEXT, *, may_be_pipe: bool = False) -> bytes:
    """Read a file whole. Raises `ValueError` if it has more than `longest` bytes or is a pipe, and `OSError`."""
    with open(path, "rb") if may_be_pipe else open_regular(path) as file:
        data = file.read(longest + 1)
    if len(data) > longest:
        raise ValueError(f"it has more than {longest:,} bytes")
    return data


def parse_json(data: bytes) -> Any:
    """Parse JSON. Raises `ValueError` if it is not valid, or would take far more memory than honest files do."""
    text = data.decode()
    copies = 8 if not text.isascii() else 5 if "\\u" in text else 2  # Python stores some texts in 4 bytes a character
    memory = 300 * text.count("{") + 72 * text.count("[") + 80 * text.count(",") + copies * len(text)
    memory += 8 * (len(data) - len(text)) + 12 * text.count("\x7f")  # a digest writes them as escapes of six bytes
    if memory > _MEMORY + len(data):
        raise ValueError("its JSON would take too much memory")
    try:
        contents = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    _check_depth(contents)
    return contents


def read_json(path: Path) -> Any:
    """Read a JSON file, as `read_text` and `parse_json` do."""
    return parse_json(read_text(path))


def _check_depth(contents: Any) -> None:
    """Raise `ValueError` if `contents` are nested so deeply that writing or comparing them could fail."""
    level = [contents]
    for _ in range(_DEEPEST):
        level = [part for value in level for part in _containers_in(value)]
        if not level:
            return
    raise ValueError("its JSON is nested too deeply")


def _containers_in(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in parts if isinstance(part, dict | list)]
