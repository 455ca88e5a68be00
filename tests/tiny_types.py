"""Tiny checkpoints of every decoder language model with routed experts in the installed transformers, as it saves them.

`MODEL_TYPES` is found by program, so that a new release shows what is missing. A config is shrunk by the names of its
fields (`SIZES`), here and in its parts; lists with an entry per layer are dropped, so that the class derives them anew.
`TWEAKS` holds what is left for single types, by path. Hidden 32, 3 layers, 8 experts, float32, routers spread widely.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCAB
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from expertcut.model import REFUSED

HIDDEN, LAYERS, EXPERTS, TOP_K, WIDTH, DENSE = 32, 3, 8, 2, 24, 40

EXCLUDED = {
    "switch_transformers": "encoder-decoder", "nllb_moe": "encoder-decoder", "vitpose_backbone": "vision",
    "vitpose": "vision", "openai_privacy_filter": "token classifier", "bamba": "num_experts is the constant 1",
}  # fmt: skip
"""Modules that speak of experts and hold no decoder language model with routed ones."""
COMPOSITE = ("kimi_k25", "nemotron_h_omni", "nemo_speechlm")
"""Types without experts of their own whose language part is one of the others."""
_EXPERTS = re.compile(r"use_experts_implementation|num_experts|n_routed_experts|num_local_experts|moe_num_experts")
_TABLES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_WHOLE = {
    "qwen3_5_moe", "qwen4_exp", "llama4", "gemma4", "dots3_note", "inkling2", "inkling_mm_model", "minimax_m3_vl",
}  # fmt: skip
"""Types whose checkpoints hold towers too, while the class for causal language models drops them."""


def model_types() -> tuple[str, ...]:
    """Every model type with a class that generates text and routed experts."""
    folders = {
        path.parent.name
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        if path.parent.name not in EXCLUDED and _EXPERTS.search(path.read_text())
    }
    return tuple(
        name
        for name in getattr(configuration_auto, "CONFIG_MAPPING_NAMES")  # noqa: B009
        if name in COMPOSITE or (model_type_to_module_name(name) in folders and _class_name(name))
    )


def _class_name(model_type: str) -> str | None:
    if model_type == "qwen3_omni_moe":
        return "Qwen3OmniMoeForConditionalGeneration"
    for table in _TABLES[model_type in _WHOLE :]:
        name = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).get(model_type)
        if name:
            return str(name if isinstance(name, str) else name[0])
    return None


def model_class(model_type: str) -> Any:
    """The class that generates text for a model type."""
    name = _class_name(model_type)
    assert name is not None
    if hasattr(transformers, name):
        return getattr(transformers, name)
    folder = model_type_to_module_name(model_type)
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "unpadded_vocab_size": VOCAB, "hidden_size": HIDDEN, "d_model": HIDDEN,
    "num_hidden_layers": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "depth": 2, "encoder_layers": 2,
    "max_position_embeddings": 512, "max_seq_len": 512, "model_max_length": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "global_head_dim": 16, "swa_head_dim": 16, "num_global_key_value_heads": 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "encoder_attention_heads": 4, "kv_channels": 16, "v_head_dim": 16,
    "swa_v_head_dim": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "q_lora_rank": 20, "kv_lora_rank": 20,
    "o_lora_rank": 20, "o_groups": 2, "qk_head_dim": 32, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16,
    "sliding_window": 16, "sliding_window_size": 16, "attention_chunk_size": 16, "linear_num_heads": 4,
    "linear_head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_d_state": 12, "ssm_state_size": 12, "mamba_dt_rank": 6, "mamba_chunk_size": 16, "chunk_size": 16,
    "block_size": 16, "intermediate_size": DENSE, "ffn_hidden_size": DENSE, "moe_intermediate_size": WIDTH,
    "expert_ffn_hidden_size": WIDTH, "encoder_ffn_dim": DENSE, "shared_expert_intermediate_size": 28,
    "moe_shared_expert_intermediate_size": 28, "shared_intermediate_size": 28, "share_expert_dim": 28,
    "shared_experts_intermediate_size": 28, "dense_intermediate_size": DENSE, "intermediate_size_mlp": DENSE,
    "moe_hidden_size": 20, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "num_experts_per_token": TOP_K, "moe_topk": TOP_K,
    "moe_k": TOP_K, "moe_top_k": TOP_K, "top_k_experts": TOP_K, "zero_expert_num": 4, "router_hidden_size": 20,
    "patch_size": 4, "image_size": 16, "out_hidden_size": HIDDEN, "projection_dim": HIDDEN, "text_hidden_size": HIDDEN,
    "num_position_embeddings": 16, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB, "d_rel": 4,
    "rel_extent": 16, "ngram_vocab_size_base": 97, "split_ngram_parts": 2, "ple_embed_dim": HIDDEN, "hc_lowrank": 4,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "num_nextn_predict_layers": 0, "num_mtp_layers": 0,
}  # fmt: skip
PER_LAYER = {
    "layer_types", "mlp_layer_types", "indexer_types", "layers_block_type", "mlp_only_layers", "moe_layers",
    "no_rope_layers", "no_rope_layer_types", "local_layer_ids", "num_attention_heads_per_layer", "layer_rope_theta",
    "swiglu_limits", "swiglu_limits_shared", "kv_source_layers", "compress_ratios", "partial_rotary_factors",
    "hybrid_layer_pattern", "moe_layer_freq", "dense_layers", "dense_layer_ids", "layer_rope_types", "per_layer_config",
    "layer_group_size", "no_rope_layer_interval_list", "rope_layers",
}  # fmt: skip
_LEFT = {
    "rope_parameters", "rope_scaling", "transformers_version", "architectures", "dtype", "model_type", "id2label",
    "label2id",
}  # fmt: skip
_DEFAULT = object()
"""Marks a field that is left to the class."""
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_SPARSE = ["dense", "sparse", "sparse"]
_NEMOTRON = ["moe", "linear_attention", "full_attention", "moe", "mlp"]
_GEMMA = {
    "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": TOP_K, "moe_intermediate_size": WIDTH,
    "global_head_dim": 16, "num_global_key_value_heads": 2,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 2, "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
}  # fmt: skip


def _in(part: str, tweaks: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{path}": value for path, value in tweaks.items()}


def _text(**tweaks: Any) -> dict[str, Any]:
    return _in("text_config", tweaks)


TWEAKS: dict[str, dict[str, Any]] = {
    "aria": {"vision_config.patch_size": 4},
    "bailing_hybrid": {"layer_types": _LINEAR},
    "beam": {"mlp_layer_types": _SPARSE},
    "cohere2_moe": {"num_shared_experts": 1},
    "dbrx": _in("attn_config", {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0}),
    "deepseek_ocr2": _text(num_experts_per_tok=TOP_K, mlp_layer_types=_SPARSE, head_dim=8),
    "deepseek_v2": {"num_experts_per_tok": TOP_K},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "diffusion_gemma": _text(**_GEMMA),
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_shared_experts": 1},
    "dots3_note": _text(num_key_value_heads=4) | _in("vision_config", {
        "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN, "pyramid_num_routed": [0, 4, 6],
    }) | _in("audio_config", {"adapter_out_dim": HIDDEN, "adapter_input_size": HIDDEN}),
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "ernie4_5_vl_moe": _text(moe_intermediate_size=[WIDTH, 12], rope_parameters={
        "rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2],
    }),
    "flint": {"mlp_only_layers": [0]},
    "gemma4": _text(**_GEMMA),
    "gemma4_text": _GEMMA,
    "glm4_moe": {"head_dim": 16},
    "glm4v_moe": _text(head_dim=16, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    }),
    "glm5_next": _text(
        num_key_value_heads=4, mlp_layer_types=_SPARSE, qk_rope_head_dim=0, head_dim=_DEFAULT,
        layer_types=["linear_attention", "linear_attention", "indexed_attention"],
    ),
    "granitemoehybrid": {"layer_types": _LINEAR},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [TOP_K] * LAYERS},
    "inkling_mm_model": _in("vision_config", {"n_layers": 8, "num_hidden_layers": 8}),
    "jamba": {"expert_layer_offset": 0, "attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": {"layer_types": _LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": _text(moe_layers=[0, 2], num_experts_per_tok=1) | _in("vision_config", {
        "vision_output_dim": HIDDEN, "projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
    }),
    "llama4_text": {"moe_layers": [0, 2], "num_experts_per_tok": 1},
    "minimax_m3_vl": _text(mlp_layer_types=_SPARSE),
    "minimax_m3_vl_text": {"mlp_layer_types": _SPARSE},
    "mistral4": {"head_dim": _DEFAULT},
    "muse_spark": _in("audio_config", {"num_hidden_layers": 4, "out_hidden_size": HIDDEN}),
    "nemo_speechlm": _text(n_groups=2, layers_block_type=_NEMOTRON)
    | _in("word_timestamp_config", {"blank_token_id": 0, "num_key_value_heads": 4})
    | _in("audio_config", {
        "diarization_config.head_config.audio_hidden_size": HIDDEN, "asr_config.num_key_value_heads": 4,
        "diarization_config.audio_config.num_key_value_heads": 4,
    }),
    "nemotron_h": {"layers_block_type": _NEMOTRON, "n_groups": 2, "head_dim": 16},
    "nemotron_h_omni": _text(n_groups=2, layers_block_type=_NEMOTRON)
    | {"vision_config.video_temporal_patch_size": 2, "vision_hidden_size": HIDDEN},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_5_moe": _text(layer_types=_LINEAR),
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_next": {"layer_types": _LINEAR},
    "qwen3_omni_moe": _in("talker_config", {
        "text_config.shared_expert_intermediate_size": 28, "thinker_hidden_size": HIDDEN, "spatial_merge_size": 2,
        "text_config.num_local_experts": 6, "text_config.num_experts": 6,
    }) | {"thinker_config.vision_start_token_id": 92},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 92},
    "qwen4_exp": _text(**_QWEN4),
    "qwen4_exp_text": _QWEN4,
    "step3p7": _text(sliding_window=16, mlp_layer_types=_SPARSE),
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def _shrunk(config: Any, tweaks: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keyword arguments for a small config of the same class."""
    kwargs: dict[str, Any] = {}
    inverse = dict(getattr(type(config), "attribute_map", {}))
    fields = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    parts = dict(getattr(type(config), "sub_configs", {}) or {})
    parts |= dict(getattr(type(config), "sub_configs_defaults", {}) or {})
    for key, value in fields.items():
        if key in parts:
            part = getattr(config, key)
            if part is not None:
                small = _shrunk(part, tweaks, f"{prefix}{key}.")
                kwargs[key] = small | ({"model_type": part.model_type} if part.model_type else {})
        elif key in PER_LAYER or inverse.get(key) in PER_LAYER or key in _LEFT:
            continue
        elif key in ("n_group", "topk_group", "num_expert_group") and isinstance(value, int) and value > 1:
            kwargs[key] = 1 if key == "topk_group" else 2  # two groups of four experts, one in use
        elif key in SIZES and value is not None:
            kwargs[key] = SIZES[key]
    if "kv_lora_rank" in fields and "num_key_value_heads" in kwargs:
        kwargs["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention never groups its keys
    for path, value in tweaks.items():
        head, _, leaf = path.rpartition(".")
        if (f"{head}." if head else "") == prefix:
            kwargs[leaf] = value
    return {key: value for key, value in kwargs.items() if value is not _DEFAULT}


def tiny_config(model_type: str) -> Any:
    """A small config of a model type."""
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class(), TWEAKS.get(model_type, {})))


