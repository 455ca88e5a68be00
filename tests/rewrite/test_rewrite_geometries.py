"""Checkpoints of any geometry, format and order of tensors: no valid plan leaves an inconsistent one.

Everything is made and read here, byte by byte: nothing of the rewriter, of safetensors or of a model class is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_models import HIDDEN, WIDTH, Model, listing, opened

from expertcut.choose import LayerPlan, Plan, Source
from expertcut.errors import UnknownTensorError
from expertcut.model import fingerprint
from expertcut.rewrite import prune, require, verify_bytes, verify_structure

Parts = tuple[tuple[str, str, tuple[int, ...]], ...]
FORMATS: dict[str, Parts] = {
    "BF16": ((".weight", "BF16", (WIDTH, HIDDEN)),),
    "F16, with bias": ((".weight", "F16", (WIDTH, HIDDEN)), (".bias", "F16", (WIDTH,))),
    "FP8 blocks": ((".weight", "F8_E4M3", (WIDTH, HIDDEN)), (".weight_scale_inv", "F32", (1, 2))),
    "FP4 of DeepSeek": ((".weight", "I8", (WIDTH, 5)), (".scale", "F8_E8M0", (WIDTH, 1))),
    "INT4": (
        (".weight_packed", "I32", (WIDTH, 2)), (".weight_scale", "BF16", (WIDTH, 2)), (".weight_shape", "I64", (2,)),
        (".weight_zero_point", "I32", (1, 2)), (".weight_g_idx", "I32", (HIDDEN,)),
    ),
    "NVFP4": (
        (".weight_packed", "U8", (WIDTH, 5)), (".weight_scale", "F8_E4M3", (WIDTH, 1)),
        (".weight_global_scale", "F32", (1,)), (".input_global_scale", "F32", ()),
    ),
    "GPTQ": (
        (".qweight", "I32", (2, WIDTH)), (".qzeros", "I32", (1, 1)), (".scales", "F16", (1, WIDTH)),
        (".g_idx", "I32", (HIDDEN,)),
    ),
}  # fmt: skip
FUSED: dict[str, Parts] = {
    "BF16": (("", "BF16", (HIDDEN, WIDTH)),),
    "FP8": (("", "F8_E4M3", (HIDDEN, WIDTH)), ("_scale_inv", "F32", (1, 1))),
    "MXFP4": (("_blocks", "U8", (WIDTH, 1, 16)), ("_scales", "U8", (WIDTH, 1)), ("_bias", "BF16", (WIDTH,))),
}
"""One expert's share of each stacked tensor."""


@dataclass(frozen=True)
class Row:
    """How a family looks on disk."""

    block: str
    """From the number of a layer on."""
    router: str = "gate.weight"
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    stack: str = "model.layers"
    keys: Mapping[str, str] = field(default_factory=lambda: {"experts": "num_experts", "top_k": "num_experts_per_tok"})
    scope: tuple[str, ...] = ()
    """Where in the config the numbers are."""
    biases: Mapping[str, int] = field(default_factory=dict)
    """Further tensors (E,), or with the experts on that axis behind axes of length 1."""
    fused: bool = False
    numbered: bool = True
    grouped: bool = False
    mtp: str = ""
    """Where the experts of multi-token prediction are; `{}` is the number of layers."""
    tail: int = 0
    hashed: bool = False
    flat: bool = False


