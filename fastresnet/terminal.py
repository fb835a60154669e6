"""Shared parts of the commands: arguments, tables, progress, error messages and exit codes.

Slow imports are deferred until needed, so that `--help` is instant.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from fastresnet.signals import STOP_SIGNALS, handled
from fastresnet.text import for_terminal
from pipelines.errors import Note, UsageError, UserError
from pipelines.files import write_json

if TYPE_CHECKING:
    from pipelines.sources import Report


STANDARD_OUTPUT = Path("-")
"""FILE of `--json` without a name."""

_LONGEST_MESSAGE = 4000


def guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run `command`; report an error that a user can fix as one line on stderr and the documented exit code.

    When the reader of its output ends, as `head` does, it exits silently with 141: 128 and SIGPIPE.
    """
    prefix = f"fastresnet: rank {os.environ['RANK']}" if "RANK" in os.environ else "fastresnet"  # under torchrun
    with _outputs(_end_without_output), _notes_on_stderr(), _exit_on_signals(), _safe_children():
        try:
            code = command([_with_home(argument) for argument in arguments])
            sys.stdout.flush()  # at exit it would be too late for an error
            return code
        except UserError as error:
            text = str(error)
            text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"
            print(for_terminal(f"{prefix}: {text}"), file=sys.stderr)
            return error.exit_code
        except OSError as error:
            name = f" {error.filename}" if error.filename else ""
            print(for_terminal(f"{prefix}: cannot read or write{name}: {error.strerror or error}."), file=sys.stderr)
            return 1
        except Warning as warning:  # of a library, not a `Note`
            text = f"{prefix}: {type(warning).__name__}, an error by PYTHONWARNINGS or -W: {warning}"
            print(for_terminal(text), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{prefix}: interrupted.", file=sys.stderr)
            return 130


@contextlib.contextmanager
def _safe_children() -> Iterator[None]:
    """Let Python processes that this one starts import nothing from the working folder, unless this one does.

    That may be a folder of somebody else's data, with a `json.py` in it. Python before 3.11 ignores the variable.
    """
    before = os.environ.get("PYTHONSAFEPATH", "")
    with contextlib.suppress(FileNotFoundError):  # it is gone
        if not {"", os.getcwd()} & set(sys.path):
            os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ["PYTHONSAFEPATH"] = before  # empty is unset


def _with_home(argument: str) -> str:
    """Expand `~` at the start of a value: shells do not in `--root=~/x`, and a container's command has no shell."""
    option, assigned, value = argument.partition("=")
    if option.startswith("--") and assigned:
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Exit on a stop signal as after an error: partial files are removed. Trainings have their own handlers.

    A command that is ending with a `UserError` still reports it: torchrun sends SIGTERM to all ranks once one has
    failed. A second signal ends that too.
    """
    ignored = False

    def stop(signum: int, _: Any) -> None:
        nonlocal ignored
        if ignored or not _is_user_error(sys.exc_info()[1]):
            sys.exit(128 + signum)
        ignored = True

    with handled(STOP_SIGNALS, stop):
        yield


def _is_user_error(error: BaseException | None) -> bool:
    """Return True if `error`, or one that was being handled when it was raised, is a `UserError`."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error is not None


@contextlib.contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Show each note of this program as one line, whatever -W says; leave other libraries' warnings unchanged."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", Note)
        show_other, shown = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if issubclass(category, Note) and str(message) in shown:
                return  # its cause was met again
            if issubclass(category, Note):
                shown.add(str(message))
                print(for_terminal(f"fastresnet: note: {message}"), file=sys.stderr)
            else:
                show_other(message, category, *rest, **named)

        warnings.showwarning = show
        yield


# --- output whose reader may end -----------------------------------------------------------------------------------


class _Output:
    """Output stream that calls `lose` when it cannot be written, and drops the text from then on.

    Characters that its encoding lacks become escapes, as on stderr: they would be an error.
    """

    def __init__(self, stream: TextIO | None, lose: Callable[[OSError], None]) -> None:
        stream = stream._stream if isinstance(stream, _Output) else stream
        is_closed = stream is None or getattr(stream, "closed", False)  # None: closed before Python started
        self._stream = cast("TextIO", io.StringIO() if is_closed else stream)
        self.lose, self._lost = lose, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[..., object], *arguments: str) -> None:
        if self._lost:
            return
        try:
            call(*arguments)
        except OSError as error:
            self._lost = True
            with contextlib.suppress(OSError, AttributeError):  # no file
                _redirect_to_null(self._stream.fileno())  # for the rest in its buffer, and for other libraries
            self.lose(error)


