"""A grid of expert counts, top-k and strategies in; what every plan of it costs out, as a curve: CSV and a picture."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.criteria import get_criterion
from expertcut.choose.make import make_plan
from expertcut.choose.plan import Plan, numbers
from expertcut.choose.topk import MeanTopK, mean_top_k
from expertcut.errors import PlanError, ProfileError, UsageError
from expertcut.measure.figures import new_figure
from expertcut.measure.quality import WhatIf
from expertcut.model import Geometry

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile

CONTROL, ALL = "random", "all experts"
"""The strategy that others are shown against, and what stands for one where none goes."""


@dataclass(frozen=True)
class Point:
    """One plan of a sweep and what held-out text says of it."""

    strategy: str
    experts: int
    """Kept per MoE layer."""
    top_k: float
    nbytes: int
    """Tensor data that is left."""
    change: float
    """Of the held-out loss, nats per predicted token, and its 95 % interval over sequences."""
    change_low: float | None
    change_high: float | None
    kl: float
    """KL(base‖plan), nats per token."""
    agreement: float
    """Share of tokens whose most likely successor is the base's."""
    acceptance: float
    """Share of tokens that speculative decoding would accept."""
    per_layer: bool
    """True if layers differ; `top_k` is their average then."""


@dataclass(frozen=True)
class Cell:
    """One plan of a grid."""

    strategy: str
    experts: int
    top_k: float
    """A whole number unless layers differ."""
    per_layer: bool = False
    """True if layers differ in their top-k."""

    def __str__(self) -> str:
        return f"{self.strategy}, {self.experts} experts, {top_k_name(self.top_k, self.per_layer)}"


def top_k_name(top_k: float, per_layer: bool) -> str:
    """Return a top-k for reading: `top-6`, `top-6.5 on average`."""
    return f"top-{top_k:g}" + (" on average" if per_layer else "")


def grid(
    checkpoint: Checkpoint, geometry: Geometry, strategies: Sequence[str], experts: Sequence[int],
    top_k: Sequence[int | MeanTopK], *, profile: Profile | None, seed: int, notify: Callable[[str], None],
) -> dict[Cell, Plan]:  # fmt: skip
    """Make every plan of a grid; what cannot be is left out and noted. With all experts kept there is one strategy.

    An average that comes out equal in all layers is the cell of that top-k.

    Raises:
        UsageError: an unknown strategy, or nothing of the grid can be.
    """
    found: dict[Cell, Plan] = {}
    tried: set[Cell] = set()
    for strategy, count, k in product(map(get_criterion, strategies), experts, top_k):
        whole, differs = count == geometry.num_experts, isinstance(k, MeanTopK)
        name = ALL if whole else strategy.name
        asked = Cell(name, count, k.mean if isinstance(k, MeanTopK) else k, differs)
        if asked in tried:
            continue
        tried.add(asked)
        try:
            plan = make_plan(
                checkpoint, geometry, strategy=None if whole else strategy.name, experts=count, top_k=k, seed=seed,
                profile=profile, per_layer=differs,
            )  # fmt: skip
        except (PlanError, ProfileError, UsageError) as error:
            notify(f"{asked} is left out: {error.message}")
            continue
        cell = Cell(name, count, mean_top_k(plan, geometry), True) if numbers(plan, geometry).uneven else None
        found.setdefault(cell or Cell(name, count, plan.top_k(geometry)), plan)
    if not found:
        raise UsageError("nothing of the grid can be planned", "see the notes above")
    return found


def points(found: WhatIf, cells: Sequence[Cell], nbytes: Mapping[int, int]) -> list[Point]:
    """Return the points of a sweep, its plans named after their cells; `nbytes` is what is left, by expert count."""
    made = []
    for cell in cells:
        change, name = found.change(str(cell)), str(cell)
        made.append(
            Point(cell.strategy, cell.experts, cell.top_k, nbytes[cell.experts], change.value, change.low, change.high,
                  found.mean("kl", name), found.mean("agreement", name), found.mean("acceptance", name),
                  cell.per_layer)
        )  # fmt: skip
    return made


def save_csv(path: Path, curve: Sequence[Point]) -> None:
    """Write one line per point, all of one kind, under a header of field names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[Any] = csv.DictWriter(file, [field.name for field in fields(curve[0])])
        writer.writeheader()
        writer.writerows(asdict(point) for point in curve)


def save_plot(path: Path, curve: Sequence[Point], title: str) -> None:
    """Draw the change of the loss over the bytes that are left, a line per strategy and top-k.

    Raises:
        RuntimeLintError: matplotlib is not installed.
    """
    figure, (axes,) = new_figure()
    unit, name = (1e9, "GB") if max(point.nbytes for point in curve) >= 1e9 else (1e6, "MB")
    for (strategy, k, differs), line in _lines(curve):
        axes.errorbar(
            [p.nbytes / unit for p in line], [p.change for p in line], yerr=ends(line),
            label=f"{strategy}, {top_k_name(k, differs)}",
            marker="o", markersize=4, capsize=3, linestyle=":" if strategy == CONTROL else "-",
        )  # fmt: skip
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title=title, xlabel=f"weights, {name}", ylabel="change of the held-out loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)


def _lines(curve: Sequence[Point]) -> list[tuple[tuple[str, float, bool], list[Point]]]:
    """The points of every strategy and top-k, the smallest first."""
    lines: dict[tuple[str, float, bool], list[Point]] = {}
    for point in sorted(curve, key=lambda p: p.nbytes):
        lines.setdefault((point.strategy, point.top_k, point.per_layer), []).append(point)
    return [(key, lines[key]) for key in dict.fromkeys((p.strategy, p.top_k, p.per_layer) for p in curve)]


def ends(points: Sequence[Point]) -> list[list[float]]:
    """Return how far the intervals of points reach below and above them; 0 where there is none."""
    return [
        [abs(p.change - end) if end is not None else 0.0 for p, end in zip(points, side, strict=True)]
        for side in ([p.change_low for p in points], [p.change_high for p in points])
    ]
