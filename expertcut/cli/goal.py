"""`plan --goal`: a speed to reach and limits on the loss in; the plan that reaches it at the least loss out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from expertcut.cli.common import Output
from expertcut.cli.measured import Refined, noted
from expertcut.cli.options import NO_CHOICE, UNMEASURED, Choice, Forward, Measured, Service
from expertcut.cli.planning import AUTO, build_plan
from expertcut.cli.service import load_of, machine_of, say_assumptions
from expertcut.cli.text import read_texts
from expertcut.cli.walking import NAEE
from expertcut.errors import ProfileError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.limits import Limit
    from expertcut.choose.plan import Plan
    from expertcut.measure.cost_hardware import Machine
    from expertcut.measure.cost_traffic import Load
    from expertcut.measure.goal import Candidate, Goal, Reached
    from expertcut.measure.quality import WhatIf
    from expertcut.model import Geometry

ITSELF = ("experts", "keep", "drop", "fit", "top_k", "top_k_schedule", "mean_top_k")
"""Options of a choice that a goal decides itself."""
APART = ("by", "evolve", "budget", "floor", "ceiling", "sequential", "gain", "calibration")
"""Searches and fits of other kinds."""


@dataclass(frozen=True)
class Aim:
    """What is to be reached, where, and within which limits."""

    goal: Goal
    machine: Machine
    load: Load
    limits: list[Limit]


def check_goal(text: str, service: Service, choice: Choice, measured: Measured) -> Aim:
    """Check that the options go together, before anything is opened.

    Raises:
        UsageError: they do not.
    """
    from expertcut.choose.limits import parse_limit
    from expertcut.measure.goal import Goal

    goal = Goal.parse(text)
    for names, given, default in ((ITSELF, choice, NO_CHOICE), (APART, measured, UNMEASURED)):
        for name in names:
            if getattr(given, name) != getattr(default, name):
                why = "chooses experts and top-k itself" if names is ITSELF else "does not go with it"
                raise UsageError(f"--goal {why}: leave out --{name.replace('_', '-')}")
    if choice.strategy == NAEE:
        raise UsageError(f"--goal does not go with --strategy {NAEE}, which runs the model for every number of experts")
    needed = {"--hardware": service.hardware, "--concurrency": service.concurrency, "--max-loss": measured.max_loss,
              "--data": measured.data}  # fmt: skip
    missing = [option for option, value in needed.items() if not value]
    if missing:
        raise UsageError(
            f"--goal needs {' and '.join(missing)}",
            "for example --hardware h200x8 --concurrency 32 --max-loss 'nll<=0.5%' --data heldout.jsonl",
        )
    if (choice.per_layer or choice.strategy == AUTO) and choice.profile is None:
        option = "--per-layer" if choice.per_layer else f"--strategy {AUTO}"
        raise UsageError(f"--goal with {option} needs --profile", "expertcut profile MODEL -o PROFILE")
    limits = [parse_limit(limit) for limit in measured.max_loss or ()]
    return Aim(goal, machine_of(service, choice.tp), load_of(service), limits)


def reach(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, aim: Aim, choice: Choice, measured: Measured,
    forward: Forward,
) -> Refined:  # fmt: skip
    """Return the plan that reaches the goal at the least loss of those that keep the limits.

    Raises:
        GateError: there is none; says what is nearest.
    """
    from expertcut.calibrate.profile import Profile
    from expertcut.calibrate.run import ProfileOptions
    from expertcut.choose import parse_domain_weights
    from expertcut.measure.cost_model import model_cost
    from expertcut.measure.goal import candidates, cheapest, judged, out_of_reach, short_of, worth_measuring
    from expertcut.measure.search import judge_with

    profile = Profile.load(choice.profile) if choice.profile is not None else None
    weights = parse_domain_weights(choice.domain_weights) if choice.domain_weights is not None else None
    starts = _starts(out, checkpoint, geometry, choice)
    work = model_cost(checkpoint, geometry, profile)
    say_assumptions(out, work, aim.machine)
    every = candidates(work, geometry, starts, profile, weights, aim.machine, aim.load, aim.goal)
    there = worth_measuring(every, aim.goal)
    seen = next(plans[0] for plans in reversed(starts.values()))
    texts = read_texts(
        out, checkpoint, geometry, seen, forward, fit=None, judge=measured.data, tokens=measured.tokens,
        seq_len=measured.seq_len, seed=choice.seed, limits=aim.limits,
    )  # fmt: skip
    with out.progress("measuring candidates", lambda speed: f"{speed:.2f} layers/s") as advance:
        judge = judge_with(
            checkpoint, geometry, texts.judge_on, ProfileOptions(**vars(forward)), notify=out.note, advance=advance
        )  # fmt: skip
        found = judge({one.name: one.plan for one in there})
        reached = judged(found, there, aim.limits)
        best = cheapest(reached)
        if best is None:
            short = short_of(every, aim.goal, reached)
            out.note(
                f"none of {len(there)} plans at the goal keeps the limits; trying {len(short)} that fall short of it"
            )
            less = judged(judge({one.name: one.plan for one in short}), short, aim.limits) if short else []
            raise out_of_reach(aim.goal, aim.limits, reached, less)
    facts = texts.facts | {"top_k": f"--goal {aim.goal}", "goal": _facts(aim, best.candidate)}
    return Refined(noted(best.candidate.plan, facts), _members(aim, reached, found, best),
                   _table(aim.goal, reached, found, best, len(every)))  # fmt: skip


def _starts(out: Output, checkpoint: Checkpoint, geometry: Geometry, choice: Choice) -> dict[str, list[Plan]]:
    """Plans with the model's own top-k: of all experts, and of fewer by each strategy."""
    from expertcut.choose.criteria import get_criterion, judging
    from expertcut.measure.goal import expert_counts
    from expertcut.measure.sweep import ALL
    from expertcut.runtimes.lint import fast_expert_counts, lint_subject

    choice = replace(choice, tp=None)  # of the hardware, not of a budget
    whole = replace(
        choice, strategy=None, top_k=str(geometry.top_k), domain_weights=None, protect=None, protect_super=False
    )  # fmt: skip
    starts = {ALL: [build_plan(checkpoint, geometry, whole, out)]}
    counts = expert_counts(
        geometry, fast_expert_counts(lint_subject(geometry, checkpoint.config), geometry.num_experts)
    )
    names = [choice.strategy] if choice.strategy else []
    if choice.strategy == AUTO:
        names = [name for name in judging() if get_criterion(name).needs_profile]
    for name in names:
        try:
            starts[name] = [
                build_plan(checkpoint, geometry, replace(choice, strategy=name, experts=n), out) for n in counts
            ]
        except ProfileError as error:  # this profile lacks what that criterion needs
            if choice.strategy != AUTO:
                raise
            out.note(f"{name} is left out: {error.message}")
    return {name: plans for name, plans in starts.items() if plans}


