"""A budget of experts and held-out text in; how many experts each layer gets out, by what losing them costs there.

Every layer is cut alone, to a few counts, while all others stay whole; between the counts the loss is taken as linear.
The counts that lose least together are an exact knapsack over these curves. Invariant: all layers together keep no more
than the same number in each would, and none less than the floor or more than the ceiling.

Legend: L MoE layers of the trunk, N counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from expertcut.choose.budget import Bounds
from expertcut.choose.plan import Plan
from expertcut.choose.topk import allocate
from expertcut.measure.objective import Objective
from expertcut.measure.search import Judge
from expertcut.model import Geometry, MoeBlock


@dataclass(frozen=True)
class Spread:
    """What came of spreading a budget over the layers."""

    plan: Plan
    counts: tuple[int, ...]
    """(N,) experts of a layer at which it was measured; ascending."""
    losses: NDArray[np.float64]
    """(L, N) loss with this layer alone cut to that count, by the objective."""
    experts: tuple[int, ...]
    """(L,) what each layer keeps now."""


def spread(
    make: Callable[[int], Plan], experts: int, bounds: Bounds, judge: Judge, objective: Objective, geometry: Geometry
) -> Spread:  # fmt: skip
    """Spread `experts` per layer on average over the layers; `make` chooses so many in every layer, by one criterion.

    The plan allows layers to differ and keeps the rest of what `make` says, such as the top-k.
    """
    step, trunk, make = geometry.n_group, geometry.trunk, cache(make)
    counts = bounds.counts(experts, step)
    whole = _whole(make(experts), geometry)
    tried = {
        (i, count): (f"layer {block.layer} cut to {count}", _mixed(whole, {block: make(count)}))
        for i, block in enumerate(trunk) for count in counts if count < geometry.num_experts
    }  # fmt: skip
    found = judge(dict(tried.values()))
    losses = np.zeros((len(trunk), len(counts)))
    for (i, count), (name, _) in tried.items():
        losses[i, counts.index(count)] = objective.loss(found, name)
    every = range(bounds.floor, bounds.ceiling + 1, step)
    falling = np.minimum.accumulate(losses, axis=1)  # more experts never cost more: what says so is noise
    curves = np.stack([np.interp(every, counts, row) for row in falling])
    spare = (experts - bounds.floor) // step * len(trunk)
    kept = tuple(every[extra - 1] for extra in allocate(curves, len(trunk) + spare))
    plan = _mixed(whole, {block: make(count) for block, count in zip(trunk, kept, strict=True)})
    return Spread(plan, counts, losses, kept)


def _whole(plan: Plan, geometry: Geometry) -> Plan:
    """The same plan with all experts kept."""
    everything = tuple(range(geometry.num_experts))
    layers = {key: entry.model_copy(update={"kept": everything}) for key, entry in plan.layers.items()}
    return plan.model_copy(update={"layers": layers})


def _mixed(whole: Plan, cuts: Mapping[MoeBlock, Plan]) -> Plan:
    """The same plan, but with the experts that others keep in some layers."""
    cut = {key: plan.layers[key] for block, plan in cuts.items() for key in block.keys}
    return whole.model_copy(update={"layers": whole.layers | cut})
