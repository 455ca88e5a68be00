"""What the cost model counts, on published headers and tiny models: bytes, parameters, plans, profiles."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_names import NAMES, golden
from tiny_models import silent, tiny_model, tokens
from tiny_types import SUPPORTED, tiny_type

from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import ProfileOptions, profile_model
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import LayerPlan, Plan, make_plan
from expertcut.errors import PlanError, ProfileError
from expertcut.measure.cost import predict_plans
from expertcut.measure.cost_attention import read_attention
from expertcut.measure.cost_hardware import read_machine
from expertcut.measure.cost_model import model_cost, planned, spread
from expertcut.measure.cost_traffic import Load, distinct
from expertcut.model import ExpertTensor, Geometry, read_geometry
from expertcut.model.summary import nbytes_with, summarise

ACTIVATED = {
    "deepseek-v3": 37, "kimi-k2": 32, "kimi-k2.5": 32, "qwen3-235b": 22, "qwen3-30b": 3.3, "gpt-oss-120b": 5.1,
    "gpt-oss-20b": 3.6, "mixtral-8x7b": 12.9, "dbrx": 36, "glm-4.5-air": 12, "olmoe": 1.3, "minimax-m2": 10,
    "llama-4-scout": 17, "nemotron-3-nano": 3.2, "qwen3-30b-gptq": 3.3, "deepseek-v4-flash": 13,
}  # fmt: skip
"""Billions, as published; embeddings are in some of them."""


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_the_headers_hold(name: str) -> None:
    checkpoint = golden(name).checkpoint(thin=True)
    geometry = read_geometry(checkpoint)
    base = model_cost(checkpoint, geometry)
    experts = max(geometry.top_k, geometry.num_experts // 2)
    assert base.nbytes == nbytes_with(checkpoint, geometry, geometry.num_experts, mtp=False)
    assert base.with_counts(experts).nbytes == nbytes_with(checkpoint, geometry, experts, mtp=False)


@pytest.mark.parametrize("name", ACTIVATED)
def test_parameters_of_packed_and_plain_weights_are_those_that_are_published(name: str) -> None:
    checkpoint = golden(name).checkpoint()
    geometry = read_geometry(checkpoint)
    cost = model_cost(checkpoint, geometry)
    routed = sum(moe.chosen.sum() * moe.expert.parameters for moe in cost.moe)
    found = (routed + cost.dense.parameters + cost.head.parameters) / 1e9
    assert found == pytest.approx(ACTIVATED[name], rel=0.12)
    matrices = 2 if name == "nemotron-3-nano" else 3
    for moe in cost.moe:
        assert moe.expert.parameters == pytest.approx(matrices * geometry.hidden * geometry.expert_width, rel=0.002)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_type_of_model_is_counted(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Activated parameters are those of the summary, but for embeddings, towers and what only other inputs use."""
    checkpoint = open_checkpoint(tiny_type(name, tmp_path_factory))
    geometry = read_geometry(checkpoint)
    cost, summary = model_cost(checkpoint, geometry), summarise(checkpoint, geometry)
    used = sum(moe.chosen.sum() * (moe.expert.parameters + moe.row.parameters) for moe in cost.moe)
    used += cost.dense.parameters + cost.head.parameters
    tail = sum(  # the summary takes experts behind the routed ones for routed, the cost model for used by every token
        prod(checkpoint.tensors[name].shape)
        for name, role in geometry.roles.items()
        if isinstance(role, ExpertTensor) and role.expert >= geometry.blocks[role.block].experts
    )
    assert summary.activated is not None and 0 < used <= summary.activated * 1.001 + tail
    assert cost.attention.kv_nbytes > 0 and cost.layers == geometry.num_layers


def attention(config: dict[str, Any], layers: int = 4) -> tuple[Any, tuple[str, ...]]:
    checkpoint = golden("qwen3-30b").checkpoint(thin=True)
    geometry = read_geometry(checkpoint)
    return read_attention(config, replace(geometry, num_layers=layers))


