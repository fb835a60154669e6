"""Arguments of the commands: fields of a dataclass as options, with help and errors of one style.

A field's docstring, the string under it, is its help. `argparse` reads the arguments.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fastresnet.terminal import STANDARD_OUTPUT, check_json, say
from pipelines.errors import UsageError, check_word, nearest

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""Type of a field that is given without a flag."""
PositionalOrFlag = Annotated[T, "positional", "flag"]
"""Type of a field that is given without or with its flag."""
Hidden = Annotated[T, "hidden"]
"""Type of a field that is no option."""
JsonFile = Annotated[Path | None, "json"]
"""Type of `--json [FILE]`. Without FILE it is `STANDARD_OUTPUT`, and the command prints nothing else there."""

HELP = ("-h", "--help", "--help-all")
"""Flags of every command that print its help."""


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """Option of a command, or positional argument."""

    name: str
    """Name of the field."""
    kind: Any
    """Type of the value, or of each of several, without None."""
    may_be_none: bool
    several: int | Literal["*"] | None
    """Number of values, "*" if any; None for a single value."""
    marks: tuple[str, ...]
    default: Any
    """Default value, or `dataclasses.MISSING`."""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_positional(self) -> bool:
        return "positional" in self.marks

    @property
    def flags(self) -> list[str]:
        """Flags of the option: two if it is a switch, none if it is given without one."""
        if self.is_positional and "flag" not in self.marks:
            return []
        return [self.flag, self.flag.replace("--", "--no-", 1)] if self.kind is bool else [self.flag]

    @property
    def words(self) -> tuple[str, ...]:
        """Valid words, if there are any."""
        kinds = get_args(self.kind) if get_origin(self.kind) is Union else (self.kind,)
        return tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))

    @property
    def metavar(self) -> str:
        if self.is_positional:
            return self.name.removesuffix("s" * bool(self.several)).upper()
        if self.words and get_origin(self.kind) is Literal:
            return f"{{{','.join(self.words)}}}"
        names = {int: "N", float: "X", Path: "PATH"}
        return "|".join((names.get(self.number or self.kind, self.name.upper()), *self.words))

    @property
    def number(self) -> type | None:
        """Type of the numbers that it takes, if any."""
        return next((kind for kind in (int, float) if kind in (self.kind, *get_args(self.kind))), None)

    def read(self, text: str) -> Any:
        """Convert the text of a value. Raises `UsageError` if it is of another type."""
        if text in self.words:
            return text
        if get_origin(self.kind) is Literal:
            check_word(self.name, text, self.words)
        if self.kind is Path and not text:
            raise UsageError(f"{self.flag} is empty: give a path.")
        if self.number is None:
            return self.kind(text)
        if self.may_be_none and text.casefold() == "none":
            return None
        try:
            return self.number(text)
        except ValueError:
            expected = " or ".join(["a whole number" if self.number is int else "a number", *self.words])
            raise UsageError(f"{self.flag} {text!r:.200}: give {expected}.") from None


