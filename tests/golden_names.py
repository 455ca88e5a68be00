"""What published checkpoints look like on disk: tensor names, dtypes and shapes, and the config keys that matter here.

`{a,b}` is one name each, `{0-3}` a range of numbers: `layers.{0-1}.{q,k}_proj` is four names. Complete: every tensor of
the language model is there, those that no rule looks into as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from expertcut.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo


@dataclass(frozen=True)
class Golden:
    """One published checkpoint."""

    config: dict[str, Any]
    rows: str
    """Lines of name, dtype, shape."""
    tensors: int
    """How many the published index counts."""
    source: str
    """Repository on the Hub."""

    def checkpoint(self, **config: Any) -> Checkpoint:
        """Headers only: one imaginary shard, tensors in the order of the rows; `config` overrides top-level keys."""
        return as_checkpoint(list(expand(self.rows)), self.config | config)

    def templates(self) -> set[str]:
        """Names without their numbers, `model.layers.*.mlp.experts.*.up_proj.weight`."""
        return {template(name) for name, _, _ in expand(self.rows)}


def expand(rows: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (name, dtype, shape) of every tensor."""
    for row in rows.split("\n"):
        if row.strip():
            pattern, dtype, shape = row.split()
            for name in _names(pattern):
                yield name, dtype, tuple(map(int, shape.split("x")))


