"""The command line: one thin module per command, no logic. Everything but typer is imported inside the commands."""

from expertcut.cli.app import main, run

__all__ = ["main", "run"]
