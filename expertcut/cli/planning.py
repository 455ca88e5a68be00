"""Choosing experts, for `plan` and `prune`: the plan that the options ask for, and what to say about it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from expertcut.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.make import Walk
    from expertcut.choose.plan import Plan
    from expertcut.choose.topk import TopK
    from expertcut.cli.common import Output
    from expertcut.cli.options import Choice
    from expertcut.model import Geometry
    from expertcut.model.uneven import LayerNumbers
    from expertcut.runtimes.lint import Advice
    from expertcut.runtimes.rules import LintSubject

AUTO = "auto"
"""The top-k that is searched for."""


def build_plan(
    checkpoint: Checkpoint, geometry: Geometry, choice: Choice, out: Output, walk: Walk | None = None,
    sequential: bool = False,
) -> Plan:  # fmt: skip
    """Make the plan that the options ask for; `out` shows progress and knows the command, for the provenance.

    `walk` chooses while the model runs and shows its own progress.
    """
    from expertcut.calibrate.profile import Profile
    from expertcut.choose import format_size, make_plan, parse_domain_weights, parse_keep, parse_size
    from expertcut.runtimes.lint import fast_expert_counts

    if choice.drop_mtp and not (geometry.mtp_tensors or geometry.mtp_edits(checkpoint.config)):
        raise UsageError(f"--drop-mtp: {checkpoint.name} has no multi-token-prediction layers")
    top_k = _top_k(replace(choice, top_k=str(geometry.top_k)) if choice.top_k == AUTO else choice)
    served = top_k if isinstance(top_k, int) else geometry.top_k
    subject = _subject(geometry, checkpoint.config, geometry.num_experts, served)
    progress = out.progress("choosing experts", lambda speed: f"{format_size(int(speed))}/s")
    with progress if walk is None else nullcontext(lambda done, total: None) as advance:
        plan = make_plan(
            checkpoint, geometry, strategy=choice.strategy, experts=choice.experts, drop=choice.drop, tp=choice.tp or 1,
            keep=parse_keep(choice.keep) if choice.keep is not None else None,
            fit=parse_size(choice.fit) if choice.fit is not None else None,
            fit_candidates=fast_expert_counts(subject, geometry.num_experts), top_k=top_k, per_layer=choice.per_layer,
            profile=Profile.load(choice.profile) if choice.profile is not None else None,
            domain_weights=parse_domain_weights(choice.domain_weights) if choice.domain_weights is not None else None,
            protect=choice.protect or (), protect_super=choice.protect_super, seed=choice.seed,
            command=out.command, advance=advance, walk=walk, sequential=sequential,
        )  # fmt: skip
    return plan.model_copy(update={"mtp": "drop"}) if choice.drop_mtp else plan


def _top_k(choice: Choice) -> TopK | None:
    """The top-k that the options ask for, None if it stays."""
    from expertcut.choose.topk import MeanTopK, Schedule

    given = {
        "--top-k": None if choice.top_k is None else _number(choice.top_k),
        "--top-k-schedule": None if choice.top_k_schedule is None else Schedule.parse(choice.top_k_schedule),
        "--mean-top-k": None if choice.mean_top_k is None else MeanTopK(choice.mean_top_k),
    }
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise UsageError(f"found {' and '.join(found)}, expected at most one of them")
    return next(iter(found.values()), None)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"--top-k {text}: expected a whole number of 1 or more, or {AUTO}")
    return int(text)


@dataclass(frozen=True)
class Outcome:
    """What a plan makes of a checkpoint, for printing."""

    members: dict[str, Any]
    """Members of the JSON document."""
    rows: list[tuple[str, object]]
    lint: Table
    hints: list[str]
    """Where the expert count leaves the fast path of a runtime: why, and the nearest counts that do not."""


def outcome(checkpoint: Checkpoint, geometry: Geometry, plan: Plan) -> Outcome:
    """Describe what a plan makes of a checkpoint: counts, sizes, and what the runtimes say.

    Raises:
        ConfigConflictError: an entry of the quantization config cannot be rewritten for the plan.
    """
    from expertcut.choose.plan import numbers
    from expertcut.cli.tables import lint_table, records, size
    from expertcut.model.summary import nbytes_with
    from expertcut.rewrite.config import edit_config
    from expertcut.rewrite.layout import config_edits
    from expertcut.runtimes.lint import advise, lint

    config = edit_config(checkpoint.config, config_edits(checkpoint, geometry, plan))
    found = numbers(plan, geometry)
    subject = _subject(geometry, config, plan.experts, plan.top_k(geometry), found)
    findings = lint(subject)
    advice = advise(subject, geometry.num_experts) if plan.experts < geometry.num_experts else []
    before, after = checkpoint.nbytes, nbytes_with(checkpoint, geometry, found.experts, plan.mtp != "drop")
    members = {
        "experts": {"before": geometry.num_experts, "after": plan.experts},
        "top_k": {"before": geometry.top_k, "after": plan.top_k(geometry)},
        "nbytes": {"before": before, "after": after},
        "lint": records(findings),
        "nearest_fast": records(advice),
    }
    rows: list[tuple[str, object]] = [
        ("experts per layer", _change(geometry.num_experts, found.experts)),
        ("top-k", _change(geometry.top_k, found.top_k)),
        *gain_rows(checkpoint, geometry, plan),
        *([("new values", f"of {len(plan.deltas.tensors):,} tensors, by healing")] if plan.deltas else []),
        ("weights", f"{size(before)} → {size(after)}, {after / (before or 1):.1%}"),
    ]
    return Outcome(members, rows, lint_table(findings), [_hint(plan.experts, found) for found in advice])


def gain_rows(checkpoint: Checkpoint, geometry: Geometry, plan: Plan) -> list[tuple[str, object]]:
    """Say how a plan's gains reach the checkpoint, if it has any.

    Raises:
        PlanError: they cannot.
    """
    from expertcut.choose.plan import gains
    from expertcut.rewrite.config import describe
    from expertcut.rewrite.gain import ROUNDING, config_gain, folded

    found = sorted({*gains(plan, geometry).values()})
    if found == [1.0]:
        return []
    edits, factors = config_gain(checkpoint.config, geometry, plan), folded(checkpoint, geometry, plan)
    if not (edits or factors):
        return []  # the new values of its tensors hold them
    value = " to ".join(f"{gain:g}" for gain in found[:1] + found[1:][-1:])
    if edits:
        return [("gain", f"{value}, by the config alone: {', '.join(map(describe, edits))}")]
    dtypes = sorted({checkpoint.tensors[name].dtype for name in factors})
    share = max(ROUNDING[dtype] for dtype in dtypes)
    how = f"folded into {len(factors):,} {' and '.join(dtypes)} tensors, each value rounded by {share:.1g} at most"
    return [("gain", f"{value}, {how}")]


def _hint(experts: int, found: Advice) -> str:
    near = " and ".join(str(count) for count in (found.below, found.above) if count is not None)
    return f"{experts} experts leave the fast path of {found.runtime}: {found.reason}; nearest on it: {near}"


def _subject(
    geometry: Geometry, config: Mapping[str, Any], experts: int, top_k: int, own: LayerNumbers | None = None
) -> LintSubject:
    """What the rules look at; `own` are the layers' numbers, if they may differ."""
    from expertcut.runtimes.lint import lint_subject

    uneven = own is not None and own.uneven
    layers = tuple((own.experts[i], own.top_k[i]) for i in own.experts) if own and uneven else ()
    return replace(lint_subject(geometry, config), experts=experts, top_k=top_k, uneven=uneven, layers=layers)


def _change(before: int, after: Mapping[int, int]) -> str:
    """What becomes of a number, by layer: one number where all layers agree, else a range and the mean."""
    least, most = min(after.values()), max(after.values())
    if least == most:
        return f"{before} → {most}" if before != most else f"{before}, unchanged"
    return f"{before} → {least} to {most} by layer, {sum(after.values()) / len(after):.2f} on average"
