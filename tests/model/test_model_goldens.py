"""Geometry of published checkpoints, from the facts in `goldens/`: every tensor classified, once, as what it is."""

import re
from collections import Counter
from functools import cache
from math import prod

import pytest
from golden_names import FOLDER, NAMES, Tensor, as_checkpoint, golden, template
from tiny_models import TINY, read_tensors, tiny_model
from tiny_types import SUPPORTED

from expertcut.checkpoint import DTYPE_BITS
from expertcut.model import FAMILIES, ExpertTensor, Geometry, Remapped, Sliced, Whole, geometry_hash, read_geometry

FULL = ("deepseek-v3", "kimi-k2", "qwen3-235b")
"""Read with all their layers; of the others the first and the last."""
BELOW = r"(?<!resampler_model\.)(mlp|block_sparse_moe|ffn|feed_forward|mixer|layers\.\d+)\."
CUT = re.compile(
    BELOW + r"(((gate|router)\.)?((wg|layer|classifier|proj)\.)?(weight(_1)?|bias|e_score_correction_bias|expert_bias)"
    r"|router\.per_expert_scale|moe_statics\.e_score_correction_bias|(input|output)_linear\.weight"
    r"|experts\.((gate_up|down)_proj(_bias|_blocks|_scales)?|mlp\.(v1|w1|w2)))$"
)


@cache
def geometry_of(name: str) -> Geometry:
    return read_geometry(golden(name).checkpoint(thin=name not in FULL))


def kinds(geometry: Geometry, prefix: str) -> Counter[type]:
    return Counter(type(geometry.roles[name]) for name in geometry.blocks[prefix].tensors)


def nbytes(tensor: Tensor) -> int:
    return prod(tensor[2]) * DTYPE_BITS[tensor[1]] // 8


def test_every_golden_says_where_it_is_from() -> None:
    for name in NAMES:
        found = golden(name)
        assert "/" in found.source and found.grade in ("A", "B", "C"), name
        assert len(found.facts.split()) >= 5, name
        assert found.grade != "A" or found.tensors, name
        assert len((FOLDER / f"{name}.yaml").read_text().splitlines()) < 80, name


@pytest.mark.parametrize("name", [name for name in NAMES if golden(name).tensors])
def test_goldens_are_complete(name: str) -> None:
    """As many tensors, and bytes where they are known, as were published."""
    tensors = list(golden(name).expand())
    assert len({tensor[0] for tensor in tensors}) == len(tensors) == golden(name).tensors
    assert golden(name).nbytes in (None, sum(map(nbytes, tensors)))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_classified_once(name: str) -> None:
    geometry = geometry_of(name)
    assert list(geometry.roles) == [tensor[0] for tensor in golden(name).expand(thin=name not in FULL)]
    members = [tensor for block in geometry.blocks.values() for tensor in block.tensors]
    assert len(members) == len(set(members))
    assert set(members) == {n for n, role in geometry.roles.items() if not isinstance(role, Whole)}


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_of_the_model_card(name: str) -> None:
    expected, geometry = golden(name).expected, geometry_of(name)
    assert [block.layer for block in geometry.trunk] == golden(name).moe_layers(thin=name not in FULL)
    assert {block.prefix: block.layer for block in geometry.mtp} == expected.mtp
    assert (geometry.num_experts, geometry.top_k) == (expected.experts, expected.top_k)
    assert (geometry.n_group, geometry.topk_group) == expected.groups
    for block in geometry.trunk:
        found = kinds(geometry, block.prefix)
        assert found[ExpertTensor] == expected.per_expert * expected.experts
        assert found[Sliced] + found[Remapped] == expected.sliced


@pytest.mark.parametrize("name", NAMES)
def test_experts_and_routers_are_what_is_cut(name: str) -> None:
    """By name, so that a role given to the wrong tensor shows."""
    for tensor, role in geometry_of(name).roles.items():
        kind: type = Whole
        if re.search(r"(^|\.)experts\.\d+\.", tensor):
            kind = ExpertTensor
        elif CUT.search(tensor):
            kind = Sliced
        elif tensor.endswith("tid2eid"):
            kind = Remapped
        assert type(role) is kind, tensor


