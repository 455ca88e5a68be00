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
from expertcut.choose.plan import Plan
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
    top_k: int
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


@dataclass(frozen=True)
class Cell:
    """One plan of a grid."""

    strategy: str
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.strategy}, {self.experts} experts, top-{self.top_k}"


def grid(
    checkpoint: Checkpoint, geometry: Geometry, strategies: Sequence[str], experts: Sequence[int],
    top_k: Sequence[int], *, profile: Profile | None, seed: int, notify: Callable[[str], None],
) -> dict[Cell, Plan]:  # fmt: skip
    """Make every plan of a grid; what cannot be is left out and noted. With all experts kept there is one strategy.

    Raises:
        UsageError: an unknown strategy, or nothing of the grid can be.
    """
    found: dict[Cell, Plan] = {}
    for strategy, count, k in product(map(get_criterion, strategies), experts, top_k):
        whole = count == geometry.num_experts
        cell = Cell(ALL if whole else strategy.name, count, k)
        if cell in found:
            continue
        try:
            found[cell] = make_plan(
                checkpoint, geometry, strategy=None if whole else strategy.name, experts=count, top_k=k, seed=seed,
                profile=profile,
            )  # fmt: skip
        except (PlanError, ProfileError, UsageError) as error:
            notify(f"{cell} is left out: {error.message}")
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
                  found.mean("kl", name), found.mean("agreement", name), found.mean("acceptance", name))
        )  # fmt: skip
    return made


def save_csv(path: Path, curve: Sequence[Point]) -> None:
    """Write one line per point under a header of field names."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[Any] = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in curve)


def save_plot(path: Path, curve: Sequence[Point], title: str) -> None:
    """Draw the change of the loss over the bytes that are left, a line per strategy and top-k.

    Raises:
        RuntimeLintError: matplotlib is not installed.
    """
    figure, (axes,) = new_figure()
    unit, name = (1e9, "GB") if max(point.nbytes for point in curve) >= 1e9 else (1e6, "MB")
    for strategy, k in dict.fromkeys((point.strategy, point.top_k) for point in curve):
        line = sorted((p for p in curve if (p.strategy, p.top_k) == (strategy, k)), key=lambda p: p.nbytes)
        ends = [[abs(p.change - end) if end is not None else 0.0 for p, end in zip(line, side, strict=True)]
                for side in ([p.change_low for p in line], [p.change_high for p in line])]  # fmt: skip
        axes.errorbar(
            [p.nbytes / unit for p in line], [p.change for p in line], yerr=ends, label=f"{strategy}, top-{k}",
            marker="o", markersize=4, capsize=3, linestyle=":" if strategy == CONTROL else "-",
        )  # fmt: skip
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title=title, xlabel=f"weights, {name}", ylabel="change of the held-out loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)