_ROUTED = {"experts": "n_routed_experts", "top_k": "num_experts_per_tok"}
_LOCAL = {"experts": "num_local_experts", "top_k": "num_experts_per_tok"}
ROWS: dict[str, Row] = {
    "qwen3_moe": Row("mlp", fused=True),
    "mixtral": Row("block_sparse_moe", names=("w1", "w2", "w3"), keys=_LOCAL),
    "deepseek_v3": Row(
        "mlp", keys=_ROUTED, biases={"gate.e_score_correction_bias": 0}, grouped=True, mtp="model.layers.{}.mlp"
    ),
    "minimax_m2": Row("block_sparse_moe", keys=_LOCAL, biases={"e_score_correction_bias": 0}),
    "longcat_flash": Row(
        "mlp", "router.classifier.weight", keys={"experts": "n_routed_experts", "top_k": "moe_topk"}, tail=3,
        biases={"router.e_score_correction_bias": 0},
    ),
    "ernie4_5_moe": Row(
        "mlp", keys={"experts": "moe_num_experts", "top_k": "moe_k"}, biases={"moe_statics.e_score_correction_bias": 1},
        mtp="model.mtp_block.0.mlp",
    ),
    "gpt_oss": Row("mlp", "router.weight", keys=_LOCAL, biases={"router.bias": 0}, fused=True, numbered=False),
    "qwen3_5_moe": Row(
        "mlp", stack="model.language_model.layers", scope=("text_config",), fused=True, mtp="mtp.layers.0.mlp"
    ),
    "deepseek_v4": Row(
        "ffn", stack="layers", keys=_ROUTED, names=("w1", "w2", "w3"), biases={"gate.bias": 0}, hashed=True,
        mtp="mtp.0.ffn",
    ),
    "gemma4": Row(
        "", "router.proj.weight", keys={"experts": "num_experts", "top_k": "top_k_experts"}, scope=("text_config",),
        biases={"router.per_expert_scale": 0}, fused=True, numbered=False,
    ),
    "dbrx": Row(
        "ffn", "router.layer.weight", stack="transformer.blocks", scope=("ffn_config",),
        keys={"experts": "moe_num_experts", "top_k": "moe_top_k"}, numbered=False, flat=True,
    ),
}  # fmt: skip


@dataclass
class Made:
    """A checkpoint to be, and what may be asked of it."""

    model: Model
    row: Row
    top_k: int
    groups: int
    topk_group: int
    trunk: dict[str, int]
    """Prefix and layer number of every MoE block."""
    mtp: dict[str, int]
    tables: list[str] = field(default_factory=list)
    """Names of tables of expert ids."""


def block_tensors(made: Made, prefix: str, parts: Parts, fused: bool) -> None:
    """Router, biases and experts of one MoE block, and a shared expert."""
    model, row, experts = made.model, made.row, made.model.experts
    inside = f"{prefix}."
    rows = np.random.default_rng(len(model.tensors)).normal(size=(experts + row.tail, HIDDEN)).astype(np.float32)
    model.put(inside + row.router, "F32", rows.shape, rows.tobytes(), block=prefix, axis=0, tail=row.tail)
    for name, axis in row.biases.items():
        model.add(inside + name, "F32", *(1,) * axis, experts + row.tail, block=prefix, axis=axis, tail=row.tail)
    for name in row.names:
        for end, dtype, shape in parts:
            if row.flat:
                model.add(f"{inside}experts.mlp.{name}", "BF16", experts * WIDTH, HIDDEN, block=prefix, axis=0)
            elif fused:
                model.add(f"{inside}experts.{name}{end}", dtype, experts, *shape, block=prefix, axis=0)
            else:
                for expert in range(experts):
                    model.add(f"{inside}experts.{expert}.{name}{end}", dtype, *shape, block=prefix, expert=expert)
    if row.block == "mlp" and row.router == "gate.weight":
        model.add(f"{inside}shared_experts.up_proj.weight", "BF16", experts, HIDDEN)


_RANDOM = st.randoms(use_true_random=True)
"""Evenly random numbers from a drawn seed, for what is better not small."""