def options_of(cls: type) -> list[Option]:
    """List the options of dataclass `cls`, without hidden fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = [_option(field, hints[field.name]) for field in dataclasses.fields(cls)]
    return [option for option in found if "hidden" not in option.marks]


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    marks: tuple[str, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *given = get_args(hint)
        marks = tuple(given)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if may_be_none := type(None) in get_args(hint):
        hint = kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007  a union of a tuple of types
    several: int | Literal["*"] | None = None
    if get_origin(hint) is tuple:
        elements = get_args(hint)
        hint, several = elements[0], "*" if elements[-1] is Ellipsis else len(elements)
    elif isinstance(hint, type(int | str)):
        hint = Union[get_args(hint)]  # noqa: UP007  so that both kinds of unions are one
    return Option(field.name, hint, may_be_none, several, marks, field.default)


def parse(cls: type[T], command: str, arguments: Sequence[str]) -> T:
    """Fill dataclass `cls` from `arguments`; print the help and exit with 0 if they ask for it.

    Raises `UsageError` on an unknown option, and on a missing, superfluous or invalid value.
    """
    show_help(cls, command, arguments)
    given = given_values(cls, command, arguments)
    for option in options_of(cls):
        if option.default is dataclasses.MISSING and not given.get(option.name):
            check_json(given.get("json"))  # it may have taken what was meant
            needed = f"{option.metavar} ..." if option.several else option.metavar
            needed = needed if option.is_positional else f"{option.flag} {needed}"
            raise UsageError(f"{command} needs {needed} (fastresnet {command} --help).")
    return cls(**given)


def given_values(cls: type, command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Read the values of the fields of dataclass `cls` that `arguments` give. Raises `UsageError` as `parse` does."""
    options, words = options_of(cls), list(arguments)
    end = words.index("--") if "--" in words else len(words)
    after = words[end + 1 :]  # positionals, also those that begin with a dash; argparse would take them for flags
    values, unknown = _create_parser(command, options).parse_known_intermixed_args(hyphenated(words[:end]))
    found, given = vars(values), dict[str, Any]()
    for option in options:
        if option.is_positional and option.several:
            found[option.name], after = [*found.get(option.name, ()), *map(option.read, after)], []
        elif option.is_positional and after and option.name not in found:
            found[option.name] = option.read(after.pop(0))
    if unexpected := [*unknown, *after]:
        raise _unexpected(unexpected[0], command, options)
    for option in options:
        if option.flag in found and option.name in found:
            raise UsageError(f"{option.metavar} is given twice: {found[option.name]} and {option.flag}.")
        for name in {option.flag, option.name} & found.keys():
            given[option.name] = tuple(found[name]) if option.several else found[name]
    return given


def as_arguments(cls: type, given: Mapping[str, Any]) -> list[str]:
    """Return arguments from which `given_values` reads `given`, with positionals first."""
    positional, flags = list[str](), list[str]()
    for option in options_of(cls):
        if option.name not in given:
            continue
        value = given[option.name]
        words = ["none" if word is None else str(word) for word in (value if option.several else [value])]
        if option.is_positional:
            positional += words
        elif option.kind is bool:
            flags.append(option.flags[0 if value else 1])
        else:
            flags += [option.flag, *words] if option.several else [f"{option.flag}={words[0]}"]
    return [*positional, *flags]


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return True if `arguments` ask for the help of a command."""
    return not {*HELP}.isdisjoint(itertools.takewhile(lambda argument: argument != "--", arguments))


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with flags such as `--batch-size` for `--batch_size`."""
    return [re.sub(r"^--[a-z]\w*(?==|$)", lambda flag: flag[0].replace("_", "-"), argument) for argument in arguments]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise `UsageError` in this program's words."""
        message = message.removeprefix("argument ")
        if found := re.match(r"(.*?): expected (one|at least one|\d+) arguments?$", message):
            flag, number = found.groups()
            count = {"one": "a value", "at least one": "a value"}.get(number, f"{number} values")
            message = f"{flag} needs {count}; if it begins with a dash, {flag}=VALUE"
        message = re.sub(r"/\S+: ignored explicit argument", " takes no value, but is given", message)
        raise UsageError(f"{message}. See {self.prog} --help.")


