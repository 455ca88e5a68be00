"""A speed to reach and limits on the loss in; the plan that reaches it at the least loss out, or what is out of reach.

Speed is predicted for every candidate from headers and a profile. Held-out text is asked only about those that reach
the goal and cut as little as that takes. Invariant: a plan that is returned reaches the goal by prediction and keeps
every limit at the worse end of its interval.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from expertcut.calibrate.profile import Profile
from expertcut.choose.limits import Limit
from expertcut.choose.plan import Plan, experts_for, min_experts, numbers
from expertcut.choose.topk import mean_top_k
from expertcut.errors import GateError, UsageError
from expertcut.measure.cost import BASE, Prediction, predict_plans
from expertcut.measure.cost_hardware import Machine
from expertcut.measure.cost_model import ModelCost
from expertcut.measure.cost_traffic import Load
from expertcut.measure.gate import Judgement, judge
from expertcut.measure.quality import WhatIf
from expertcut.measure.sweep import ALL
from expertcut.measure.topk import lower_top_k
from expertcut.model import Geometry

PARTS, FEWEST = 8, 2
"""Experts are tried in so many parts of all, down to so many."""
SHORT = 16
"""Candidates short of the goal that are measured where none at the goal keeps the limits."""
FORM = "expected throughput=+10%, throughput=1.1x, tpot=-10% or tpot=0.9x"
_GOAL = re.compile(r"(?P<metric>throughput|tpot)\s*=\s*((?P<percent>[+-][^%x]+)%|(?P<ratio>[^%x+-]+)x)")


@dataclass(frozen=True)
class Goal:
    """A speed relative to the unchanged model's."""

    metric: str
    """`throughput`, or `tpot`: time per output token."""
    ratio: float
    """Of the unchanged model's, at least or at most."""

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Parse `throughput=+10%` and its kin.

        Raises:
            UsageError: not of that form, or nothing to be gained.
        """
        match = _GOAL.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"--goal {text}: {FORM}")
        try:
            ratio = float(match["ratio"]) if match["ratio"] else 1 + float(match["percent"]) / 100
        except ValueError:
            raise UsageError(f"--goal {text}: {FORM}") from None
        goal = cls(match["metric"], ratio)
        if not (isfinite(ratio) and ratio > 0 and goal.gain(ratio) > 0):
            more = "more than the model's own" if goal.rises else "less than the model's own, and above 0"
            raise UsageError(f"--goal {text}: {goal.metric} {ratio:g}x, expected {more}", FORM)
        return goal

    @property
    def rises(self) -> bool:
        """True if more is better."""
        return self.metric == "throughput"

    def gain(self, ratio: float) -> float:
        """Return by what fraction a ratio to the unchanged model is better."""
        return ratio - 1 if self.rises else 1 - ratio

    def ratio_of(self, one: Prediction, base: Prediction) -> float:
        """Return the ratio that a prediction comes to."""
        if self.rises:
            return one.tokens_per_second / base.tokens_per_second
        return one.tpot / base.tpot

    def reached(self, ratio: float) -> bool:
        """Return whether a ratio is good enough."""
        return ratio >= self.ratio if self.rises else ratio <= self.ratio

    def shown(self, ratio: float) -> str:
        """Return a ratio for reading: `throughput +10.0%`."""
        return f"{self.metric} {ratio - 1:+.1%}"

    def __str__(self) -> str:
        return f"{self.metric}={100 * (self.ratio - 1):+g}%"


@dataclass(frozen=True)
class Candidate:
    """One plan and how fast it is by prediction."""

    name: str
    start: str
    """What its experts were chosen by."""
    plan: Plan
    experts: int
    top_k: float
    """On average over the layers."""
    per_layer: bool
    ratio: float
    """Of the goal's metric to the unchanged model's."""
    prediction: Prediction

    def cuts_less(self, other: Candidate) -> bool:
        """Return whether this one keeps and activates at least as many experts, more of one of them."""
        mine, others = (self.experts, self.top_k), (other.experts, other.top_k)
        alike = self.start in (other.start, ALL) and self.per_layer == other.per_layer
        return alike and mine != others and mine[0] >= others[0] and mine[1] >= others[1]


@dataclass(frozen=True)
class Reached:
    """A candidate that was measured."""

    candidate: Candidate
    loss: float
    """On held-out text, nats per token."""
    judgements: list[Judgement]

    @property
    def ok(self) -> bool:
        """True if every limit holds."""
        return all(judgement.ok for judgement in self.judgements)

    @property
    def missed(self) -> str:
        """The limits that do not hold."""
        return "; ".join(str(judgement) for judgement in self.judgements if not judgement.ok)


def expert_counts(geometry: Geometry, fast: Collection[int]) -> list[int]:
    """Return the expert counts to try below all, descending: about every eighth, of those near it one that is `fast`.

    The router's groups can share each, and each leaves enough for the model's own top-k.
    """
    total, step = geometry.num_experts, geometry.n_group
    least = max(min_experts(geometry), experts_for(geometry, geometry.top_k))
    possible, found = range(step, total, step), []
    for part in range(PARTS - 1, FEWEST - 1, -1):
        target = total * part / PARTS
        near = [n for n in possible if n >= least and abs(n - target) <= total / PARTS / 2]
        if near:
            found.append(min(near, key=lambda n: (n not in fast, abs(n - target), -n)))
    return list(dict.fromkeys(found))


def candidates(
    work: ModelCost, geometry: Geometry, starts: Mapping[str, Sequence[Plan]], profile: Profile | None,
    domain_weights: Mapping[str, float] | None, machine: Machine, load: Load, goal: Goal,
) -> list[Candidate]:  # fmt: skip
    """Return every plan with every top-k up to the model's own, and averages where layers may differ, predicted.

    `starts` are plans with the model's own top-k, by what chose their experts. The unchanged model is no candidate.
    """
    made: dict[str, tuple[str, Plan]] = {}
    for start, plans in starts.items():
        for plan in plans:
            for name, variant in _variants(geometry, plan, profile, domain_weights):
                made[f"{start}, {plan.experts} experts, {name}"] = start, variant
    found = predict_plans(work, geometry, {name: plan for name, (_, plan) in made.items()}, machine, load)
    return [
        Candidate(name, start, plan, plan.experts, mean_top_k(plan, geometry), numbers(plan, geometry).uneven,
                  goal.ratio_of(found[name], found[BASE]), found[name])
        for name, (start, plan) in made.items()
    ]  # fmt: skip


def _variants(
    geometry: Geometry, plan: Plan, profile: Profile | None, domain_weights: Mapping[str, float] | None
) -> Iterator[tuple[str, Plan]]:
    if plan.experts < geometry.num_experts:
        yield f"top-{geometry.top_k}", plan
    yield from lower_top_k(geometry, plan, profile, domain_weights)


def worth_measuring(every: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Return the candidates that reach the goal, but for those that cut more than another of their kind that does.

    Raises:
        GateError: none does, whatever the loss; names the fastest.
    """
    if not every:
        raise GateError(f"{goal} is out of reach: there is nothing to cut", "give a --strategy to drop experts by")
    there = [one for one in every if goal.reached(one.ratio)]
    if not there:
        best = max(every, key=lambda one: goal.gain(one.ratio))
        raise GateError(
            f"{goal} is out of reach by prediction, whatever the loss: at most {goal.shown(best.ratio)} by {best.name}",
            "a --strategy drops experts too" if len({one.experts for one in every}) == 1 else None,
        )  # fmt: skip
    return [one for one in there if not any(other.cuts_less(one) for other in there)]


