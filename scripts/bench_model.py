"""The benchmarks' model: a random Qwen3-MoE checkpoint of 1.7 GB in BF16, in shards, every projection a tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHARDS = 4
"""Two layers each."""


def build(path: Path) -> None:
    """Write the checkpoint to `path`, unless it is there; the same bytes every time."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    total = 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = dict(_shard(shard, generator))
        save_file(tensors, part / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (part / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    (part / "config.json").write_text(json.dumps(CONFIG, indent=2))
    part.rename(path)


def _shard(shard: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, vocabulary = CONFIG["hidden_size"], CONFIG["vocab_size"]

    def random(*shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)

    if shard == 0:
        yield "model.embed_tokens.weight", random(vocabulary, hidden, std=1.0)
    per_shard = CONFIG["num_hidden_layers"] // SHARDS
    for layer in range(shard * per_shard, (shard + 1) * per_shard):
        yield from _layer(f"model.layers.{layer}", random)
    if shard == SHARDS - 1:
        yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
        yield "lm_head.weight", random(vocabulary, hidden, std=0.03)


def _layer(prefix: str, random) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, head, width = CONFIG["hidden_size"], CONFIG["head_dim"], CONFIG["moe_intermediate_size"]
    heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16)
    for norm in ("q_norm", "k_norm"):
        yield f"{prefix}.self_attn.{norm}.weight", torch.ones(head, dtype=torch.bfloat16)
    for name, rows in (("q_proj", heads * head), ("k_proj", kv_heads * head), ("v_proj", kv_heads * head)):
        yield f"{prefix}.self_attn.{name}.weight", random(rows, hidden, std=0.03)
    yield f"{prefix}.self_attn.o_proj.weight", random(hidden, heads * head, std=0.03)
    yield f"{prefix}.mlp.gate.weight", random(CONFIG["num_experts"], hidden, std=0.03)
    for expert in range(CONFIG["num_experts"]):
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.experts.{expert}.{name}.weight", random(width, hidden, std=0.03)
        yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", random(hidden, width, std=0.04)
