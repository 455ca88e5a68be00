"""The entry point: commands, and the way from what they raise to one line and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Annotated

import typer

from expertcut import __version__
from expertcut.cli.bench import bench
from expertcut.cli.common import INTERRUPTED, Output, exit_code
from expertcut.cli.demo import demo
from expertcut.cli.estimate import estimate
from expertcut.cli.eval import evaluate
from expertcut.cli.heal import heal
from expertcut.cli.inspect import inspect
from expertcut.cli.merge import merge
from expertcut.cli.options import flat
from expertcut.cli.plan import plan
from expertcut.cli.profile import profile
from expertcut.cli.prune import prune
from expertcut.cli.push import push
from expertcut.cli.report import report
from expertcut.cli.show import show
from expertcut.cli.sweep import sweep
from expertcut.cli.verify import verify
from expertcut.errors import ExpertcutError

COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect, "profile": profile, "merge": merge, "show": show, "plan": plan, "heal": heal,
    "prune": prune, "verify": verify, "eval": evaluate, "sweep": sweep, "bench": bench, "estimate": estimate,
    "report": report, "push": push, "demo": demo,
}  # fmt: skip
# Wherever the installed typer keeps click: the base of BadParameter is UsageError, whose base is ClickException.
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def application(whole: Collection[str]) -> typer.Typer:
    """Return the command line: these commands whole, of the others, as each takes time, only what they are for."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    for name, command in COMMANDS.items():
        app.command(name)(flat(command) if name in whole else _described(command))
    return app


def _described(command: Callable[..., None]) -> Callable[[], None]:
    def nothing() -> None: ...

    nothing.__doc__ = command.__doc__
    return nothing


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"expertcut {__version__}")
        raise typer.Exit


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make a Mixture-of-Experts checkpoint smaller, offline, and keep it loadable by ordinary runtimes.

    inspect → profile → plan (→ heal) → prune → verify, eval. Each command has --help with an example.
    """


def main() -> None:
    """Run the command line of this process and exit."""
    sys.excepthook = _unexpected
    with contextlib.suppress(AttributeError, OSError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names need not be UTF-8
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line, without the program's name, and return its exit code.

    Errors of the program are printed; what is unexpected is raised.
    """
    debug = False
    command = typer.main.get_group(application([name for name in args if name in COMMANDS][:1]))
    command.rich_markup_mode = None  # the list of commands is plain text: drawing it takes longer than all imports
    with Output(args) as out:
        try:
            with command.make_context("expertcut", list(args) or ["--help"], obj=out) as ctx:
                debug = ctx.params["debug"]
                if debug:
                    sys.excepthook = sys.__excepthook__
                command.invoke(ctx)
            sys.stdout.flush()
        except typer.Exit as exit:
            return exit.exit_code
        except KeyboardInterrupt:
            out.error("interrupted", "the same command resumes" if out.resumable else None)
            return INTERRUPTED
        except BrokenPipeError:
            out.abandon()
            return 1
        except (_CLICK_ERROR, ExpertcutError, OSError) as error:
            if debug:
                import traceback

                traceback.print_exc()
            return _fail(out, error)
    return 0


def _fail(out: Output, error: Exception) -> int:
    if isinstance(error, ExpertcutError):
        out.error(error.message, error.hint)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        out.error(where + (error.strerror or str(error)), None)
    else:
        context = getattr(error, "ctx", None)
        out.error(error.format_message(), f"{context.command_path} --help" if context else None)  # type: ignore[attr-defined]
        return 2
    return exit_code(error)


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Stand in for the traceback of an error that nobody foresaw; Python exits with 1."""
    found = str(error).strip().splitlines()
    Output(()).error(
        f"unexpected {kind.__name__}" + (f": {found[0]}" if found else ""), "run it again as: expertcut --debug …"
    )