def short_of(every: Sequence[Candidate], goal: Goal, reached: Sequence[Reached]) -> list[Candidate]:
    """Return at most `SHORT` candidates that gain something but not enough, evenly over their gains.

    Of those that drop experts only what chose them best among those at the goal.
    """
    best = next((one.candidate.start for one in reached if one.candidate.start != ALL), None)
    short = [one for one in every if (best is None or one.start in (ALL, best))
             and goal.gain(one.ratio) > 0 and not goal.reached(one.ratio)]  # fmt: skip
    short.sort(key=lambda one: goal.gain(one.ratio))
    if len(short) <= SHORT:
        return short
    return [short[round(i * (len(short) - 1) / (SHORT - 1))] for i in range(SHORT)]


def judged(found: WhatIf, some: Sequence[Candidate], limits: Sequence[Limit]) -> list[Reached]:
    """Return what held-out text says of candidates, the least loss first, of equal ones the fastest."""
    made = [Reached(one, found.mean("nll", one.name), judge(found, one.name, limits)) for one in some]
    return sorted(
        made, key=lambda one: (one.loss if isfinite(one.loss) else inf, -one.candidate.prediction.tokens_per_second)
    )


def cheapest(reached: Sequence[Reached]) -> Reached | None:
    """Return the first, so the one that loses least, that keeps every limit."""
    return next((one for one in reached if one.ok), None)


def out_of_reach(
    goal: Goal, limits: Sequence[Limit], reached: Sequence[Reached], short: Sequence[Reached]
) -> GateError:
    """Return what to say where no candidate at the goal keeps the limits: the nearest on either side."""
    least = reached[0]
    within = max((one for one in short if one.ok), key=lambda one: goal.gain(one.candidate.ratio), default=None)
    most = "none of those tried" if within is None else (
        f"{goal.shown(within.candidate.ratio)} by {within.candidate.name}"
    )  # fmt: skip
    return GateError(
        f"{goal} within {', '.join(map(str, limits))} is out of reach; the least loss at the goal: "
        f"{least.candidate.name}: {least.missed}; the most within the limits: {most}",
        "a lower --goal or a higher --max-loss",
    )
