"""Every model type of the installed transformers is supported or refused with a reason; layouts of the Hub alone."""

from __future__ import annotations

from typing import Any

import pytest
from golden_names import as_checkpoint, expand
from tiny_types import MODEL_TYPES, SUPPORTED, tiny_type

from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.errors import ConfigConflictError, UnknownTensorError
from expertcut.model import BY_TYPE, FAMILIES, REFUSED, Sliced, Whole, read_geometry, resolve_family

MOE: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2,
}  # fmt: skip


def checkpoint(rows: str, model_type: str, **config: Any) -> Checkpoint:
    return as_checkpoint(list(expand(rows)), {"model_type": model_type, **config})


def test_transformers_has_the_types_that_we_know_of() -> None:
    """The enumeration finds something: about eighty types, the famous ones among them."""
    assert len(MODEL_TYPES) >= 80
    famous = {"mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v4", "gpt_oss", "llama4", "gemma4", "dbrx", "kimi_k25"}
    assert famous <= set(MODEL_TYPES)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_type_is_supported_or_refused_with_a_reason(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if name in REFUSED:
        assert len(REFUSED[name].split()) > 8
        with pytest.raises(UnknownTensorError, match="not supported"):
            resolve_family({"model_type": name})
    else:
        geometry = read_geometry(open_checkpoint(tiny_type(name, tmp_path_factory)))
        assert geometry.family.model_type == name
        assert geometry.num_experts == 8
        assert geometry.blocks


def test_at_most_four_types_are_refused() -> None:
    assert len(REFUSED) <= 4
    assert not REFUSED.keys() & BY_TYPE.keys()
    assert set(MODEL_TYPES) == set(SUPPORTED) | (REFUSED.keys() & set(MODEL_TYPES))


def test_no_model_type_has_two_rows() -> None:
    names = [name for row in FAMILIES for name in (row.model_type, *row.aliases)]
    assert len(names) == len(set(names)) == len(BY_TYPE)


BAILING = """
    model.word_embeddings.weight BF16 96x32
    model.layers.0.mlp.gate_proj.weight BF16 48x32
    model.layers.1.mlp.gate.weight BF16 8x32
    model.layers.1.mlp.experts.{0-7}.{gate,up}_proj.weight BF16 24x32
    model.layers.1.mlp.experts.{0-7}.down_proj.weight BF16 32x24
"""


@pytest.mark.parametrize(("said", "scoring"), [({}, "softmax"), ({"score_function": "sigmoid"}, "sigmoid")])
def test_ling_says_how_it_scores(said: dict[str, str], scoring: str) -> None:
    geometry = read_geometry(checkpoint(BAILING, "bailing_moe", **MOE, **said))
    assert geometry.family.scoring == scoring
    with pytest.raises(ConfigConflictError, match="score_function is 'tanh'"):
        read_geometry(checkpoint(BAILING, "bailing_moe", **MOE, score_function="tanh"))


def test_type_of_the_language_part_counts_where_the_whole_has_no_row() -> None:
    """InternVL around Qwen3-MoE: the counts are edited where they stand."""
    rows = BAILING.replace("model.layers", "language_model.model.layers")
    whole = checkpoint(rows, "internvl_chat", llm_config=MOE | {"model_type": "qwen3_moe"})
    geometry = read_geometry(whole)
    assert geometry.family.root == ("llm_config",)
    edits = geometry.config_edits(whole.config, 4, 1)
    assert [e.path for e in edits] == [("llm_config", "num_experts"), ("llm_config", "num_experts_per_tok")]


def test_lists_with_an_entry_per_layer_are_edited_in_every_entry() -> None:
    rows = BAILING.replace("mlp.gate.weight", "mlp.gate.wg.weight")
    config = MOE | {"moe_topk": [2, 2], "moe_intermediate_size": [24, 24], "intermediate_size": 24}
    model = checkpoint(rows, "hunyuan", **config)
    geometry = read_geometry(model)
    edits = {edit.path: edit.new for edit in geometry.config_edits(model.config, 4, 1)}
    assert edits == {("num_experts",): 4, ("moe_topk",): [1, 1], ("num_experts_per_tok",): 1}
    with pytest.raises(ConfigConflictError, match=r"moe_topk is \[2, 1\]"):
        read_geometry(checkpoint(rows, "hunyuan", **config | {"moe_topk": [2, 1]}))


def test_towers_are_never_looked_into() -> None:
    """A vision tower may have experts of its own."""
    rows = BAILING + "vision_tower.layers.1.mlp.experts.{0-3}.up_proj.weight BF16 8x8"
    geometry = read_geometry(checkpoint(rows, "qwen3_moe", **MOE))
    assert [block.prefix for block in geometry.blocks.values()] == ["model.layers.1.mlp"]
    with pytest.raises(UnknownTensorError, match="decoder.layers.1.ffn.experts.0.up_proj.weight: looks like"):
        read_geometry(
            checkpoint(BAILING + "decoder.layers.1.ffn.experts.0.up_proj.weight BF16 8x8", "qwen3_moe", **MOE)
        )


MTP_PLACES = {
    "model.layers.2.": ("model.layers.2.eh_proj.weight", "model.layers.2.mlp"),
    "mtp.layers.0.": ("mtp.fc.weight", "mtp.layers.0.mlp"),
    "mtp.0.": ("mtp.0.e_proj.weight", "mtp.0.mlp"),
    "model.mtp.layers.0.": ("model.mtp.norm.weight", "model.mtp.layers.0.mlp"),
    "model.mtp_layers.0.": ("model.mtp_layers.0.norm.weight", "model.mtp_layers.0.mlp"),
    "model.mtp_block.0.": ("model.mtp_linear_proj.0.weight", "model.mtp_block.0.mlp"),
    "language_model.mtp.layers.0.": ("language_model.mtp.fc.weight", "language_model.mtp.layers.0.mlp"),
}


@pytest.mark.parametrize("place", MTP_PLACES)
def test_layers_for_multi_token_prediction_in_every_place(place: str) -> None:
    extra, prefix = MTP_PLACES[place]
    layer = [row.replace("model.layers.1.", place) for row in BAILING.splitlines() if "layers.1." in row]
    rows = BAILING + "\n".join(layer) + f"\n{extra} BF16 32x32\n"
    config = MOE | {"num_nextn_predict_layers": 1}
    model = checkpoint(rows, "qwen3_moe", **config)
    geometry = read_geometry(model)
    assert [(block.prefix, block.layer) for block in geometry.mtp] == [(prefix, 2)]
    assert set(geometry.mtp_tensors) == {name for name in model.tensors if name.startswith(place) or name == extra}
    assert [(edit.path, edit.new) for edit in geometry.mtp_edits(config)] == [(("num_nextn_predict_layers",), 0)]


def test_rows_behind_the_experts_stay() -> None:
    rows = """
        model.layers.{0-1}.mlp.router.classifier.weight F32 12x32
        model.layers.{0-1}.mlp.router.e_score_correction_bias F32 12
        model.layers.{0-1}.mlp.experts.{0-7}.{gate,up}_proj.weight BF16 24x32
        model.layers.{0-1}.mlp.experts.{0-7}.down_proj.weight BF16 32x24
        model.layers.{0-1}.mlps.{0-1}.up_proj.weight BF16 48x32
    """
    config = {"n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 2, "hidden_size": 32, "num_layers": 2}
    geometry = read_geometry(checkpoint(rows, "longcat_flash", **config, expert_ffn_hidden_size=24))
    prefix = "model.layers.1.mlp"
    assert geometry.roles[f"{prefix}.router.classifier.weight"] == Sliced(prefix, 0, tail=4)
    assert geometry.roles["model.layers.1.mlps.0.up_proj.weight"] == Whole()
    assert (geometry.num_experts, geometry.tail) == (8, 4)
