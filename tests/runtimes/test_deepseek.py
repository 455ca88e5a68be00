"""A tiny DeepSeek-V3 in block FP8 (groups, dense first layer, MTP layer) from profile to served, and its BF16 twin.

One plan, made from the FP8 checkpoint's own profile, prunes the FP8 checkpoint and its twins in float32 and bfloat16.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from engines import ask, assert_same_tokens, comparable, interpreter
from generate import transformers_tokens
from quantised_models import quantised_pair
from reference import load, logits, profile
from tiny_models import Tensors, read_tensors, silent, tokens, write_shards

from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.executor import LayerStream
from expertcut.calibrate.passage import run_through
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.measure.numeric import verify_numeric
from expertcut.model import read_geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure

HIDDEN, DENSE, WIDTH, VOCAB, HEADS, EXPERTS, KEPT = 32, 48, 24, 96, 4, 12, 9
EXTRA = "model.layers.3"
"""The layer for multi-token prediction, behind the three of the trunk."""
NEW_TOKENS = 24
PROMPTS = [sequence.ids.tolist() for sequence in tokens((9, 14, 6, 20, 11, 17), seed=5).sequences]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def fp8(name: str, rows: int, columns: int) -> Shapes:
    """A weight in blocks of 16 × 16, and its scales."""
    grid = (-(-rows // 16), -(-columns // 16))
    return {
        f"{name}.weight": (torch.float8_e4m3fn, (rows, columns)),
        f"{name}.weight_scale_inv": (torch.float32, grid),
    }


def plain(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": (torch.bfloat16, shape)}


def mlp(name: str, width: int) -> Shapes:
    sides = fp8(f"{name}.gate_proj", width, HIDDEN) | fp8(f"{name}.up_proj", width, HIDDEN)
    return sides | fp8(f"{name}.down_proj", HIDDEN, width)


def layer(number: int, experts: int) -> Shapes:
    """One decoder layer: latent attention of 4 heads (24 + 8, values 16), then a dense MLP or experts."""
    here, attention = f"model.layers.{number}", f"model.layers.{number}.self_attn"
    found = plain(f"{here}.input_layernorm", HIDDEN) | plain(f"{here}.post_attention_layernorm", HIDDEN)
    found |= fp8(f"{attention}.q_a_proj", 24, HIDDEN) | plain(f"{attention}.q_a_layernorm", 24)
    found |= fp8(f"{attention}.q_b_proj", HEADS * (24 + 8), 24)
    found |= fp8(f"{attention}.kv_a_proj_with_mqa", 16 + 8, HIDDEN) | plain(f"{attention}.kv_a_layernorm", 16)
    found |= fp8(f"{attention}.kv_b_proj", HEADS * (24 + 16), 16) | fp8(f"{attention}.o_proj", HIDDEN, HEADS * 16)
    if number == 0:
        return found | mlp(f"{here}.mlp", DENSE)
    for expert in range(experts):
        found |= mlp(f"{here}.mlp.experts.{expert}", WIDTH)
    found |= mlp(f"{here}.mlp.shared_experts", WIDTH) | plain(f"{here}.mlp.gate", experts, HIDDEN)
    return found | {f"{here}.mlp.gate.e_score_correction_bias": (torch.float32, (experts,))}


def expected(experts: int) -> Shapes:
    """Every tensor of the checkpoint, its dtype and shape."""
    found = plain("model.embed_tokens", VOCAB, HIDDEN) | plain("model.norm", HIDDEN) | plain("lm_head", VOCAB, HIDDEN)
    for number in range(4):
        found |= layer(number, experts)
    for part in ("enorm", "hnorm", "shared_head.norm"):
        found |= plain(f"{EXTRA}.{part}", HIDDEN)
    for part in ("embed_tokens", "shared_head.head"):
        found |= plain(f"{EXTRA}.{part}", VOCAB, HIDDEN)
    return found | plain(f"{EXTRA}.eh_proj", HIDDEN, 2 * HIDDEN)


def shapes(tensors: Tensors) -> Shapes:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint, with entries for the extra layer in its quantization config, as GLM-4.5 has them."""
    folder = tmp_path_factory.mktemp("deepseek") / "fp8"
    shutil.copytree(quantised_pair("FP8 blocks, MTP and groups", tmp_path_factory)[0], folder)
    config = json.loads((folder / "config.json").read_text())
    names = config["quantization_config"]["modules_to_not_convert"]
    more = [f"{EXTRA}.eh_proj", f"{EXTRA}.shared_head.head", "re:.*shared_head.*"]
    config["quantization_config"]["modules_to_not_convert"] = [*names, *more]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def plan(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the FP8 checkpoint, from its own profile."""
    out, checkpoint = tmp_path_factory.mktemp("plan"), open_checkpoint(source)
    found = profile(source, tokens((40, 40, 33)), out / "profile")
    made = make_plan(checkpoint, read_geometry(checkpoint), strategy="reap", experts=KEPT, top_k=2, profile=found)
    made.save(out / "plan.json")
    return out / "plan.json"


def pruned(folder: Path, plan: Plan, out: Path) -> Path:
    checkpoint = open_checkpoint(folder)
    prune(checkpoint, read_geometry(checkpoint), plan, out, max_shard_size=20_000)
    require(verify_structure(out, checkpoint) + verify_bytes(out, checkpoint))
    return out


@pytest.fixture(scope="module")
def twins(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unquantised checkpoint in float32 and in bfloat16, and both pruned with the FP8 checkpoint's plan."""
    out = tmp_path_factory.mktemp("twins")
    whole = quantised_pair("FP8 blocks, MTP and groups", tmp_path_factory)[1]
    shutil.copytree(whole, out / "bf16")
    tensors = read_tensors(whole)
    halves = {n: t if n.endswith("correction_bias") else t.bfloat16() for n, t in tensors.items()}
    write_shards(out / "bf16", halves, 50_000)
    chosen = Plan.load(plan)
    folders = {"bf16": out / "bf16", "float32, pruned": pruned(whole, chosen, out / "float32-pruned")}
    return folders | {"bf16, pruned": pruned(out / "bf16", chosen, out / "bf16-pruned")}


def test_the_pruned_checkpoint_holds_exactly_the_right_tensors(source: Path, plan: Path, tmp_path: Path) -> None:
    assert shapes(read_tensors(source)) == expected(EXPERTS)
    chosen = Plan.load(plan)
    out = pruned(source, chosen, tmp_path / "out")
    old, new = read_tensors(source), read_tensors(out)
    assert shapes(new) == expected(KEPT)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == new.keys() and len(set(index.values())) > 3
    kept = {1: chosen.layers["model.layers.1.mlp"].kept, 2: chosen.layers["model.layers.2.mlp"].kept}
    kept[3] = kept[2]  # in lockstep
    assert all(sum(e // 4 == group for e in ids) == 3 for ids in kept.values() for group in range(3))
    for name, tensor in new.items():
        place = re.fullmatch(r"(model\.layers\.(\d)\.mlp)\.(?:gate|experts\.(\d+))\.(.*)", name)
        if place is None:
            before = old[name]
        elif place[3]:
            before = old[f"{place[1]}.experts.{kept[int(place[2])][int(place[3])]}.{place[4]}"]
        else:
            before = old[name][list(kept[int(place[2])])]
        assert tensor.view(torch.uint8).equal(before.view(torch.uint8)), name
    config = json.loads((source / "config.json").read_text())
    found = json.loads((out / "config.json").read_text())
    assert found == config | {"n_routed_experts": KEPT, "num_experts_per_tok": 2}


def test_without_its_extra_layer(source: Path, plan: Path, tmp_path: Path) -> None:
    out = pruned(source, Plan.load(plan).model_copy(update={"mtp": "drop"}), tmp_path / "out")
    left = {name: shape for name, shape in expected(KEPT).items() if not name.startswith(f"{EXTRA}.")}
    assert shapes(read_tensors(out)) == left
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = [
        "lm_head",
        "model.layers.0.mlp.gate",
        "re:.*shared_head.*",
    ]
    counts = {"n_routed_experts": KEPT, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0}
    assert json.loads((out / "config.json").read_text()) == config | counts


def test_it_computes_what_its_twin_computes(source: Path, plan: Path, twins: dict[str, Path], tmp_path: Path) -> None:
    """The pruned FP8 checkpoint, dequantised layer by layer, against transformers with the pruned float32 twin."""
    chosen, data = Plan.load(plan), tokens((21, 21, 21))
    out = open_checkpoint(pruned(source, chosen, tmp_path / "out"))
    require(verify_numeric(out, open_checkpoint(source), chosen, data, device="cpu", notify=silent, advance=silent))
    layers = LayerStream(out, read_geometry(out), device=torch.device("cpu"), dtype=torch.float32)
    work = make_batches([s.ids for s in data.sequences], [0] * 3, 10**6)
    passage = run_through(layers, work, 1, lambda index, layer: [layer], silent, silent)
    found = torch.cat([part for _, _, part in passage.logits(0)], dim=1)
    layers.close()
    assert torch.equal(found, logits(load(twins["float32, pruned"]), work[0].ids))


@pytest.mark.runtimes
@pytest.mark.timeout(600)
def test_vllm_serves_the_twin(twins: dict[str, Path], repo: Path, tmp_path: Path) -> None:
    """Greedy tokens of transformers, in float32; the whole twin gives others."""
    whole, reference = (transformers_tokens(str(twins[name]), PROMPTS, NEW_TOKENS) for name in ("bf16", "bf16, pruned"))
    lengths = [comparable(*pair) for pair in zip(reference["tokens"], reference["margins"], strict=True)]
    assert sum(lengths) >= len(PROMPTS) * NEW_TOKENS // 2
    assert any(a[:n] != b[:n] for a, b, n in zip(whole["tokens"], reference["tokens"], lengths, strict=True))
    python = interpreter("vllm", repo)
    assert_same_tokens(ask(python, "vllm", twins["bf16, pruned"], PROMPTS, NEW_TOKENS, tmp_path), reference)
