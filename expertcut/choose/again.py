"""A plan and an expert count in; the plan of that count by the same choice out, from what the provenance says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.criteria import get_criterion
from expertcut.choose.make import make_plan
from expertcut.choose.plan import Plan
from expertcut.errors import PlanError
from expertcut.model import Geometry

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile


def with_experts(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, experts: int, profile: Profile | None
) -> Plan:  # fmt: skip
    """Return the plan with other numbers of experts kept, by its own criterion, seed and protection; all else stays.

    Raises:
        PlanError: the plan does not say how its experts were chosen, was edited since, or needs its profile.
        UsageError: the count is out of range or the groups cannot share it.
    """
    counts = {len(entry.kept) for entry in plan.layers.values()}
    if len(counts) > 1:
        raise PlanError("the plan's layers keep different numbers of experts")
    if _kept(_chosen(checkpoint, geometry, plan, min(counts), profile)) != _kept(plan):
        raise PlanError("the plan keeps other experts than its provenance tells: was it edited?")
    chosen = _kept(_chosen(checkpoint, geometry, plan, experts, profile))
    layers = {p: entry.model_copy(update={"kept": chosen[p]}) for p, entry in plan.layers.items()}
    return plan.model_copy(update={"layers": layers})


def _chosen(checkpoint: Checkpoint, geometry: Geometry, plan: Plan, experts: int, profile: Profile | None) -> Plan:
    told: Mapping[str, Any] = plan.provenance
    strategy = told.get("criterion")
    if strategy is None:
        raise PlanError("the plan does not say by which criterion its experts were chosen")
    if told.get("sequential") or get_criterion(strategy).needs_replay:
        raise PlanError("the plan's experts were chosen while the model ran")
    scored, weights = get_criterion(strategy).needs_profile, told.get("domain_weights")
    if scored or told.get("super_experts"):
        if profile is None:
            raise PlanError("the plan was made with a profile", "add --profile")
        if profile.digest() != told.get("profile"):
            raise PlanError("the plan was made with another profile")
    return make_plan(
        checkpoint, geometry, strategy=strategy, experts=experts, profile=profile, seed=told.get("seed", 0),
        top_k=min(entry.top_k or geometry.top_k for entry in plan.layers.values()),
        domain_weights=weights if scored else None, protect=_protect(told.get("protected") or {}, geometry),
        protect_super=bool(told.get("super_experts")),
    )  # fmt: skip


def _protect(protected: Mapping[str, list[int]], geometry: Geometry) -> list[str]:
    """The options that protect these experts; a block's second set is numbered behind its first."""
    found = []
    for prefix, ids in protected.items():
        block = geometry.keys[prefix]
        first = block.keys.index(prefix) * geometry.num_experts
        found.append(f"{block.layer}:{','.join(str(first + e) for e in ids)}")
    return found


def _kept(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {prefix: entry.kept for prefix, entry in plan.layers.items()}