def template(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def as_checkpoint(tensors: list[tuple[str, str, tuple[int, ...]]], config: dict[str, Any]) -> Checkpoint:
    """An opened checkpoint of these (name, dtype, shape), in one imaginary shard."""
    infos, at = {}, 0
    for name, dtype, shape in tensors:
        end = at + prod(shape) * DTYPE_BITS[dtype] // 8
        assert name not in infos, name
        infos[name] = TensorInfo(name, dtype, shape, "model.safetensors", at, end)
        at = end
    return Checkpoint("golden", Path("golden"), config, infos, {"model.safetensors": at}, False, ())


def _names(pattern: str) -> Iterator[str]:
    head, brace, rest = pattern.partition("{")
    if not brace:
        yield head
        return
    choices, rest = _choices(rest)
    for choice in choices:
        numbers = re.fullmatch(r"(\d+)-(\d+)", choice)
        values = map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else _names(choice)
        for value in values:
            yield from (f"{head}{value}{tail}" for tail in _names(rest))


def _choices(text: str) -> tuple[list[str], str]:
    """Split `a,b{c,d}}rest` into its choices and the rest."""
    depth, start, choices = 1, 0, []
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0 or (depth == 1 and character == ","):
            choices.append(text[start:at])
            start = at + 1
        if depth == 0:
            break
    return choices, text[start:]


QWEN3 = Golden(
    {
        "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "norm_topk_prob": True, "intermediate_size": 6144,
    },
    """
    {lm_head,model.embed_tokens}.weight BF16 151936x2048
    model.norm.weight BF16 2048
    model.layers.{0-47}.{input,post_attention}_layernorm.weight BF16 2048
    model.layers.{0-47}.self_attn.{q,k}_norm.weight BF16 128
    model.layers.{0-47}.self_attn.q_proj.weight BF16 4096x2048
    model.layers.{0-47}.self_attn.{k,v}_proj.weight BF16 512x2048
    model.layers.{0-47}.self_attn.o_proj.weight BF16 2048x4096
    model.layers.{0-47}.mlp.gate.weight BF16 128x2048
    model.layers.{0-47}.mlp.experts.{0-127}.{gate,up}_proj.weight BF16 768x2048
    model.layers.{0-47}.mlp.experts.{0-127}.down_proj.weight BF16 2048x768
    """,
    18867,
    "Qwen/Qwen3-30B-A3B",
)  # fmt: skip

OLMOE = Golden(
    {
        "model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 2048,
        "intermediate_size": 1024, "num_hidden_layers": 16, "norm_topk_prob": False,
    },
    """
    {model.embed_tokens,lm_head}.weight BF16 50304x2048
    model.norm.weight BF16 2048
    model.layers.{0-15}.{input,post_attention}_layernorm.weight BF16 2048
    model.layers.{0-15}.self_attn.{q,k,v,o}_proj.weight BF16 2048x2048
    model.layers.{0-15}.self_attn.{q,k}_norm.weight BF16 2048
    model.layers.{0-15}.mlp.gate.weight BF16 64x2048
    model.layers.{0-15}.mlp.experts.{0-63}.{gate,up}_proj.weight BF16 1024x2048
    model.layers.{0-15}.mlp.experts.{0-63}.down_proj.weight BF16 2048x1024
    """,
    3219,
    "allenai/OLMoE-1B-7B-0125-Instruct",
)  # fmt: skip

MIXTRAL = Golden(
    {
        "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32,
    },
    """
    {model.embed_tokens,lm_head}.weight BF16 32000x4096
    model.norm.weight BF16 4096
    model.layers.{0-31}.{input,post_attention}_layernorm.weight BF16 4096
    model.layers.{0-31}.self_attn.{q,o}_proj.weight BF16 4096x4096
    model.layers.{0-31}.self_attn.{k,v}_proj.weight BF16 1024x4096
    model.layers.{0-31}.block_sparse_moe.gate.weight BF16 8x4096
    model.layers.{0-31}.block_sparse_moe.experts.{0-7}.w{1,3}.weight BF16 14336x4096
    model.layers.{0-31}.block_sparse_moe.experts.{0-7}.w2.weight BF16 4096x14336
    """,
    995,
    "mistralai/Mixtral-8x7B-v0.1",
)  # fmt: skip

QWEN2 = Golden(
    {
        "model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4, "hidden_size": 2048,
        "moe_intermediate_size": 1408, "num_hidden_layers": 24, "norm_topk_prob": False, "intermediate_size": 5632,
    },
    """
    {model.embed_tokens,lm_head}.weight BF16 151936x2048
    model.norm.weight BF16 2048
    model.layers.{0-23}.{input,post_attention}_layernorm.weight BF16 2048
    model.layers.{0-23}.self_attn.{q,k,v,o}_proj.weight BF16 2048x2048
    model.layers.{0-23}.self_attn.{q,k,v}_proj.bias BF16 2048
    model.layers.{0-23}.mlp.gate.weight BF16 60x2048
    model.layers.{0-23}.mlp.shared_expert_gate.weight BF16 1x2048
    model.layers.{0-23}.mlp.shared_expert.{gate,up}_proj.weight BF16 5632x2048
    model.layers.{0-23}.mlp.shared_expert.down_proj.weight BF16 2048x5632
    model.layers.{0-23}.mlp.experts.{0-59}.{gate,up}_proj.weight BF16 1408x2048
    model.layers.{0-23}.mlp.experts.{0-59}.down_proj.weight BF16 2048x1408
    """,
    4659,
    "Qwen/Qwen1.5-MoE-A2.7B",
)  # fmt: skip

DEEPSEEK_V2_LITE = Golden(
    {
        "model_type": "deepseek_v2", "n_routed_experts": 64, "num_experts_per_tok": 6, "hidden_size": 2048,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "n_group": 1, "topk_group": 1,
        "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "first_k_dense_replace": 1,
    },
    """
    {lm_head,model.embed_tokens}.weight BF16 102400x2048
    model.norm.weight BF16 2048
    model.layers.{0-26}.{input,post_attention}_layernorm.weight BF16 2048
    model.layers.{0-26}.self_attn.kv_a_layernorm.weight BF16 512
    model.layers.{0-26}.self_attn.kv_a_proj_with_mqa.weight BF16 576x2048
    model.layers.{0-26}.self_attn.kv_b_proj.weight BF16 4096x512
    model.layers.{0-26}.self_attn.o_proj.weight BF16 2048x2048
    model.layers.{0-26}.self_attn.q_proj.weight BF16 3072x2048
    model.layers.0.mlp.{gate,up}_proj.weight BF16 10944x2048
    model.layers.0.mlp.down_proj.weight BF16 2048x10944
    model.layers.{1-26}.mlp.experts.{0-63}.{gate,up}_proj.weight BF16 1408x2048
    model.layers.{1-26}.mlp.experts.{0-63}.down_proj.weight BF16 2048x1408
    model.layers.{1-26}.mlp.shared_experts.{gate,up}_proj.weight BF16 2816x2048
    model.layers.{1-26}.mlp.shared_experts.down_proj.weight BF16 2048x2816
    model.layers.{1-26}.mlp.gate.weight BF16 64x2048
    """,
    5291,
    "deepseek-ai/DeepSeek-V2-Lite-Chat",
)  # fmt: skip

DEEPSEEK_R1 = Golden(
    {
        "model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 7168,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "n_group": 8,
        "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "first_k_dense_replace": 3, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    """
    {lm_head,model.embed_tokens,model.layers.61.embed_tokens,model.layers.61.shared_head.head}.weight BF16 129280x7168
    model.norm.weight BF16 7168
    model.layers.{0-61}.{input,post_attention}_layernorm.weight BF16 7168
    model.layers.{0-61}.self_attn.kv_a_layernorm.weight BF16 512
    model.layers.{0-61}.self_attn.q_a_layernorm.weight BF16 1536
    model.layers.{0-61}.self_attn.kv_a_proj_with_mqa.weight F8_E4M3 576x7168
    model.layers.{0-61}.self_attn.kv_a_proj_with_mqa.weight_scale_inv F32 5x56
    model.layers.{0-61}.self_attn.kv_b_proj.weight F8_E4M3 32768x512
    model.layers.{0-61}.self_attn.kv_b_proj.weight_scale_inv F32 256x4
    model.layers.{0-61}.self_attn.o_proj.weight F8_E4M3 7168x16384
    model.layers.{0-61}.self_attn.o_proj.weight_scale_inv F32 56x128
    model.layers.{0-61}.self_attn.q_a_proj.weight F8_E4M3 1536x7168
    model.layers.{0-61}.self_attn.q_a_proj.weight_scale_inv F32 12x56
    model.layers.{0-61}.self_attn.q_b_proj.weight F8_E4M3 24576x1536
    model.layers.{0-61}.self_attn.q_b_proj.weight_scale_inv F32 192x12
    model.layers.{0-2}.mlp.{gate,up}_proj.weight F8_E4M3 18432x7168
    model.layers.{0-2}.mlp.{gate,up}_proj.weight_scale_inv F32 144x56
    model.layers.{0-2}.mlp.down_proj.weight F8_E4M3 7168x18432
    model.layers.{0-2}.mlp.down_proj.weight_scale_inv F32 56x144
    model.layers.{3-61}.mlp.{experts.{0-255},shared_experts}.{gate,up}_proj.weight F8_E4M3 2048x7168
    model.layers.{3-61}.mlp.{experts.{0-255},shared_experts}.{gate,up}_proj.weight_scale_inv F32 16x56
    model.layers.{3-61}.mlp.{experts.{0-255},shared_experts}.down_proj.weight F8_E4M3 7168x2048
    model.layers.{3-61}.mlp.{experts.{0-255},shared_experts}.down_proj.weight_scale_inv F32 56x16
    model.layers.{3-61}.mlp.gate.weight BF16 256x7168
    model.layers.{3-61}.mlp.gate.e_score_correction_bias F32 256
    model.layers.61.eh_proj.weight BF16 7168x14336
    model.layers.61.{enorm,hnorm,shared_head.norm}.weight BF16 7168
    """,
    91991,
    "deepseek-ai/DeepSeek-R1",
)  # fmt: skip

GLM_AIR = Golden(
    {
        "model_type": "glm4_moe", "n_routed_experts": 128, "num_experts_per_tok": 8, "hidden_size": 4096,
        "moe_intermediate_size": 1408, "num_hidden_layers": 46, "num_nextn_predict_layers": 1, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 1,
    },
    """
    {lm_head,model.embed_tokens,model.layers.46.embed_tokens,model.layers.46.shared_head.head}.weight BF16 151552x4096
    model.norm.weight BF16 4096
    model.layers.{0-46}.{input,post_attention}_layernorm.weight BF16 4096
    model.layers.{0-46}.self_attn.q_proj.weight BF16 12288x4096
    model.layers.{0-46}.self_attn.q_proj.bias BF16 12288
    model.layers.{0-46}.self_attn.{k,v}_proj.weight BF16 1024x4096
    model.layers.{0-46}.self_attn.{k,v}_proj.bias BF16 1024
    model.layers.{0-46}.self_attn.o_proj.weight BF16 4096x12288
    model.layers.0.mlp.{gate,up}_proj.weight BF16 10944x4096
    model.layers.0.mlp.down_proj.weight BF16 4096x10944
    model.layers.{1-46}.mlp.{experts.{0-127},shared_experts}.{gate,up}_proj.weight BF16 1408x4096
    model.layers.{1-46}.mlp.{experts.{0-127},shared_experts}.down_proj.weight BF16 4096x1408
    model.layers.{1-46}.mlp.gate.weight BF16 128x4096
    model.layers.{1-46}.mlp.gate.e_score_correction_bias F32 128
    model.layers.46.eh_proj.weight BF16 4096x8192
    model.layers.46.{enorm,hnorm,shared_head.norm}.weight BF16 4096
    """,
    18329,
    "zai-org/GLM-4.5-Air",
)  # fmt: skip

_GPT_OSS_DENSE = """
    {lm_head,model.embed_tokens}.weight BF16 201088x2880
    model.norm.weight BF16 2880
    model.layers.{0-23}.{input,post_attention}_layernorm.weight BF16 2880
    model.layers.{0-23}.self_attn.sinks BF16 64
    model.layers.{0-23}.self_attn.q_proj.weight BF16 4096x2880
    model.layers.{0-23}.self_attn.q_proj.bias BF16 4096
    model.layers.{0-23}.self_attn.{k,v}_proj.weight BF16 512x2880
    model.layers.{0-23}.self_attn.{k,v}_proj.bias BF16 512
    model.layers.{0-23}.self_attn.o_proj.weight BF16 2880x4096
    model.layers.{0-23}.self_attn.o_proj.bias BF16 2880
    model.layers.{0-23}.mlp.router.weight BF16 32x2880
    model.layers.{0-23}.mlp.router.bias BF16 32
    model.layers.{0-23}.mlp.experts.gate_up_proj_bias BF16 32x5760
    model.layers.{0-23}.mlp.experts.down_proj_bias BF16 32x2880
"""
_GPT_OSS_CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
    "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
}  # fmt: skip

GPT_OSS_MXFP4 = Golden(
    _GPT_OSS_CONFIG | {"quantization_config": {"quant_method": "mxfp4"}},
    _GPT_OSS_DENSE
    + """
    model.layers.{0-23}.mlp.experts.gate_up_proj_blocks U8 32x5760x90x16
    model.layers.{0-23}.mlp.experts.gate_up_proj_scales U8 32x5760x90
    model.layers.{0-23}.mlp.experts.down_proj_blocks U8 32x2880x90x16
    model.layers.{0-23}.mlp.experts.down_proj_scales U8 32x2880x90
    """,
    459,
    "openai/gpt-oss-20b",
)

GPT_OSS_BF16 = Golden(
    _GPT_OSS_CONFIG,
    _GPT_OSS_DENSE
    + """
    model.layers.{0-23}.mlp.experts.gate_up_proj BF16 32x2880x5760
    model.layers.{0-23}.mlp.experts.down_proj BF16 32x2880x2880
    """,
    411,
    "unsloth/gpt-oss-20b-BF16",
)

QWEN3_VL = Golden(
    {
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "norm_topk_prob": True,
        },
    },
    """
    {lm_head,model.language_model.embed_tokens}.weight BF16 151936x2048
    model.language_model.norm.weight BF16 2048
    model.language_model.layers.{0-47}.{input,post_attention}_layernorm.weight BF16 2048
    model.language_model.layers.{0-47}.mlp.gate.weight BF16 128x2048
    model.language_model.layers.{0-47}.mlp.experts.gate_up_proj BF16 128x2048x1536
    model.language_model.layers.{0-47}.mlp.experts.down_proj BF16 128x768x2048
    model.language_model.layers.{0-47}.self_attn.{q,k}_norm.weight BF16 128
    model.language_model.layers.{0-47}.self_attn.q_proj.weight BF16 4096x2048
    model.language_model.layers.{0-47}.self_attn.{k,v}_proj.weight BF16 512x2048
    model.language_model.layers.{0-47}.self_attn.o_proj.weight BF16 2048x4096
    """,
    531,
    "Qwen/Qwen3-VL-30B-A3B-Instruct (text part)",
)  # fmt: skip

_QWEN35_LINEAR = "0-2,4-6,8-10,12-14,16-18,20-22,24-26,28-30,32-34,36-38"
_QWEN35_FULL = "3,7,11,15,19,23,27,31,35,39"
QWEN3_5 = Golden(
    {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "num_experts": 256, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 512,
            "num_hidden_layers": 40, "shared_expert_intermediate_size": 512, "mtp_num_hidden_layers": 1,
        },
    },
    f"""
    {{lm_head,model.language_model.embed_tokens}}.weight BF16 248320x2048
    {{model.language_model,mtp}}.norm.weight BF16 2048
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.A_log F32 32
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.dt_bias BF16 32
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.norm.weight F32 128
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.conv1d.weight BF16 8192x1x4
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.in_proj_{{a,b}}.weight BF16 32x2048
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.in_proj_qkv.weight BF16 8192x2048
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.in_proj_z.weight BF16 4096x2048
    model.language_model.layers.{{{_QWEN35_LINEAR}}}.linear_attn.out_proj.weight BF16 2048x4096
    {{model.language_model.layers.{{0-39}},mtp.layers.0}}.{{input,post_attention}}_layernorm.weight BF16 2048
    {{model.language_model.layers.{{0-39}},mtp.layers.0}}.mlp.gate.weight BF16 256x2048
    {{model.language_model.layers.{{0-39}},mtp.layers.0}}.mlp.shared_expert_gate.weight BF16 1x2048
    {{model.language_model.layers.{{0-39}},mtp.layers.0}}.mlp.shared_expert.{{gate,up}}_proj.weight BF16 512x2048
    {{model.language_model.layers.{{0-39}},mtp.layers.0}}.mlp.shared_expert.down_proj.weight BF16 2048x512
    {{model.language_model.layers.{{{_QWEN35_FULL}}},mtp.layers.0}}.self_attn.{{q,k}}_norm.weight BF16 256
    {{model.language_model.layers.{{{_QWEN35_FULL}}},mtp.layers.0}}.self_attn.q_proj.weight BF16 8192x2048
    {{model.language_model.layers.{{{_QWEN35_FULL}}},mtp.layers.0}}.self_attn.{{k,v}}_proj.weight BF16 512x2048
    {{model.language_model.layers.{{{_QWEN35_FULL}}},mtp.layers.0}}.self_attn.o_proj.weight BF16 2048x4096
    model.language_model.layers.{{0-39}}.mlp.experts.gate_up_proj BF16 256x1024x2048
    model.language_model.layers.{{0-39}}.mlp.experts.down_proj BF16 256x2048x512
    mtp.layers.0.mlp.experts.{{0-255}}.{{gate,up}}_proj.weight BF16 512x2048
    mtp.layers.0.mlp.experts.{{0-255}}.down_proj.weight BF16 2048x512
    mtp.fc.weight BF16 2048x4096
    mtp.pre_fc_norm_{{embedding,hidden}}.weight BF16 2048
    """,
    1478,
    "Qwen/Qwen3.5-35B-A3B (text part)",
)  # fmt: skip

GOLDENS = {
    "qwen3": QWEN3, "qwen2": QWEN2, "olmoe": OLMOE, "mixtral": MIXTRAL, "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-r1": DEEPSEEK_R1, "glm-4.5-air": GLM_AIR, "gpt-oss-mxfp4": GPT_OSS_MXFP4, "gpt-oss-bf16": GPT_OSS_BF16,
    "qwen3-vl": QWEN3_VL, "qwen3.5": QWEN3_5,
}  # fmt: skip
