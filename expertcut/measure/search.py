"""Candidate plans and text in; the best plan out: the pick of several criteria, and evolution from there.

All candidates of a generation go through the model together, each layer read once. Invariant: the same inputs give the
same plan; every candidate keeps as many experts as its parents, in each layer too unless bounds let layers differ.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.passage import Advance, Notify
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.budget import Bounds
from expertcut.choose.plan import LayerPlan, Plan
from expertcut.measure.objective import Objective
from expertcut.measure.quality import WhatIf
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry

POPULATION = 8
"""Candidates of a generation."""
PARENTS = 4
"""Best candidates so far that the next generation descends from."""
TOGETHER = 16
"""Candidates that go through the model together: each has hidden states of its own in memory."""
CHANCE = 0.25
"""Of a layer to exchange one of its experts; and, where they may differ, of two layers to move one between them."""

Judge = Callable[[Mapping[str, Plan]], WhatIf]


@dataclass(frozen=True)
class Scored:
    """A candidate and its loss."""

    name: str
    plan: Plan
    loss: float


def judge_with(
    checkpoint: Checkpoint, geometry: Geometry, data: CalibrationSet, options: ProfileOptions, *, notify: Notify,
    advance: Advance,
) -> Judge:  # fmt: skip
    """Return what evaluates candidates on a text, a few at a time."""

    def judge(plans: Mapping[str, Plan]) -> WhatIf:
        names, runs = list(plans), []
        for start in range(0, max(1, len(names)), TOGETHER):
            some = {name: plans[name] for name in names[start : start + TOGETHER]}
            runs.append(evaluate(checkpoint, geometry, data, some, options, notify=notify, advance=advance))
        return WhatIf.joined(runs)

    return judge


def scored(judge: Judge, plans: Mapping[str, Plan], objective: Objective) -> tuple[list[Scored], WhatIf]:
    """Return candidates with their losses, the best first, of equal ones the first; and what the pass found."""
    found = judge(plans)
    ranked = [Scored(name, plan, objective.loss(found, name)) for name, plan in plans.items()]
    return sorted(ranked, key=lambda one: one.loss), found


def evolve(
    starts: Sequence[Scored], judge: Judge, objective: Objective, generations: int, geometry: Geometry, *,
    protected: Mapping[str, Collection[int]], bounds: Bounds | None = None, seed: int = 0,
    tell: Callable[[int, Scored], None] = lambda generation, best: None,
) -> list[Scored]:  # fmt: skip
    """Return all candidates after so many generations, the best first; `starts` are among them.

    A child takes each layer's experts from one of two parents, and now and then exchanges a kept expert of a layer for
    a dropped one of the same group: rather one that few starts keep for one that many do. Within `bounds`, a layer may
    also drop an expert of every group for another layer to take. Fitness is the loss on the
    judge's text, so the result has to be judged on other text. `tell` hears of each generation's best.
    """
    draw = random.Random(seed)
    known = {_genes(one.plan): one for one in reversed(starts)}
    ranked = sorted(known.values(), key=lambda one: one.loss)
    votes = {key: Counter(e for one in starts for e in one.plan.layers[key].kept) for key in starts[0].plan.layers}
    mutate = _Mutation(votes, len(starts), geometry, protected, bounds, draw)
    for generation in range(1, generations + 1):
        children: dict[str, Plan] = {}
        genes = set(known)
        for attempt in range(20 * POPULATION):
            one, other = (draw.choice(ranked[:PARENTS]).plan for _ in range(2))
            child = _child(one, other, draw, mutate)
            if _genes(child) not in genes and len(children) < POPULATION:
                genes.add(_genes(child))
                children[f"generation {generation}, child {attempt}"] = child
        if not children:
            break
        found, _ = scored(judge, children, objective)
        known |= {_genes(child.plan): child for child in found}
        ranked = sorted(known.values(), key=lambda one: one.loss)
        tell(generation, ranked[0])
    return ranked


@dataclass(frozen=True)
class _Mutation:
    """Exchanges experts of a layer and moves some between layers, within groups; protected ones stay."""

    votes: Mapping[str, Counter[int]]
    """How many starts keep an expert, by key."""
    starts: int
    geometry: Geometry
    protected: Mapping[str, Collection[int]]
    bounds: Bounds | None
    draw: random.Random

    def exchanged(self, key: str, kept: tuple[int, ...]) -> tuple[int, ...]:
        """One kept expert for a dropped one of the same group."""
        group = self.draw.randrange(self.geometry.n_group)
        goes, comes = self._goes(key, kept, group), self._comes(key, kept, group)
        return kept if goes is None or comes is None else tuple(sorted({*kept, comes} - {goes}))

    def moved(self, layers: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
        """One expert of every group less in one layer, and more in another, as far as the bounds let it."""
        trunk, groups = self.geometry.trunk, range(self.geometry.n_group)
        if self.bounds is None or len(trunk) < 2 or self.draw.random() >= CHANCE:
            return layers
        gives, takes = self.draw.sample(trunk, 2)
        found = dict(layers)
        for block, one, sign in ((gives, self._goes, -1), (takes, self._comes, 1)):
            for key in block.keys:
                kept = layers[key].kept
                some = {e for group in groups if (e := one(key, kept, group)) is not None}
                count = len(kept) + sign * len(groups)
                if len(some) < len(groups) or not self.bounds.floor <= count <= self.bounds.ceiling:
                    return layers
                found[key] = layers[key].model_copy(update={"kept": tuple(sorted({*kept} ^ some))})
        return found

    def _goes(self, key: str, kept: tuple[int, ...], group: int) -> int | None:
        ids = [e for e in self._group(group) if e in kept and e not in self.protected.get(key, ())]
        return self._drawn(ids, [1 + self.starts - self.votes[key][e] for e in ids])

    def _comes(self, key: str, kept: tuple[int, ...], group: int) -> int | None:
        ids = [e for e in self._group(group) if e not in kept]
        return self._drawn(ids, [1 + self.votes[key][e] for e in ids])

    def _group(self, group: int) -> range:
        size = self.geometry.num_experts // self.geometry.n_group
        return range(group * size, (group + 1) * size)

    def _drawn(self, ids: list[int], weights: list[int]) -> int | None:
        return self.draw.choices(ids, weights)[0] if ids else None


def _genes(plan: Plan) -> tuple[tuple[int, ...], ...]:
    return tuple(entry.kept for entry in plan.layers.values())


def _child(one: Plan, other: Plan, draw: random.Random, mutate: _Mutation) -> Plan:
    layers: dict[str, LayerPlan] = {}
    for key, entry in one.layers.items():
        kept = draw.choice((entry.kept, other.layers[key].kept))
        if len(kept) != len(entry.kept):  # counts differ by layer, and the total must stay
            kept = entry.kept
        kept = mutate.exchanged(key, kept) if draw.random() < CHANCE else kept
        layers[key] = entry.model_copy(update={"kept": kept})
    return one.model_copy(update={"layers": mutate.moved(layers)})
