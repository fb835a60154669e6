"""`fastresnet completion`: what a shell needs to complete this program's command lines."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Sequence

from tyro.conf import Positional

from fastresnet.terminal import parse
from pipelines.errors import check_choice

SHELLS = ("bash", "zsh")

# zsh can run bash's completion functions.
_ZSH = """autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""

# Where it offers nothing, the shell offers the names of files. `--model=x` is three words in bash and one in zsh.
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
    """Print what makes a shell complete commands, options and their values: eval "$(fastresnet completion bash)"."""

    shell: Positional[str]
    """bash or zsh."""

    def __post_init__(self) -> None:
        check_choice("shell", self.shell, SHELLS)


def run(arguments: list[str]) -> int:
    options: Options = parse(Options, "completion", arguments)
    of_commands = _options()
    flags = {command: _flags(command, of_command) for command, of_command in of_commands.items()}
    values = [f"{names}) {action} ;;" for names, action in _values(flags)]
    commands = [f'{pattern}) words="{" ".join(words)}" ;;' for pattern, words in _places(of_commands, flags)]
    script = _FUNCTION.format(values="\n        ".join(values), commands="\n            ".join(commands))
    print((_ZSH if options.shell == "zsh" else "") + script, end="")
    return 0


def _options() -> dict[str, type]:
    """What holds the options of each command; of a benchmark under `bench NAME`."""
    from fastresnet.cli import COMMANDS, load_bench
    from fastresnet.config import TrainConfig

    others = [name for name in COMMANDS if name not in ("train", "bench")]
    return {
        "train": TrainConfig,
        **{name: importlib.import_module(f"fastresnet.commands.{name}").Options for name in others},
        **{f"bench {name}": options for name, (options, _) in load_bench().COMMANDS.items()},
    }


def _flags(command: str, options: type) -> dict[str, str]:
    """The flags of a command, and the type of what each takes."""
    from fastresnet.commands import train

    flags: dict[str, str] = {}
    for field in dataclasses.fields(options):
        kind, name = str(field.type), field.name.replace("_", "-")
        if kind == "bool":
            flags |= {f"--{name}": kind, f"--no-{name}": kind}
        elif not kind.startswith(("Positional", "Suppress")):
            flags[f"--{name}"] = kind
    return {**flags, **(train.FLAGS if command == "train" else {}), "--help": "bool"}


def _values(flags: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """What to do after a flag that takes a value, as the pattern of a `case` and a command of the shell."""
    choices = _choices()
    kinds = {flag: kind for of_command in flags.values() for flag, kind in of_command.items() if kind != "bool"}
    files = [flag for flag, kind in kinds.items() if "Path" in kind or flag == "--weights"]
    yield from ((flag, f'words="{" ".join(choices[flag])}"') for flag in kinds if flag in choices)
    yield " | ".join(files), ":"
    others = [flag for flag in kinds if flag not in choices and flag not in files]
    yield " | ".join(others), "compopt +o default 2>/dev/null"


def _places(of_commands: dict[str, type], flags: dict[str, dict[str, str]]) -> Iterator[tuple[str, Iterable[str]]]:
    """What else fits, by patterns of the number of the word to complete, the first two words after the program's name
    and the beginning of the word to complete.
    """
    from fastresnet.cli import COMMANDS
    from fastresnet.recipes import RECIPES

    benchmarks = [command.removeprefix("bench ") for command in flags if command.startswith("bench ")]
    yield '"1:"*', [*COMMANDS, "--help", "--version"]
    yield '"2:bench "*', [*benchmarks, "--help"]
    yield '"2:train "[!-]*', RECIPES
    yield '"2:completion "[!-]*', SHELLS
    for command, options in of_commands.items():
        takes_files = any(str(field.type).startswith("Positional") for field in dataclasses.fields(options))
        only_dashes = '" -"*' if takes_files else ""
        yield f'*":{command} "*{only_dashes}', flags[command]


def _choices() -> dict[str, Sequence[str]]:
    """The words that options take, wherever they occur."""
    from fastresnet.commands import export, plot
    from fastresnet.config import COMPILE, DEVICES, OPTIMIZERS, PRECISIONS, SCHEDULES
    from fastresnet.models import SHORTCUTS, list_models
    from pipelines import DECODERS, PIPELINES
    from pipelines.prepare import CIFAR10, FORMATS, SHAPES10
    from pipelines.sampling import FLIPS, NORMALIZATIONS, PADDING_MODES

    return {
        "--model": list_models(),
        "--models": list_models(),
        "--shortcut": SHORTCUTS,
        "--data": (CIFAR10, SHAPES10),
        "--pipeline": ("auto", *PIPELINES),
        "--decode": DECODERS,
        "--optimizer": OPTIMIZERS,
        "--schedule": SCHEDULES,
        "--padding-mode": PADDING_MODES,
        "--flip": FLIPS,
        "--normalization": NORMALIZATIONS,
        "--device": DEVICES,
        "--threads": ("auto",),
        "--precision": PRECISIONS,
        "--precisions": PRECISIONS[1:],
        "--compile": ("auto", *COMPILE),
        "--backends": tuple(COMPILE.values()),
        "--kind": plot.KINDS,
        "--format": tuple(export.SUFFIXES),
        "--formats": FORMATS,
    }
