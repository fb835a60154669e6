"""Completion of command lines, in real shells."""

import re
import shutil
import subprocess

import pytest

from fastresnet.cli import COMMANDS
from fastresnet.models import list_models
from fastresnet.recipes import RECIPES
from pipelines import PIPELINES

OF_OPTIONS = [command for command in COMMANDS if command not in ("bench", "help", "version")]


@pytest.fixture
def complete(run, tmp_path):
    """`complete("train", "fa")`: the words that bash offers for the last one of `fastresnet train fa`."""
    code, script, err = run("completion", "bash")
    assert (code, err) == (0, "")

    def complete_words(*words):
        program = 'eval "$1"; shift; COMP_WORDS=(fastresnet "$@"); COMP_CWORD=$#; _fastresnet; echo "${COMPREPLY[@]}"'
        done = subprocess.run(
            ["bash", "--norc", "-uc", program, "bash", script, *words], capture_output=True, text=True, check=True
        )
        assert not done.stderr
        return done.stdout.split()

    return complete_words


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        (["p"], ["prepare", "predict", "plot"]),
        (["--v"], ["--version"]),
        (["train", "ba"], ["baseline"]),
        (["train", "fast", "--mom"], ["--momentum"]),
        (["train", "--model", "se-"], ["se-resnet20", "se-resnet56"]),
        (["train", "--model", "=", "wrn16"], ["wrn16-2", "wrn16-8"]),
        (["train", "--pipeline", "="], ["auto", *PIPELINES]),
        (["train", "--pipeline=d"], ["--pipeline=dali"]),
        (["train", "--pipeline", ""], ["auto", *PIPELINES]),
        (["train", "--out", ""], []),
        (["train", "--lr", ""], []),
        (["train", "--nesterov", "--dry"], ["--dry-run"]),
        (["bench", "s"], ["step", "show"]),
        (["bench", "train", "--se"], ["--seconds"]),
        (["bench", "show", ""], []),
        (["plot", ""], []),
        (["plot", "runs/a", "--k"], ["--kind"]),
        (["plot", "runs/a", "--kind", "m"], ["mistakes"]),
        (["help", "pl"], ["plot"]),
        (["summary", "se-"], ["se-resnet20", "se-resnet56"]),
        (["prepare", "sh"], ["shapes10"]),
        (["eval", ""], []),
        (["completion", ""], ["bash", "zsh"]),
        (["list", ""], ["models", "recipes", "data", "pretrained"]),
        (["list", "data", "--r"], ["--root"]),
        (["nonsense", "--"], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bash_completes_matching_words(complete, words, offered):
    assert complete(*words) == offered


def test_all_commands_and_recipes_are_offered(complete):
    assert complete("") == [*COMMANDS, "--help", "--version"]
    assert complete("train", "") == list(RECIPES)


@pytest.mark.parametrize(
    "command",
    [*OF_OPTIONS, *(f"train {recipe}" for recipe in RECIPES), *(f"bench {each}" for each in ("step", "show"))],
)
def test_completed_flags_match_the_help(run, complete, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "1000")
    _, out, _ = run(*command.split(), "--help-all")
    patterns = (r"^  (--[a-z][a-z-]*)", r", (--no-\S+)", r"Also\s+(--[a-z-]*)")
    shown = {flag for pattern in patterns for flag in re.findall(pattern, out, re.MULTILINE)}
    offered = set(complete(*command.split(), "--")) - {"--help", "--help-all"}
    negated = {flag for flag in offered if flag.startswith("--no-")}
    assert shown >= offered - negated
    assert shown <= offered
    assert {flag.replace("--no-", "--") for flag in negated} <= shown


@pytest.mark.parametrize(
    "flag",
    [
        "model", "shortcut", "pipeline", "decode", "optimizer", "schedule", "padding-mode", "flip", "normalization",
        "device", "precision", "compile",
    ],
)  # fmt: skip
def test_completed_values_are_those_that_the_command_accepts(run, complete, flag):
    code, _, err = run("train", f"--{flag}", "?")
    assert code == 2
    valid = re.search(r"Valid: (.*)\.$", err.strip())[1].split(", ")
    assert complete("train", f"--{flag}", "") == valid


def test_bash_completes_file_names_where_no_option_matches(run, tmp_path):
    """An interactive bash, in which the key is pressed, completes the name of the only file there is."""
    _, script, _ = run("completion", "bash")
    (tmp_path / "weights of mine").touch()
    (tmp_path / "script").write_text(script)
    done = subprocess.run(
        ["bash", "--norc", "-i"],
        input=". ./script\nPS1=; fastresnet() { printf '<%s>' \"$@\"; }\nfastresnet ev\t w\t\n",
        capture_output=True, text=True, check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "TERM": "dumb"},
    )  # fmt: skip
    assert "<eval><weights of mine>" in done.stdout.replace("\n", "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_offers_the_same_words(run):
    _, script, _ = run("completion", "zsh")
    program = 'eval "$1"; emulate sh; COMP_WORDS=(fastresnet train --model=wrn16); COMP_CWORD=2; _fastresnet'
    done = subprocess.run(
        ["zsh", "-fc", f'{program}; print -l -- "${{COMPREPLY[@]}}"', "zsh", script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [f"--model={name}" for name in list_models()]  # of which zsh chooses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fish"], "unknown shell 'fish'"), (["bsh"], "did you mean 'bash'?"), ([], "completion needs SHELL")],
)
def test_other_shells_are_refused(run, arguments, message):
    code, out, err = run("completion", *arguments)
    assert (code, out) == (2, "")
    assert message in err
