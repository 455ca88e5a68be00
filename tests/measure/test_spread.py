"""A budget spread over layers: the best there is by the measured curves, within floor, ceiling, groups and total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tiny_models import silent, tiny_model, tokens

from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.choose.budget import Bounds
from expertcut.choose.plan import validate
from expertcut.errors import UsageError
from expertcut.measure.objective import Objective
from expertcut.measure.quality import WhatIf
from expertcut.measure.search import Judge, Scored, evolve, judge_with
from expertcut.measure.spread import Spread, spread
from expertcut.model import Geometry, read_geometry

Model = tuple[Checkpoint, Geometry]
PRICES = (1.0, 10.0, 3.0)
"""What an expert less costs in each layer, by how far it is cut already."""


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = open_checkpoint(tiny_model(request.param, tmp_path_factory))
    return checkpoint, read_geometry(checkpoint)


def cut(model: Model, experts: int) -> Plan:
    return make_plan(*model, strategy="last", experts=experts, top_k=1, per_layer=True)


def price(geometry: Geometry, layer: int, kept: int) -> float:
    return PRICES[layer % len(PRICES)] * (geometry.num_experts - kept) ** 2


def judge_of(geometry: Geometry, seen: list[Plan]) -> Judge:
    """A made-up loss that is the sum of what every layer's cut costs."""

    def judge(plans: Mapping[str, Plan]) -> WhatIf:
        seen.extend(plans.values())
        losses = [
            sum(price(geometry, i, len(plan.layers[b.prefix].kept)) for i, b in enumerate(geometry.trunk))
            for plan in plans.values()
        ]
        means = np.array([[0.0], *([loss] for loss in losses)])
        zero = np.zeros_like(means)
        return WhatIf(("base", *plans), ("x",), np.array([0]), np.array([1]), means, zero, zero, zero)

    return judge


def spread_over(model: Model, experts: int, bounds: Bounds) -> tuple[Spread, list[Plan]]:
    seen: list[Plan] = []
    geometry = model[1]
    found = spread(lambda n: cut(model, n), experts, bounds, judge_of(geometry, seen), Objective(), geometry)
    return found, seen


def loss(found: Spread, kept: Sequence[int]) -> float:
    """What layers lose by the measured curves, straight between the counts that were measured."""
    return sum(float(np.interp(n, found.counts, row)) for n, row in zip(kept, found.losses, strict=True))


def test_the_spread_is_the_best_of_all_by_its_curves(model: Model) -> None:
    geometry = model[1]
    step, every = geometry.n_group, geometry.num_experts
    experts = every * 3 // 4 // step * step
    bounds = Bounds.resolve(geometry, experts, 1, None, None)
    found, seen = spread_over(model, experts, bounds)
    layers, kept = len(geometry.trunk), found.experts
    assert layers > 1 and set(kept) != {experts}, "prices differ, and so do the layers"
    assert sum(kept) <= experts * layers and all(bounds.floor <= n <= bounds.ceiling for n in kept)
    assert [len(found.plan.layers[block.prefix].kept) for block in geometry.trunk] == list(kept)
    assert {n: found.plan.layers[b.prefix].kept for b, n in zip(geometry.trunk, kept, strict=True)} == {
        n: cut(model, n).layers[b.prefix].kept for b, n in zip(geometry.trunk, kept, strict=True)
    }
    validate(found.plan, geometry)
    possible = [
        some for some in product(range(bounds.floor, bounds.ceiling + 1, step), repeat=layers)
        if sum(some) <= experts * layers
    ]  # fmt: skip
    assert loss(found, kept) == pytest.approx(min(loss(found, some) for some in possible))
    for i, row in enumerate(found.losses):
        assert row.tolist() == [price(geometry, i, n) for n in found.counts]
    for plan in seen:  # every layer is measured alone
        assert sum(len(entry.kept) < every for entry in plan.layers.values()) == 1


