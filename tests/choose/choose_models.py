"""Geometries in memory, tiny checkpoints on disk, and profiles of given counts, for the tests of `choose`."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from expertcut.calibrate.profile import MAXIMA_E, SUMS_E, BlockRecord, DataRecord, Profile, ProfileMeta
from expertcut.calibrate.stats import LayerStats
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import LayerPlan, Plan, Source
from expertcut.model import Fingerprint, Geometry, MoeBlock, fingerprint, resolve_family

ANYONE = Source(name="anyone", fingerprint=Fingerprint(geometry="0" * 64, sketch={}))


def geometry(
    experts: int = 8,
    *,
    top_k: int = 2,
    n_group: int = 1,
    topk_group: int = 1,
    moe_layers: tuple[int, ...] = (1, 2, 3),
    mtp: bool = False,
) -> Geometry:
    """DeepSeek-V3-like, dense layer 0, no tensors; with `mtp`, one prediction layer behind the last."""
    layers = max(moe_layers) + 1
    blocks = [(layer, False) for layer in moe_layers] + ([(layers, True)] if mtp else [])
    prefixes = {f"model.layers.{layer}.mlp": (layer, is_mtp) for layer, is_mtp in blocks}
    return Geometry(
        family=resolve_family({"model_type": "deepseek_v3"}),
        roles={},
        blocks={
            p: MoeBlock(p, layer, m, f"{p}.gate.weight", f"{p}.experts.", (), experts, top_k)
            for p, (layer, m) in prefixes.items()
        },
        num_experts=experts,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        hidden=4,
        expert_width=4,
        num_layers=layers,
        renormalise=True,
    )


def plan(kept: Mapping[int, tuple[int, ...]], top_k: int | None = None) -> Plan:
    """A plan by layer number."""
    layers = {f"model.layers.{n}.mlp": LayerPlan(layer=n, kept=ids, top_k=top_k) for n, ids in kept.items()}
    return Plan(source=ANYONE, layers=layers)


def write_checkpoint(folder: Path, *, grouped: bool = False, seed: int = 0) -> Checkpoint:
    """Two MoE layers of eight experts, 3 x 4 x 4 float32 each; grouped: in two groups, and a prediction layer more."""
    rng = np.random.default_rng(seed)
    config: dict[str, Any] = {
        "num_hidden_layers": 2, "hidden_size": 4, "moe_intermediate_size": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    if grouped:
        config |= {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    else:
        config |= {"model_type": "qwen3_moe", "num_experts": 8}
    tensors = {"model.embed_tokens.weight": rng.normal(size=(16, 4))}
    for layer in range(3 if grouped else 2):
        prefix = f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.gate.weight"] = rng.normal(size=(8, 4))
        for expert in range(8):
            for part in ("gate", "up", "down"):
                tensors[f"{prefix}.experts.{expert}.{part}_proj.weight"] = rng.normal(size=(4, 4))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder)


def layer_stats(**given: Any) -> LayerStats:
    """Statistics of one layer; of what is not given, what every profile has is zero."""
    experts = len(next(iter(given.values())))
    values: dict[str, Any] = {field.name: np.zeros(experts) for field in fields(LayerStats)}
    values |= {"prefix": "model.layers.0.mlp", "layer": 0, "tokens": 0.0, "out_sq": 0.0, "entropy": 0.0}
    arrays = {name: np.array(value, np.float64) for name, value in given.items()}
    lazy = {name: arrays.pop(name) for name in [*arrays] if name not in values}
    return LayerStats(**values | arrays | {"lazy": lazy})


def profile(
    model: tuple[Checkpoint, Geometry],
    stats: Mapping[str, np.ndarray],
    act_max: Mapping[int, list[float]] | None = None,
    pair_domains: bool = False,
) -> Profile:
    """A profile of the domains code and prose whose blocks all have the given statistics; (2, E) others are zero.

    `act_max` is by layer number, (E,), and comes from the second domain.
    """
    checkpoint, own = model
    domains = ("code", "prose")
    d, e, k = len(domains), own.num_experts, own.top_k
    one: dict[str, np.ndarray] = {name: np.zeros(d) for name in ("tokens", "out_sq", "entropy")}
    one |= {name: np.zeros((d, e)) for name in ("count", *SUMS_E, *MAXIMA_E)}
    one |= {name: np.zeros((d, e, k)) for name in ("rank_count", "rank_mass")}
    one |= {name: np.zeros((d, k)) for name in ("topk_error", "topk_cross", "topk_sq", "lost_mass")} | dict(stats)
    tokens = dict.fromkeys(domains, 10)
    record = DataRecord(fingerprint="f", tokens=tokens, seq_len=10, packed=True, seed=0, sources=[])
    meta = ProfileMeta(
        source=checkpoint.name, fingerprint=fingerprint(*model), tokenizer="t", data=[record],
        domains=list(domains), experts=e, top_k=k, pair_domains=pair_domains, moments=False, dtype="float32",
        versions={}, blocks=[BlockRecord(prefix=block.prefix, layer=block.layer) for block in own.trunk],
    )  # fmt: skip
    arrays = {f"{block.prefix}/{name}": array for block in own.trunk for name, array in one.items()}
    for layer, maxima in (act_max or {}).items():
        arrays[f"model.layers.{layer}.mlp/act_max"] = np.array([np.zeros(e), maxima])
    return Profile(meta, arrays)