def _facts(aim: Aim, best: Candidate) -> dict[str, Any]:
    machine, load = aim.machine, aim.load
    return {
        "goal": str(aim.goal), "max_loss": [str(limit) for limit in aim.limits],
        "hardware": f"{machine.count} {machine.name}", "tp": machine.shards, "ep": machine.ep,
        "concurrency": load.concurrency, "input_len": load.input_len, "output_len": load.output_len,
        "predicted": best.ratio - 1, "tokens_per_second": best.prediction.tokens_per_second,
    }  # fmt: skip


def _members(aim: Aim, reached: Sequence[Reached], found: WhatIf, best: Reached) -> dict[str, Any]:
    return {
        "goal": _facts(aim, best.candidate) | {
            "chosen": best.candidate.name,
            "candidates": [
                {"name": one.candidate.name, "experts": one.candidate.experts, "top_k": one.candidate.top_k,
                 "predicted": one.candidate.ratio - 1, "change": asdict(found.change(one.candidate.name)), "ok": one.ok}
                for one in reached
            ],
        }
    }  # fmt: skip


def _table(
    goal: Goal, reached: Sequence[Reached], found: WhatIf, best: Reached, tried: int
) -> list[RenderableType]:  # fmt: skip
    from expertcut.cli.tables import heading, table

    rows = [
        (one.candidate.name, f"{one.candidate.ratio - 1:+.1%}", found.change(one.candidate.name).shown,
         "chosen" if one is best else "holds too, loses more" if one.ok else one.missed)
        for one in reached
    ]  # fmt: skip
    columns = ("candidate", f">{goal.metric}, predicted", ">change of the loss", "limits")
    return ["", heading(f"{goal}: of {tried} plans, those that reach it and cut least"), table(columns, rows)]
