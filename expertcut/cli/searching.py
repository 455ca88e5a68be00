"""`plan --strategy auto`, `--budget global` and `--evolve`: candidates in, the best by held-out text out, and how sure
that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from expertcut.cli.common import Output
from expertcut.cli.options import UNMEASURED, Choice, Forward, Measured
from expertcut.cli.planning import AUTO, build_plan
from expertcut.cli.walking import walk_with, walks
from expertcut.errors import ProfileError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.calibrate.data import CalibrationSet
    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.budget import Bounds
    from expertcut.choose.plan import Plan
    from expertcut.measure.objective import Objective
    from expertcut.measure.quality import WhatIf
    from expertcut.measure.search import Judge, Scored
    from expertcut.model import Geometry

GLOBAL = "global"
"""The budget that is spread over the layers."""
GENERATIONS = 5
"""Of evolution from the best of all criteria."""
CONTROLS = 3
"""Random plans that are measured beside the chosen one."""
SPREAD = "spread over the layers"
"""Of a criterion: by what each layer loses."""
SHOWN = 12
"""Candidates in the table."""


@dataclass(frozen=True)
class Found:
    """The plan that a search ended with, and what to say about it."""

    plan: Plan
    facts: dict[str, Any]
    """For the plan's provenance."""
    members: dict[str, Any]
    parts: list[RenderableType]


def generations(choice: Choice, measured: Measured) -> int:
    """Return for how many generations candidates evolve."""
    return measured.evolve if measured.evolve is not None else GENERATIONS * (choice.strategy == AUTO)


def searches(choice: Choice, measured: Measured) -> list[str]:
    """Return the options given that need candidates to be measured; none if nothing is searched for."""
    given = {f"--strategy {AUTO}": choice.strategy == AUTO, "--evolve": bool(measured.evolve),
             f"--budget {GLOBAL}": measured.budget == GLOBAL}  # fmt: skip
    return [option for option, is_given in given.items() if is_given]


def check_spread(choice: Choice, measured: Measured) -> None:
    """Check that the options for spreading a budget over the layers go together, before anything is opened.

    Raises:
        UsageError: they do not.
    """
    if measured.budget not in (UNMEASURED.budget, GLOBAL):
        raise UsageError(f"--budget {measured.budget}: unknown; known: {UNMEASURED.budget}, {GLOBAL}")
    if measured.budget != GLOBAL:
        if measured.floor is not None or measured.ceiling is not None:
            raise UsageError(f"--floor and --ceiling have an effect with --budget {GLOBAL} only")
        return
    if not choice.per_layer:
        raise UsageError(
            f"--budget {GLOBAL} makes layers differ, which only expertcut's plug-ins serve", "say so with --per-layer"
        )
    if walks(choice, measured):
        raise UsageError(f"--budget {GLOBAL} goes with strategies that read a profile or the weights, layer by layer")


def spread_bounds(geometry: Geometry, plan: Plan, measured: Measured) -> Bounds | None:
    """Return what every layer may keep if the budget of a plan is to be spread, None if it is not.

    Raises:
        UsageError: the bounds given cannot be.
    """
    from expertcut.choose.budget import Bounds

    if measured.budget != GLOBAL:
        return None
    return Bounds.resolve(geometry, plan.experts, plan.top_k(geometry), measured.floor, measured.ceiling)


def build_candidates(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, choice: Choice, measured: Measured, forward: Forward
) -> dict[str, Plan]:  # fmt: skip
    """Make the plan that the options ask for; for the strategy `auto` one by each criterion that reads a profile or
    the weights.
    """
    if choice.strategy != AUTO:
        walk = walk_with(out, checkpoint, geometry, choice, measured, forward) if walks(choice, measured) else None
        plan = build_plan(checkpoint, geometry, choice, out, walk, measured.sequential)
        return {choice.strategy or "the plan": plan}
    from dataclasses import replace

    from expertcut.choose.criteria import judging

    if choice.profile is None:
        raise UsageError(f"--strategy {AUTO} needs --profile", "expertcut profile MODEL -o PROFILE")
    made: dict[str, Plan] = {}
    for name in judging():
        try:
            made[name] = build_plan(checkpoint, geometry, replace(choice, strategy=name), out)
        except ProfileError as error:  # this profile lacks what that criterion needs
            out.note(f"{name} is left out: {error.message}")
    return made