@pytest.mark.parametrize("name", [name for name in NAMES if golden(name).expected.mtp])
def test_what_goes_with_multi_token_prediction(name: str) -> None:
    """Dropping it takes embeddings, norms and heads of its own as well, and nothing of the trunk."""
    geometry = geometry_of(name)
    layers = tuple(f"model.layers.{layer}." for layer in golden(name).expected.mtp.values())
    expected = [tensor for tensor in geometry.roles if tensor.startswith(("mtp.", *layers))]
    assert list(geometry.mtp_tensors) == expected
    assert len(expected) > sum(len(block.tensors) for block in geometry.mtp)


def test_separate_mtp_stack_may_store_experts_one_by_one() -> None:
    geometry = geometry_of("qwen3.5-35b")
    assert kinds(geometry, "mtp.layers.0.mlp") == Counter({ExpertTensor: 3 * 256, Sliced: 1})
    assert geometry.roles["mtp.layers.0.mlp.experts.7.up_proj.weight"] == ExpertTensor(
        "mtp.layers.0.mlp", 7, "up_proj.weight"
    )


def test_scales_follow_their_expert_and_norms_of_the_mtp_layer_stay() -> None:
    roles = geometry_of("deepseek-v3").roles
    scale = "model.layers.61.mlp.experts.255.down_proj.weight_scale_inv"
    assert roles[scale] == ExpertTensor("model.layers.61.mlp", 255, "down_proj.weight_scale_inv")
    assert roles["model.layers.61.mlp.gate.e_score_correction_bias"] == Sliced("model.layers.61.mlp", 0)
    for name in ("eh_proj", "shared_head.head", "embed_tokens", "enorm", "mlp.shared_experts.up_proj"):
        assert roles[f"model.layers.61.{name}.weight"] == Whole()


@pytest.mark.parametrize(
    ("plain", "quantised"),
    [("gpt-oss-20b-bf16", "gpt-oss-20b"), ("qwen3-30b", "qwen3-30b-gptq"), ("glm-4.6", "glm-4.5-fp8"),
     ("kimi-k2-thinking", "kimi-k2.5")],
)  # fmt: skip
def test_siblings_in_other_formats_have_the_same_geometry_hash(plain: str, quantised: str) -> None:
    """A plan made on one applies to the other."""
    assert geometry_hash(geometry_of(plain)) == geometry_hash(geometry_of(quantised))


def test_layers_for_multi_token_prediction_are_not_in_the_geometry_hash() -> None:
    whole = golden("deepseek-v3")
    trunk = [tensor for tensor in whole.expand() if not tensor[0].startswith("model.layers.61.")]
    assert geometry_hash(read_geometry(as_checkpoint(trunk, whole.config))) == geometry_hash(geometry_of("deepseek-v3"))


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("deepseek-v3", [("n_routed_experts",), ("num_experts_per_tok",)]),
        ("gpt-oss-20b", [("num_local_experts",), ("num_experts_per_tok",), ("experts_per_token",)]),
        ("qwen3.5-35b", [("text_config", "num_experts"), ("text_config", "num_experts_per_tok")]),
        ("dbrx", [("ffn_config", "moe_num_experts"), ("ffn_config", "moe_top_k")]),
        ("gemma-4-26b", [("text_config", "num_experts"), ("text_config", "top_k_experts")]),
    ],
)
def test_config_edits_name_every_alias(name: str, paths: list[tuple[str, ...]]) -> None:
    edits = geometry_of(name).config_edits(golden(name).config, 12, 2)
    assert [edit.path for edit in edits] == paths
    assert [edit.new for edit in edits] == [12] + [2] * (len(edits) - 1)
    expected = golden(name).expected
    assert [edit.old for edit in edits] == [expected.experts] + [expected.top_k] * (len(edits) - 1)


def test_expert_bytes_count_its_rows() -> None:
    checkpoint = golden("gpt-oss-20b-bf16").checkpoint()
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
    published = TINY[name].golden
    assert published is not None
    tensors = read_tensors(tiny_model(name, tmp_path_factory))
    found = {template(tensor): tensor for tensor in tensors if ".visual." not in tensor}
    expected = {n for n in published.templates() if not n.endswith("_scale_inv")}
    dense = {f"model.layers.*.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    missing, extra = expected - found.keys(), found.keys() - expected - dense
    if TINY[name].config["tie_word_embeddings"]:
        missing -= {"lm_head.weight"}
    if TINY[name].config.get("num_nextn_predict_layers") == 0:
        missing = {n for n in missing if not any(part in n for part in ("eh_proj", "norm", "shared_head", "embed"))}
    assert (missing, extra) == (set(), set())
    real = {template(n): (dtype, shape) for n, dtype, shape in published.expand()}
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
