"""A plan made again with another expert count: the same choice, or a refusal that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choose_models import profile, write_checkpoint

from expertcut.calibrate.profile import Profile
from expertcut.checkpoint import Checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.choose.again import with_experts
from expertcut.errors import PlanError, UsageError
from expertcut.model import Geometry, read_geometry

Model = tuple[Checkpoint, Geometry]


@pytest.fixture(scope="module", params=["plain", "grouped"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), grouped=request.param == "grouped")
    return checkpoint, read_geometry(checkpoint)


def profiled(model: Model, seed: int = 0) -> Profile:
    random = np.random.default_rng(seed)
    names = ("count", "gate_sum", "norm_sum", "gated_norm_sum", "gated_norm_sq_sum")
    return profile(model, {name: random.uniform(1, 9, (2, 8)) for name in names}, {1: [1.0] * 7 + [900.0]})


def kept(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {prefix: entry.kept for prefix, entry in plan.layers.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "random", "seed": 5}, {"strategy": "router-norm", "protect": ["1:3", "6"]}, {"strategy": "reap"},
        {"strategy": "energy", "domain_weights": {"code": 2.0, "prose": 0.5}},
        {"strategy": "first", "protect_super": True}, {"strategy": "last", "top_k": 1},
    ],
)  # fmt: skip
def test_the_same_choice_with_more_experts(model: Model, options: dict[str, Any]) -> None:
    made = profiled(model)
    plan, more = (make_plan(*model, experts=n, profile=made, **options) for n in (4, 6))
    again = with_experts(*model, plan, 6, made)
    assert kept(again) == kept(more) and kept(again) != kept(plan)
    assert [entry.top_k for entry in again.layers.values()] == [entry.top_k for entry in plan.layers.values()]
    assert again.source == plan.source
    assert kept(with_experts(*model, plan, 4, made)) == kept(plan)


def test_a_top_k_below_the_models_allows_fewer_experts(model: Model) -> None:
    plan = make_plan(*model, strategy="random", experts=4, top_k=1)
    least = 2 * model[1].n_group
    assert with_experts(*model, plan, least, None).experts == least


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"criterion": None}, "does not say by which criterion"),
        ({"seed": 1}, "was it edited"),
        ({"criterion": "reap"}, "was made with a profile"),
    ],
)
def test_a_plan_that_does_not_tell_is_not_guessed(model: Model, change: dict[str, Any], words: str) -> None:
    plan = make_plan(*model, strategy="random", experts=4)
    plan = plan.model_copy(update={"provenance": plan.provenance | change})
    with pytest.raises(PlanError, match=words):
        with_experts(*model, plan, 6, None)


def test_another_profile_is_refused(model: Model) -> None:
    plan = make_plan(*model, strategy="reap", experts=4, profile=profiled(model))
    with pytest.raises(PlanError, match="made with another profile"):
        with_experts(*model, plan, 6, profiled(model, seed=1))


def test_layers_of_other_counts_are_refused(model: Model) -> None:
    plan = make_plan(*model, strategy="first", experts=4)
    layers = dict(plan.layers)
    prefix = next(iter(layers))
    layers[prefix] = layers[prefix].model_copy(update={"kept": tuple(range(8))})
    with pytest.raises(PlanError, match="keep different numbers of experts"):
        with_experts(*model, plan.model_copy(update={"layers": layers, "per_layer": True}), 6, None)


def test_counts_out_of_range_are_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="expected 1 to 8"):
        with_experts(*model, make_plan(*model, strategy="first", experts=4), 9, None)


def test_plans_are_made_from_files_too(model: Model, tmp_path: Path) -> None:
    made = profiled(model)
    make_plan(*model, strategy="reap", experts=4, profile=made, protect=["0:1"]).save(tmp_path / "plan.json")
    again = with_experts(*model, Plan.load(tmp_path / "plan.json"), 6, made)
    assert kept(again) == kept(make_plan(*model, strategy="reap", experts=6, profile=made, protect=["0:1"]))
