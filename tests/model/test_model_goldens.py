"""Geometry of published checkpoints, from the facts in `golden_names`: every tensor classified, once, as what it is."""

from collections import Counter
from functools import cache

import pytest
from golden_names import GOLDENS, Golden, expand, template
from tiny_models import TINY, read_tensors, tiny_model
from tiny_types import SUPPORTED

from expertcut.model import FAMILIES, ExpertTensor, Geometry, Sliced, Whole, geometry_hash, read_geometry

# name → trunk layers, MTP (prefix, layer), E, k, groups, tensors per expert, sliced tensors per trunk block
FACTS = {
    "qwen3": (range(48), [], 128, 8, (1, 1), 3, 1),
    "qwen2": (range(24), [], 60, 4, (1, 1), 3, 1),
    "olmoe": (range(16), [], 64, 8, (1, 1), 3, 1),
    "mixtral": (range(32), [], 8, 2, (1, 1), 3, 1),
    "deepseek-v2-lite": (range(1, 27), [], 64, 6, (1, 1), 3, 1),
    "deepseek-r1": (range(3, 61), [("model.layers.61.mlp", 61)], 256, 8, (8, 4), 6, 2),
    "glm-4.5-air": (range(1, 46), [("model.layers.46.mlp", 46)], 128, 8, (1, 1), 3, 2),
    "gpt-oss-mxfp4": (range(24), [], 32, 4, (1, 1), 0, 8),
    "gpt-oss-bf16": (range(24), [], 32, 4, (1, 1), 0, 6),
    "qwen3-vl": (range(48), [], 128, 8, (1, 1), 0, 3),
    "qwen3.5": (range(40), [("mtp.layers.0.mlp", 40)], 256, 8, (1, 1), 0, 3),
}


@cache
def geometry_of(name: str) -> Geometry:
    return read_geometry(GOLDENS[name].checkpoint())


def kinds(geometry: Geometry, prefix: str) -> Counter[type]:
    return Counter(type(geometry.roles[name]) for name in geometry.blocks[prefix].tensors)


@pytest.mark.parametrize("name", GOLDENS)
def test_every_tensor_is_classified_once(name: str) -> None:
    names = [row[0] for row in expand(GOLDENS[name].rows)]
    geometry = geometry_of(name)
    assert len(names) == GOLDENS[name].tensors
    assert list(geometry.roles) == names
    members = [tensor for block in geometry.blocks.values() for tensor in block.tensors]
    assert len(members) == len(set(members))
    assert set(members) == {n for n, role in geometry.roles.items() if not isinstance(role, Whole)}


@pytest.mark.parametrize("name", GOLDENS)
def test_the_facts_of_the_model_card(name: str) -> None:
    layers, mtp, experts, top_k, groups, per_expert, sliced = FACTS[name]
    geometry = geometry_of(name)
    assert [block.layer for block in geometry.trunk] == list(layers)
    assert [(block.prefix, block.layer) for block in geometry.mtp] == mtp
    assert (geometry.num_experts, geometry.top_k) == (experts, top_k)
    assert (geometry.n_group, geometry.topk_group) == groups
    for block in geometry.trunk:
        assert kinds(geometry, block.prefix) == Counter({ExpertTensor: per_expert * experts, Sliced: sliced})


def test_experts_and_routers_are_what_is_cut() -> None:
    """By name, so that a role given to the wrong tensor shows."""
    for name in GOLDENS:
        for tensor, role in geometry_of(name).roles.items():
            inner = tensor.partition(".mlp.")[2] or tensor.partition(".block_sparse_moe.")[2]
            numbered = inner.startswith("experts.") and inner.split(".")[1].isdigit()
            cut = inner.startswith("experts.") or inner.split(".")[0] in ("gate", "router")
            expected = ExpertTensor if numbered else Sliced if cut else Whole
            assert type(role) is expected, (name, tensor)


def test_separate_mtp_stack_may_store_experts_one_by_one() -> None:
    geometry = geometry_of("qwen3.5")
    assert kinds(geometry, "mtp.layers.0.mlp") == Counter({ExpertTensor: 3 * 256, Sliced: 1})
    assert geometry.roles["mtp.layers.0.mlp.experts.7.up_proj.weight"] == ExpertTensor(
        "mtp.layers.0.mlp", 7, "up_proj.weight"
    )


def test_scales_follow_their_expert_and_norms_of_the_mtp_layer_stay() -> None:
    roles = geometry_of("deepseek-r1").roles
    scale = "model.layers.61.mlp.experts.255.down_proj.weight_scale_inv"
    assert roles[scale] == ExpertTensor("model.layers.61.mlp", 255, "down_proj.weight_scale_inv")
    assert roles["model.layers.61.mlp.gate.e_score_correction_bias"] == Sliced("model.layers.61.mlp", 0)
    for name in ("eh_proj", "shared_head.head", "embed_tokens", "enorm", "mlp.shared_experts.up_proj"):
        assert roles[f"model.layers.61.{name}.weight"] == Whole()


