"""Law 3: a pruned checkpoint computes what its source computes with the router narrowed, through real files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from law_models import MODELS, Model, open_model
from reference import load, logits, moe_blocks
from tiny_models import silent, tokens

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan
from expertcut.measure.numeric import verify_numeric
from expertcut.rewrite import prune

DATA = tokens((30, 30, 30), seed=11)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Model:
    return open_model(request.param, tmp_path_factory, demo_model)


def narrow(source: Any, plan: Plan) -> Any:
    """Slice transformers' own modules of the source by hand: stacked experts, router rows, biases."""
    kept = {entry.layer: list(entry.kept) for entry in plan.layers.values()}
    top_k = {entry.layer: entry.top_k for entry in plan.layers.values()}
    for layer, block in moe_blocks(source).items():
        router = block.router if hasattr(block, "router") else block.gate
        for owner in (block.experts, router):
            for store in (owner._parameters, owner._buffers):
                for name, value in store.items():
                    assert value.shape[0] == owner.num_experts
                    narrowed = value.data[kept[layer]]
                    store[name] = torch.nn.Parameter(narrowed) if store is owner._parameters else narrowed
            owner.num_experts = len(kept[layer])
        router.top_k = top_k[layer] or router.top_k
    return source


@pytest.fixture(scope="module", params=[None, -1])
def plan(request: pytest.FixtureRequest, model: Model) -> Plan:
    """Five eighths of the experts; the model's own top-k, and one less."""
    return model.random_plan(seed=3, top_k=request.param and model.geometry.top_k + request.param)


@pytest.fixture(scope="module")
def written(model: Model, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    size = max(60_000, model.checkpoint.nbytes // 6)
    prune(model.checkpoint, model.geometry, plan, out, max_shard_size=size)
    return out


def test_law_3_pruned_is_the_source_sliced_by_hand(model: Model, plan: Plan, written: Path) -> None:
    """Two models of transformers, one loaded from the new files, one cut in memory: equal bit for bit."""
    ids = torch.stack([torch.from_numpy(s.ids) for s in DATA.sequences])
    found = logits(load(written), ids)
    source = load(model.folder)
    whole = logits(source, ids)
    expected = logits(narrow(source, plan), ids)
    assert torch.equal(found, expected)
    assert float((found - whole).abs().max()) > 1e-3 * float(whole.std())


def test_law_3_with_eager_experts(model: Model, plan: Plan, written: Path) -> None:
    """The same with transformers' loop over experts."""
    ids = torch.from_numpy(DATA.sequences[0].ids)[None]
    found = logits(load(written, experts="eager"), ids)
    assert torch.equal(found, logits(narrow(load(model.folder, experts="eager"), plan), ids))


def test_law_3_as_verify_checks_it(model: Model, plan: Plan, written: Path) -> None:
    """Streamed: equal to the narrowed source, within rounding of the masked one, and unlike the controls."""
    checks = verify_numeric(
        open_checkpoint(written), model.checkpoint, plan, DATA, device="cpu", notify=silent, advance=silent
    )
    assert [check for check in checks if not check.ok] == []
    assert len(checks) == 4
    assert "bit for bit" in checks[0].detail
    assert [("control" in check.name) for check in checks] == [False, False, True, True]


def test_law_3_for_the_identity_plan(model: Model, tmp_path: Path) -> None:
    """Nothing is cut, so the source itself is no control."""
    plan = model.plan(range(model.geometry.num_experts))
    prune(model.checkpoint, model.geometry, plan, tmp_path / "out")
    checks = verify_numeric(
        open_checkpoint(tmp_path / "out"), model.checkpoint, plan, DATA, device="cpu", notify=silent, advance=silent
    )
    assert [check.ok for check in checks] == [True] * 4
    assert checks[2].detail == "these tokens use no dropped expert"
    assert torch.equal(
        logits(load(tmp_path / "out"), torch.from_numpy(DATA.sequences[0].ids)[None]),
        logits(load(model.folder), torch.from_numpy(DATA.sequences[0].ids)[None]),
    )
