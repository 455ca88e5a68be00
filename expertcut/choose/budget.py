"""How many experts to keep: one of `--experts`, `--keep`, `--drop`, `--fit` in, one expert count for every layer out.

Invariant: the count is between 1 and E and a multiple of the router's groups. Sizes are bytes of tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import experts_for, min_experts
from expertcut.errors import PlanError, UsageError
from expertcut.model import Geometry

_UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Budget:
    """Expert count per layer, and how it came about."""

    experts: int
    option: str
    """The option that decided, as the user would write it, e.g. `--keep 0.7`."""
    note: str | None = None
    """What was chosen and why, for printing, where the option does not say the number itself."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What every layer keeps at least and at most; both are whole multiples of the router's groups."""

    floor: int
    ceiling: int

    @classmethod
    def resolve(cls, geometry: Geometry, experts: int, top_k: int, floor: int | None, ceiling: int | None) -> Bounds:
        """Check bounds around `experts` on average; without them, half of it and all there are.

        Raises:
            UsageError: the groups cannot share one, or the average or the top-k lies outside.
        """
        step, least = geometry.n_group, max(min_experts(geometry), experts_for(geometry, top_k))
        if floor is None:
            floor = max(least, experts // 2 // step * step)
        if ceiling is None:
            ceiling = geometry.num_experts
        for option, count in (("--floor", floor), ("--ceiling", ceiling)):
            if count % step:
                raise UsageError(f"{option} {count}: the router's {step} groups cannot share it equally")
        if not least <= floor <= experts <= ceiling <= geometry.num_experts:
            raise UsageError(
                f"--floor {floor} --ceiling {ceiling}: expected a floor of {least} or more, at most the {experts} on "
                f"average, and a ceiling from there to {geometry.num_experts}"
            )
        return cls(floor, ceiling)

    def counts(self, experts: int, step: int) -> tuple[int, ...]:
        """Return the counts at which a layer's loss is measured: the bounds, `experts`, and halfway to either."""

        def halfway(one: int, other: int) -> int:
            return (one + other) // 2 // step * step

        points = {self.floor, halfway(self.floor, experts), experts, halfway(experts, self.ceiling), self.ceiling}
        return tuple(sorted(points))


def resolve_budget(
    checkpoint: Checkpoint,
    geometry: Geometry,
    *,
    experts: int | None = None,
    keep: float | None = None,
    drop: int | None = None,
    fit: int | None = None,
    tp: int = 1,
    candidates: Iterable[int] | None = None,
    top_k: int | None = None,
) -> Budget:
    """Turn exactly one of the four budgets into an expert count.

    `keep` is a fraction above 0 and at most 1, rounded to the nearest group-equal count (halves up). `fit` is bytes per
    device for the weights alone, `tp` the number of devices they are split over, `candidates` the counts that `fit`
    chooses among (those that runtimes serve fast; None: all). `top_k` is the plan's, if it changes.

    Raises:
        UsageError: none or several budgets, or a value out of range.
        PlanError: no fast expert count fits.
    """
    given = {
        name: value
        for name, value in (("--experts", experts), ("--keep", keep), ("--drop", drop), ("--fit", fit))
        if value is not None
    }
    if len(given) != 1:
        raise UsageError(
            f"found {' and '.join(given) or 'no budget'}, expected exactly one of --experts, --keep, --drop, --fit",
            "for example --keep 0.75",
        )
    if tp < 1 or (tp > 1 and fit is None):
        raise UsageError(f"--tp {tp}: expected a number of devices of 1 or more, and --fit with it")
    total = geometry.num_experts
    if experts is not None:
        return Budget(_checked(experts, f"--experts {experts}", geometry), f"--experts {experts}")
    if drop is not None:
        option = f"--drop {drop}"
        return Budget(_checked(total - drop, option, geometry), option, f"keeping {total - drop} of {total} experts")
    if keep is not None:
        return _keep_fraction(keep, geometry)
    assert fit is not None
    if candidates is None:
        candidates = range(1, total + 1)
    return _fit(checkpoint, geometry, fit, tp, _serviceable(candidates, geometry, top_k or geometry.top_k))


def fit_experts(
    total_bytes: int, bytes_per_expert: int, num_experts: int, budget_bytes: int, candidates: Iterable[int]
) -> int:
    """Return the largest candidate whose weights fit; `bytes_per_expert` is one expert of every block together.

    Keeping all experts is a candidate too: a model that fits is not cut.

    Raises:
        PlanError: none fits; names the smallest and its size.
    """
    sizes = {n: total_bytes - (num_experts - n) * bytes_per_expert for n in {num_experts, *candidates}}
    fitting = [n for n, size in sizes.items() if size <= budget_bytes]
    if not fitting:
        least = min(sizes)
        raise PlanError(
            f"the weights take {format_size(sizes[least])} even with {least} of {num_experts} experts, "
            f"more than the {format_size(budget_bytes)} that --fit and --tp allow",
            "raise --fit or --tp",
        )
    return max(fitting)


def parse_size(text: str) -> int:
    """Parse a size such as `48GiB` (2^30) or `1.5 TB` (10^12) into whole bytes, rounded down.

    Raises:
        UsageError: not a number with a unit, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _BY_LOWER.get(match["unit"].lower()) if match else None
    size = int(Fraction(match["number"]) * factor) if match and factor else 0
    if size < 1:
        raise UsageError(
            f"size {text!r}: expected a positive number and one of {', '.join(_UNITS)}", "for example 48GiB or 48GB"
        )
    return size


def parse_keep(text: str) -> float:
    """Parse a share such as `0.75` or `75%` into a fraction.

    Raises:
        UsageError: not a number, or not above 0 and at most 1 (100%).
    """
    percent = text.strip().endswith("%")
    try:
        keep = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        keep = float("nan")
    return _checked_keep(keep, text)


def format_size(nbytes: int) -> str:
    """Write bytes in the largest binary unit, e.g. `1.50 GiB`."""
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if nbytes >= _UNITS[u]), "B")
    return f"{nbytes} B" if unit == "B" else f"{nbytes / _UNITS[unit]:.2f} {unit}"


def _checked_keep(keep: float, written: str) -> float:
    if not 0 < keep <= 1:
        raise UsageError(
            f"--keep {written}: expected a share above 0 and at most 1 (or 100%)", "for example --keep 75%"
        )
    return keep


def _checked(experts: int, option: str, geometry: Geometry) -> int:
    total, n_group = geometry.num_experts, geometry.n_group
    if not 1 <= experts <= total:
        raise UsageError(f"{option}: keeps {experts} of {total} experts, expected 1 to {total}")
    if experts % n_group:
        below = experts // n_group * n_group
        choices = sorted({max(n, min_experts(geometry)) for n in (below, below + n_group)})
        raise UsageError(
            f"{option}: keeps {experts} experts, which the router's {n_group} groups cannot share equally",
            f"keep {' or '.join(map(str, choices))}",
        )
    return experts


def _keep_fraction(keep: float, geometry: Geometry) -> Budget:
    total, n_group = geometry.num_experts, geometry.n_group
    wanted = Fraction(str(_checked_keep(keep, f"{keep:g}"))) * total  # exact: 0.145 of 100 is 14.5, rounded up
    experts = max(int(wanted / n_group + Fraction(1, 2)) * n_group, min_experts(geometry))
    groups = f", equally many of the router's {n_group} groups" if n_group > 1 else ""
    note = f"keeping {experts} of {total} experts ({experts / total:.1%}){groups}"
    return Budget(experts, f"--keep {keep:g}", note)


def _serviceable(candidates: Iterable[int], geometry: Geometry, top_k: int) -> list[int]:
    """The candidates that make a valid plan: group-equal, and enough for the router's groups and the top-k."""
    least = max(min_experts(geometry), experts_for(geometry, top_k))
    return [n for n in candidates if least <= n <= geometry.num_experts and n % geometry.n_group == 0]


def _fit(checkpoint: Checkpoint, geometry: Geometry, fit: int, tp: int, candidates: list[int]) -> Budget:
    per_expert = sum(geometry.expert_nbytes(checkpoint, prefix) for prefix in geometry.blocks)
    experts = fit_experts(checkpoint.nbytes, per_expert, geometry.num_experts, fit * tp, candidates)
    size = checkpoint.nbytes - (geometry.num_experts - experts) * per_expert
    note = (
        f"keeping {experts} of {geometry.num_experts} experts: {format_size(size)} of weights "
        f"in {tp} x {format_size(fit)}, by tensor sizes"
    )
    return Budget(experts, f"--fit {fit}B --tp {tp}", note)