def test_attention_by_kind() -> None:
    """Bytes of a cached token and layer in BF16, the layers that it is in, and what is said of the others."""
    grouped, quiet = attention({"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128})
    assert (grouped.kv_nbytes, grouped.kv_heads, grouped.decode_flops) == (2 * 2 * 4 * 128, 4, 4 * 32 * 128)
    assert grouped.cached(100) == 400 and quiet == ()
    latent, _ = attention({"num_attention_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128})
    assert (latent.kv_nbytes, latent.kv_heads) == (2 * 576, 1)
    assert latent.decode_flops == 2 * 16 * (576 + 512) and latent.prefill_flops == 2 * 16 * (192 + 128)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "linear_attention"]
    mixed, quiet = attention({"num_attention_heads": 8, "layer_types": kinds, "sliding_window": 64})
    assert [mixed.cached(10), mixed.cached(1000)] == [30, 1000 + 2 * 64] and quiet == ()
    assert mixed.kv_heads == 8, "as many as there are heads, where the config names no others"
    _, notes = attention({"num_attention_heads": 8, "sliding_window": 64})
    assert notes == ("all layers are taken as full attention, in spite of sliding_window",)
    assert attention({"num_attention_heads": 8, "sliding_window": 64, "use_sliding_window": False})[1] == ()
    wide, notes = attention({})
    assert wide.kv_nbytes == 4 * 2048 and "names no attention heads" in notes[0]


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Geometry]:
    checkpoint = open_checkpoint(tiny_model(request.param, tmp_path_factory))
    return checkpoint, read_geometry(checkpoint)


@pytest.fixture(scope="module")
def profile(model: tuple[Checkpoint, Geometry], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    options, out = ProfileOptions(device="cpu", dtype="float32"), tmp_path_factory.mktemp("cost")
    return profile_model(*model, tokens(), out, options, tokenizer="t", notify=silent, advance=silent)


def uneven(model: tuple[Checkpoint, Geometry]) -> Plan:
    """All experts in the first MoE layer, with a top-k of 1; in the others half of each group, top-k as it is."""
    geometry = model[1]
    half = make_plan(*model, strategy="odd", experts=geometry.num_experts // 2)
    first = geometry.trunk[0]
    whole = LayerPlan(layer=first.layer, kept=tuple(range(first.experts)), top_k=1)
    return half.model_copy(update={"layers": half.layers | {first.prefix: whole}, "per_layer": True})


def test_a_profile_decides_who_is_popular(model: tuple[Checkpoint, Geometry], profile: Profile) -> None:
    geometry = model[1]
    for block, moe in zip(geometry.trunk, model_cost(*model, profile).moe, strict=True):
        stats = profile.layer(block.prefix)
        assert moe.chosen == pytest.approx(stats.count / stats.tokens, abs=1e-8)
    flat = {f"{prefix}/count": np.ones_like(profile.arrays[f"{prefix}/count"]) for prefix in profile.prefixes}
    alike = model_cost(*model, Profile(profile.meta, {**profile.arrays, **flat}))
    for known, unknown in zip(alike.moe, model_cost(*model).moe, strict=True):
        assert known.chosen == pytest.approx(unknown.chosen)


def test_a_plan_narrows_every_layer_by_itself(model: tuple[Checkpoint, Geometry], profile: Profile) -> None:
    geometry, plan = model[1], uneven(model)
    left = planned(model_cost(*model, profile), geometry, plan)
    for block, moe in zip(geometry.trunk, left.moe, strict=True):
        entry, stats = plan.layers[block.prefix], profile.layer(block.prefix)
        k = entry.top_k or block.top_k
        assert len(moe.chosen) == len(entry.kept) and moe.chosen.sum() == pytest.approx(k)
        used = stats.rank_count[:, :k].sum(axis=1) / stats.tokens
        assert moe.chosen == pytest.approx(spread(used[list(entry.kept)], k))
    counts = {block.layer: len(plan.layers[block.prefix].kept) for block in geometry.trunk}
    counts |= {block.layer: counts[geometry.trunk[-1].layer] for block in geometry.mtp}
    assert left.nbytes == nbytes_with(*model, counts, mtp=False)


def test_plans_beside_the_unchanged_model(model: tuple[Checkpoint, Geometry], profile: Profile) -> None:
    plans = {"uneven": uneven(model), "same": make_plan(*model, top_k=model[1].top_k)}
    machine, load = read_machine("rtx4090"), Load(8, 64, 64)
    found = predict_plans(model_cost(*model, profile), model[1], plans, machine, load)
    assert list(found) == ["base", "uneven", "same"]
    assert found["same"].gain == pytest.approx(0) and found["uneven"].gain > 0
    assert found["uneven"].gain == pytest.approx(
        found["uneven"].tokens_per_second / found["base"].tokens_per_second - 1
    )
    chosen = [m.chosen for m in planned(model_cost(*model, profile), model[1], plans["uneven"]).moe]
    assert found["uneven"].experts == pytest.approx(np.mean([len(layer) for layer in chosen]))
    mean = np.mean([distinct(layer, np.array([8.0])) for layer in chosen])
    assert found["uneven"].touched == pytest.approx(mean)


def test_a_top_k_means_the_same_in_a_grid_and_in_a_plan(model: tuple[Checkpoint, Geometry], profile: Profile) -> None:
    work = model_cost(*model, profile)
    for k in range(1, model[1].top_k + 1):
        in_plan = planned(work, model[1], make_plan(*model, top_k=k))
        for one, other in zip(work.with_counts(None, k).moe, in_plan.moe, strict=True):
            assert np.sort(one.chosen) == pytest.approx(np.sort(other.chosen))


def test_what_belongs_to_another_model_is_refused(
    model: tuple[Checkpoint, Geometry], profile: Profile, demo_model: Path
) -> None:
    other = open_checkpoint(demo_model)
    geometry = read_geometry(other)
    with pytest.raises(PlanError, match="the plan"):
        planned(model_cost(other, geometry), geometry, uneven(model))
    with pytest.raises(ProfileError, match="not in the profile|knows 8 experts, the model 32"):
        model_cost(other, geometry, profile)