@contextlib.contextmanager
def _outputs(lose: Callable[[OSError], None]) -> Iterator[None]:
    """Call `lose` in the block if standard output cannot be written. What is written to a lost stderr is dropped."""
    for number in (1, 2):  # a closed one would be the number of the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            _redirect_to_null(number)
    before = sys.stdout, sys.stderr
    out, err = _Output(sys.stdout, lose), _Output(sys.stderr, _drop)
    sys.stdout, sys.stderr = cast("TextIO", out), cast("TextIO", err)
    try:
        yield
    finally:
        out.lose = _drop
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def _redirect_to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def _drop(_: OSError) -> None:
    """Go on silently."""


def _end_without_output(error: OSError) -> None:
    """End the command: silently if the reader of its output has ended."""
    if isinstance(error, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    error.filename = "standard output"
    raise error


@contextlib.contextmanager
def outlived_output() -> Iterator[None]:
    """Go on in the block, with a note, when standard output cannot be written: a training outlives its terminal."""

    def go_on(error: OSError) -> None:
        print(f"fastresnet: note: standard output is lost ({error.strerror}); the run goes on.", file=sys.stderr)

    with _outputs(go_on):
        yield
        sys.stdout.flush()


# --- arguments, tables, progress -----------------------------------------------------------------------------------


def check_output(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Raise `UsageError`, before the work and not after it, if file `path` cannot be written.

    Its folder must exist, and its name must end in one of `suffixes`, if given.
    """
    if path is not None and path.is_dir():
        raise UsageError(f"{option} {path} is a folder. Give a file in it.")
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}.")
    if path is not None and suffixes and path.suffix not in suffixes:
        endings = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
        raise UsageError(f"{option} {path}: give a name that ends in {endings}.")


def check_json(path: Path | None) -> None:
    """Raise `UsageError` if the FILE of `--json [FILE]` cannot be written, or is not named as a JSON file.

    That may be the file of weights that was meant for the command.
    """
    if path != STANDARD_OUTPUT:
        check_output("--json", path, (".json",))


def write_figures(path: Path | None, figures: dict[str, Any]) -> bool:
    """Write `figures` as `--json` asks: to a file, or to standard output. Return True if that takes no table then."""
    if path is None:
        return False
    if path != STANDARD_OUTPUT:
        write_json(path, figures)
        return False
    print(json.dumps(figures, indent=2))
    return True


def load_torch() -> None:
    """Import PyTorch, which takes seconds; a terminal says so."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading PyTorch") if console.is_terminal else contextlib.nullcontext():
        import torch  # noqa: F401


@contextlib.contextmanager
def progress_line() -> Iterator[Report]:
    """Show progress bars on a terminal, with amounts, rate and remaining time; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    from fastresnet.console import PlainConsole

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            rate = task.finished_speed or task.speed or 0
            return Text(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s" if rate else "")

    console = PlainConsole(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, completed=done, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield report


def print_table(title: str, lines: Sequence[tuple[str, ...]], header: Sequence[str] = ("", ""), texts: int = 1) -> None:
    """Print a table of one line for each of `lines`: the first `texts` columns to the left, figures to the right."""
    from rich.table import Table

    from fastresnet.console import PlainConsole

    table = Table(title=title, show_header=any(header), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < texts else "right")
    for line in lines:
        table.add_row(*(cell.replace("\n", r"\n") for cell in line))
    PlainConsole().print_table(table)


def say(text: object) -> None:
    """Print `text`, which may contain names from outside, on stdout."""
    print(for_terminal(str(text)))
