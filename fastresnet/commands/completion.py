"""`fastresnet completion`: completion of command lines in bash and zsh."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fastresnet.arguments import HELP, Option, Positional, options_of, parse
from pipelines.errors import check_choice

SHELLS = ("bash", "zsh")

# zsh can run bash's completion functions.
_ZSH = """autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""

# If it offers nothing, the shell completes file names. `--model=x` is three words in bash and one in zsh.
_FUNCTION = """_fastresnet() {{
    local words= prefix= current=${{COMP_WORDS[COMP_CWORD]}} option=${{COMP_WORDS[COMP_CWORD-1]}}
    if [[ $option == "=" ]]; then
        option=${{COMP_WORDS[COMP_CWORD-2]}}
    elif [[ $current == "=" ]]; then
        current=
    elif [[ $current == --*=* ]]; then
        option=${{current%%=*}} prefix=${{current%%=*}}= current=${{current#*=}}
    fi
    case $option in
        {values}
        *) case "$COMP_CWORD:${{COMP_WORDS[1]}} ${{COMP_WORDS[2]-}}  $current" in
            {commands}
        esac ;;
    esac
    COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$current"))
}}
complete -o default -F _fastresnet fastresnet
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Print a script for the shell to complete commands, options and values: eval "$(fastresnet completion bash)"."""

    shell: Positional[str]
    """bash or zsh."""

    def __post_init__(self) -> None:
        check_choice("shell", self.shell, SHELLS)


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "completion", arguments)
    of_commands = _options()
    values = [f"{names}) {action} ;;" for names, action in _values(of_commands)]
    commands = [f'{pattern}) words="{" ".join(words)}" ;;' for pattern, words in _places(of_commands)]
    script = _FUNCTION.format(values="\n        ".join(values), commands="\n            ".join(commands))
    print((_ZSH if options.shell == "zsh" else "") + script, end="")
    return 0


def _options() -> dict[str, list[Option]]:
    """Return the options of each command; a benchmark's are under `bench NAME`."""
    from fastresnet.cli import COMMANDS, load_bench

    modules = [name for name in COMMANDS if name not in ("bench", "help", "version")]
    commands = {name: importlib.import_module(f"fastresnet.commands.{name}").Options for name in modules}
    benchmarks = {f"bench {name}": options for name, (options, _) in load_bench().COMMANDS.items()}
    return {name: options_of(options) for name, options in {**commands, **benchmarks}.items()}


def _flags(options: Sequence[Option]) -> list[str]:
    return [*itertools.chain.from_iterable(option.flags for option in options), *HELP]


def _values(of_commands: dict[str, list[Option]]) -> Iterator[tuple[str, str]]:
    """Yield the pattern of a `case`, and the shell's command, for flags that take a value."""
    valued = {option.flag: option for options in of_commands.values() for option in options if len(option.flags) == 1}
    choices = _choices(valued.values())
    files = [flag for flag, option in valued.items() if option.kind is Path or flag in ("--weights", "--init-from")]
    yield from ((flag, f'words="{" ".join(choices[flag])}"') for flag in valued if flag in choices)
    yield " | ".join(files), ":"
    others = [flag for flag in valued if flag not in choices and flag not in files]
    yield " | ".join(others), "compopt +o default 2>/dev/null"


def _places(of_commands: dict[str, list[Option]]) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the words for all other positions, with their patterns.

    Patterns match the number of the word to complete, the first two words after the program's name, and the beginning
    of the word to complete.
    """
    from fastresnet.cli import COMMANDS
    from fastresnet.commands.list import LISTS
    from fastresnet.models import list_models
    from fastresnet.recipes import RECIPES
    from pipelines.prepare import BUILT_IN

    benchmarks = [command.removeprefix("bench ") for command in of_commands if command.startswith("bench ")]
    yield '"1:"*', [*COMMANDS, "--help", "--version"]
    yield '"2:bench "*', [*benchmarks, "--help"]
    yield '"2:help "*', COMMANDS
    words = {"train": RECIPES, "completion": SHELLS, "list": LISTS, "summary": list_models(), "prepare": BUILT_IN}
    for command, of_command in words.items():
        yield f'"2:{command} "[!-]*', of_command
    for command, options in of_commands.items():
        takes_files = any(option.is_positional and command not in words for option in options)
        only_dashes = '" -"*' if takes_files else ""
        yield f'*":{command} "*{only_dashes}', _flags(options)


def _choices(options: Iterable[Option]) -> dict[str, Sequence[str]]:
    """Return the values of options: from their types or, where these list none, from the modules."""
    from fastresnet.models import list_models
    from pipelines.prepare import BUILT_IN, FORMATS

    return {
        **{option.flag: option.words for option in options if option.words},
        "--model": list_models(),
        "--models": list_models(),
        "--data": BUILT_IN,
        "--formats": FORMATS,
    }
