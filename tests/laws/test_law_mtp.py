"""Layers for multi-token prediction: pruned in lockstep, or dropped with the config field that announces them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from law_models import Model
from reference import load, logits
from tiny_models import read_tensors, silent, tiny_model, tokens

from expertcut.checkpoint import load_json, open_checkpoint
from expertcut.measure.numeric import verify_numeric
from expertcut.model import read_geometry
from expertcut.model.summary import nbytes_with
from expertcut.rewrite import prune, verify_bytes, verify_structure

# name → what the tensors of its extra layer start with, and the config field
STORED = {
    "deepseek_v3": ("model.layers.3.", ("num_nextn_predict_layers",)),
    "glm4_moe": ("model.layers.3.", ("num_nextn_predict_layers",)),
    "qwen3_5_moe": ("mtp.", ("text_config", "mtp_num_hidden_layers")),
}


@pytest.fixture(params=STORED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_model(name, tmp_path_factory))


def test_dropped_with_their_field(name: str, model: Model, tmp_path: Path) -> None:
    start, path = STORED[name]
    plan, out = model.random_plan(seed=4).model_copy(update={"mtp": "drop"}), tmp_path / "out"
    result = prune(model.checkpoint, model.geometry, plan, out, max_shard_size=60_000)
    lockstep = tmp_path / "lockstep"
    prune(model.checkpoint, model.geometry, model.random_plan(seed=4), lockstep, max_shard_size=60_000)
    found, with_mtp = read_tensors(out), read_tensors(lockstep)
    assert any(name.startswith(start) for name in with_mtp)
    assert set(found) == {name for name in with_mtp if not name.startswith(start)}
    assert all(torch.equal(found[name], with_mtp[name]) for name in found)
    for folder, count in ((out, 0), (model.folder, 1)):
        scope = load_json(folder / "config.json")
        for key in path:
            scope = scope[key]
        assert scope == count
    assert read_geometry(open_checkpoint(out)).mtp == ()
    assert result.nbytes_after == nbytes_with(model.checkpoint, model.geometry, plan.experts, mtp=False)
    checks = [*verify_structure(out, model.checkpoint), *verify_bytes(out, model.checkpoint)]
    checks += verify_numeric(
        open_checkpoint(out), model.checkpoint, plan, tokens((20,)), device="cpu", notify=silent, advance=silent
    )
    assert [check for check in checks if not check.ok] == []
    ids = torch.from_numpy(tokens((20,)).sequences[0].ids)[None]
    assert torch.equal(logits(load(out), ids), logits(load(lockstep), ids))
