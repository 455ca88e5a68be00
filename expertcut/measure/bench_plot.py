"""The rows of a benchmark in; a picture of throughput over concurrency, and of its ratio to the first variant, out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertcut.errors import RuntimeLintError
from expertcut.measure.bench import Row


def save_plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw a line per variant and length.

    Raises:
        RuntimeLintError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeLintError("a picture needs matplotlib", "pip install 'expertcut[report]'") from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = {(row.input_len, row.output_len) for row in rows}
    for name, length in dict.fromkeys((row.variant, (row.input_len, row.output_len)) for row in rows):
        line = sorted(
            (r for r in rows if (r.variant, (r.input_len, r.output_len)) == (name, length)), key=lambda r: r.concurrency
        )
        label = name if len(lengths) == 1 else f"{name}, {length[0]} in, {length[1]} out"
        _line(
            left, line, label, [(r.tokens_per_s, min(r.tokens_per_s_values), max(r.tokens_per_s_values)) for r in line]
        )
        _line(right, line, label, [(r.ratio or 1.0, r.ratio_low, r.ratio_high) for r in line])
    left.set(xlabel="concurrent requests", ylabel="tokens written per second, median and range", yscale="log")
    right.set(xlabel="concurrent requests", ylabel="ratio to the first variant, 95 % interval")
    ratios, (low, high) = [row.ratio or 1.0 for row in rows], right.get_ylim()
    right.set_ylim(max(low, min(ratios) / 1.5), min(high, max(ratios) * 1.5))  # wide intervals would hide the curves
    left.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _line(
    axes: Any, line: Sequence[Row], label: str, points: Sequence[tuple[float, float | None, float | None]]
) -> None:  # fmt: skip
    ends = [[abs(value - (end if end is not None else value)) for value, end in side]
            for side in ([(p[0], p[1]) for p in points], [(p[0], p[2]) for p in points])]  # fmt: skip
    clients = [row.concurrency for row in line]
    axes.errorbar(
        clients, [p[0] for p in points], yerr=ends, label=label.lstrip("_"), marker="o", markersize=4, capsize=3
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [str(count) for count in clients])
