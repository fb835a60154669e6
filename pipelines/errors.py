"""Errors that a user can cause and fix: one or two lines on stderr and a documented exit code, never a traceback."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """Failure outside the program; the message says what, where and what to do."""

    exit_code = 1


class RunError(UserError):
    """Failure of the work itself, for example a non-finite loss."""


class UsageError(UserError):
    """Argument that is unknown, out of range or not supported here."""

    exit_code = 2


class DataError(UserError):
    """File that is missing, damaged or of another kind."""

    exit_code = 3


class Note(UserWarning):
    """Warning for the user; the command continues."""


def note(text: str) -> None:
    """Warn with a `Note`."""
    warnings.warn(text, Note, stacklevel=3)


def list_some(names: Sequence[str], shown: int = 3, separator: str = ", ") -> str:
    """List the first `shown` of `names`, and the number of those that follow."""
    more = len(names) - shown
    return separator.join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise `UsageError`, naming the nearest valid value, unless `value` is one of `choices`."""
    names = list(choices)
    if value in names:
        return
    hint = f": did you mean {near!r}?" if (near := nearest(str(value), names)) else "."
    raise UsageError(f"unknown {what} {value!r:.200}{hint} Valid: {', '.join(names)}.")


def reason_of(error: Exception) -> str:
    """Return the first line of a library's message, 200 characters at most, or the name of an error without one."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def nearest(value: str, names: Iterable[str], similarity: float = 0.6) -> str | None:
    """Return the name most similar to `value`, if at least by `similarity` in 0..1; case and punctuation are equal."""

    def plain(text: str) -> str:
        return re.sub(r"[\W_]", "", text.casefold()) or text

    found = {name: difflib.SequenceMatcher(None, plain(value), plain(name)).ratio() for name in names}
    best = max(found, key=found.__getitem__)
    return best if found[best] >= similarity else None


@functools.cache
def literals(options: type) -> dict[str, tuple[str, ...]]:
    """Return the valid values of each field of dataclass `options` that is a `Literal` or a tuple of them, by name."""
    words = {}
    for name, hint in get_type_hints(options).items():
        element = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if get_origin(element) is Literal:
            words[name] = get_args(element)
    return words


def check_word(field: str, word: str, words: Iterable[str]) -> None:
    """Raise `UsageError` unless `word` is one of `words`, the values of `field` of a dataclass."""
    check_choice(field.replace("_", " ").removesuffix("s"), word, words)


def check_literals(options: Any) -> None:
    """Raise `UsageError` if a field of a dataclass has a value that is not in its `Literal`."""
    for name, words in literals(options.__class__).items():
        value = getattr(options, name)
        for word in value if isinstance(value, tuple) else (value,):
            check_word(name, word, words)
