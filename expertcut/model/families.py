"""The family table: one declarative row per on-disk layout. Adding a family is adding a row.

Names in a row are relative to a decoder layer (`block`) or to its MoE block (all others). Tensor patterns are matched
with `fnmatch`; per-expert tensors are everything below `experts.<id>.`, so that scales, zero points, packed weights and
biases follow their expert without being listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from expertcut.errors import ConfigConflictError, UnknownTensorError

Scoring = Literal["softmax", "softmax-after-topk", "sigmoid"]
"""How a router turns logits into gate weights: softmax over all experts, softmax over the chosen ones, or sigmoid."""


@dataclass(frozen=True, slots=True)
class Family:
    """Where a model type keeps its experts, router and their numbers."""

    model_type: str
    block: str = "mlp"
    """Module path of the MoE block below its decoder layer."""
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    """Config keys of the routed-expert count; the first present one counts, all present ones must agree."""
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    """Config keys of the number of experts activated per token."""
    width: str = "moe_intermediate_size"
    """Config key of a routed expert's intermediate size."""
    root: tuple[str, ...] = ()
    """Path of the config object that holds the keys above, such as `("text_config",)`."""
    expert: str = "experts"
    """Module below the block whose numbered children are the experts."""
    router: str = "gate"
    """Router module below the block; its `weight` has one row per expert."""
    sliced: tuple[tuple[str, int], ...] = ()
    """(pattern, axis) of further tensors that have an expert axis: biases, fused 3-D experts."""
    whole: tuple[str, ...] = ("shared_expert.*", "shared_experts.*", "shared_expert_gate.*")
    """Patterns of tensors of the block that belong to no routed expert."""
    scoring: Scoring = "softmax"
    renormalise: bool | str = "norm_topk_prob"
    """Config key saying whether the chosen gate weights are scaled to sum to one, or a fixed answer."""
    renormalise_default: bool = False
    """What an absent key means."""
    grouped_if: tuple[str, str] | None = None
    """(config key, value) that must hold for `n_group` to be in force; None: `n_group` > 1 suffices."""
    group_best: int = 2
    """How many experts of a group the router looks at to rank the group: each group must keep at least as many."""
    correction_bias: str | None = None
    """Tensor added to the scores for choosing, not for weighing."""


_FUSED = (("experts.*", 0),)
_CORRECTION = "gate.e_score_correction_bias"
_DEEPSEEK_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")

FAMILIES: tuple[Family, ...] = (
    Family("qwen2_moe"),
    Family("qwen3_moe"),
    Family("olmoe", width="intermediate_size"),
    Family(
        "mixtral", block="block_sparse_moe", experts=("num_local_experts", "num_experts"),
        width="intermediate_size", renormalise=True,
    ),
    Family(
        "deepseek_v2", experts=_DEEPSEEK_EXPERTS, renormalise=False,
        grouped_if=("topk_method", "group_limited_greedy"), group_best=1,
    ),
    Family(
        "deepseek_v3", experts=_DEEPSEEK_EXPERTS, scoring="sigmoid", renormalise_default=True,
        sliced=((_CORRECTION, 0),), correction_bias=_CORRECTION,
    ),
    Family(
        "glm4_moe", experts=_DEEPSEEK_EXPERTS, scoring="sigmoid", renormalise_default=True,
        sliced=((_CORRECTION, 0),), correction_bias=_CORRECTION,
    ),
    Family(
        "gpt_oss", experts=("num_local_experts", "num_experts"), top_k=("num_experts_per_tok", "experts_per_token"),
        width="intermediate_size", router="router", sliced=(("router.bias", 0), *_FUSED), whole=(),
        scoring="softmax-after-topk", renormalise=True,
    ),
    Family("qwen3_vl_moe", root=("text_config",), sliced=_FUSED, renormalise=True),
    Family("qwen3_5_moe", root=("text_config",), sliced=_FUSED, renormalise=True),
)  # fmt: skip

_BY_TYPE = {family.model_type: family for family in FAMILIES}


def resolve_family(config: dict[str, Any]) -> Family:
    """Return the row for a raw config, by its `model_type`.

    Raises:
        ConfigConflictError: the config has no `model_type`.
        UnknownTensorError: no row for this model type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigConflictError("config.json: no model_type", "add the model_type that transformers uses")
    if model_type not in _BY_TYPE:
        known = ", ".join(sorted(_BY_TYPE))
        raise UnknownTensorError(
            f"config.json: model_type {model_type!r} has no row in the family table; known: {known}",
            "see CONTRIBUTING.md, 'Add a family'",
        )
    return _BY_TYPE[model_type]
