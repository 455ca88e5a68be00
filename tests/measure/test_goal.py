"""Goals as typed, the plans that are tried for one, and which of them held-out text is asked about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import make_plan
from expertcut.choose.limits import parse_limit
from expertcut.errors import GateError, UsageError
from expertcut.measure.cost_hardware import read_machine
from expertcut.measure.cost_model import model_cost
from expertcut.measure.cost_traffic import Load
from expertcut.measure.goal import (
    SHORT,
    Candidate,
    Goal,
    Reached,
    candidates,
    cheapest,
    expert_counts,
    out_of_reach,
    short_of,
    worth_measuring,
)
from expertcut.measure.sweep import ALL
from expertcut.model import Geometry, read_geometry


@pytest.mark.parametrize(
    ("text", "metric", "ratio"),
    [
        ("throughput=+10%", "throughput", 1.1),
        (" throughput = 1.25x ", "throughput", 1.25),
        ("tpot=-10%", "tpot", 0.9),
        ("tpot=0.5x", "tpot", 0.5),
    ],
)
def test_goals(text: str, metric: str, ratio: float) -> None:
    goal = Goal.parse(text)
    assert goal.metric == metric and goal.ratio == pytest.approx(ratio)
    assert Goal.parse(str(goal)).ratio == pytest.approx(ratio)
    assert goal.reached(goal.ratio) and not goal.reached(1.0) and goal.gain(goal.ratio) > 0


@pytest.mark.parametrize(
    "text",
    ["throughput", "throughput=10", "throughput=10%", "throughput=-10%", "throughput=0.9x", "throughput=1x",
     "throughput=+x%", "throughput=nanx", "throughput=infx", "tpot=+10%", "tpot=-100%", "tpot=0x", "speed=+10%"],
)  # fmt: skip
def test_no_goals(text: str) -> None:
    with pytest.raises(UsageError, match="--goal "):
        Goal.parse(text)


@pytest.fixture(scope="module")
def geometry(demo_model: Path) -> Geometry:
    """Of the built-in model: 32 experts, top-4, no groups."""
    return read_geometry(open_checkpoint(demo_model))


@given(groups=st.integers(1, 8), size=st.integers(1, 32), fast=st.sets(st.integers(1, 256)))
def test_counts_keep_groups_and_prefer_fast_ones(groups: int, size: int, fast: set[int], geometry: Geometry) -> None:
    total = groups * size
    shaped = replace(geometry, num_experts=total, n_group=groups, topk_group=groups, top_k=min(4, size))
    found = expert_counts(shaped, fast)
    assert found == sorted(set(found), reverse=True) and len(found) <= 6
    for count in found:
        assert count % groups == 0 and shaped.top_k <= count < total
        around = [total * part / 8 for part in range(2, 8) if abs(count - total * part / 8) <= total / 16]
        possible = [[n for n in range(groups, total, groups) if abs(n - at) <= total / 16 and n >= shaped.top_k]
                    for at in around]  # fmt: skip
        assert count in fast or any(not fast & set(near) for near in possible)


@pytest.fixture(scope="module")
def tried(demo_model: Path, geometry: Geometry) -> list[Candidate]:
    """All plans for the built-in model, at a load where both levers count."""
    checkpoint = open_checkpoint(demo_model)
    whole = make_plan(checkpoint, geometry, top_k=geometry.top_k)
    odd = [make_plan(checkpoint, geometry, strategy="first", experts=n) for n in (24, 16, 8)]
    machine = read_machine("cpu").model_copy(update={"bandwidth_gb_s": 2.0, "bf16_tflops": 0.05})
    goal = Goal.parse("throughput=+10%")
    return candidates(
        model_cost(checkpoint, geometry), geometry, {ALL: [whole], "first": odd}, None, None, machine,
        Load(8, 16, 64), goal,
    )  # fmt: skip


def test_every_top_k_of_every_count_is_tried_but_the_unchanged_model(tried: list[Candidate]) -> None:
    assert {(one.experts, one.top_k) for one in tried} == {
        (n, k) for n in (32, 24, 16, 8) for k in (4, 3, 2, 1) if (n, k) != (32, 4)
    }
    for one in tried:
        assert one.plan.experts == one.experts and one.ratio > 1 and not one.per_layer
        assert one.ratio == pytest.approx(1 + one.prediction.gain)
    assert next(one.name for one in tried if one.experts == 16) == "first, 16 experts, top-4"


@given(percent=st.floats(0.1, 30))
def test_what_is_measured_reaches_the_goal_and_cuts_least(percent: float, tried: list[Candidate]) -> None:
    goal = Goal("throughput", 1 + percent / 100)
    there = [one for one in tried if one.ratio >= goal.ratio]
    if not there:
        with pytest.raises(GateError, match="out of reach by prediction, whatever the loss: at most throughput"):
            worth_measuring(tried, goal)
        return
    found = worth_measuring(tried, goal)
    for one in there:
        less = [other for other in there if other != one and other.experts >= one.experts and other.top_k >= one.top_k]
        assert (one in found) == (not less)


def reached(one: Candidate, loss: float, ok: bool) -> Reached:
    """A candidate with a judgement that holds or does not."""
    from expertcut.measure.gate import Judgement
    from expertcut.measure.intervals import Estimate

    limit = parse_limit("nll<=1%")
    return Reached(one, loss, [Judgement(limit, None, Estimate(0.0, 0.0, 0.005 if ok else 0.02))])


def test_the_least_loss_that_holds_wins_and_else_the_nearest_are_named(tried: list[Candidate]) -> None:
    goal, limits = Goal("throughput", max(one.ratio for one in tried)), [parse_limit("nll<=1%")]
    (best,) = worth_measuring(tried, goal)
    short = short_of(tried, goal, [reached(best, 3.0, False)])
    assert best not in short and 0 < len(short) <= SHORT
    one, other = short[0], short[-1]
    assert cheapest([reached(one, 2.0, False), reached(other, 2.1, True), reached(best, 2.2, True)]) == reached(
        other, 2.1, True
    )
    assert cheapest([reached(one, 2.0, False)]) is None
    error = out_of_reach(goal, limits, [reached(best, 3.0, False)],
                         [reached(one, 1.0, True), reached(other, 1.0, True)])  # fmt: skip
    assert f"least loss at the goal: {best.name}: nll<=1%: up to 2.00% over the base, 1.00% too much" in error.message
    assert error.message.endswith(f"within the limits: {goal.shown(other.ratio)} by {other.name}")
    assert out_of_reach(goal, limits, [reached(best, 3.0, False)], []).message.endswith("none of those tried")
