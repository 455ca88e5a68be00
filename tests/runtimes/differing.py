"""Checkpoints whose layers differ in expert count and top-k, small enough for every engine's CPU backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from quantised_models import BLOCK, Packed, fp8_block, int4, int8, quantised_pair
from tiny_models import Tensors, read_tensors, tokens, write_shards

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import LayerPlan, Plan, make_plan
from expertcut.model import read_geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure

PROMPTS = [sequence.ids.tolist() for sequence in tokens((9, 14, 6, 20, 11), seed=5).sequences]
NEW_TOKENS = 20
_COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 4, "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": None,
    "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
"""Heads are 32 wide, as vLLM's CPU attention wants them."""
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"intermediate_size": 32, "num_experts": 8}),
    "mixtral": ("Mixtral", {"intermediate_size": 32, "num_local_experts": 8}),
    "deepseek_v2": ("DeepseekV2", {
        "moe_intermediate_size": 32, "intermediate_size": 64, "n_routed_experts": 12, "num_experts_per_tok": 3,
        "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
    }),
    "glm4_moe": ("Glm4Moe", {
        "moe_intermediate_size": 32, "intermediate_size": 64, "n_routed_experts": 8, "head_dim": 32, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    }),
    "gpt_oss": ("GptOss", {
        "intermediate_size": 32, "num_local_experts": 8, "head_dim": 32, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
}  # fmt: skip
"""By style: transformers' class, and what its config has besides the common keys."""
STYLES = ("qwen3_moe", "deepseek_v3", *BUILT)


def source(style: str, factory: pytest.TempPathFactory) -> Path:
    """A whole model of a style: the built-in one, DeepSeek-V3 with groups, or one that transformers builds."""
    if style == "qwen3_moe":
        return Path(__file__).parents[2] / "expertcut" / "_demo_model"
    if style == "deepseek_v3":
        return quantised_pair("FP8 blocks, MTP and groups", factory)[1]
    folder = factory.mktemp(style) / "model"
    name, config = BUILT[style]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**_COMMON | config))
    for parameter in model.parameters():
        if parameter.dim() == 3 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def differing_plan(folder: Path, experts: bool = True) -> Plan:
    """Every other layer with about three quarters of the experts (if wanted) and a smaller top-k."""
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    everything, groups = tuple(range(geometry.num_experts)), geometry.n_group
    made = make_plan(checkpoint, geometry, strategy="random", experts=geometry.num_experts * 3 // 4 // groups * groups)
    layers = {
        prefix: LayerPlan(layer=entry.layer, kept=entry.kept if place % 2 and experts else everything,
                          top_k=geometry.top_k - place % 2)
        for place, (prefix, entry) in enumerate(made.layers.items())
    }  # fmt: skip
    return made.model_copy(update={"layers": layers, "per_layer": True})


def differing(folder: Path, out: Path, experts: bool = True) -> Path:
    """The checkpoint that such a plan makes."""
    checkpoint = open_checkpoint(folder)
    prune(checkpoint, read_geometry(checkpoint), differing_plan(folder, experts), out)
    require(verify_structure(out, checkpoint) + verify_bytes(out, checkpoint))
    return out


def _compressed(kind: str, activations: str | None, **weights: Any) -> dict[str, Any]:
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"symmetric": True} | weights}
    if activations:
        group["input_activations"] = {"num_bits": 8, "type": activations, "strategy": "token", "dynamic": True}
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"]
    config = {"format": kind, "config_groups": {"group_0": group}, "ignore": ignore}
    return {"quant_method": "compressed-tensors"} | config


_LEFT = ("mlp.gate", *(f"self_attn.{part}_proj" for part in "qkvo"))
QUANTISED: dict[str, tuple[Callable[..., Packed], dict[str, Any]]] = {
    "FP8 blocks": (fp8_block(torch.float32), {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.{name}" for i in range(3) for name in _LEFT)],
    }),
    "INT8": (int8, _compressed("int-quantized", "int", num_bits=8, type="int", strategy="channel")),
    "INT4": (int4(), _compressed("pack-quantized", None, num_bits=4, type="int", strategy="group", group_size=BLOCK)),
}  # fmt: skip


def quantised(name: str, folder: Path, out: Path) -> Path:
    """A checkpoint with its experts, and nothing else, in a quantised format."""
    pack, config = QUANTISED[name]
    random = np.random.default_rng(7)
    tensors: Tensors = {}
    for tensor, values in read_tensors(folder).items():
        parts = pack(tuple(values.shape), random)[0] if ".experts." in tensor else {"": values}
        tensors |= {tensor + end: part for end, part in parts.items()}
    shutil.copytree(folder, out)
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    write_shards(out, tensors)
    return out