def search(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, candidates: Mapping[str, Plan], choice: Choice,
    measured: Measured, objective: Objective, bounds: Bounds | None, select_on: CalibrationSet,
    report_on: CalibrationSet, forward: Forward,
) -> Found:  # fmt: skip
    """Choose the best candidate on one text, spread it and let it evolve if asked for, and measure it on the other."""
    from dataclasses import replace

    from expertcut.calibrate.run import ProfileOptions
    from expertcut.choose.protect import parse_protect
    from expertcut.measure.search import evolve, judge_with, scored

    options = ProfileOptions(**vars(forward))
    objective.check(select_on.domains)
    with out.progress("trying candidates", lambda speed: f"{speed:.2f} layers/s") as advance:
        select = judge_with(checkpoint, geometry, select_on, options, notify=out.note, advance=advance)
        ranked, selection = scored(select, candidates, objective)
        if bounds is not None:
            ranked = _spread(out, checkpoint, geometry, choice, ranked, bounds, select, objective)
        starts = [one.name for one in ranked]
        if evolves := generations(choice, measured):
            ranked = evolve(
                ranked, select, objective, evolves, geometry, seed=choice.seed, bounds=bounds,
                protected=parse_protect(choice.protect or (), geometry),
                tell=lambda number, best: out.note(f"generation {number}: {best.loss:.4f} by {best.name}"),
            )  # fmt: skip
        best, runner_up = ranked[0], next((one for one in ranked[1:] if one.name in candidates), None)
        controls = {
            f"random, seed {seed}": build_plan(
                checkpoint, geometry, replace(choice, strategy="random", seed=seed, protect_super=False), out
            )
            for seed in range(CONTROLS)
        }
        shown = {best.name: best.plan} | ({runner_up.name: runner_up.plan} if runner_up else {}) | controls
        report = judge_with(checkpoint, geometry, report_on, options, notify=out.note, advance=advance)(shown)
    facts: dict[str, Any] = {
        "criterion": best.plan.provenance["criterion"] if best.name in starts else f"evolved from {', '.join(starts)}",
        "searched": {"by": objective.by, "generations": evolves, "loss": best.loss},
    }
    members = {
        "searched": {
            "by": objective.by, "chosen": best.name,
            "candidates": [{"name": one.name, "loss": one.loss} for one in ranked],
            "report": [{"name": name, **asdict(report.change(name))} for name in shown],
        }
    }  # fmt: skip
    parts = _parts(ranked, best, runner_up, objective, selection, report)
    return Found(best.plan, facts, members, parts)


def _spread(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, choice: Choice, ranked: list[Scored], bounds: Bounds,
    select: Judge, objective: Objective,
) -> list[Scored]:  # fmt: skip
    """Spread the budget of the best candidate over the layers; what comes of it is one candidate more."""
    from dataclasses import replace

    from expertcut.measure.search import scored
    from expertcut.measure.spread import spread

    best = ranked[0]

    def make(experts: int) -> Plan:
        counted = replace(choice, strategy=best.name, experts=experts, keep=None, drop=None, fit=None, tp=None)
        return build_plan(checkpoint, geometry, counted, out)

    found = spread(make, best.plan.experts, bounds, select, objective, geometry)
    told = best.plan.provenance | {
        "spread": {"floor": bounds.floor, "ceiling": bounds.ceiling, "by": objective.by, "counts": list(found.counts),
                   "losses": found.losses.tolist()}
    }  # fmt: skip
    plan = found.plan.model_copy(update={"provenance": told})
    more, _ = scored(select, {f"{best.name}, {SPREAD}": plan}, objective)
    out.note(f"experts by layer: {', '.join(map(str, found.experts))}, {more[0].loss:.4f} against {best.loss:.4f}")
    return sorted([*ranked, *more], key=lambda one: one.loss)


def _parts(
    ranked: list[Scored], best: Scored, runner_up: Scored | None, objective: Objective, selection: WhatIf,
    report: WhatIf,
) -> list[RenderableType]:  # fmt: skip
    from expertcut.cli.tables import heading, table

    tried = [(one.name, f"{one.loss:+.4f}") for one in ranked[:SHOWN]]
    seen = [(name, f"{report.mean('kl', name):.4f}", report.change(name).shown) for name in report.names[1:]]
    sure: list[RenderableType] = []
    if runner_up is not None:
        ahead = report.difference(runner_up.name, best.name)
        verdict = {1: "better", -1: "worse", 0: "neither better nor worse"}[ahead.sign]
        sure = [f"beside {runner_up.name}, the chosen one is {verdict} on that half: {ahead.shown} nats per token"]
    return [
        "", heading(f"chosen on the first half of the held-out text, by {objective.by}"),
        table(("candidate", ">loss"), tried),
        "", heading("on the second half, which nothing was chosen by"),
        table(("plan", ">KL", ">change of the loss"), seen), *sure,
    ]  # fmt: skip