@st.composite
def checkpoints(draw: st.DrawFn, name: str) -> Made:
    """Any format, number of layers, experts and groups, dense layers in between, tensors in any order."""
    row, random = ROWS[name], draw(_RANDOM)
    groups = draw(st.integers(1, 4)) if row.grouped else 1
    size = random.randint(2 if row.grouped else 1, 12 // groups)
    experts, topk_group = groups * size, random.randint(1, groups)
    top_k = random.randint(1, topk_group * size)
    layers = draw(st.lists(st.booleans(), min_size=1, max_size=3).filter(any))  # True: a MoE layer
    hidden_key = "d_model" if row.flat else "hidden_size"
    numbers: dict[str, Any] = {row.keys["experts"]: experts, row.keys["top_k"]: top_k, "moe_intermediate_size": WIDTH}
    numbers |= {"expert_ffn_hidden_size": WIDTH, "intermediate_size": WIDTH, "ffn_hidden_size": WIDTH}
    numbers |= {"zero_expert_num": row.tail} if row.tail else {}
    outer = {hidden_key: HIDDEN, "num_hidden_layers": len(layers), "norm_topk_prob": True}
    if row.grouped:
        outer |= {"n_group": groups, "topk_group": topk_group}
    config: dict[str, Any] = {"model_type": name, **outer, **(numbers if not row.scope else {})}
    if row.scope:
        config[row.scope[0]] = numbers | (outer if row.scope == ("text_config",) else {})
    made = Made(Model(config, experts, random.randrange(2**16)), row, top_k, groups, topk_group, {}, {})
    fused = not row.numbered or (row.fused and draw(st.booleans()))
    parts = draw(st.sampled_from(list((FUSED if fused else FORMATS).values())))
    for number, sparse in enumerate(layers):
        here = f"{row.stack}.{number}"
        made.model.add(f"{here}.self_attn.q_proj.weight", "BF16", HIDDEN, HIDDEN)
        if sparse:
            made.trunk[f"{here}.{row.block}".rstrip(".")] = number
    if row.mtp and draw(st.booleans()):
        config["num_nextn_predict_layers"] = 1
        made.mtp[row.mtp.format(len(layers))] = len(layers)
    for prefix in (*made.trunk, *made.mtp):
        block_tensors(made, prefix, parts[:1] if row.flat else parts, fused and not row.flat)
    if row.hashed:
        first = next(iter(made.trunk))
        table = np.array([random.sample(range(experts), top_k) for _ in range(16)])
        made.tables.append(f"{first}.gate.tid2eid")
        made.model.put(made.tables[0], "I64", table.shape, table.astype("<i8").tobytes(), block=first)
    made.model.shuffle(random)
    return made


@st.composite
def plans(draw: st.DrawFn, made: Made) -> tuple[dict[str, tuple[int, ...]], int, str]:
    """Kept ids of every block, top-k, and what becomes of multi-token prediction, within what routers can do."""
    random, size, groups = draw(_RANDOM), made.model.experts // made.groups, made.groups
    each = random.randint(min(2, size) if made.row.grouped else 1, size)
    top_k = random.randint(1, min(made.top_k, made.topk_group * each))

    def ids() -> tuple[int, ...]:
        chosen = (random.sample(range(g * size, (g + 1) * size), each) for g in range(groups))
        return tuple(sorted(e for some in chosen for e in some))

    kept = {prefix: ids() for prefix in made.trunk}
    mtp = draw(st.sampled_from(["lockstep", "own", "drop"])) if made.mtp else "lockstep"
    kept |= {prefix: ids() if mtp == "own" else list(kept.values())[-1] for prefix in made.mtp if mtp != "drop"}
    return kept, top_k, mtp


Tensor = tuple[str, tuple[int, ...], bytes]


def read_files(folder: Path) -> dict[str, Tensor]:
    """Every tensor, and on the way all that is to be said of shards and index."""
    found: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    shards = sorted(folder.glob("*.safetensors"))
    for number, path in enumerate(shards, 1):
        many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        assert path.name == (many if len(shards) > 1 else "model.safetensors")
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header, data, at = json.loads(raw[8 : 8 + length]), raw[8 + length :], 0
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = info["data_offsets"]
            assert begin == at and name not in found
            found[name] = info["dtype"], tuple(info["shape"]), data[begin:end]
            places[name], at = path.name, end
        assert at == len(data)
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in found.values())
    return found


def check_table(made: Made, name: str, tensor: Tensor, kept: Sequence[int], top_k: int) -> None:
    """Kept experts under their new numbers, others some expert that is left, none twice."""
    old = np.frombuffer(made.model.tensors[name].data, "<i8").reshape(16, -1)[:, :top_k]
    assert tensor[:2] == ("I64", (16, top_k))
    for before, after in zip(old.tolist(), np.frombuffer(tensor[2], "<i8").reshape(16, top_k).tolist(), strict=True):
        assert len(set(after)) == top_k and set(after) <= set(range(len(kept)))
        assert all(new == kept.index(e) for e, new in zip(before, after, strict=True) if e in kept)