def _create_parser(command: str, options: Sequence[Option]) -> _Parser:
    parser = _Parser(
        prog=f"fastresnet {command}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for option in options:
        count = {} if option.several is None else {"nargs": option.several}
        if option.is_positional:
            parser.add_argument(option.name, type=option.read, nargs=option.several or "?")
        if option.kind is bool:
            parser.add_argument(option.flag, dest=option.name, action=argparse.BooleanOptionalAction)
        elif "json" in option.marks:
            parser.add_argument(option.flag, dest=option.name, type=Path, nargs="?", const=STANDARD_OUTPUT)
        elif option.flags:
            dest = option.flag if option.is_positional else option.name
            parser.add_argument(option.flag, dest=dest, type=option.read, **cast("Any", count))
    return parser


def _unexpected(word: str, command: str, options: Sequence[Option]) -> UsageError:
    program = f"fastresnet {command}"
    if not word.startswith("-"):
        return UsageError(f"unexpected argument {word:.200}. See {program} --help.")
    flags = [name for option in options for name in option.flags]
    hint = f" Did you mean {near}?" if (near := nearest(word.partition("=")[0], flags, 0.7)) else ""
    return UsageError(f"unknown option {word:.200}.{hint} See {program} --help.")


# --- help --------------------------------------------------------------------------------------------------------


def docstrings_of(cls: type) -> dict[str, str]:
    """Return the docstrings of the fields of `cls` and of its bases, by name: Python does not keep them."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in itertools.pairwise(cast("ast.ClassDef", definition).body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[name] = " ".join(words.split())
    return found


def show_help(
    cls: type,
    command: str,
    arguments: Sequence[str],
    *,
    default: Any = None,
    groups: Mapping[str, str] | None = None,
    common: Collection[str] = (),
) -> None:
    """Print the help on the options of dataclass `cls` and exit with 0, if `arguments` ask for it.

    `default` has the values of options that are not given, instead of the fields' own. `groups` has headings by the
    first field of each group. `--help` describes the `common` fields, if any are named, and `--help-all` all of them.
    """
    if not asks_for_help(arguments):
        return
    width = max(40, min(shutil.get_terminal_size().columns, 100))  # longer lines are hard to read
    options, docs = options_of(cls), docstrings_of(cls)
    is_short = bool(common) and "--help-all" not in arguments
    positional = [option for option in options if option.is_positional]
    places = "".join(f" {_place(option)}" for option in positional)
    lines = [f"usage: fastresnet {command}{places} [OPTIONS]", "", *_wrapped(inspect.getdoc(cls) or "", width)]
    grouped = _grouped(options, groups or {})
    described = {"common options": [option for option in options if option.name in common]} if is_short else grouped
    for heading, members in {"arguments": positional, **described}.items():
        lines += ["", f"{heading}:"] if members else []
        for option in members:
            value = option.default if default is None else getattr(default, option.name)
            text = _with_default(docs[option.name], value)
            text += f" Also {option.flag} {option.metavar}." if option.is_positional and option.flags else ""
            lines += _entry(_signature(option, value), text, width)
    if is_short:
        lines += ["", f"other options, described by fastresnet {command} --help-all:"]
        for heading, members in grouped.items():
            flags = " ".join(option.flag for option in members if option.name not in common)
            lines += _wrapped(f"{heading}: {flags}", width, "  ", "    ") if flags else []
    say("\n".join(lines))
    raise SystemExit(0)


def _grouped(options: Sequence[Option], groups: Mapping[str, str]) -> dict[str, list[Option]]:
    """Return the options that have flags alone, by the headings of their groups."""
    heading, grouped = "options", dict[str, list[Option]]()
    for option in options:
        heading = groups.get(option.name, heading)
        if not option.is_positional:
            grouped.setdefault(heading, []).append(option)
    return grouped


def _wrapped(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _place(option: Option) -> str:
    several = f"{option.metavar} ..." if option.several else option.metavar
    return several if option.default is dataclasses.MISSING else f"[{several}]"


def _signature(option: Option, value: Any) -> str:
    if option.is_positional:
        return option.metavar
    if option.kind is bool:
        return option.flag if value is False else ", ".join(option.flags)
    if "json" in option.marks:
        return f"{option.flag} [FILE]"
    if option.may_be_none and option.number and value not in (None, dataclasses.MISSING):
        return f"{option.flag} {option.metavar}|none"
    if option.several == "*":
        return f"{option.flag} {option.metavar} ..."
    return " ".join([option.flag, *[option.metavar] * (option.several or 1)])


def _with_default(text: str, value: Any) -> str:
    if value is None or value is False or value in ((), dataclasses.MISSING):
        return text
    words = " ".join(map(str, value)) if isinstance(value, tuple) else "on" if value is True else value
    return f"{text} (default: {words})"


_COLUMN = 28


def _entry(signature: str, text: str, width: int) -> Iterator[str]:
    """Yield the lines of one option: its text beside it, or below it if it is long."""
    indent = " " * _COLUMN
    first = f"  {signature}"
    wrapped = _wrapped(text, width, indent, indent)
    if len(first) < _COLUMN - 1 and wrapped:
        wrapped[0] = first.ljust(_COLUMN) + wrapped[0][_COLUMN:]
    else:
        yield first
    yield from wrapped
