"""`fastresnet completion`: completion of command lines in bash and zsh."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Sequence

from tyro.conf import Positional

from fastresnet.terminal import parse
from pipelines.errors import check_choice, literals

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
    flags = {command: _flags(of_command) for command, of_command in of_commands.items()}
    values = [f"{names}) {action} ;;" for names, action in _values(flags, _choices(of_commands))]
    commands = [f'{pattern}) words="{" ".join(words)}" ;;' for pattern, words in _places(of_commands, flags)]
    script = _FUNCTION.format(values="\n        ".join(values), commands="\n            ".join(commands))
    print((_ZSH if options.shell == "zsh" else "") + script, end="")
    return 0


def _options() -> dict[str, type]:
    """Return the dataclass of each command's options; a benchmark's is under `bench NAME`."""
    from fastresnet.cli import COMMANDS, load_bench

    others = [name for name in COMMANDS if name != "bench"]
    return {
        **{name: importlib.import_module(f"fastresnet.commands.{name}").Options for name in others},
        **{f"bench {name}": options for name, (options, _) in load_bench().COMMANDS.items()},
    }


def _flags(options: type) -> dict[str, str]:
    """Return the flags of a command, and the type of each value."""
    flags: dict[str, str] = {}
    for field in dataclasses.fields(options):
        kind, name = str(field.type), field.name.replace("_", "-")
        if kind == "bool":
            flags |= {f"--{name}": kind, f"--no-{name}": kind}
        elif not kind.startswith(("Positional", "Suppress")):
            flags[f"--{name}"] = kind
    return {**flags, "--help": "bool"}


def _values(flags: dict[str, dict[str, str]], choices: dict[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Yield the pattern of a `case`, and the shell's command, for flags that take a value."""
    kinds = {flag: kind for of_command in flags.values() for flag, kind in of_command.items() if kind != "bool"}
    files = [flag for flag, kind in kinds.items() if "Path" in kind or flag == "--weights"]
    yield from ((flag, f'words="{" ".join(choices[flag])}"') for flag in kinds if flag in choices)
    yield " | ".join(files), ":"
    others = [flag for flag in kinds if flag not in choices and flag not in files]
    yield " | ".join(others), "compopt +o default 2>/dev/null"


def _places(of_commands: dict[str, type], flags: dict[str, dict[str, str]]) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the words for all other positions, with their patterns.

    Patterns match the number of the word to complete, the first two words after the program's name, and the beginning
    of the word to complete.
    """
    from fastresnet.cli import COMMANDS
    from fastresnet.commands.list import LISTS
    from fastresnet.recipes import RECIPES

    benchmarks = [command.removeprefix("bench ") for command in flags if command.startswith("bench ")]
    yield '"1:"*', [*COMMANDS, "--help", "--version"]
    yield '"2:bench "*', [*benchmarks, "--help"]
    yield '"2:train "[!-]*', RECIPES
    yield '"2:completion "[!-]*', SHELLS
    yield '"2:list "[!-]*', LISTS
    for command, options in of_commands.items():
        takes_files = any(str(field.type).startswith("Positional") for field in dataclasses.fields(options))
        only_dashes = '" -"*' if takes_files else ""
        yield f'*":{command} "*{only_dashes}', flags[command]


def _choices(of_commands: dict[str, type]) -> dict[str, Sequence[str]]:
    """Return the values of options: from their types or, where these list none, from the modules."""
    from fastresnet.models import list_models
    from pipelines.prepare import BUILT_IN, FORMATS

    typed = {
        f"--{name.replace('_', '-')}": words
        for options in of_commands.values()
        for name, words in literals(options).items()
    }
    return {
        **typed,
        "--threads": ("auto",),
        "--model": list_models(),
        "--models": list_models(),
        "--data": BUILT_IN,
        "--formats": FORMATS,
    }
