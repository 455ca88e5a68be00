"""Points of a sweep and how fast each is in; which of them are worth having out, and a picture of it. numpy only.

On the front is what nothing else beats: no other point, the unchanged model among them, is at least as fast and loses
no more while it is better in one of the two. Invariant: the front depends on the points alone, not on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf, isfinite
from pathlib import Path
from statistics import fmean

from expertcut.errors import DataError
from expertcut.measure.cost_fit import Measured, Row
from expertcut.measure.figures import new_figure
from expertcut.measure.sweep import Cell, Point, ends
from expertcut.model import Geometry


@dataclass(frozen=True)
class Speed:
    """How fast a model is under the load of a sweep."""

    tokens_per_second: float
    """Output tokens of all requests."""
    gain: float
    """Over the unchanged model, 0.1: a tenth more."""


@dataclass(frozen=True)
class Rated(Point):
    """A point of a sweep and its speed."""

    tokens_per_second: float | None
    """None where it was not measured; `gain` likewise."""
    gain: float | None
    front: bool
    """True if nothing beats it."""


def measured_speeds(
    measured: Measured, geometry: Geometry, cells: Sequence[Cell], concurrency: int, input_len: int | None = None,
    output_len: int | None = None,
) -> dict[Cell, Speed]:  # fmt: skip
    """Return the measured speeds of those cells that rows match by experts, top-k and concurrency.

    A gain is over the unchanged model of the same series; of several series it is the mean. Rows do not say which layer
    activates how many, so cells whose layers differ match none.

    Raises:
        DataError: no row has the load, rows of several lengths do, or the unchanged model was not measured beside them.
    """
    rows = [row for row in measured.rows if row.concurrency == concurrency
            and input_len in (None, row.input_len) and output_len in (None, row.output_len)]  # fmt: skip
    lengths = sorted({(row.input_len, row.output_len) for row in rows})
    if len(lengths) != 1:
        found = ", ".join(f"{prompt}+{answer}" for prompt, answer in lengths) or "none"
        hint = "say which with --input-len and --output-len" if rows else f"it has {measured.concurrencies}"
        raise DataError(f"{measured.source}: tokens of rows at concurrency {concurrency}: {found}; expected one", hint)
    base = {row.series: row for row in rows if _is(row, geometry.num_experts, geometry.top_k)}
    if not base:
        own = f"{geometry.num_experts} experts, top-{geometry.top_k}"
        raise DataError(f"{measured.source}: no row of the unchanged model ({own}) at concurrency {concurrency}")
    speeds = {}
    for cell in cells:
        own_rows = [row for row in rows if _is(row, cell.experts, cell.top_k) and row.series in base]
        if own_rows and not cell.per_layer:
            gain = fmean(row.tokens_per_s / base[row.series].tokens_per_s for row in own_rows) - 1
            speeds[cell] = Speed(fmean(row.tokens_per_s for row in own_rows), gain)
    return speeds


def _is(row: Row, experts: float, top_k: float) -> bool:
    return (row.experts, row.top_k) == (experts, top_k)


def rated(curve: Sequence[Point], speeds: Sequence[Speed | None]) -> list[Rated]:
    """Join the points of a sweep with their speeds, and mark the front; points without a speed are not on it."""
    fronts = iter(front([(s.gain, p.change) for p, s in zip(curve, speeds, strict=True) if s is not None]))
    return [
        Rated(**vars(point), tokens_per_second=speed.tokens_per_second, gain=speed.gain, front=next(fronts))
        if speed is not None
        else Rated(**vars(point), tokens_per_second=None, gain=None, front=False)
        for point, speed in zip(curve, speeds, strict=True)
    ]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which points (gain, loss) nothing beats; the unchanged model, (0, 0), takes part unnamed.

    Exact on the values given: intervals do not matter, equal points are on the front together. What is not finite never
    is. O(n log n).
    """
    order = sorted((-gain, loss, at) for at, (gain, loss) in enumerate([*points, (0.0, 0.0)])
                   if isfinite(gain) and isfinite(loss))  # fmt: skip
    found, least = [False] * len(points), inf
    for _, alike in groupby(order, key=lambda entry: entry[0]):
        ranked = list(alike)
        best = ranked[0][1]
        for _, loss, at in ranked:
            if at < len(points):
                found[at] = loss == best < least  # `least` is of all that are faster
        least = min(least, best)
    return found


def save_front(path: Path, curve: Sequence[Rated], title: str) -> None:
    """Draw the change of the loss over the gain in throughput, the front as steps.

    Raises:
        RuntimeLintError: matplotlib is not installed.
    """
    figure, (axes,) = new_figure()
    known = [point for point in curve if point.gain is not None]
    for strategy in dict.fromkeys(point.strategy for point in known):
        some = [point for point in known if point.strategy == strategy]
        axes.errorbar([100 * (p.gain or 0) for p in some], [p.change for p in some], yerr=ends(some), label=strategy,
                      marker="o", markersize=4, capsize=3, linestyle="none")  # fmt: skip
    best = sorted((100 * (p.gain or 0), p.change) for p in known if p.front)
    axes.plot(
        [gain for gain, _ in best],
        [change for _, change in best],
        color="black",
        linewidth=1,
        label="front",
        drawstyle="steps-pre",
    )  # the least loss at that gain or a higher one
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(title=title, xlabel="gain in throughput, %", ylabel="change of the held-out loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)
