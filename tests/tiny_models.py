"""Tiny checkpoints of every family, in the layout of the Hub: several shards, the Hub's names and config keys.

transformers builds and names the weights; the config is written by hand, because transformers renames keys that other
runtimes need. Layers 3, hidden 32; weights are spread widely enough that routers decide clearly.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from golden_names import Golden, golden
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.data import Sequence as TokenSequence
from expertcut.calibrate.reader import TensorReader
from expertcut.model import BY_TYPE

VOCAB = 96
SHARD = 40_000
"""Bytes of tensor data per shard; every tiny model has several."""
Tensors = dict[str, torch.Tensor]

torch.set_num_threads(1)  # threads that wait for each other are slower than tiny models
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
gc.freeze()  # the executor collects garbage; what was imported is none, and there is much of it


@dataclass(frozen=True)
class Tiny:
    """How to make one tiny checkpoint."""

    config: dict[str, Any]
    golden: Golden | None
    """The published checkpoint whose names it must have."""
    finish: Callable[[Tensors, torch.Generator], None] = lambda tensors, random: None
    """Adds what transformers does not build."""

    @property
    def family(self) -> str:
        return str(self.config["model_type"])


def _mtp_layer(tensors: Tensors, random: torch.Generator) -> None:
    """A multi-token-prediction layer behind the last, as DeepSeek-V3 and GLM-4.5 store it."""
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace("layers.2.", "layers.3.")] = _noise(tensors[name], random)
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(32, 64, generator=random).bfloat16()
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"model.layers.3.{name}.weight"] = _noise(tensors["model.embed_tokens.weight"], random)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"model.layers.3.{name}.weight"] = _noise(tensors["model.norm.weight"], random)


def _qwen3_vl(tensors: Tensors, random: torch.Generator) -> None:
    """Fused experts lie transposed on the Hub, (E, H, 2I) and (E, I, H); transformers writes them as it computes."""
    for name in tensors:
        if ".mlp.experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()


def _qwen3_5(tensors: Tensors, random: torch.Generator) -> None:
    """As Qwen stores it: experts of the trunk fused, those of the stack for multi-token prediction one by one.

    transformers reads both ways and writes one by one, which is also how quantised derivatives look.
    """
    last = "model.language_model.layers.2."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, "mtp.layers.0.")] = _noise(tensors[name], random)
    tensors["mtp.fc.weight"] = torch.randn(32, 64, generator=random).bfloat16()
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = _noise(tensors["model.language_model.norm.weight"], random)
    for layer in range(3):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack([tensors.pop(f"{experts}.{e}.{part}_proj.weight") for e in range(8)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{experts}.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        tensors[f"{experts}.down_proj"] = parts["down"]


def _noise(like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=random).to(like.dtype)


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True,
    "rope_theta": 10000.0, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 16, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "rope_scaling": None,
}  # fmt: skip
_DEEPSEEK = _COMMON | {
    "num_experts_per_tok": 3, "moe_intermediate_size": 24, "intermediate_size": 48, "num_key_value_heads": 4,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 2, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "attention_bias": False, "rope_scaling": None,
}  # fmt: skip
_V3 = _DEEPSEEK | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "q_lora_rank": 24, "n_shared_experts": 1,
    "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
}  # fmt: skip
_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_position_embeddings": 16,
    "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
_ROPE_VL = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
_TEXT = {key: value for key, value in _COMMON.items() if key not in ("tie_word_embeddings", "torch_dtype")}
_QWEN3_VL: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False, "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "text_config": _TEXT | {
        "model_type": "qwen3_vl_moe_text", "dtype": "bfloat16", "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 16, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "rope_scaling": _ROPE_VL,
    },
    "vision_config": _VISION | {"model_type": "qwen3_vl_moe", "deepstack_visual_indexes": [0]},
}  # fmt: skip
_QWEN3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False, "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "text_config": {key: value for key, value in _TEXT.items() if key != "rope_theta"} | {
        "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "head_dim": 16, "attn_output_gate": True,
        "full_attention_interval": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_value_head_dim": 8, "mlp_only_layers": [], "attention_bias": False, "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000,
            "partial_rotary_factor": 0.5,
        },
    },
    "vision_config": _VISION | {"model_type": "qwen3_5_moe", "deepstack_visual_indexes": []},
}  # fmt: skip

TINY: dict[str, Tiny] = {
    "qwen2_moe": Tiny(_COMMON | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "intermediate_size": 48,
        "shared_expert_intermediate_size": 40, "norm_topk_prob": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [0], "use_sliding_window": False,
    }, golden("qwen1.5-moe")),
    "qwen3_moe": Tiny(_QWEN3, golden("qwen3-30b")),
    "qwen3_moe-tied": Tiny(
        _QWEN3 | {"tie_word_embeddings": True, "norm_topk_prob": False, "decoder_sparse_step": 2}, golden("qwen3-30b")
    ),
    "olmoe": Tiny(_COMMON | {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3,
        "intermediate_size": 24, "norm_topk_prob": False, "num_key_value_heads": 4, "clip_qkv": None,
    }, golden("olmoe")),
    "mixtral": Tiny(_COMMON | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8,
        "num_experts_per_tok": 3, "intermediate_size": 24, "sliding_window": None,
    }, golden("mixtral-8x7b")),
    "deepseek_v2": Tiny(_DEEPSEEK | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "n_routed_experts": 12,
        "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy", "scoring_func": "softmax",
        "norm_topk_prob": False, "routed_scaling_factor": 4.0,
    }, golden("deepseek-v2-lite")),
    "deepseek_v2-lite": Tiny(_DEEPSEEK | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "n_routed_experts": 8,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }, golden("deepseek-v2-lite")),
    "deepseek_v3": Tiny(_V3, golden("deepseek-v3"), _mtp_layer),
    "deepseek_v3-ungrouped": Tiny(
        _V3 | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "tie_word_embeddings": True,
               "num_nextn_predict_layers": 0}, golden("deepseek-v3"),
    ),
    "glm4_moe": Tiny(_COMMON | {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "intermediate_size": 48, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "attention_bias": True,
        "routed_scaling_factor": 1.5, "head_dim": 16, "partial_rotary_factor": 0.5, "use_qk_norm": False,
        "num_nextn_predict_layers": 1, "rope_scaling": None,
    }, golden("glm-4.5-air"), _mtp_layer),
    "gpt_oss": Tiny(_COMMON | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 8,
        "num_experts_per_tok": 3, "experts_per_token": 3, "intermediate_size": 24, "head_dim": 16,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "swiglu_limit": 1.5, "attention_bias": True, "rope_theta": 150000,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
                         "original_max_position_embeddings": 16},
    }, golden("gpt-oss-20b-bf16")),
    "qwen3_vl_moe": Tiny(_QWEN3_VL, golden("qwen3-vl-30b"), _qwen3_vl),
    "qwen3_vl_moe-tied": Tiny(_QWEN3_VL | {"tie_word_embeddings": True}, golden("qwen3-vl-30b"), _qwen3_vl),
    "qwen3_5_moe": Tiny(_QWEN3_5, golden("qwen3.5-35b"), _qwen3_5),
    "qwen3_5_moe-unfused": Tiny(_QWEN3_5, None),
}  # fmt: skip

NAMES = tuple(TINY)
assert BY_TYPE.keys() >= {tiny.family for tiny in TINY.values()}


def tiny_model(name: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny checkpoint; made once per test run. Read only."""
    folder = factory.getbasetemp() / "tiny-models" / name
    if not folder.exists():
        write_tiny(folder, name)
    return folder


