"""What `plan` measures while it makes a plan: the smallest top-k that keeps limits, and gains that make up for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from expertcut.cli.common import Output
from expertcut.cli.options import UNMEASURED, Choice, Forward, Measured
from expertcut.cli.planning import AUTO
from expertcut.cli.searching import GLOBAL, check_spread, searches, spread_bounds
from expertcut.cli.text import Texts, read_texts
from expertcut.cli.walking import NAEE, check_walk, walks
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.limits import Limit
    from expertcut.choose.plan import Plan
    from expertcut.measure.gain import Gained
    from expertcut.measure.quality import WhatIf
    from expertcut.measure.topk import Tried
    from expertcut.model import Geometry


@dataclass(frozen=True)
class Refined:
    """A plan as measuring left it, and what to say about it."""

    plan: Plan
    members: dict[str, Any] = field(default_factory=dict)
    """Members of the JSON document."""
    parts: list[RenderableType] = field(default_factory=list)


def check_measured(choice: Choice, measured: Measured) -> list[Limit]:
    """Check that the options go together, before anything is opened; returns the limits.

    Raises:
        UsageError: they do not.
    """
    from expertcut.choose.limits import parse_limit

    options = searches(choice, measured)
    if options and not measured.data:
        raise UsageError(f"{options[0]} needs --data", "--data FILE: text that was not used for calibration")
    if measured.by != UNMEASURED.by and not options:
        raise UsageError(f"--by has an effect with --strategy {AUTO}, --evolve and --budget {GLOBAL} only")
    if options and choice.strategy is None:
        raise UsageError(f"{options[0]} needs --strategy", f"for example --strategy {AUTO}")
    check_spread(choice, measured)
    if choice.top_k == AUTO and not (measured.max_loss and measured.data):
        raise UsageError(
            f"--top-k {AUTO} needs --max-loss and --data", "for example --max-loss 'nll<=1%' --data heldout.jsonl"
        )
    if measured.max_loss and choice.top_k != AUTO:
        raise UsageError(f"--max-loss has an effect with --goal and with --top-k {AUTO} only")
    if measured.gain and not measured.calibration:
        raise UsageError("--gain needs --calibration", "for example --calibration general, with --data for other text")
    check_walk(choice, measured)
    runs = walks(choice, measured)
    if measured.calibration and not measured.gain and not runs:
        raise UsageError(f"--calibration has an effect with --gain, --sequential and --strategy {NAEE} only")
    unused = measured.data if runs else replace(measured, evolve=None) != UNMEASURED
    if choice.top_k != AUTO and not measured.gain and not options and unused:
        raise UsageError(
            f"--data, --tokens and --seq-len have an effect with --gain, --evolve, --budget {GLOBAL} and {AUTO} only"
        )
    return [parse_limit(text) for text in measured.max_loss or ()]


def refine(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, candidates: Mapping[str, Plan], choice: Choice,
    measured: Measured, limits: list[Limit], forward: Forward,
) -> Refined:  # fmt: skip
    """Choose among candidates, search the top-k and fit the gains that the options ask for; else the plan as it is."""
    plan = next(iter(candidates.values()))
    wanted = searches(choice, measured)
    if not (wanted or limits or measured.gain):
        return Refined(plan)
    bounds = spread_bounds(geometry, plan, measured)
    texts = read_texts(
        out, checkpoint, geometry, plan, forward, fit=measured.calibration if measured.gain else None,
        judge=measured.data, tokens=measured.tokens, seq_len=measured.seq_len, seed=choice.seed, limits=limits,
    )  # fmt: skip
    members: dict[str, Any] = {}
    parts: list[RenderableType] = []
    if wanted:
        from expertcut.choose import parse_domain_weights
        from expertcut.cli.searching import search
        from expertcut.measure.objective import Objective

        weights = parse_domain_weights(choice.domain_weights) if choice.domain_weights is not None else None
        objective = Objective.parse(measured.by, weights)
        select_on, report_on = texts.judge_on.parted(2)
        found = search(
            out, checkpoint, geometry, candidates, choice, measured, objective, bounds, select_on, report_on, forward
        )  # fmt: skip
        plan, members, parts = noted(found.plan, texts.facts | found.facts), found.members, found.parts
        texts = replace(texts, judge_on=select_on)
    if limits:
        last = _search_top_k(out, checkpoint, geometry, plan, choice, limits, texts, forward)
    elif measured.gain:
        last = _fit_gain(out, checkpoint, geometry, plan, texts, forward)
    else:
        last = Refined(plan)
    return Refined(last.plan, members | last.members, [*parts, *last.parts])


def _fit_gain(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, texts: Texts, forward: Forward
) -> Refined:
    from expertcut.calibrate.run import ProfileOptions
    from expertcut.measure.gain import gain_plans

    assert texts.fit_on is not None
    options = ProfileOptions(**vars(forward))
    with out.progress("fitting gains", lambda speed: f"{speed:.2f} layers/s") as advance:
        gained, found = gain_plans(
            checkpoint, geometry, {"the plan": plan}, texts.fit_on, texts.judge_on, options, notify=out.note,
            advance=advance,
        )  # fmt: skip
    return _refined(gained["the plan"].plan, gained["the plan"], found, texts.facts)


def _search_top_k(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, choice: Choice, limits: list[Limit],
    texts: Texts, forward: Forward,
) -> Refined:  # fmt: skip
    from expertcut.calibrate.profile import Profile
    from expertcut.calibrate.run import ProfileOptions
    from expertcut.choose import parse_domain_weights
    from expertcut.measure.topk import first_that_holds, search_top_k

    with out.progress("searching the top-k", lambda speed: f"{speed:.2f} layers/s") as advance:
        tried, found = search_top_k(
            checkpoint, geometry, plan, limits, texts.judge_on, ProfileOptions(**vars(forward)), fit_on=texts.fit_on,
            notify=out.note, advance=advance,
            profile=Profile.load(choice.profile) if choice.profile is not None else None,
            domain_weights=parse_domain_weights(choice.domain_weights) if choice.domain_weights is not None else None,
        )  # fmt: skip
    best = first_that_holds(tried)
    facts = texts.facts | {"top_k": f"--top-k {AUTO} {' '.join(f'--max-loss {limit}' for limit in limits)}"}
    refined = _refined(best.plan, best.gained, found, facts)
    records = [
        {"top_k": one.mean, "name": one.shown, "change": asdict(found.change(one.shown)), "ok": one.ok} for one in tried
    ]
    return Refined(
        refined.plan, {"tried": records, **refined.members}, [*_tried_table(tried, found, best), *refined.parts]
    )


def _refined(plan: Plan, gained: Gained | None, found: WhatIf, facts: dict[str, Any]) -> Refined:
    parts: list[RenderableType] = []
    members: dict[str, Any] = {}
    if gained is not None:
        change = found.difference(gained.shown, gained.name)
        members = {"gain": {"kept": gained.kept, "change": asdict(change)}}
        facts = facts | members
        if gained.kept is None:
            facts.pop("gain_text")
            parts = ["", "gain: none kept, held-out text does not show that one helps"]
        else:
            parts = ["", f"gain: {gained.kept}, loss {change.shown} nats per token beside the plan without"]
    return Refined(noted(plan, facts), members, parts)


def noted(plan: Plan, facts: dict[str, Any]) -> Plan:
    """Return a plan with more in its provenance."""
    return plan.model_copy(update={"provenance": plan.provenance | facts})


def _tried_table(tried: list[Tried], found: WhatIf, best: Tried) -> list[RenderableType]:
    from expertcut.cli.tables import table

    rows = []
    for one in tried:
        change, missed = found.change(one.shown), next((j for j in one.judgements if not j.ok), None)
        verdict = "chosen" if one is best else str(missed) if missed else "holds too, activates more"
        rows.append((f"{one.mean:g}", one.shown, change.shown, verdict))
    return ["", table((">top-k", "tried", ">change of the loss", "limits"), rows)]
