"""A plan and limits in; the smallest top-k under which the plan keeps them out, judged on held-out text in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.passage import Advance, Notify
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.limits import Limit
from expertcut.choose.plan import Plan
from expertcut.choose.topk import allocate, mean_top_k, top_k_loss
from expertcut.errors import GateError
from expertcut.measure.gain import Gained, gain_plans
from expertcut.measure.gate import Judgement, judge
from expertcut.measure.quality import WhatIf
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry

STEPS = 8
"""Averages tried with layers that differ: whole numbers, and halves too where the model's own top-k is no larger."""


@dataclass(frozen=True)
class Tried:
    """One top-k that was tried."""

    name: str
    mean: float
    """Experts activated per token and MoE layer, on average over the layers."""
    plan: Plan
    gained: Gained | None
    """What became of gains, if they were asked for."""
    shown: str
    """The name of `plan` in what the pass found."""
    judgements: list[Judgement]

    @property
    def ok(self) -> bool:
        """True if every limit holds."""
        return all(judgement.ok for judgement in self.judgements)


def search_top_k(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, limits: Sequence[Limit], data: CalibrationSet,
    options: ProfileOptions, *, profile: Profile | None = None, domain_weights: Mapping[str, float] | None = None,
    fit_on: CalibrationSet | None = None, notify: Notify, advance: Advance,
) -> tuple[list[Tried], WhatIf]:  # fmt: skip
    """Return the plan under every top-k that was tried, the fewest activated experts first, and what the pass found.

    Tried is every number below the model's own; with a `profile`, for plans whose layers may differ, also averages
    distributed by what each layer loses. With `fit_on`, each with a gain if that helps. The worse end of the interval
    counts, as for any limit. `data` must have passed `check_limits`.

    Raises:
        PlanError: the plan does not fit the checkpoint, or no gain can be carried.
        DataError: no sequence has two tokens.
    """
    plans = dict(lower_top_k(geometry, plan, profile, domain_weights))
    gained: dict[str, Gained] = {}
    if fit_on is not None and plans:
        gained, found = gain_plans(
            checkpoint, geometry, plans, fit_on, data, options, notify=notify, advance=advance
        )  # fmt: skip
    else:
        found = evaluate(checkpoint, geometry, data, plans, options, notify=notify, advance=advance)
    tried = []
    for name, candidate in plans.items():
        best = gained.get(name)
        shown = name if best is None else best.shown
        tried.append(
            Tried(name, mean_top_k(candidate, geometry), candidate if best is None else best.plan, best, shown,
                  judge(found, shown, limits))
        )  # fmt: skip
    return sorted(tried, key=lambda one: (one.mean, found.mean("nll", one.shown))), found


def first_that_holds(tried: Sequence[Tried]) -> Tried:
    """Return the first one, so the one that activates fewest experts, under which every limit holds.

    Raises:
        GateError: there is none; says how near the nearest came.
    """
    for one in tried:
        if one.ok:
            return one
    if not tried:
        raise GateError("no top-k below the model's own is possible with the experts that the plan keeps")
    missed = next(judgement for judgement in tried[-1].judgements if not judgement.ok)
    raise GateError(f"{tried[-1].name}: {missed}; fewer activated experts lose more", "raise --max-loss")


def lower_top_k(
    geometry: Geometry, plan: Plan, profile: Profile | None, domain_weights: Mapping[str, float] | None
) -> Iterator[tuple[str, Plan]]:
    """Yield a plan with every top-k below the model's own, by name.

    With a profile, where the plan's layers may differ, also with averages that go where they lose least.
    """
    most, trunk = geometry.top_k, geometry.trunk
    for k in range(most - 1, 0, -1):
        yield f"top-{k}", _with_top_k(geometry, plan, [k] * len(trunk))
    if not (plan.per_layer and profile is not None):
        return
    losses = np.stack([top_k_loss(profile.layer(block.prefix, domain_weights)) for block in trunk])
    parts = 2 if most <= STEPS else 1
    for step in range(parts * most - 1, parts - 1, -1):
        mean = Fraction(step, parts)
        found = allocate(losses, floor(mean * len(trunk)))
        if len(set(found)) > 1:
            yield f"top-{float(mean):g} on average", _with_top_k(geometry, plan, found)


def _with_top_k(geometry: Geometry, plan: Plan, top_k: Sequence[int]) -> Plan:
    layers = dict(plan.layers)
    for block, k in zip(geometry.trunk, top_k, strict=True):
        for key in block.keys:
            layers[key] = layers[key].model_copy(update={"top_k": None if k == geometry.top_k else k})
    return plan.model_copy(update={"layers": layers})
