"""Options from the fields of a dataclass: values, errors and help."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from fastresnet.arguments import (
    Hidden,
    JsonFile,
    Positional,
    PositionalOrFlag,
    as_arguments,
    given_values,
    parse,
    show_help,
)
from fastresnet.cli import COMMANDS
from pipelines.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """Cook a meal."""

    salt: float = 0.5
    """Grams of salt."""
    secret: Hidden[str] = "garlic"
    """Ingredient that is no option."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Base):
    """Cook a meal."""

    dish: PositionalOrFlag[str]
    """Name of the dish."""
    guests: Positional[tuple[str, ...]] = ()
    """Names of guests."""
    course: Literal["starter", "main"] = "main"
    """Course of the meal."""
    plates: int | None = None
    """Number of plates."""
    heat: int | Literal["auto"] = "auto"
    """Degrees Celsius."""
    size: tuple[float, float] | None = None
    """Sides of the table, metres."""
    sauces: tuple[int, ...] = (1, 2)
    """Numbers of sauces."""
    serve_hot: bool = False
    """Serve it at once."""
    spicy: bool = True
    """Add chillies."""
    book: Path | None = None
    """Book with the recipe."""
    json: JsonFile = None
    """Write it."""


def given(*words):
    return parse(Options, "cook", list(words))


def test_values_have_the_types_of_the_fields():
    made = given(
        *("stew", "--salt", "2", "--course=starter", "--plates", "3", "--heat", "90", "--size", "1", "2.5"),
        *("--sauces", "4", "5", "6", "--serve-hot", "--no-spicy", "--book", "x.txt"),
    )
    assert made == Options(
        dish="stew", salt=2.0, course="starter", plates=3, heat=90, size=(1.0, 2.5), sauces=(4, 5, 6), serve_hot=True,
        spicy=False, book=Path("x.txt"),
    )  # fmt: skip
    assert type(made.salt) is float


@pytest.mark.parametrize("words", [["stew"], ["--dish", "stew"], ["--serve-hot", "stew"], ["stew", "--no-serve-hot"]])
def test_a_positional_may_be_anywhere_or_have_its_flag(words):
    assert given(*words).dish == "stew"


def test_further_positionals_fill_a_field_of_several():
    assert given("stew", "ann", "--serve-hot", "bob").guests == ("ann", "bob")


def test_positionals_after_two_dashes_may_look_like_flags():
    made = given("--serve-hot", "--", "--salt", "-x", "--")
    assert (made.dish, made.guests, made.salt) == ("--salt", ("-x", "--"), 0.5)
    assert given("stew", "--", "-x").guests == ("-x",)


def test_given_values_are_written_as_arguments_again():
    words = [
        *("stew", "--plates", "none", "--sauces", "4", "5", "--no-spicy", "--serve-hot", "ann", "--book=-x.txt"),
        *("--size", "1", "2.5", "--salt", "1e-3"),
    ]
    values = given_values(Options, "cook", words)
    again = as_arguments(Options, values)
    assert again[:2] == ["stew", "ann"]
    assert given_values(Options, "cook", again) == values


def test_flags_may_have_underscores_and_values_keep_theirs():
    assert given("stew", "--serve_hot", "--book=a_b=c_d").book == Path("a_b=c_d")


def test_a_number_may_be_none_where_the_field_may():
    assert given("stew", "--plates", "2", "--plates", "none").plates is None
    with pytest.raises(UsageError, match="--salt 'none': give a number"):
        given("stew", "--salt", "none")


def test_json_takes_a_file_or_none():
    assert given("stew").json is None
    assert given("stew", "--json").json == Path("-")
    assert given("stew", "--json", "x.json").json == Path("x.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "cook needs DISH"),
        (["stew", "--dish", "soup"], "DISH is given twice: stew and --dish"),
        (["stew", "--plates"], "--plates needs a value"),
        (["stew", "--salt", "-1e-3"], "--salt needs a value; if it begins with a dash, --salt=VALUE"),
        (["stew", "--book", ""], "--book is empty"),
        (["--json", "stew"], "--json stew: give a name that ends in .json"),
        (["stew", "--plates", "many"], "--plates 'many': give a whole number"),
        (["stew", "--plates", "1.5"], "--plates '1.5': give a whole number"),
        (["stew", "--heat", "hot"], "--heat 'hot': give a whole number or auto"),
        (["stew", "--size", "1"], "--size needs 2 values"),
        (["stew", "--course", "mian"], "unknown course 'mian': did you mean 'main'"),
        (["stew", "--serve-hot=yes"], "--serve-hot takes no value"),
        (["stew", "--sal", "1"], "unknown option --sal. Did you mean --salt?"),
        (["stew", "--secret", "x"], "unknown option --secret"),
        (["stew", "-x"], "unknown option -x. See fastresnet cook --help"),
    ],
)
def test_each_error_names_the_argument(words, message):
    with pytest.raises(UsageError) as caught:
        given(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def help_of(capsys, monkeypatch, columns, *words, **settings):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        show_help(Options, "cook", words, **settings)
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_has_every_option_with_its_text_and_default(capsys, monkeypatch):
    out = help_of(capsys, monkeypatch, 100, "--help")
    assert out.splitlines()[0] == "usage: fastresnet cook DISH [GUEST ...] [OPTIONS]"
    for line in (
        "  DISH                      Name of the dish. Also --dish DISH.",
        "  --salt X                  Grams of salt. (default: 0.5)",
        "  --course {starter,main}   Course of the meal. (default: main)",
        "  --plates N                Number of plates.",
        "  --heat N|auto             Degrees Celsius. (default: auto)",
        "  --size X X                Sides of the table, metres.",
        "  --sauces N ...            Numbers of sauces. (default: 1 2)",
        "  --serve-hot               Serve it at once.",
        "  --spicy, --no-spicy       Add chillies. (default: on)",
        "  --json [FILE]             Write it.",
    ):
        assert line in out.splitlines()
    assert "secret" not in out


def test_short_help_names_the_other_options(capsys, monkeypatch):
    groups = {"dish": "food", "plates": "table"}
    short = help_of(capsys, monkeypatch, 80, "-h", groups=groups, common=("salt", "spicy"))
    assert "Grams of salt" in short
    assert "Number of plates" not in short
    assert "table: --plates --heat --size" in " ".join(short.split())
    full = help_of(capsys, monkeypatch, 80, "--help-all", groups=groups, common=("salt", "spicy"))
    assert "Number of plates" in full
    assert "\ntable:\n" in full


def test_help_has_the_defaults_of_a_given_object(capsys, monkeypatch):
    out = help_of(capsys, monkeypatch, 80, "-h", default=Options(dish="stew", salt=7.0, serve_hot=True, plates=4))
    assert "  --plates N|none           Number of plates. (default: 4)" in out
    assert "(default: 7.0)" in out
    assert "--serve-hot, --no-serve-hot" in out


@pytest.mark.parametrize("command", [*COMMANDS, "bench loaders", "bench train"])
def test_help_of_every_command_fits_a_terminal_and_reads_plainly(run, monkeypatch, command):
    """A person reads it on one screen of 60 lines; none of the types of Python is in it."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) < 60
    assert max(map(len, out.splitlines())) <= 80
    assert not {"STR", "INT", "FLOAT", "{None}", "None", "tuple", "╭"} & set(out.replace("|", " ").split())
