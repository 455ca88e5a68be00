"""A model and texts in; for every way to make it faster the boldest plan that costs next to nothing, and its cost, out.

One half of the held-out text and of the arithmetic chooses among plans, and every figure is of the other half. A way on
which nothing holds the limits is reported all the same, by its mildest plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from results_common import OPTIONS, Subject, say, silent

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.profile import Profile
from expertcut.choose import Plan, make_plan
from expertcut.choose.limits import Limit
from expertcut.choose.plan import gains, numbers
from expertcut.choose.topk import mean_top_k
from expertcut.measure.arithmetic import Answers, Item, arithmetic_accuracy, arithmetic_items
from expertcut.measure.intervals import Estimate
from expertcut.measure.topk import search_top_k
from expertcut.measure.whatif import evaluate

NLL, POINTS = Limit("nll", 0.005, relative=True), -0.01
"""How much loss may grow, and the arithmetic fall, at the worse ends of their intervals."""
TOP_K, BY_LAYER, FEWER, BOTH = "lower top-k", "top-k by layer", "fewer experts", "both"
WAYS = (TOP_K, BY_LAYER, FEWER, BOTH)
CRITERIA = ("reap", "gated-norm-sum")
STEP = 16
"""Experts are dropped by this fraction of them, up to half."""
FINALISTS = 3
"""Plans a way whose arithmetic is looked at."""


@dataclass(frozen=True)
class Candidate:
    """A plan on one of the ways."""

    way: str
    name: str
    plan: Plan
    cost: float
    """Experts kept times mean top-k: the fewer are chosen of the fewer, the fewer are read and computed with."""
    growth: Estimate
    """Of the loss, as a fraction, on the text that chooses."""

    @property
    def ok(self) -> bool:
        """True if the loss holds its limit."""
        return self.growth.high is not None and self.growth.high <= NLL.value


class Quality(BaseModel):
    """What a plan costs, on text and arithmetic that had no part in choosing it; fractions with their intervals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    way: str
    name: str
    plan: Plan
    experts: int
    top_k: float
    """Mean over layers."""
    gain: bool
    stock: bool
    """True if vLLM serves it as it is; False: with expertcut's plug-in."""
    growth: tuple[float, float, float]
    """Of the loss: value, and between what it lies."""
    points: tuple[float, float, float]
    """Difference in the share of arithmetic items answered right, likewise."""