def write_tiny(folder: Path, name: str, seed: int = 0, **config: Any) -> Path:
    """Write a tiny checkpoint; `config` overrides keys of its config."""
    tiny = TINY[name]
    random = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny.config | config, indent=2))
    tensors = _weights(folder, random)
    tiny.finish(tensors, random)
    write_shards(folder, tensors)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 8}')
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


def write_shards(folder: Path, tensors: Tensors, size: int = SHARD) -> None:
    """Replace a folder's weights by these, in shards of at most `size` bytes with an index."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > size:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for shard, file in zip(shards, names, strict=True):
        save_file(shard, folder / file, {"format": "pt"})
    weight_map = {name: file for shard, file in zip(shards, names, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a checkpoint, by the names on disk."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _weights(folder: Path, random: torch.Generator) -> Tensors:
    """Random weights as transformers saves them, in the dtypes of the Hub: bfloat16, correction biases float32."""
    config = AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            router = any(part in name for part in (".gate.", ".router."))
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.2 * torch.randn(value.shape, generator=random))
            elif isinstance(value, torch.nn.Parameter) and value.dim() > 1:
                value.copy_((2.0 if router else 1.0) * torch.randn(value.shape, generator=random) / 32**0.5)
            elif isinstance(value, torch.nn.Parameter):
                value.add_((0.5 if router else 0.2) * torch.randn(value.shape, generator=random))
    made = folder / "made"
    model.save_pretrained(made)
    tensors = read_tensors(made)
    shutil.rmtree(made)
    wide = ("e_score_correction_bias", "A_log", "linear_attn.norm.weight")
    return {name: t if name.endswith(wide) else t.bfloat16() for name, t in tensors.items()}


def tokens(
    lengths: Sequence[int] = (24, 24, 24, 24), *, domains: Sequence[str] = ("prose", "code"), seed: int = 0,
    vocabulary: int = 88,
) -> CalibrationSet:  # fmt: skip
    """Random token sequences of these lengths, dealt out to the domains in turn."""
    random = np.random.default_rng(seed)
    dealt = [(domains[i % len(domains)], random.integers(1, vocabulary, length)) for i, length in enumerate(lengths)]
    return calibration([TokenSequence(ids, domain) for domain, ids in dealt], tuple(domains))


def calibration(sequences: Sequence[TokenSequence], domains: tuple[str, ...]) -> CalibrationSet:
    """A calibration set of these sequences."""
    ordered = sorted(sequences, key=lambda s: domains.index(s.domain))
    digest = sha256(b"".join(s.domain.encode() + s.ids.tobytes() for s in ordered)).hexdigest()
    return CalibrationSet(tuple(ordered), domains, max(len(s.ids) for s in ordered), True, 0, digest, [])


def messages() -> tuple[list[str], Callable[[str], None]]:
    """A list, and a function that collects notices in it."""
    heard: list[str] = []
    return heard, heard.append


def silent(*args: object) -> None:
    """Takes any progress, does nothing."""


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count, from now on, how often each stored tensor is looked at."""
    reads: Counter[str] = Counter()
    view = TensorReader.view

    def counted(self: TensorReader, name: str) -> torch.Tensor:
        reads[name] += 1
        return view(self, name)

    monkeypatch.setattr(TensorReader, "view", counted)
    return reads