def test_quantised_sibling_has_the_same_geometry_hash() -> None:
    """A plan made on one applies to the other."""
    hashes = {geometry_hash(geometry_of(f"gpt-oss-{kind}")) for kind in ("mxfp4", "bf16")}
    assert len(hashes) == 1
    with_mtp = GOLDENS["deepseek-r1"]
    rows = [row for row in expand(with_mtp.rows) if not row[0].startswith("model.layers.61.")]
    without = Golden(with_mtp.config, "\n".join(f"{n} {d} {'x'.join(map(str, s))}" for n, d, s in rows), len(rows), "")
    assert geometry_hash(read_geometry(without.checkpoint())) == geometry_hash(geometry_of("deepseek-r1"))


@pytest.mark.parametrize("name", ["deepseek-r1", "gpt-oss-mxfp4", "qwen3.5"])
def test_config_edits_name_every_alias(name: str) -> None:
    edits = geometry_of(name).config_edits(GOLDENS[name].config, 16, 2)
    expected = {
        "deepseek-r1": [("n_routed_experts",), ("num_experts_per_tok",)],
        "gpt-oss-mxfp4": [("num_local_experts",), ("num_experts_per_tok",), ("experts_per_token",)],
        "qwen3.5": [("text_config", "num_experts"), ("text_config", "num_experts_per_tok")],
    }[name]
    assert [edit.path for edit in edits] == expected
    assert [edit.new for edit in edits] == [16] + [2] * (len(edits) - 1)
    assert [edit.old for edit in edits] == [FACTS[name][2]] + [FACTS[name][3]] * (len(edits) - 1)


def test_expert_bytes_count_its_rows() -> None:
    checkpoint = GOLDENS["gpt-oss-bf16"].checkpoint()
    geometry = read_geometry(checkpoint)
    weights, biases = 2880 * 5760 + 2880 * 2880, 5760 + 2880
    assert geometry.expert_nbytes(checkpoint, "model.layers.5.mlp") == 2 * (weights + biases + 2880 + 1)


def test_every_row_of_the_table_has_a_tiny_checkpoint() -> None:
    """All laws run over the tiny checkpoints, so that a row without one would be a row without tests."""
    made = {tiny.family for tiny in TINY.values()} | set(SUPPORTED)
    rows = {family.model_type for family in FAMILIES if not made & {family.model_type, *family.aliases}}
    assert rows == {"bailing_moe"}  # its code is on the Hub only; see test_model_types


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.golden])
def test_tiny_checkpoints_have_the_names_of_the_hub(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """transformers writes what it reads; that the Hub reads the same is a fact of its own."""
    golden = TINY[name].golden
    assert golden is not None
    tensors = read_tensors(tiny_model(name, tmp_path_factory))
    found = {template(tensor): tensor for tensor in tensors if ".visual." not in tensor}
    expected = {n for n in golden.templates() if not n.endswith("_scale_inv")}
    dense = {f"model.layers.*.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    missing, extra = expected - found.keys(), found.keys() - expected - dense
    if TINY[name].config["tie_word_embeddings"]:
        missing -= {"lm_head.weight"}
    if TINY[name].config.get("num_nextn_predict_layers") == 0:
        missing = {n for n in missing if not any(part in n for part in ("eh_proj", "norm", "shared_head", "embed"))}
    assert (missing, extra) == (set(), set())
    real = {template(n): (dtype, shape) for n, dtype, shape in expand(golden.rows)}
    for short in expected & found.keys():
        dtype, shape = real[short]
        assert tensors[found[short]].dim() == len(shape)
        if dtype in ("BF16", "F32"):
            assert str(tensors[found[short]].dtype) == {"BF16": "torch.bfloat16", "F32": "torch.float32"}[dtype], short


def test_orientation_of_fused_experts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Which of H and 2I comes first is told by no name: hidden 32, width 24, 8 experts."""
    for name, layer, up, down in (
        ("qwen3_vl_moe", "model.language_model.layers.0", (8, 32, 48), (8, 24, 32)),
        ("qwen3_5_moe", "model.language_model.layers.0", (8, 48, 32), (8, 32, 24)),
        ("gpt_oss", "model.layers.0", (8, 32, 48), (8, 24, 32)),
    ):
        tensors = read_tensors(tiny_model(name, tmp_path_factory))
        assert tensors[f"{layer}.mlp.experts.gate_up_proj"].shape == up
        assert tensors[f"{layer}.mlp.experts.down_proj"].shape == down
