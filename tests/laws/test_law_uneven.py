"""The laws for plans whose layers differ in expert count, top-k or both; stock runtimes refuse what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from law_models import MODELS, Model, open_model
from reference import load, logits
from test_law_numeric import narrow
from tiny_models import silent, tokens
from transformers import AutoConfig

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import LayerPlan, Plan
from expertcut.choose.plan import experts_for, min_experts, numbers
from expertcut.errors import PlanError
from expertcut.measure.numeric import verify_numeric
from expertcut.model import read_geometry
from expertcut.model.summary import nbytes_with
from expertcut.rewrite import prune, require, verify_bytes, verify_structure
from expertcut.runtimes.transformers import from_pretrained

DATA = tokens((30, 30, 30), seed=11)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Model:
    return open_model(request.param, tmp_path_factory, demo_model)


def uneven_plan(model: Model, experts: bool, top_k: bool) -> Plan:
    """All experts and the model's own top-k in the first MoE layer, fewer of what is asked for in the others."""
    geometry, layers = model.geometry, {}
    for place, (prefix, entry) in enumerate(model.random_plan(seed=3).layers.items()):
        k = max(1, geometry.top_k - place) if top_k else geometry.top_k
        least = max(min_experts(geometry), experts_for(geometry, k))
        kept = entry.kept if place and experts and len(entry.kept) >= least else tuple(range(geometry.num_experts))
        layers[prefix] = LayerPlan(layer=entry.layer, kept=kept, top_k=k)
    made = model.random_plan()
    return made.model_copy(update={"layers": layers, "per_layer": True})


@pytest.fixture(scope="module", params=[(True, False), (False, True), (True, True)], ids=["experts", "top-k", "both"])
def plan(request: pytest.FixtureRequest, model: Model) -> Plan:
    if len(model.geometry.trunk) < 2:
        pytest.skip("a single layer with experts cannot differ from others")
    return uneven_plan(model, *request.param)


@pytest.fixture(scope="module")
def written(model: Model, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uneven") / "out"
    prune(model.checkpoint, model.geometry, plan, out, max_shard_size=max(60_000, model.checkpoint.nbytes // 6))
    return out


def test_what_is_written_is_whole_and_says_its_layers_numbers(model: Model, plan: Plan, written: Path) -> None:
    require(verify_structure(written, model.checkpoint) + verify_bytes(written, model.checkpoint))
    checkpoint = open_checkpoint(written)
    geometry = read_geometry(checkpoint)
    assert geometry.uneven
    assert checkpoint.nbytes == nbytes_with(model.checkpoint, model.geometry, numbers(plan, model.geometry).experts)
    for block in geometry.trunk:
        entry = plan.layers[block.prefix]
        assert (block.experts, block.top_k) == (len(entry.kept), entry.top_k)


def test_law_3_pruned_is_the_source_sliced_by_hand(model: Model, plan: Plan, written: Path) -> None:
    ids = torch.stack([torch.from_numpy(s.ids) for s in DATA.sequences])
    loaded: Any = from_pretrained(written, dtype=torch.float32, experts_implementation="grouped_mm")
    assert torch.equal(logits(loaded.eval(), ids), logits(narrow(load(model.folder), plan), ids))


def test_law_3_as_verify_checks_it(model: Model, plan: Plan, written: Path) -> None:
    checks = verify_numeric(
        open_checkpoint(written), model.checkpoint, plan, DATA, device="cpu", notify=silent, advance=silent
    )
    assert [check for check in checks if not check.ok] == []


def test_transformers_alone_refuses_it(written: Path) -> None:
    with pytest.raises(ValueError, match="expertcut_"):
        AutoConfig.from_pretrained(written)


def test_layers_that_differ_must_be_asked_for(model: Model, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="stock runtimes load only"):
        prune(model.checkpoint, model.geometry, plan.model_copy(update={"per_layer": None}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_layers_differ_is_not_planned_for_again(model: Model, plan: Plan, written: Path) -> None:
    checkpoint = open_checkpoint(written)
    with pytest.raises(PlanError):
        prune(checkpoint, read_geometry(checkpoint), plan, written.parent / "again")


def test_layers_that_are_alike_stay_loadable(model: Model, tmp_path: Path) -> None:
    """Allowed to differ, but equal: an ordinary checkpoint."""
    plan = model.random_plan().model_copy(update={"per_layer": True})
    prune(model.checkpoint, model.geometry, plan, tmp_path / "out")
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == model.checkpoint.config["model_type"] and "expertcut" not in config
