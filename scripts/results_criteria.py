"""The tables of docs/results.md on criteria; see the script beside it. Prints Markdown.

Held-out text is parted in two: `auto` chooses on one half and evolves there, and every figure is of the other.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from results_common import OPTIONS, SEEDS, Subject, arguments, out, pooled, say, silent, subjects, table

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.profile import Profile
from expertcut.choose import Plan, make_plan
from expertcut.choose.budget import Bounds
from expertcut.choose.criteria import CRITERIA, NAEE
from expertcut.choose.make import Request
from expertcut.choose.plan import LayerPlan
from expertcut.cli.searching import GENERATIONS
from expertcut.measure.arithmetic import arithmetic_accuracy, arithmetic_items
from expertcut.measure.objective import Objective
from expertcut.measure.quality import WhatIf
from expertcut.measure.search import evolve, judge_with, scored
from expertcut.measure.spread import spread
from expertcut.measure.walk import walk

DROPPED = (0.25, 0.5)
PATTERNS = ("first", "last")
"""Criteria without a row: `odd` and `even` stand for the patterns."""
AUTO, BEST, SPREAD, BESIDE = "auto", "best of the criteria", "the best, `--budget global`", "reap"


@dataclass(frozen=True)
class Run:
    """One calibration seed."""

    found: WhatIf
    chosen: str
    """The criterion that does best on the select half."""
    correct: dict[str, float]
    """Share of arithmetic items answered right, by plan and of the base."""


def run(subject: Subject, seed: int, share: float, select: CalibrationSet, report: CalibrationSet, tokens: int,
        scratch: Path, items: int) -> Run:  # fmt: skip
    """Plans by every criterion from one draw of calibration text, measured on the report half."""
    data = subject.text(subject.calibration, tokens, seed)
    folder = scratch / f"{subject.folder.name}-{seed}"
    profile = Profile.load(folder) if folder.exists() else subject.profile(data, folder)
    plans = {
        name: make_plan(subject.checkpoint, subject.geometry, strategy=name, keep=1 - share, profile=profile, seed=seed)
        for name in CRITERIA if name not in PATTERNS
    }  # fmt: skip
    judging = {name: plan for name, plan in plans.items() if CRITERIA[name].needs}

    def replayed(request: Request) -> tuple[dict[str, LayerPlan], Profile]:
        return walk(
            request, data, OPTIONS, sequential=False, tokenizer=subject.tokenizer.fingerprint, notify=say,
            advance=silent,
        )  # fmt: skip

    plans[NAEE.name] = make_plan(
        subject.checkpoint, subject.geometry, strategy=NAEE.name, keep=1 - share, seed=seed, walk=replayed
    )
    judge = judge_with(subject.checkpoint, subject.geometry, select, OPTIONS, notify=say, advance=silent)
    ranked, _ = scored(judge, judging, Objective())
    evolved = evolve(ranked, judge, Objective(), GENERATIONS, subject.geometry, protected={}, seed=seed)
    chosen, even = ranked[0].name, ranked[0].plan

    def make(experts: int) -> Plan:
        return make_plan(
            subject.checkpoint, subject.geometry, strategy=chosen, experts=experts, profile=profile, per_layer=True
        )

    bounds = Bounds.resolve(subject.geometry, even.experts, even.top_k(subject.geometry), None, None)
    spread_plan = spread(make, even.experts, bounds, judge, Objective(), subject.geometry).plan
    judge = judge_with(subject.checkpoint, subject.geometry, report, OPTIONS, notify=say, advance=silent)
    plans = {AUTO: evolved[0].plan, BEST: plans[chosen], SPREAD: spread_plan} | plans
    return Run(judge(plans), chosen, _arithmetic(subject, plans, items))


def _arithmetic(subject: Subject, plans: dict[str, Plan], items: int) -> dict[str, float]:
    answers = arithmetic_accuracy(
        subject.checkpoint, subject.geometry, plans, arithmetic_items(items), OPTIONS, notify=say, advance=silent
    )
    return {name: answers.accuracy(name).value for name in answers.names}


def report(subject: Subject, share: float, runs: list[Run]) -> float:
    """Print one table; returns the geometric mean over seeds of what auto loses beside reap."""
    found, base = pooled([run.found for run in runs]), runs[0].correct["base"]
    out(f"\n#### {subject.title}, {share:.0%} dropped\n",
        f"Base: {found.mean('nll', 'base'):.3f} nats per token over {found.count():,} tokens in {found.sequences()} "
        f"sequences; {base:.1%} of the arithmetic right.\n")  # fmt: skip
    names = sorted(found.names[1:], key=lambda name: found.change(name).value)
    chosen, rows = ", ".join(dict.fromkeys(run.chosen for run in runs)), []
    for name in names:
        single = [run.found.change(name).value for run in runs]
        right = [run.correct[name] for run in runs]
        label = f"**{name}**" if name in (AUTO, SPREAD) else name
        label += f" ({chosen})" * (name in (BEST, SPREAD))
        rows.append([label, found.change(name).shown, f"{min(single):.3f} to {max(single):.3f}",
                     f"{found.mean('kl', name):.3f}", f"{sum(right) / len(right):.1%}"])  # fmt: skip
    out(table(["criterion", "change of the loss", "over seeds", "KL", "arithmetic right"], rows))
    ratios = {}
    for name in (AUTO, BEST, SPREAD):
        losses = [(run.found.change(name).value, run.found.change(BESIDE).value) for run in runs]
        if all(min(pair) > 0 for pair in losses):  # no ratio where a plan happens to do better than all experts
            ratios[name] = geometric_mean(one / other for one, other in losses)
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) or "none, some lose nothing"
    out(f"\nLoss beside {BESIDE}'s, geometric mean over seeds: {told}")
    return ratios.get(AUTO, 1.0)


def main() -> None:
    parser = arguments("What fewer experts cost, by every criterion.", 16384, 65536)
    parser.add_argument("--items", type=int, default=2000, help="arithmetic problems")
    given = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(given, Path(folder)):
            select, held = subject.text(subject.heldout, given.heldout_tokens, 0).parted(2)
            for share in DROPPED:
                runs = []
                for seed in SEEDS:
                    runs.append(run(subject, seed, share, select, held, given.tokens, Path(folder), given.items))
                    say(f"{subject.folder.name}: {share:.0%}, seed {seed} done, auto is {runs[-1].chosen}")
                ratio = report(subject, share, runs)
                ratios += [ratio] * (share == DROPPED[-1])
    out(f"\nHalf dropped, all models: auto loses {geometric_mean(ratios):.2f} of what {BESIDE} does (geometric mean).")


if __name__ == "__main__":
    main()
