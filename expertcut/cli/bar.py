"""The progress bar of long work: how far, how fast, how long still."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from expertcut.cli.common import Advance

PERIOD = 3600.0
"""Seconds over which the rate is estimated: a layer of a large model can take minutes."""


@contextlib.contextmanager
def progress_bar(console: Console, what: str, rate: Callable[[float], str]) -> Iterator[Advance]:
    """Show a bar that is gone when the block ends; `rate` writes what is done per second."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Rate(rate), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=PERIOD) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Rate(ProgressColumn):
    def __init__(self, rate: Callable[[float], str]) -> None:
        super().__init__()
        self._rate = rate

    def render(self, task: Task) -> Text:
        return Text(self._rate(task.speed) if task.speed else "")
