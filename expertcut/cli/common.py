"""What all commands share: where output goes, progress, and which exit code an error has.

Results go to stdout: tables, or with `--json` one JSON document and nothing else. Notes, warnings, progress and errors
go to stderr; after an error stdout is empty.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import typer

from expertcut import errors

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDE = 1000
"""Columns where the output is no terminal: nothing is wrapped or cut."""
INTERRUPTED = 130
EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.UsageError, 2),
    (errors.CheckpointError, 3),
    (errors.ProfileError, 4),
    (errors.DataError, 4),
    (errors.PlanError, 4),
    (errors.VerifyError, 5),
    (errors.GateError, 5),
    (errors.RuntimeLintError, 6),
    (errors.HubError, 6),
    (errors.ExpertcutError, 1),
    (OSError, 1),
)
"""The first class that fits decides; everything else is unexpected and has 1."""

Advance = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


class Output:
    """Where one run of a command prints; leaving it gives stdout back."""

    def __init__(self, args: Sequence[str]) -> None:
        self.command = shlex.join(("expertcut", *map(_portable, args)))
        """The command line for the record: as typed, but paths that tell of this machine are cut to their last part."""
        self.json = False
        self.resumable = False
        """True once the command has begun what it can go on with after an interruption."""
        self._stdout = sys.stdout
        self._stderr: Console | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout = self._stdout

    @property
    def stderr(self) -> Console:
        """The console that everything but results goes to."""
        self._stderr = self._stderr or console(sys.stderr)
        return self._stderr

    def only_json(self) -> None:
        """Keep stdout for the document: whatever else is printed from now on, by any library, goes to stderr."""
        self.json = True
        sys.stdout = sys.stderr

    def note(self, message: str) -> None:
        """Print a line on stderr."""
        self._line("", message)

    def warn(self, message: str) -> None:
        """Print a warning on stderr."""
        self._line("warning: ", message, "yellow")

    def error(self, message: str, hint: str | None) -> None:
        """Print an error, and what to do next, one line each."""
        self._line("error: ", message, "bold red")
        if hint:
            self._line("hint: ", hint, "bold")

    def finish(self, document: dict[str, Any], *renderables: RenderableType) -> None:
        """Print the result: the document with `--json`, else the renderables."""
        if self.json:
            self._stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")
        else:
            stdout = console(self._stdout)
            for renderable in renderables:
                stdout.print(renderable)
        self._stdout.flush()

    def abandon(self) -> None:
        """The reader of the pipe has left: let the interpreter's last flush find a place to go."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stdout.fileno())

    def busy(self, what: str) -> contextlib.AbstractContextManager[Any]:
        """Show that something of unknown length is going on; on a terminal only."""
        return self.stderr.status(what) if self.stderr.is_terminal else contextlib.nullcontext()

    @contextlib.contextmanager
    def progress(self, what: str, rate: Callable[[float], str], scale: int = 1) -> Iterator[Advance]:
        """Show a bar with rate and remaining time while the block runs; on a terminal only.

        The block tells how far it is in units of its own; `rate` writes that number per second, times `scale`.
        """
        if not self.stderr.is_terminal:
            yield lambda done, total: None
            return
        from expertcut.cli.bar import progress_bar

        with progress_bar(self.stderr, what, lambda speed: rate(speed * scale)) as advance:
            yield advance

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Off a terminal, drop what libraries print on stderr, such as bars; the command's own lines still appear."""
        if self.stderr.is_terminal:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield

    def _line(self, label: str, message: str, style: str = "") -> None:
        from rich.text import Text

        line = Text.assemble((label, style), " ".join(message.splitlines()))
        self.stderr.print(line, soft_wrap=True)


def output(ctx: typer.Context, as_json: bool) -> Output:
    """Return the run's output, its stdout reserved if the result is to be JSON."""
    out: Output = ctx.obj
    if as_json:
        out.only_json()
    return out


def draw(out: Output, path: Path, save: Callable[[Path], None]) -> None:
    """Draw a picture if matplotlib is installed, else say that there is none."""
    try:
        save(path)
    except errors.RuntimeLintError as error:
        out.note(f"no {path.name}: {error.message}; {error.hint}")


def numbers(option: str, text: str | None) -> list[int]:
    """Return whole numbers between commas, each once; none of no text.

    Raises:
        UsageError: they are none.
    """
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise errors.UsageError(
            f"{option} {text}: expected whole numbers of 1 or more, between commas", f"{option} 64,48"
        )
    return list(dict.fromkeys(map(int, parts)))


def console(stream: IO[str]) -> Console:
    """Open a rich console: the terminal's width, or so wide that nothing is wrapped."""
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False, emoji=False, markup=False)


def _portable(argument: str) -> str:
    """An argument, or an option's value, without the folders of a path that does not stay below the current one."""
    option, value = re.fullmatch(r"(--[^=]+=|-[A-Za-z](?=[/~]))?(.*)", argument, re.DOTALL).groups("")  # type: ignore[union-attr]
    return option + ",".join(_inside(part) for part in value.split(","))


def _inside(value: str) -> str:
    path = PurePath(value)
    outside = path.is_absolute() or value.startswith("~") or ".." in path.parts
    return (path.name or value) if outside else value


def _finite(value: Any) -> Any:
    """JSON knows no infinity: null stands for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return value