def expected_config(made: Made, entries: list[str], experts: int, top_k: int, drop: bool) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(made.model.config))
    scope = config[made.row.scope[0]] if made.row.scope else config
    scope |= {made.row.keys["experts"]: experts, made.row.keys["top_k"]: top_k}
    if drop:
        config["num_nextn_predict_layers"] = 0
    config["quantization_config"]["ignore"] = ["lm_head", *entries]
    return config


def with_entries(made: Made, kept: Mapping[str, Sequence[int]]) -> list[str]:
    """Name every third expert module in the quantization config; return those that must be left."""
    numbered = ((name.rpartition(".")[0], t.block, t.expert) for name, t in made.model.tensors.items())
    modules = dict.fromkeys((name, block, e) for name, block, e in numbered if e is not None)
    named = [module for i, module in enumerate(modules) if i % 3 == 0]
    made.model.config["quantization_config"] = {"ignore": ["lm_head", *(name for name, _, _ in named)]}
    return [
        name.replace(f"experts.{expert}.", f"experts.{list(kept[block]).index(expert)}.")
        for name, block, expert in named
        if expert in kept.get(block, ())
    ]


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.data())
def test_no_valid_plan_leaves_an_inconsistent_checkpoint(name: str, data: st.DataObject) -> None:
    made = data.draw(checkpoints(name))
    kept, top_k, mtp = data.draw(plans(made))
    entries = with_entries(made, kept)
    with TemporaryDirectory() as folder:
        ckpt, geometry = opened(made.model.write(Path(folder, "in"), data.draw(st.integers(1, 9))))
        assert {p: b.layer for p, b in geometry.blocks.items()} == made.trunk | made.mtp
        said = {p: LayerPlan(layer=(made.trunk | made.mtp)[p], kept=ids, top_k=top_k) for p, ids in kept.items()}
        layers = said if mtp == "own" else {prefix: said[prefix] for prefix in made.trunk}
        source = Source(name="any", fingerprint=fingerprint(ckpt, geometry))
        plan = Plan(source=source, layers=layers, mtp="drop" if mtp == "drop" else "lockstep")
        out, limit = Path(folder, "out"), data.draw(st.integers(1, ckpt.nbytes))
        prune(ckpt, geometry, plan, out, max_shard_size=limit)
        found = read_files(out)
        require(verify_structure(out, ckpt) + verify_bytes(out, ckpt))
        config = json.loads((out / "config.json").read_text())
    count = len(next(iter(kept.values())))
    for name in made.tables:
        block = made.model.tensors[name].block
        check_table(made, name, found.pop(name), kept[block], top_k)
    gone = [prefix.rpartition(".")[0] for prefix in made.mtp if mtp == "drop"]
    left = made.model.pruned({**kept, **{prefix: () for prefix in made.mtp if prefix not in kept}})
    assert found == {n: t for n, t in left.items() if n not in made.tables and not n.startswith(tuple(gone) or "/")}
    assert config == expected_config(made, entries, count, top_k, mtp == "drop")


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.data())
def test_a_planted_tensor_stops_the_run_by_name(name: str, data: st.DataObject) -> None:
    made = data.draw(checkpoints(name))
    prefix = data.draw(st.sampled_from([*made.trunk, *made.mtp]))
    shape = data.draw(st.permutations([made.model.experts, 3, 77]))
    stranger = f"{prefix}.{data.draw(st.sampled_from(['mystery', 'later.scale', 'gate_proj_zero', 'moe.weight_g']))}"
    made.model.add(stranger, "F32", *shape)
    with TemporaryDirectory() as folder:
        made.model.write(Path(folder, "in"), 3)
        with pytest.raises(UnknownTensorError) as caught:
            opened(Path(folder, "in"))
        assert stranger in caught.value.message and f"{made.model.experts} experts" in caught.value.message
        assert listing(Path(folder)) == ["in"]
