"""The family table: one declarative row per on-disk layout. Adding a family is adding a row.

Names in a row are relative to a decoder layer (`block`) or to its MoE block (all others), as they stand in checkpoints;
`live*` are the modules of transformers where those differ. Tensor patterns are matched with `fnmatch`; per-expert
tensors are everything below `experts.<id>.`, so that scales, zero points, packed weights and biases follow their expert
without being listed. Where a config has several names for a number, the first present one counts and all must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from expertcut.errors import ConfigConflictError, UnknownTensorError

Scoring = Literal[
    "softmax", "softmax-after-topk", "sigmoid", "sqrtsoftplus", "sigmoid-of-logit", "sigmoid-input", "sparsemixer"
]  # fmt: skip
"""How a router chooses and weighs, of logits x (a correction bias is added for choosing only):

softmax: by probability, weight = probability. softmax-after-topk: by logit, weight = softmax over the chosen.
sigmoid, sqrtsoftplus: by σ(x), √softplus(x), weight the same. sigmoid-of-logit: by x, weight = σ(x).
sigmoid-input: by x; σ(x) scales the expert's input, the output is not weighted. sparsemixer: by x, one after another,
each weight from a softmax over the logits near the largest one left.
"""

LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers")
LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern")
"""Lists or strings with one entry per layer, where a config has no count."""
HIDDEN_KEYS = ("hidden_size", "d_model")
GROUP_KEYS = ("n_group", "num_expert_group")
SCALING_KEYS = (
    "routed_scaling_factor", "router_scaling_factor", "moe_routed_scaling_factor", "moe_router_scaling_factor",
    "route_scale",
)  # fmt: skip
"""Keys of a factor on all that the routed experts add up to, in every layer."""
MTP_KEYS = (
    "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules", "use_mtp",
    "mtp_hybrid_override_pattern", "mtp_layers_block_type", "mtp_layer_types", "mtp_mlp_layer_types",
    "mtp_local_layer_ids",
)  # fmt: skip
"""Keys that announce or describe multi-token-prediction layers: counts, switches, and lists with an entry per layer."""
MTP_SCOPE = "mtp_config"
"""An object of its own that some configs keep such keys in."""
ROOTS = ((), ("text_config",), ("llm_config",), ("language_config",), ("thinker_config", "text_config"))
"""Where configs keep their language part; for a model type without a row its language part's type is looked up."""
TOWERS = (
    "vision*", "visual*", "audio*", "talker*", "code2wav*", "sam_model*", "qwen2_model*", "perception*", "sound*",
    "vit*", "mtp_dspark*",
)  # fmt: skip
"""Modules that start a part which is no language model; one of the first three components of a tensor's name."""


@dataclass(frozen=True, slots=True)
class Family:
    """Where a model type keeps its experts, router and their numbers."""

    model_type: str
    aliases: tuple[str, ...] = ()
    """Further model types with the same row."""
    block: str = "mlp"
    """Module path of the MoE block below its decoder layer; empty: its parts are the layer's own children."""
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    """Config keys of the routed-expert count."""
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    """Config keys of the number of experts activated per token; a value may be a list with an entry per layer."""
    width: tuple[str, ...] = ("moe_intermediate_size",)
    """Config keys of a routed expert's intermediate size; the first present one counts, the others may differ."""
    root: tuple[str, ...] = ()
    """Path of the config object that holds the keys above, where it is none of `ROOTS`."""
    expert: str = "experts"
    """Module below the block whose numbered children are the experts; empty: there are only fused ones."""
    router: str = "gate"
    """Router module below the block; its `weight` has one row per expert."""
    router_axis: int = 0
    """Axis of the router's weight that counts experts; 1 where it is stored transposed."""
    twin: tuple[str, str] | None = None
    """A second set of as many experts, which text does not use, numbered behind the first in the same list: the name
    below the block under which plans keep it, and its router's weight. The correction bias has a row for each set."""
    sliced: tuple[tuple[str, int], ...] = ()
    """(pattern, axis) of further tensors that have an expert axis: biases, fused 3-D experts."""
    flattened: tuple[str, ...] = ()
    """Patterns of tensors (E·I, H) whose rows e·I … (e+1)·I belong to expert e."""
    tail: str | int = 0
    """Config key, or number, of rows behind the routed ones that no routed expert stands behind; they always stay."""
    hash_table: str | None = None
    """Integer tensor (vocabulary, k) whose values are expert ids."""
    whole: tuple[str, ...] = ("shared_expert.*", "shared_experts.*", "shared_expert_gate.*")
    """Patterns of tensors of the block that belong to no routed expert."""
    scoring: Scoring = "softmax"
    scoring_key: str | None = None
    """Config key that, where present, says which scoring holds."""
    renormalise: bool | str = "norm_topk_prob"
    """Config key saying whether the chosen gate weights are scaled to sum to one, or a fixed answer."""
    renormalise_default: bool = False
    """What an absent key means."""
    grouped_if: tuple[str, str] | None = None
    """(config key, value) that must hold for groups to be in force; None: more than one suffices."""
    ranks_one_group: bool = False
    """The router ranks its groups by their best experts even if there is only one."""
    group_best: int = 2
    """How many experts of a group the router looks at to rank the group: each group must keep at least as many."""
    correction_bias: str | None = None
    """Tensor added to the scores for choosing, not for weighing."""
    live_block: str | None = None
    """The MoE block's module path below the layer in transformers, where it differs from `block`."""
    live: tuple[str, str | None] | None = None
    """(router module, correction bias) below the block in transformers, where they differ from `router` and
    `correction_bias`."""
    skips: bool = False
    """The tail is one class that means to skip the block; transformers reports it as expert 0 with weight 0."""
    fixed_top_k: bool = False
    """The router knows one top-k only."""
    unscalable: str | None = None
    """Why a factor on what the routed experts add up to cannot be folded into their weights."""
    scales_shared: bool = False
    """The config's factor on the routed experts is on shared ones too."""

    @property
    def sets(self) -> int:
        """Sets of experts in every block."""
        return 2 if self.twin else 1