def test_bounds_are_kept_even_where_more_would_be_better(model: Model) -> None:
    geometry = model[1]
    step, every = geometry.n_group, geometry.num_experts
    experts = every * 3 // 4 // step * step
    narrow = Bounds.resolve(geometry, experts, 1, experts, every)
    assert set(spread_over(model, experts, narrow)[0].experts) == {experts}, "the floor leaves nothing to give"
    low = Bounds.resolve(geometry, experts, 1, None, experts)
    assert max(spread_over(model, experts, low)[0].experts) == experts


def test_default_bounds_and_what_is_measured() -> None:
    assert Bounds(8, 64).counts(32, 1) == (8, 20, 32, 48, 64)
    assert Bounds(8, 64).counts(32, 8) == (8, 16, 32, 48, 64)
    assert Bounds(32, 64).counts(32, 1) == (32, 48, 64)


@pytest.mark.parametrize(
    ("floor", "ceiling", "what"),
    [(7, None, "--floor 7: the router's 3 groups cannot share it equally"),
     (None, 10, "--ceiling 10: the router's 3 groups cannot share it equally"),
     (3, None, "expected a floor of 6 or more"), (12, None, "at most the 9 on average"),
     (None, 6, "a ceiling from there to 12"), (None, 15, "a ceiling from there to 12")],
)  # fmt: skip
def test_bounds_that_cannot_be(
    floor: int | None, ceiling: int | None, what: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    geometry = read_geometry(open_checkpoint(tiny_model("deepseek_v3", tmp_path_factory)))
    assert (geometry.n_group, geometry.num_experts) == (3, 12), "the numbers below are for this model"
    with pytest.raises(UsageError, match=what):
        Bounds.resolve(geometry, 9, 1, floor, ceiling)


def test_evolution_may_move_experts_between_layers_within_the_bounds(model: Model) -> None:
    geometry = model[1]
    step, layers = geometry.n_group, len(geometry.trunk)
    experts = geometry.num_experts * 3 // 4 // step * step
    bounds = Bounds.resolve(geometry, experts, 1, None, None)
    seen: list[Plan] = []
    judge = judge_of(geometry, seen)
    start = cut(model, experts)
    alike = sum(price(geometry, i, experts) for i in range(layers))
    protected = {key: {0} & set(entry.kept) for key, entry in start.layers.items()}
    starts = [Scored("alike", start, alike)]
    ranked = evolve(starts, judge, Objective(), 12, geometry, protected=protected, bounds=bounds)
    assert ranked[0].loss < alike, "counts that cost less were found"
    for plan in seen:
        validate(plan, geometry)
        counts = [len(plan.layers[block.prefix].kept) for block in geometry.trunk]
        assert sum(counts) == experts * layers
        assert all(bounds.floor <= count <= bounds.ceiling for count in counts)
    plain: list[Plan] = []
    evolve(starts, judge_of(geometry, plain), Objective(), 3, geometry, protected=protected)
    assert {len(entry.kept) for plan in plain for entry in plan.layers.values()} == {experts}


def test_real_losses_are_those_of_each_layer_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tiny_model("qwen3_moe", tmp_path_factory)
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    options, data = ProfileOptions(device="cpu", dtype="float32"), tokens((24, 24, 24, 24), seed=3)
    judge = judge_with(checkpoint, geometry, data, options, notify=silent, advance=silent)
    experts = geometry.num_experts // 2
    bounds = Bounds.resolve(geometry, experts, 1, None, None)
    found = spread(lambda n: cut((checkpoint, geometry), n), experts, bounds, judge, Objective("kl"), geometry)
    block, whole = geometry.trunk[-1], cut((checkpoint, geometry), geometry.num_experts)
    alone = whole.model_copy(
        update={"layers": whole.layers | {block.prefix: cut((checkpoint, geometry), experts).layers[block.prefix]}}
    )
    expected = judge({"alone": alone}).mean("kl", "alone")
    assert expected > 0 and found.losses[-1, found.counts.index(experts)] == expected
