"""Small checkpoints written byte by byte, and the truth about every tensor beside: what a pruner must leave of it.

Bytes are random; routers are plain BF16 numbers, because plans look at them. Nothing of the code under test is used.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.checkpoint import DTYPE_BITS, Checkpoint, open_checkpoint
from expertcut.choose import LayerPlan, Plan, Source
from expertcut.model import Geometry, fingerprint, read_geometry

HIDDEN, WIDTH, EXPERTS = 10, 6, 8


@dataclass
class Truth:
    """One tensor: what it holds, and which expert it belongs to or which axis has one entry per expert."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    block: str = ""
    expert: int | None = None
    axis: int | None = None
    tail: int = 0
    """Rows behind those of the experts, which always stay."""

    def rows(self, experts: int, kept: Sequence[int]) -> list[int]:
        """Indices along the axis of experts, each with one row or several, that must be left."""
        assert self.axis is not None
        behind = self.shape[self.axis] - self.tail
        unit = behind // experts
        return [*(e * unit + i for e in kept for i in range(unit)), *range(behind, self.shape[self.axis])]


@dataclass
class Model:
    """A checkpoint to be: config, tensors in order, experts in all."""

    config: dict[str, Any]
    experts: int
    seed: int = 0
    tensors: dict[str, Truth] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def add(self, name: str, dtype: str, *shape: int, **role: Any) -> None:
        data = self.random.bytes(prod(shape) * DTYPE_BITS[dtype] // 8)
        self.tensors[name] = Truth(dtype, shape, data, **role)

    def put(self, name: str, dtype: str, shape: Sequence[int], data: bytes, **role: Any) -> None:
        self.tensors[name] = Truth(dtype, tuple(shape), data, **role)

    def shuffle(self, order: random.Random) -> None:
        """Put the tensors in another order."""
        names = list(self.tensors)
        order.shuffle(names)
        self.tensors = {name: self.tensors[name] for name in names}

    def router(self, block: str, name: str) -> None:
        values = self.random.normal(size=(self.experts, HIDDEN)).astype(np.float32)
        data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        self.tensors[f"{block}.{name}"] = Truth("BF16", (self.experts, HIDDEN), data, block, axis=0)

    def pruned(self, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """Name, dtype, shape and bytes of every tensor that must be left, by plain numpy."""
        left = {}
        for name, truth in self.tensors.items():
            shape, data = truth.shape, truth.data
            if truth.expert is not None:
                if truth.expert not in kept[truth.block]:
                    continue
                new = list(kept[truth.block]).index(truth.expert)
                name = name.replace(f"experts.{truth.expert}.", f"experts.{new}.")
            elif truth.axis is not None:
                size = DTYPE_BITS[truth.dtype] // 8
                array = np.frombuffer(data, np.uint8).reshape(*shape, size)
                array = array.take(truth.rows(self.experts, kept[truth.block]), axis=truth.axis)
                shape, data = array.shape[:-1], array.tobytes()
            left[name] = (truth.dtype, shape, data)
        return left

    def write(
        self, root: Path, shards: int = 3, companions: Mapping[str, bytes] | None = None, fit: bool = False
    ) -> Path:
        """Write it in the given number of shards, or fewer, with borders at random places; `fit`: all is aligned."""
        root.mkdir(parents=True)
        names = list(self.tensors)
        borders = sorted(random.Random(self.seed).sample(range(1, len(names)), min(shards, len(names)) - 1))
        parts = [names[a:b] for a, b in zip([0, *borders], [*borders, len(names)], strict=True)]
        index: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            if fit:
                part.sort(key=lambda name: -DTYPE_BITS[self.tensors[name].dtype])
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if shards > 1 else "model.safetensors"
            (root / file).write_bytes(file_bytes({n: self.tensors[n] for n in part}, pad=fit))
            index |= dict.fromkeys(part, file)
        if shards > 1:
            (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (root / "config.json").write_text(json.dumps(self.config))
        for name, data in (companions or {"tokenizer.json": b"{}", "LICENSE": b"Ours\n"}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root


def file_bytes(tensors: Mapping[str, Truth], pad: bool = False) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, truth in tensors.items():
        header[name] = {"dtype": truth.dtype, "shape": truth.shape, "data_offsets": [at, at + len(truth.data)]}
        at += len(truth.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return struct.pack("<Q", len(text)) + text + b"".join(truth.data for truth in tensors.values())


def _common(model: Model, layers: int, prefix: str = "model.") -> None:
    model.add(f"{prefix}embed_tokens.weight", "BF16", 16, HIDDEN)
    for layer in range(layers):
        model.add(f"{prefix}layers.{layer}.self_attn.q_proj.weight", "BF16", HIDDEN, HIDDEN)


def qwen3(seed: int = 0, width: int = WIDTH) -> Model:
    """One tensor per expert and projection, float32 scales between them; layer 1 is dense."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 3,
        "num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_size": HIDDEN,
        "moe_intermediate_size": width, "mlp_only_layers": [1], "rope_theta": 1e6, "vocab_size": 16, "note": "naïve",
    }  # fmt: skip
    model = Model(config, EXPERTS, seed)
    _common(model, 3)
    model.add("model.layers.1.mlp.up_proj.weight", "BF16", 2 * WIDTH, HIDDEN)
    for layer in (0, 2):
        block = f"model.layers.{layer}.mlp"
        for expert in range(EXPERTS):
            for part in ("down_proj", "gate_proj", "up_proj"):
                name = f"{block}.experts.{expert}.{part}.weight"
                model.add(name, "F8_E4M3", width, HIDDEN, block=block, expert=expert)
                model.add(f"{name}_scale_inv", "F32", 1, 1, block=block, expert=expert)
        model.router(block, "gate.weight")
    model.add("lm_head.weight", "BF16", 16, HIDDEN)
    return model


def qwen3_vl(seed: int = 0) -> Model:
    """Fused experts under a nested config."""
    text = {
        "num_hidden_layers": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
    }  # fmt: skip
    model = Model({"model_type": "qwen3_vl_moe", "text_config": text, "vision_config": {"depth": 2}}, EXPERTS, seed)
    _common(model, 2, "model.language_model.")
    for layer in range(2):
        block = f"model.language_model.layers.{layer}.mlp"
        model.add(f"{block}.experts.gate_up_proj", "BF16", EXPERTS, HIDDEN, 2 * WIDTH, block=block, axis=0)
        model.add(f"{block}.experts.down_proj", "BF16", EXPERTS, WIDTH, HIDDEN, block=block, axis=0)
        model.router(block, "gate.weight")
    model.add("model.visual.patch_embed.weight", "BF16", EXPERTS, 4)
    return model


def deepseek(seed: int = 0) -> Model:
    """Two groups, correction bias, shared expert, dense first layer, one multi-token-prediction layer."""
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 3, "n_routed_experts": EXPERTS, "num_experts_per_tok": 3,
        "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "num_nextn_predict_layers": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
        "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "mlp.gate"]},
    }  # fmt: skip
    model = Model(config, EXPERTS, seed)
    _common(model, 4)
    for layer in (1, 2, 3):
        block = f"model.layers.{layer}.mlp"
        model.router(block, "gate.weight")
        model.add(f"{block}.gate.e_score_correction_bias", "F32", EXPERTS, block=block, axis=0)
        for part in ("gate_proj", "up_proj", "down_proj"):
            model.add(f"{block}.shared_experts.{part}.weight", "BF16", WIDTH, HIDDEN)
            for expert in range(EXPERTS):
                name = f"{block}.experts.{expert}.{part}.weight"
                model.add(name, "BF16", WIDTH, HIDDEN, block=block, expert=expert)
    model.add("model.layers.3.eh_proj.weight", "BF16", HIDDEN, 2 * HIDDEN)
    return model


def gpt_oss(seed: int = 0) -> Model:
    """Fused packed experts with scales and biases; the router has a bias."""
    config = {
        "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
        "experts_per_token": 2, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    model = Model(config, EXPERTS, seed)
    _common(model, 2)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        model.router(block, "router.weight")
        model.add(f"{block}.router.bias", "BF16", EXPERTS, block=block, axis=0)
        for part, rows in (("gate_up_proj", 2 * WIDTH), ("down_proj", HIDDEN)):
            model.add(f"{block}.experts.{part}_blocks", "U8", EXPERTS, rows, 1, 16, block=block, axis=0)
            model.add(f"{block}.experts.{part}_scales", "U8", EXPERTS, rows, 1, block=block, axis=0)
            model.add(f"{block}.experts.{part}_bias", "BF16", EXPERTS, rows, block=block, axis=0)
    return model


def large(seed: int = 0) -> Model:
    """86 MB of experts of the kind of `qwen3`, each projection more than a megabyte."""
    return qwen3(seed, width=180_000)


MODELS: dict[str, Callable[[], Model]] = {
    "qwen3": qwen3,
    "qwen3_vl": qwen3_vl,
    "deepseek": deepseek,
    "gpt_oss": gpt_oss,
}


def opened(root: Path) -> tuple[Checkpoint, Geometry]:
    ckpt = open_checkpoint(root)
    return ckpt, read_geometry(ckpt)


def plan_for(ckpt: Checkpoint, geometry: Geometry, kept: Iterable[Sequence[int]], top_k: int | None = None) -> Plan:
    """Kept ids of the trunk's blocks in layer order."""
    layers = {
        block.prefix: LayerPlan(layer=block.layer, kept=tuple(ids), top_k=top_k)
        for block, ids in zip(geometry.trunk, kept, strict=True)
    }
    return Plan(source=Source(name="the model", fingerprint=fingerprint(ckpt, geometry)), layers=layers)


def half(ckpt: Checkpoint, geometry: Geometry) -> Plan:
    """Half of the experts, other ones in every layer, the same number in every group."""
    choices = [(0, 2, 5, 7), (1, 3, 4, 6)]
    return plan_for(ckpt, geometry, [choices[i % 2] for i in range(len(geometry.trunk))], top_k=2)


def kept_of(plan: Plan, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Kept ids of every block; multi-token prediction as the last layer of the trunk."""
    last = plan.layers[geometry.trunk[-1].prefix].kept
    return {prefix: plan.layers[prefix].kept if prefix in plan.layers else last for prefix in geometry.blocks}


def digest(root: Path) -> dict[str, str]:
    """Hash of every file below a directory, by name."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
