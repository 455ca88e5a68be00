"""Choosing among candidates: what counts as best, and evolution that keeps budgets, groups and protected experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tiny_models import silent, tiny_model, tokens

from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.choose.plan import validate
from expertcut.errors import UsageError
from expertcut.measure.objective import Objective
from expertcut.measure.quality import WhatIf
from expertcut.measure.search import POPULATION, Scored, evolve, judge_with, scored
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry, read_geometry

DATA = tokens((24, 24, 24, 24), seed=3)
OPTIONS = ProfileOptions(device="cpu", dtype="float32")


def two_domains(*losses: tuple[float, float]) -> WhatIf:
    """Candidates whose loss per token in two domains of 10 and 30 tokens is known; the base's is 1 and 2."""
    means = np.array([(1.0, 2.0), *losses])
    names = ("base", *"abcdefg"[: len(losses)])
    sums, zero = means * [10, 30], np.zeros_like(means)
    return WhatIf(names, ("x", "y"), np.array([0, 1]), np.array([10, 30]), sums, zero + sums, zero, zero)


def test_objectives_by_their_definitions() -> None:
    found = two_domains((1.5, 2.1), (1.2, 2.3))
    assert Objective("nll").loss(found, "a") == pytest.approx((5 + 3) / 40)
    assert Objective("nll", {"x": 3, "y": 1}).loss(found, "a") == pytest.approx((3 * 0.5 + 0.1) / 4)
    assert Objective("nll", {"y": 1}).loss(found, "a") == pytest.approx(0.1)
    assert Objective("worst").loss(found, "a") == pytest.approx(0.5)
    assert Objective("worst").loss(found, "b") == pytest.approx(0.2)
    assert Objective("kl").loss(found, "a") == pytest.approx((15 + 63) / 40)


def test_objectives_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="--by speed: unknown; known: nll, kl, worst"):
        Objective.parse("speed", None)
    with pytest.raises(UsageError, match="leave out --domain-weights"):
        Objective.parse("worst", {"x": 1})
    with pytest.raises(UsageError, match="no domain of the text has a weight"):
        Objective.parse("kl", {"z": 1}).check(("x", "y"))


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Geometry]:
    folder = tiny_model(request.param, tmp_path_factory)
    return folder, read_geometry(open_checkpoint(folder))


def starts(folder: Path, geometry: Geometry, losses: Mapping[str, float]) -> list[Scored]:
    checkpoint = open_checkpoint(folder)
    keep = geometry.num_experts * 2 // 3 // geometry.n_group * geometry.n_group
    return [
        Scored(name, make_plan(checkpoint, geometry, strategy=name, experts=keep, protect=["0,1"]), loss)
        for name, loss in losses.items()
    ]


def distance(plan: Plan) -> float:
    """A made-up loss: how far the kept ids lie from the highest ones."""
    return -float(sum(sum(entry.kept) for entry in plan.layers.values()))


def test_evolution_finds_better_ones_within_what_is_allowed(model: tuple[Path, Geometry]) -> None:
    folder, geometry = model
    first = starts(folder, geometry, {"first": 0.0, "even": 0.0, "odd": 0.0})
    first = [Scored(one.name, one.plan, distance(one.plan)) for one in first]
    judged: list[Plan] = []

    def judge(plans: Mapping[str, Plan]) -> WhatIf:
        judged.extend(plans.values())
        assert len(plans) <= POPULATION
        means = np.array([[0.0], *([distance(plan)] for plan in plans.values())])
        zero = np.zeros_like(means)
        return WhatIf(("base", *plans), ("x",), np.array([0]), np.array([1]), means, zero, zero, zero)

    told: list[int] = []
    protected = {key: {0, 1} for key in first[0].plan.layers}
    found = evolve(
        first, judge, Objective(), 12, geometry, protected=protected, seed=1, tell=lambda n, best: told.append(n)
    )
    assert told == list(range(1, 13))
    assert found[0].loss < min(one.loss for one in first)
    assert {one.name for one in first} <= {one.name for one in found}
    assert [one.loss for one in found] == sorted(one.loss for one in found)
    kept = [tuple(entry.kept for entry in plan.layers.values()) for plan in judged]
    assert len(set(kept)) == len(kept), "nothing is judged twice"
    for plan in judged:
        validate(plan, geometry)
        assert all({0, 1} <= set(entry.kept) for entry in plan.layers.values())
        assert [len(e.kept) for e in plan.layers.values()] == [len(e.kept) for e in first[0].plan.layers.values()]
    again = evolve(first, judge, Objective(), 12, geometry, protected=protected, seed=1)
    assert [one.plan for one in again] == [one.plan for one in found], "the same inputs give the same plan"


def test_many_candidates_are_judged_a_few_at_a_time(model: tuple[Path, Geometry]) -> None:
    folder, geometry = model
    checkpoint = open_checkpoint(folder)
    keep = geometry.n_group * 3
    plans = {
        str(seed): make_plan(checkpoint, geometry, strategy="random", experts=keep, top_k=1, seed=seed)
        for seed in range(20)
    }
    judge = judge_with(checkpoint, geometry, DATA, OPTIONS, notify=silent, advance=silent)
    ranked, found = scored(judge, plans, Objective())
    whole = evaluate(checkpoint, geometry, DATA, plans, OPTIONS, notify=silent, advance=silent)
    assert found.names == whole.names == ("base", *plans)
    assert np.array_equal(found.nll, whole.nll) and np.array_equal(found.kl, whole.kl)
    assert [one.name for one in ranked] == sorted(plans, key=lambda name: whole.mean("nll", name))