def build(model_type: str, seed: int = 0) -> Any:
    """A small model with seeded random weights, float32, in evaluation mode."""
    torch.manual_seed(seed)
    made, config = model_class(model_type), tiny_config(model_type)
    whole = made.config_class is None or isinstance(config, made.config_class)
    model = made(config if whole else config.get_text_config())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in [*parameters.items(), *model.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases")):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
                if name.endswith("balancing_biases"):
                    tensor[-1] = -1.0  # loading always sets the last one so
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.stack([torch.randperm(EXPERTS)[: tensor.shape[1]] for _ in tensor]))
            elif name.endswith("per_expert_scale"):
                tensor.copy_(1 + torch.rand_like(tensor))
            elif name in parameters and tensor.dim() == 2 and tensor.shape[0] in range(EXPERTS, EXPERTS + 5):
                tensor.copy_(torch.randn_like(tensor) / 2)  # routers, by their rows
            elif name in parameters and (tensor.dim() == 3 or ".experts." in name or not tensor.isfinite().all()):
                tensor.copy_(torch.randn_like(tensor) / 8)  # some classes leave their experts as memory was
    return model.eval()


MODEL_TYPES = model_types()
SUPPORTED = tuple(name for name in MODEL_TYPES if name not in REFUSED)
NOT_STREAMED = {"diffusion_gemma": "found 2 stacks"}
"""Types that cannot be run layer by layer, and what the refusal says."""
STREAMED = tuple(name for name in SUPPORTED if name not in NOT_STREAMED)


@cache
def _saved(model_type: str, base: Path) -> Path:
    folder = base / "tiny-types" / model_type
    build(model_type).save_pretrained(folder)
    return folder


def tiny_type(model_type: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny checkpoint of a model type; made once per test run. Read only."""
    return _saved(model_type, factory.getbasetemp())