_FUSED = (("experts.*", 0),)
_CORRECTION = "gate.e_score_correction_bias"
_BIASED = ((_CORRECTION, 0), *_FUSED)
_LINEARS = (("input_linear.*", 0), ("output_linear.*", 0))
_ROUTED = ("n_routed_experts", "num_local_experts", "num_experts")
_LOCAL = ("num_local_experts", "num_experts")
_WIDE = ("intermediate_size",)
_NORMED = "its experts' outputs are normalised"
_LAYER_PARTS = (
    "self_attn.*", "self_attention.*", "attention.*", "mlp.*", "feed_forward.*", "*norm", "*norm.*", "*layernorm*",
    "layer_scalar", "shared_experts.*", "indexer.*", "per_layer_*", "router.scale",
)  # fmt: skip


def _softmax(model_type: str, *aliases: str, **facts: Any) -> Family:
    """A router that weighs by probability; fused and numbered experts both occur."""
    return Family(model_type, aliases, **_defaults(facts, sliced=_FUSED))


def _after_topk(model_type: str, *aliases: str, **facts: Any) -> Family:
    """A router that takes the softmax over the chosen logits."""
    return Family(
        model_type, aliases, **_defaults(facts, sliced=_FUSED, scoring="softmax-after-topk", renormalise=True)
    )


def _sigmoid(model_type: str, *aliases: str, bias: str | None = _CORRECTION, **facts: Any) -> Family:
    """A router that weighs by sigmoid, with a correction bias, as DeepSeek-V3's."""
    sliced = _FUSED if bias is None else ((bias, 0), *_FUSED)
    usual = _defaults(facts, sliced=sliced, scoring="sigmoid", renormalise_default=True)
    return Family(model_type, aliases, correction_bias=bias, **usual)


def _defaults(facts: dict[str, Any], **usual: Any) -> dict[str, Any]:
    return usual | facts


