"""Configs and tensors that contradict each other, one small checkpoint of headers at a time."""

from typing import Any

import pytest
from golden_names import as_checkpoint, expand

from expertcut.checkpoint import Checkpoint
from expertcut.errors import ConfigConflictError, UnknownTensorError
from expertcut.model import read_geometry

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "hidden_size": 32,
    "moe_intermediate_size": 24, "num_hidden_layers": 3, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
}  # fmt: skip
ROWS = """
    model.embed_tokens.weight BF16 96x32
    model.layers.0.mlp.{gate,up}_proj.weight BF16 48x32
    model.layers.{1-2}.mlp.gate.weight BF16 8x32
    model.layers.{1-2}.mlp.gate.e_score_correction_bias F32 8
    model.layers.{1-2}.mlp.experts.{0-7}.{gate,up}_proj.weight BF16 24x32
    model.layers.{1-2}.mlp.experts.{0-7}.down_proj.weight BF16 32x24
"""


def checkpoint(*extra: str, without: str = "", **config: Any) -> Checkpoint:
    rows = [row for row in expand(ROWS) if not without or without not in row[0]]
    for row in extra:
        rows += expand(row)
    settings = {key: value for key, value in (CONFIG | config).items() if value is not ...}
    return as_checkpoint(rows, settings)


def test_the_sound_one_is_read() -> None:
    geometry = read_geometry(checkpoint())
    assert list(geometry.blocks) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert (geometry.hidden, geometry.expert_width, geometry.num_layers) == (32, 24, 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_experts": 16}, ("n_routed_experts=8", "num_experts=16")),
        ({"n_routed_experts": ...}, ("n_routed_experts", "is set")),
        ({"n_routed_experts": "8"}, ("n_routed_experts", "'8'")),
        ({"n_routed_experts": True}, ("n_routed_experts", "True")),
        ({"num_experts_per_tok": 0}, ("num_experts_per_tok", "0")),
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok=9", "8 experts")),
        ({"num_hidden_layers": ...}, ("num_hidden_layers",)),
        ({"hidden_size": 32.0}, ("hidden_size", "32.0")),
        ({"moe_intermediate_size": None}, ("moe_intermediate_size",)),
        ({"n_group": 3}, ("n_group=3", "8 experts")),
        ({"n_group": 2, "topk_group": 3}, ("topk_group=3",)),
        ({"n_group": 2, "topk_group": None}, ("topk_group",)),
        ({"n_routed_experts": 4}, ("gate.weight", "[8, 32]", "4 experts")),
        ({"n_routed_experts": 16}, ("[8, 32]", "16 experts")),
        ({"model_type": ...}, ("model_type",)),
    ],
)
def test_config_conflicts(config: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigConflictError) as caught:
        read_geometry(checkpoint(**config))
    for word in words:
        assert word in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("n_group", [None, 0, 1, ...])
def test_no_groups_said_in_several_ways(n_group: object) -> None:
    assert read_geometry(checkpoint(n_group=n_group, topk_group=None)).n_group == 1


@pytest.mark.parametrize(
    ("without", "name"),
    [
        ("layers.2.mlp.experts.5.", "model.layers.2.mlp.experts.5."),
        ("layers.1.mlp.experts.7.down_proj", "model.layers.1.mlp.experts.7.down_proj.weight"),
        ("layers.2.mlp.gate.weight", "model.layers.2.mlp.gate.weight"),
        ("layers.1.mlp.experts", "model.layers.1.mlp"),
    ],
)
def test_incomplete_blocks(without: str, name: str) -> None:
    with pytest.raises(ConfigConflictError, match=name.replace(".", r"\.")):
        read_geometry(checkpoint(without=without))


def test_expert_beyond_the_count() -> None:
    with pytest.raises(ConfigConflictError, match=r"experts\.8\.up_proj.*expert 8, but the config counts 8 experts"):
        read_geometry(checkpoint("model.layers.2.mlp.experts.8.up_proj.weight BF16 24x32"))


def test_family_without_a_row() -> None:
    with pytest.raises(UnknownTensorError, match="'dense'") as caught:
        read_geometry(checkpoint(model_type="dense"))
    assert "qwen3_moe" in caught.value.message  # the known ones are named


def test_no_experts_where_the_family_keeps_them() -> None:
    with pytest.raises(UnknownTensorError, match=r"layers\.\*\.mlp\.experts"):
        read_geometry(checkpoint(without=".mlp."))


@pytest.mark.parametrize(
    ("row", "unknown"),
    [
        ("model.layers.2.mlp.load_balance F32 8", True),
        ("model.layers.1.mlp.gate.temperature F32 3x8", True),
        ("model.layers.1.mlp.experts_scale.weight F32 8x1", True),
        ("model.layers.1.mlp.shared_experts.up_proj.weight BF16 8x32", False),  # known to be whole
        ("model.layers.1.mlp.norm.weight BF16 32", False),  # no axis of that length
        ("model.layers.1.self_attn.sinks BF16 8", False),  # not in a MoE block
    ],
)
def test_expert_sized_tensors(row: str, unknown: bool) -> None:
    if unknown:
        with pytest.raises(UnknownTensorError) as caught:
            read_geometry(checkpoint(row))
        assert row.split()[0] in caught.value.message
        assert caught.value.hint
    else:
        read_geometry(checkpoint(row))


def test_expert_tensors_need_no_rule() -> None:
    """What lies below an expert's number follows it, whatever it is called."""
    extra = "model.layers.{1-2}.mlp.experts.{0-7}.down_proj.zero_point_of_tomorrow I32 5"
    geometry = read_geometry(checkpoint(extra))
    assert len(geometry.blocks["model.layers.1.mlp"].tensors) == 2 + 4 * 8


def test_absolute_layers_and_mtp_by_number() -> None:
    rows = """
        model.layers.3.mlp.gate.weight BF16 8x32
        model.layers.3.mlp.gate.e_score_correction_bias F32 8
        model.layers.3.mlp.experts.{0-7}.up_proj.weight BF16 24x32
    """
    geometry = read_geometry(checkpoint(rows))
    assert [(b.layer, b.mtp) for b in geometry.blocks.values()] == [(1, False), (2, False), (3, True)]


def test_nested_config_must_be_there() -> None:
    """With the counts at the top the config is of another kind, such as a text-only one; without any it is broken."""
    with pytest.raises(ConfigConflictError, match="none of num_experts, num_local_experts is set"):
        read_geometry(checkpoint(model_type="qwen3_vl_moe"))
    with pytest.raises(ConfigConflictError, match="ffn_config is missing"):
        read_geometry(checkpoint(model_type="dbrx"))
