"""Layers for multi-token prediction: pruned in lockstep, or dropped with the config field that announces them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from law_models import Model
from reference import load, logits
from tiny_models import read_tensors, silent, tiny_model, tokens, write_tiny

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


def test_nothing_is_left_that_speaks_of_them(tmp_path: Path) -> None:
    """In the config, its quantization entries of all kinds, and a companion that repeats them."""
    layer, others = "model.layers.3", ("lm_head", "model.layers.2.eh_proj", "model.layers.30.eh_proj")
    entries = {
        f"{layer}.eh_proj": None, f"{layer}*": None, f"{layer}.mlp.experts.5.up_proj": None, f"{layer}.mlp": None,
        "re:model\\.layers\\.3\\..*": None, f"{layer}.mlp.experts.*": None,
        **{name: name for name in others},
        "model.layers.2.mlp.experts.5.up_proj": "model.layers.2.mlp.experts.2.up_proj",
    }  # fmt: skip
    left = [entry for entry in entries.values() if entry]
    quantised = {"ignore": list(entries), "quantized_layers": dict.fromkeys(entries, {"bits": 4})}
    described: dict[str, Any] = {
        "use_mtp": True, "mtp_hybrid_override_pattern": "*E", "mtp_layers_block_type": ["full_attention", "moe"],
        "mtp_config": {"num_nextn_predict_layers": 1, "chain": False}, "num_mtp_modules": 0,
    }  # fmt: skip
    folder = write_tiny(tmp_path / "in", "glm4_moe", quantization_config=quantised, **described)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"exclude_modules": list(entries)}}))
    model = Model(folder)
    plan = model.plan((0, 1, 5, 6, 7)).model_copy(update={"mtp": "drop"})
    prune(model.checkpoint, model.geometry, plan, tmp_path / "out")
    assert load_json(tmp_path / "out/config.json") == model.checkpoint.config | {
        "num_nextn_predict_layers": 0, "use_mtp": False, "mtp_hybrid_override_pattern": "", "mtp_layers_block_type": [],
        "mtp_config": {"num_nextn_predict_layers": 0, "chain": False}, "n_routed_experts": 5,
        "quantization_config": {"ignore": left, "quantized_layers": dict.fromkeys(left, {"bits": 4})},
    }  # fmt: skip
    assert load_json(tmp_path / "out/hf_quant_config.json") == {"quantization": {"exclude_modules": left}}
    checks = [*verify_structure(tmp_path / "out", model.checkpoint), *verify_bytes(tmp_path / "out", model.checkpoint)]
    assert [check for check in checks if not check.ok] == []