FAMILIES: tuple[Family, ...] = (
    _softmax("qwen2_moe"),
    _softmax("qwen3_moe", "interns1_moe"),
    _softmax(
        "qwen3_next", "mellum", "qwen4_exp", "qwen4_exp_text", "qwen3_omni_moe", "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_text", renormalise_default=True,
    ),
    _softmax("qwen3_vl_moe", "qwen3_vl_moe_text", renormalise=True),
    _softmax("qwen3_5_moe", "qwen3_5_moe_text", renormalise=True),
    _softmax("olmoe", "flex_olmo", width=_WIDE),
    _softmax(
        "mixtral", "minimax", "minimax_m1", "minimax_text_01", block="block_sparse_moe", experts=_LOCAL, width=_WIDE,
        sliced=(), renormalise=True, live_block="mlp",
    ),
    _softmax(
        "phimoe", block="block_sparse_moe", experts=_LOCAL, width=_WIDE, sliced=(), scoring="sparsemixer",
        renormalise=False, live_block="mlp", live=("router", None), fixed_top_k=True,
    ),
    _softmax("jamba", block="feed_forward", width=_WIDE, router="router", sliced=(), renormalise=False),
    _softmax(
        "deepseek_v2", "deepseek", "deepseek_vl_v2", "deepseek_ocr", "deepseek_ocr2", "deepseek_ocr2_text",
        "unlimited_ocr", "unlimited_ocr_text", experts=_ROUTED, renormalise=False,
        grouped_if=("topk_method", "group_limited_greedy"), group_best=1,
    ),
    _softmax(
        "hunyuan_v1_moe", "hunyuan", "hunyuan_moe", top_k=("moe_topk", "num_experts_per_tok"), width=_WIDE,
        router="gate.wg", sliced=(), whole=("shared_mlp.*",), renormalise=True, live=("gate", None),
    ),
    _softmax(
        "dbrx", block="ffn", root=("ffn_config",), experts=("moe_num_experts",), top_k=("moe_top_k",),
        width=("ffn_hidden_size",), router="router.layer", sliced=(), flattened=("experts.mlp.*",),
        renormalise="moe_normalize_expert_weights", renormalise_default=True, live=("router", None),
    ),
    _softmax("mistral4", "mistral4_text", experts=_ROUTED, ranks_one_group=True, renormalise_default=True),
    _softmax(
        "mistral_large4", "mistral_large4_text", block="", experts=_ROUTED, whole=_LAYER_PARTS, renormalise=True,
        live_block="mlp", ranks_one_group=True,
    ),
    _softmax(
        "gemma4", "gemma4_text", "diffusion_gemma", "diffusion_gemma_text", block="",
        top_k=("top_k_experts", "num_experts_per_tok"), router="router.proj",
        sliced=(("router.per_expert_scale", 0), *_FUSED), whole=_LAYER_PARTS, renormalise=True, unscalable=_NORMED,
    ),
    _softmax(
        "longcat_flash", "longcat_flash_chat", "longcat_flash_ngram", experts=("n_routed_experts",),
        top_k=("moe_topk", "num_experts_per_tok"), width=("expert_ffn_hidden_size", "moe_intermediate_size"),
        router="router.classifier", tail="zero_expert_num",
        sliced=(("router.classifier.bias", 0), ("router.e_score_correction_bias", 0)), renormalise=False,
        correction_bias="router.e_score_correction_bias", live=("router", "router.e_score_correction_bias"),
        unscalable="its router also routes to experts without weights",
    ),
    _softmax(
        "ernie4_5_moe", experts=("moe_num_experts", "num_experts"), top_k=("moe_k", "num_experts_per_tok"),
        sliced=(("moe_statics.e_score_correction_bias", 1), *_FUSED), renormalise=True,
        correction_bias="moe_statics.e_score_correction_bias",
        live=("gate", "gate.moe_statics.e_score_correction_bias"),
    ),
    _softmax(
        "ernie4_5_vl_moe", "ernie4_5_moe_vl", "ernie4_5_vl_moe_text", experts=("moe_num_experts", "num_experts"),
        top_k=("moe_k", "num_experts_per_tok"), router_axis=1, twin=("vision_moe", "gate.weight_1"), sliced=(),
        renormalise=True, correction_bias="moe_statics.e_score_correction_bias",
        live=("text_moe.gate", "text_moe.gate.moe_statics.e_score_correction_bias"),
    ),
    _softmax(
        "zaya", router="gate.router_mlp.out_proj", tail=1, sliced=(("gate.balancing_biases", 0), *_FUSED),
        whole=("gate.*",), renormalise=False, correction_bias="gate.balancing_biases",
        live=("gate", "gate.balancing_biases"), skips=True, fixed_top_k=True,
    ),
    _softmax(  # Ling 1 is softmax and has no such key; Ling 2 says sigmoid
        "bailing_moe", scoring_key="score_function", renormalise_default=True,
        sliced=(("gate.expert_bias", 0), ("gate.bias", 0), *_FUSED), correction_bias="gate.expert_bias",
        live=("gate", _CORRECTION),
    ),
    _after_topk(
        "gpt_oss", experts=_LOCAL, top_k=("num_experts_per_tok", "experts_per_token"), width=_WIDE, router="router",
        sliced=(("router.bias", 0), *_FUSED), whole=(),
    ),
    _after_topk(
        "granitemoe", "granitemoeshared", "granitemoehybrid", block="block_sparse_moe", experts=_LOCAL, width=_WIDE,
        router="router.layer", sliced=_LINEARS, live=("router", None),
    ),
    _after_topk("granitemoe_swa", block="block_sparse_moe", experts=_LOCAL, width=_WIDE, router="router"),
    _after_topk(
        "aria", "aria_text", experts=("moe_num_experts",), top_k=("moe_topk",), width=_WIDE, router="router",
    ),
    _after_topk(
        "cohere2_moe", width=_WIDE, sliced=(), scoring_key="expert_selection_fn", renormalise="norm_topk_prob",
        renormalise_default=True,
    ),
    _sigmoid(
        "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "kimi_vl", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
        "glm4v_moe_text", "glm_moe_dsa", "glm5_next", "glm5_next_text", "solar_open", "axk1", "axk2", "mimo_v2_flash",
        "mimo_v2", "hy_v4", "dots3_note", "dots3_note_text", "minimax_m3_vl_text", experts=_ROUTED,
        width=("moe_intermediate_size", "intermediate_size"), ranks_one_group=True,
    ),
    _sigmoid("dots1", experts=_ROUTED, ranks_one_group=True, renormalise_default=False),
    _sigmoid("beam", ranks_one_group=True),
    _sigmoid("exaone_moe", ranks_one_group=True, bias="e_score_correction_bias", live=("gate", _CORRECTION)),
    _sigmoid(
        "bailing_hybrid", "bailing_moe_v2", "bailing_moe_linear", "bailing_moe_linear_v2",
        top_k=("num_experts_per_tok", "num_experts_per_token"), scoring_key="score_function",
        bias="gate.expert_bias", sliced=(("gate.expert_bias", 0), ("gate.bias", 0), *_FUSED),
        live=("gate", _CORRECTION), ranks_one_group=True,
    ),
    _sigmoid(
        "kimi_linear", block="block_sparse_moe", top_k=("num_experts_per_token", "num_experts_per_tok"),
        scoring_key="moe_router_activation_func", renormalise="moe_renormalize", sliced=((_CORRECTION, 0),),
        live_block="mlp", ranks_one_group=True,
    ),
    _sigmoid(
        "nemotron_h", block="mixer", ranks_one_group=True, experts=_ROUTED,
        sliced=((_CORRECTION, 0), ("experts.gate_and_up_projs", 0), ("experts.down_projs", 0)),
        whole=("shared_experts.*", "fc1_latent_proj.*", "fc2_latent_proj.*"),
    ),
    _sigmoid(
        "deepseek_v4", "deepseek_ref", block="ffn", experts=_ROUTED, scoring="sqrtsoftplus", scoring_key="scoring_func",
        renormalise=True, bias="gate.bias", sliced=(("gate.bias", 0),), hash_table="gate.tid2eid", live_block="mlp",
        live=("gate", _CORRECTION),
    ),
    _sigmoid(
        "minimax_m2", block="block_sparse_moe", experts=_LOCAL, width=("intermediate_size", "moe_intermediate_size"),
        renormalise=True, bias="e_score_correction_bias", live_block="mlp",
    ),
    _sigmoid(
        "minimax_m3_vl", "minimax_m3", block="block_sparse_moe", experts=_LOCAL,
        width=("intermediate_size", "moe_intermediate_size"), renormalise=True, bias="e_score_correction_bias",
        live_block="mlp", live=("gate", _CORRECTION),
    ),
    _sigmoid("afmoe", router="router.gate", renormalise=True, bias="expert_bias", live=("router", "expert_bias")),
    _sigmoid(
        "hy_v3", router="router.gate", whole=("shared_mlp.*",), renormalise=True, bias="expert_bias",
        live=("gate", "e_score_correction_bias"),
    ),
    _sigmoid("lfm2_moe", block="feed_forward", bias="expert_bias"),
    _sigmoid("laguna", renormalise=True, bias="experts.e_score_correction_bias", live=("gate", _CORRECTION)),
    _sigmoid("flint", bias=None),
    _sigmoid(
        "kolibri1", block="", experts=_LOCAL, expert="mlp.experts", router="mlp.gate", scoring="sigmoid-of-logit",
        renormalise_default=False, bias="moe.router.expert_bias", sliced=(("moe.router.expert_bias", 0),),
        whole=("mlp.shared_experts.*", "self_attn.*", "*norm.*"), live_block="mlp", live=("gate", _CORRECTION),
    ),
    _sigmoid(
        "muse_spark", "muse_spark_text", experts=_LOCAL, renormalise=True,
        sliced=((_CORRECTION, 0), ("experts.gate_up_proj*", 0), ("experts.down_proj*", 0)),
        whole=("experts.post_expert_norm.*", "pre_expert_*", "post_expert_*"), unscalable=_NORMED,
    ),
    _sigmoid(
        "inkling_mm_model", "inkling_text", experts=_ROUTED, width=("moe_intermediate_size", "intermediate_size"),
        renormalise=True, tail="n_shared_experts", bias="gate.bias", sliced=(("gate.bias", 0), *_BIASED),
        whole=("shared_experts.*", "gate.global_scale"), live=("gate", _CORRECTION), scales_shared=True,
    ),
    _sigmoid(
        "inkling2", "inkling2_text", experts=_ROUTED, scoring_key="scoring_func", renormalise=True, bias="gate.bias",
        whole=(), live=("gate", _CORRECTION),
    ),
    _sigmoid(
        "step3p7", "step3p5", "step3_text", "step3_vl", block="moe",
        experts=("n_routed_experts", "moe_num_experts", "num_local_experts", "num_experts"),
        top_k=("num_experts_per_tok", "moe_top_k"), expert="", renormalise=True, bias="router_bias",
        sliced=(("router_bias", 0), ("gate_proj.*", 0), ("up_proj.*", 0), ("down_proj.*", 0)), whole=(),
        live_block="mlp", live=("gate", _CORRECTION),
    ),
    _softmax(
        "llama4", "llama4_text", block="feed_forward", experts=_LOCAL, width=_WIDE, router="router",
        scoring="sigmoid-input", renormalise=False,
    ),
)  # fmt: skip

