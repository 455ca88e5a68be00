"""Choosing experts, for `plan` and `prune`: the options as typed, the plan, and what to say about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.model import Geometry
    from expertcut.runtimes.rules import LintSubject


@dataclass(frozen=True)
class Choice:
    """The options that a plan is made from, as typed."""

    profile: Path | None
    strategy: str | None
    experts: int | None
    keep: str | None
    drop: int | None
    fit: str | None
    tp: int
    top_k: int | None
    domain_weights: str | None
    protect: tuple[str, ...]
    protect_super: bool
    seed: int
    drop_mtp: bool = False


NO_CHOICE = Choice(None, None, None, None, None, None, 1, None, None, (), False, 0)


def build_plan(checkpoint: Checkpoint, geometry: Geometry, choice: Choice, command: str) -> Plan:
    """Make the plan that the options ask for; `command` is for its provenance."""
    from expertcut.calibrate.profile import Profile
    from expertcut.choose import make_plan, parse_domain_weights, parse_keep, parse_size
    from expertcut.runtimes.lint import fast_expert_counts

    if choice.strategy is None:
        raise UsageError("no strategy given", "for example --profile PROFILE --strategy reap")
    if choice.drop_mtp and not (geometry.mtp_tensors or geometry.mtp_edits(checkpoint.config)):
        raise UsageError(f"--drop-mtp: {checkpoint.name} has no multi-token-prediction layers")
    subject = _subject(checkpoint, geometry, geometry.num_experts, choice.top_k or geometry.top_k)
    plan = make_plan(
        checkpoint, geometry, strategy=choice.strategy, experts=choice.experts, drop=choice.drop, tp=choice.tp,
        keep=parse_keep(choice.keep) if choice.keep is not None else None,
        fit=parse_size(choice.fit) if choice.fit is not None else None,
        fit_candidates=fast_expert_counts(subject, geometry.num_experts), top_k=choice.top_k,
        profile=Profile.load(choice.profile) if choice.profile is not None else None,
        domain_weights=parse_domain_weights(choice.domain_weights) if choice.domain_weights is not None else None,
        protect=choice.protect, protect_super=choice.protect_super, seed=choice.seed, command=command,
    )  # fmt: skip
    return plan.model_copy(update={"mtp": "drop"}) if choice.drop_mtp else plan


@dataclass(frozen=True)
class Outcome:
    """What a plan makes of a checkpoint, for printing."""

    members: dict[str, Any]
    """Members of the JSON document."""
    rows: list[tuple[str, object]]
    lint: Table


def outcome(checkpoint: Checkpoint, geometry: Geometry, plan: Plan) -> Outcome:
    """Describe what a plan makes of a checkpoint: counts, sizes, and what the runtimes say."""
    from expertcut.cli.tables import lint_table, records, size
    from expertcut.model.summary import nbytes_with
    from expertcut.runtimes.lint import lint, nearest_fast_counts

    subject = _subject(checkpoint, geometry, plan.experts, plan.top_k(geometry))
    findings = lint(subject)
    nearest = nearest_fast_counts(subject, geometry.num_experts)
    before, after = checkpoint.nbytes, nbytes_with(checkpoint, geometry, plan.experts, plan.mtp != "drop")
    members = {
        "experts": {"before": geometry.num_experts, "after": plan.experts},
        "top_k": {"before": geometry.top_k, "after": plan.top_k(geometry)},
        "nbytes": {"before": before, "after": after},
        "lint": records(findings),
        "nearest_fast": {"below": nearest[0], "above": nearest[1]},
    }
    rows: list[tuple[str, object]] = [
        ("experts per layer", _change(geometry.num_experts, plan.experts)),
        ("top-k", _change(geometry.top_k, plan.top_k(geometry))),
        ("weights", f"{size(before)} → {size(after)}, {after / (before or 1):.1%}"),
    ]
    if plan.experts not in nearest:
        close = " and ".join(str(count) for count in nearest if count is not None) or "none"
        rows.append(("nearest counts fast in vLLM", close))
    return Outcome(members, rows, lint_table(findings))


def _subject(checkpoint: Checkpoint, geometry: Geometry, experts: int, top_k: int) -> LintSubject:
    from dataclasses import replace

    from expertcut.runtimes.lint import lint_subject

    return replace(lint_subject(geometry, checkpoint.config), experts=experts, top_k=top_k)


def _change(before: int, after: int) -> str:
    return f"{before} → {after}" if before != after else f"{before}, unchanged"