class Study(BaseModel):
    """What choosing and measuring plans found, kept between runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, str | int]
    """Whatever it depends on."""
    base: str
    """What the unchanged model does, in words."""
    rows: tuple[Quality, ...]


def study(subject: Subject, settings: Mapping[str, str | int], scratch: Path) -> Study:
    """Choose a plan on every way and measure it; `settings` give `tokens`, `heldout tokens` and `items`."""
    data = subject.text(subject.calibration, int(settings["tokens"]), 0)
    profile = subject.profile(data, scratch)
    select, report = subject.text(subject.heldout, int(settings["heldout tokens"]), 0).parted(2)
    items = arithmetic_items(2 * int(settings["items"]))
    half = len(items) // 2
    found = [*_by_top_k(subject, profile, data, select), *_by_experts(subject, profile, select)]
    found += _by_both(subject, found, data, select)
    chosen = _chosen(subject, found, items[:half])
    whatif = subject.whatif(report, {one.way: one.plan for one in chosen})
    answers = _answers(subject, {one.way: one.plan for one in chosen}, items[half:])
    rows = (_quality(subject, one, whatif.growth(one.way), answers.difference(one.way)) for one in chosen)
    base = (
        f"{whatif.mean('nll', 'base'):.3f} nats per token over {whatif.count():,} held-out tokens in "
        f"{whatif.sequences()} sequences; {answers.accuracy('base').value:.1%} of {half:,} arithmetic items right"
    )
    return Study(settings=dict(settings), base=base, rows=tuple(rows))


def _by_top_k(subject: Subject, profile: Profile, data: CalibrationSet, select: CalibrationSet) -> list[Candidate]:
    """Every lower top-k, and budgets over layers, each with a gain where that helps."""
    whole = make_plan(subject.checkpoint, subject.geometry, top_k=subject.geometry.top_k, per_layer=True)
    return _searched(subject, whole, "", profile, data, select)


def _by_experts(subject: Subject, profile: Profile, select: CalibrationSet) -> list[Candidate]:
    """Fewer experts by the criterion that does best at each number."""
    total, groups = subject.geometry.num_experts, subject.geometry.n_group
    counts = sorted({total * (STEP - n) // STEP // groups * groups for n in range(1, STEP // 2 + 1)})
    plans = {
        (experts, criterion): make_plan(
            subject.checkpoint, subject.geometry, strategy=criterion, experts=experts, profile=profile
        )
        for experts in counts for criterion in CRITERIA
    }  # fmt: skip
    named = {f"{experts} by {criterion}": plan for (experts, criterion), plan in plans.items()}
    found = evaluate(subject.checkpoint, subject.geometry, select, named, OPTIONS, notify=say, advance=silent)
    best = [
        min((f"{experts} by {name}" for name in CRITERIA), key=lambda name: found.mean("nll", name))
        for experts in counts
    ]
    return [_candidate(subject, FEWER, name, named[name], found.growth(name)) for name in best]


def _by_both(
    subject: Subject, found: Sequence[Candidate], data: CalibrationSet, select: CalibrationSet
) -> list[Candidate]:
    """Every lower top-k on the fewest experts that hold and on the mildest plan."""
    fewer = sorted((one for one in found if one.way == FEWER), key=lambda one: one.cost)
    starts = {one.name: one for one in (next((one for one in fewer if one.ok), fewer[-1]), fewer[-1])}
    return [
        lower for one in starts.values()
        for lower in _searched(subject, one.plan, f"{one.name}, ", None, data, select)
    ]  # fmt: skip


def _searched(
    subject: Subject, plan: Plan, prefix: str, profile: Profile | None, data: CalibrationSet, select: CalibrationSet
) -> list[Candidate]:
    tried, found = search_top_k(
        subject.checkpoint, subject.geometry, plan, [NLL], select, OPTIONS, profile=profile, fit_on=data, notify=say,
        advance=silent,
    )  # fmt: skip
    uneven = {one.name: numbers(one.plan, subject.geometry).uneven for one in tried}
    return [
        _candidate(subject, BOTH if prefix else BY_LAYER if uneven[one.name] else TOP_K, f"{prefix}{one.shown}",
                   one.plan, found.growth(one.shown))
        for one in tried
    ]  # fmt: skip


def _candidate(subject: Subject, way: str, name: str, plan: Plan, growth: Estimate) -> Candidate:
    return Candidate(way, name, plan, plan.experts * mean_top_k(plan, subject.geometry), growth)


def _chosen(subject: Subject, found: Sequence[Candidate], items: Sequence[Item]) -> list[Candidate]:
    """Of every way the cheapest plan that holds both limits; failing that the loss's alone; failing that the mildest.

    A way without any plan is left out.
    """
    finalists = {}
    for way in WAYS:
        own = sorted((one for one in found if one.way == way), key=lambda one: one.cost)
        mildest = sorted(own, key=lambda one: one.growth.value)[:1]
        finalists[way] = [one for one in own if one.ok][:FINALISTS] or mildest
    answers = _answers(subject, {one.name: one.plan for some in finalists.values() for one in some}, items)
    chosen = []
    for some in filter(None, finalists.values()):
        held = [one for one in some if _ends(answers.difference(one.name))[1] > POINTS]
        chosen.append((held or some)[0])
        say(f"{subject.folder.name}: {chosen[-1].way}: {chosen[-1].name}")
    return chosen


def _answers(subject: Subject, plans: Mapping[str, Plan], items: Sequence[Item]) -> Answers:
    return arithmetic_accuracy(
        subject.checkpoint, subject.geometry, plans, items, OPTIONS, notify=say, advance=silent
    )  # fmt: skip


def _quality(subject: Subject, one: Candidate, growth: Estimate, points: Estimate) -> Quality:
    return Quality(
        way=one.way, name=one.name, plan=one.plan, experts=one.plan.experts,
        top_k=mean_top_k(one.plan, subject.geometry), gain=set(gains(one.plan, subject.geometry).values()) != {1.0},
        stock=not numbers(one.plan, subject.geometry).uneven, growth=_ends(growth), points=_ends(points),
    )  # fmt: skip


def _ends(found: Estimate) -> tuple[float, float, float]:
    assert found.low is not None and found.high is not None
    return found.value, found.low, found.high
