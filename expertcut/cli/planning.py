"""Choosing experts, for `plan` and `prune`: the options as typed, the plan, and what to say about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

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


NO_CHOICE = Choice(None, None, None, None, None, None, 1, None, None, (), False, 0)


def build_plan(checkpoint: Checkpoint, geometry: Geometry, choice: Choice, command: str) -> Plan:
    """Make the plan that the options ask for; `command` is for its provenance."""
    from expertcut.calibrate.profile import Profile
    from expertcut.choose import make_plan, parse_domain_weights, parse_keep, parse_size
    from expertcut.runtimes.lint import fast_expert_counts, lint_subject

    if choice.strategy is None:
        raise UsageError("no strategy given", "for example --profile PROFILE --strategy reap")
    subject = lint_subject(geometry, checkpoint.config)
    return make_plan(
        checkpoint, geometry, strategy=choice.strategy, experts=choice.experts, drop=choice.drop, tp=choice.tp,
        keep=parse_keep(choice.keep) if choice.keep is not None else None,
        fit=parse_size(choice.fit) if choice.fit is not None else None,
        fit_candidates=fast_expert_counts(subject, geometry.num_experts), top_k=choice.top_k,
        profile=Profile.load(choice.profile) if choice.profile is not None else None,
        domain_weights=parse_domain_weights(choice.domain_weights) if choice.domain_weights is not None else None,
        protect=choice.protect, protect_super=choice.protect_super, seed=choice.seed, command=command,
    )  # fmt: skip


def outcome(checkpoint: Checkpoint, geometry: Geometry, plan: Plan) -> tuple[dict[str, Any], list[RenderableType]]:
    """Describe what a plan makes of a checkpoint: as JSON members, and as tables."""
    from expertcut.cli.tables import facts, lint_table, records, size
    from expertcut.model.summary import nbytes_with
    from expertcut.runtimes.lint import lint, nearest_fast_counts

    subject = _subject(checkpoint, geometry, plan)
    findings = lint(subject)
    nearest = nearest_fast_counts(subject, geometry.num_experts)
    before, after = checkpoint.nbytes, nbytes_with(checkpoint, geometry, plan.experts)
    document = {
        "experts": {"before": geometry.num_experts, "after": plan.experts},
        "top_k": {"before": geometry.top_k, "after": plan.top_k(geometry)},
        "nbytes": {"before": before, "after": after},
        "lint": records(findings),
        "nearest_fast": {"below": nearest[0], "above": nearest[1]},
    }
    rows = [
        ("experts per layer", _change(geometry.num_experts, plan.experts)),
        ("top-k", _change(geometry.top_k, plan.top_k(geometry))),
        ("weights", f"{size(before)} → {size(after)}, {after / (before or 1):.1%}"),
    ]
    if plan.experts not in nearest:
        close = " and ".join(str(count) for count in nearest if count is not None) or "none"
        rows.append(("nearest counts fast in vLLM", close))
    return document, [facts("", rows), "", lint_table(findings, "Runtimes, after pruning")]


def _subject(checkpoint: Checkpoint, geometry: Geometry, plan: Plan) -> LintSubject:
    from dataclasses import replace

    from expertcut.runtimes.lint import lint_subject

    return replace(lint_subject(geometry, checkpoint.config), experts=plan.experts, top_k=plan.top_k(geometry))


def _change(before: int, after: int) -> str:
    return f"{before} → {after}" if before != after else f"{before}, unchanged"
