"""Results as tables: plain text off a terminal, no digit ever cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from expertcut.choose.budget import format_size
from expertcut.runtimes.lint import Fit, LintFinding

if TYPE_CHECKING:
    from expertcut.rewrite.verify import Check

_STATUS = {"fast": "green", "loads": "yellow", "wrong": "bold red", "refuses": "bold red"}


def heading(text: str) -> Text:
    """A line above a table."""
    return Text(text, style="bold")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Build a table; a column named `>…` holds numbers and is right-aligned, cells are printed as they are."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        made.add_row(*map(_cell, row))
    return made


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Build a table of names and values without a header."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="cyan", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, _cell(value))
    return made


def size(nbytes: int) -> str:
    """Bytes for reading: `5.42 MiB (5,683,200 bytes)`."""
    return f"{format_size(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1024 else format_size(nbytes)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers for reading: `0, 2-5, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def lint_table(findings: Iterable[LintFinding]) -> Table:
    """Build the table of what the runtimes make of a checkpoint; a runtime's version is the one the rules are of."""
    rows = [
        (
            f"{f.runtime} {f.version}" if f.version[0].isdigit() else f.runtime,
            Text(f.status, _STATUS[f.status]),
            f.rule,
            Text.assemble(f.reason, (f" [{f.source}]" if f.source else "", "dim")),
        )
        for f in findings
    ]
    return table(("runtime", "status", "rule", "reason"), rows)


def fit_table(fits: Iterable[Fit]) -> Table:
    """Build the table of expert counts that stay fast, and of tensor- and expert-parallel sizes."""
    rows = [(f.runtime, steps(f.fast_experts) or "none", *map(_sizes, (f.tp, f.ep))) for f in fits]
    return table(("runtime", "fast with experts", "TP sizes", "EP sizes"), rows)


def steps(numbers: Sequence[int]) -> str:
    """Ascending numbers for reading, four and more at equal distances together: `1-5, 8, 16, 24 … 64, 128`."""
    parts, start = [], 0
    while start < len(numbers):
        end = start + 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == numbers[start + 1] - numbers[start]:
            end += 1
        if end - start < 4:
            parts.append(str(numbers[start]))
            start += 1
        else:
            first, second, last = numbers[start], numbers[start + 1], numbers[end - 1]
            parts.append(f"{first}-{last}" if second == first + 1 else f"{first}, {second} … {last}")
            start = end
    return ", ".join(parts)


def checks_table(checks: Iterable[Check]) -> Table:
    """Build the table of a verification."""
    rows = [(Text("ok", "green") if c.ok else Text("FAILED", "bold red"), c.name, c.detail) for c in checks]
    return table(("", "check", "found"), rows)


def records(items: Iterable[Any]) -> list[dict[str, Any]]:
    """Dataclasses as JSON objects."""
    return [asdict(item) for item in items]


def _sizes(sizes: Sequence[int] | None) -> str:
    return "–" if sizes is None else steps(sizes) or "none"


def _cell(value: object) -> Text:
    return value if isinstance(value, Text) else Text(str(value))