REFUSED: Mapping[str, str] = {
    "doge": "its experts are the cells of a √E × √E grid of 2·√E router rows: only whole rows or columns could go",
    "jetmoe": "its attention is made of routed experts too; one config key counts both, and no profile sees those",
    "nemotron_h_puzzle": "every layer has an expert count and a top-k of its own (block_configs); plans have one",
}
"""Model types that are known and not supported, and why."""

BY_TYPE: Mapping[str, Family] = {name: row for row in FAMILIES for name in (row.model_type, *row.aliases)}
"""The row of every supported model type."""


def resolve_family(config: Mapping[str, Any]) -> Family:
    """Return the row for a raw config, with this config's own model type, root and scoring filled in.

    Raises:
        ConfigConflictError: the config has no `model_type`, or names a scoring that its row does not know.
        UnknownTensorError: no row for this model type, or it is refused.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigConflictError("config.json: no model_type", "add the model_type that transformers uses")
    parts = (dig(config, path) or {} for path in ROOTS[1:])
    for name in (model_type, *(str(part.get("model_type")) for part in parts)):
        if reason := REFUSED.get(name):
            raise UnknownTensorError(f"config.json: model_type {name!r} is not supported: {reason}")
        if name in BY_TYPE:
            row = BY_TYPE[name]
            root = _root(config, row)
            return replace(row, model_type=model_type, root=root, scoring=_scoring(dig(config, root) or {}, row))
    raise UnknownTensorError(
        f"config.json: model_type {model_type!r} has no row in the family table; known: {', '.join(sorted(BY_TYPE))}",
        "see CONTRIBUTING.md, 'Add a family'",
    )


def dig(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    """Return the object at a path of a raw config, None if there is none."""
    found: Any = config
    for key in path:
        found = found.get(key)
        if not isinstance(found, dict):
            return None
    return found  # type: ignore[no-any-return]


def _root(config: Mapping[str, Any], row: Family) -> tuple[str, ...]:
    for path in (row.root, *ROOTS):
        part = dig(config, path)
        if part is not None and any(part.get(key) is not None for key in row.experts):
            return path
    return row.root


def _scoring(scope: Mapping[str, Any], row: Family) -> Scoring:
    said = scope.get(row.scoring_key) if row.scoring_key else None
    if said is None:
        return row.scoring
    known: Mapping[str, Scoring] = {name: name for name in get_args(Scoring)}
    if row.scoring == "softmax-after-topk":
        known = {"softmax": "softmax-after-topk", "sigmoid": "sigmoid-of-logit"}
    if said not in known:
        raise ConfigConflictError(f"config.json: {row.scoring_key} is {said!r}, known: {', '.join(known)}")
    return known[said]
