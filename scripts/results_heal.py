"""The tables of docs/results.md on healing; see the script beside it. Prints Markdown.

Held-out text is parted in two: on one half `auto` chooses and evolves, and what is fitted is kept or not; every figure
is of the other. What is fitted is fitted on calibration text of another seed than the profile's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean

from merging import hc_smoe, ream
from results_common import OPTIONS, SEEDS, Subject, arguments, out, pooled, say, silent, subjects, table

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.profile import Profile
from expertcut.choose import Plan, make_plan
from expertcut.choose.criteria import CRITERIA
from expertcut.cli.searching import GENERATIONS
from expertcut.measure.arithmetic import arithmetic_accuracy, arithmetic_items
from expertcut.measure.distil import STEPS
from expertcut.measure.heal import PLAN, Healed, distil_healed, heal_plan
from expertcut.measure.heal_fit import fit_deltas
from expertcut.measure.objective import Objective
from expertcut.measure.quality import WhatIf
from expertcut.measure.search import evolve, judge_with, scored

DROPPED, HALF = (0.25, 0.5), 0.5
BESIDE, AUTO, CLUSTERED = "reap", "auto", "merged as HC-SMoE does"
PLAIN, GAIN, HEALED = "", ", gain", ", healed"
DISTILLED, MERGED = f"{HEALED}, routers distilled", ", merged as REAM does"
"""What is done to a plan, as it stands behind its name."""
OTHER_SEED = 1000
"""What is added to a seed for the text that is fitted on."""


@dataclass(frozen=True)
class Run:
    """One calibration seed."""

    found: WhatIf
    kept: dict[str, str]
    """What was kept of what was fitted, by plan."""
    correct: dict[str, float]
    """Share of arithmetic items answered right, by plan and of the base."""


@dataclass(frozen=True)
class Setting:
    """A model, texts and where files go."""

    subject: Subject
    select: CalibrationSet
    report: CalibrationSet
    scratch: Path
    given: argparse.Namespace

    def profile(self, seed: int) -> tuple[CalibrationSet, Profile]:
        data = self.subject.text(self.subject.calibration, self.given.tokens, seed)
        folder = self.scratch / f"{self.subject.folder.name}-{seed}"
        return data, Profile.load(folder) if folder.exists() else self.subject.profile(data, folder)

    def fit_on(self, seed: int) -> CalibrationSet:
        return self.subject.text(self.subject.calibration, self.given.heal_tokens, seed + OTHER_SEED)

    def plan(self, strategy: str, share: float, profile: Profile, seed: int) -> Plan:
        model = self.subject
        return make_plan(
            model.checkpoint, model.geometry, strategy=strategy, keep=1 - share, profile=profile, seed=seed
        )

    def auto(self, share: float, profile: Profile, seed: int) -> Plan:
        """Choose among the criteria on the select half, and evolve there."""
        model = self.subject
        names = [name for name, criterion in CRITERIA.items() if criterion.needs]
        judging = {name: self.plan(name, share, profile, seed) for name in names}
        judge = judge_with(model.checkpoint, model.geometry, self.select, OPTIONS, notify=say, advance=silent)
        ranked, _ = scored(judge, judging, Objective())
        evolved = evolve(ranked, judge, Objective(), GENERATIONS, model.geometry, protected={}, seed=seed)
        return evolved[0].plan


def run(here: Setting, seed: int, share: float) -> Run:
    """Plans from one draw of calibration text, and what can be done to them, measured on the report half."""
    model, clock = here.subject, _Clock(f"{here.subject.folder.name}, {share:.0%}, seed {seed}")
    data, profile = here.profile(seed)
    plain = {BESIDE: here.plan(BESIDE, share, profile, seed), AUTO: here.auto(share, profile, seed)}
    fit_on = here.fit_on(seed)
    clock("planned")
    plans, kept = {f"{name}{PLAIN}": plan for name, plan in plain.items()}, {}
    for name, plan in plain.items():
        healed, distilled = _heal(here, plan, fit_on, f"{name}-{share}-{seed}")
        kept[f"{name}{GAIN}"], plans[f"{name}{GAIN}"] = _gain(healed, plan)
        plans |= {f"{name}{HEALED}": healed.plan, f"{name}{DISTILLED}": distilled.plan}
        kept |= {f"{name}{HEALED}": healed.name, f"{name}{DISTILLED}": "yes" if distilled.distilled else "no"}
        clock(f"{name} healed and distilled")
        file = here.scratch / f"{model.folder.name}-{name}-{share}-{seed}-merged.safetensors"
        plans[f"{name}{MERGED}"] = ream(model, plan, data, profile, file)
    file = here.scratch / f"{model.folder.name}-{share}-{seed}-clustered.safetensors"
    plans[CLUSTERED] = hc_smoe(model, plain[BESIDE], data, profile, file)
    clock("merged")
    found = model.whatif(here.report, plans)
    answers = arithmetic_accuracy(
        model.checkpoint, model.geometry, plans, arithmetic_items(here.given.items), OPTIONS, notify=say, advance=silent
    )
    clock("measured")
    return Run(found, kept, {name: answers.accuracy(name).value for name in answers.names})


def _heal(here: Setting, plan: Plan, fit_on: CalibrationSet, name: str) -> tuple[Healed, Healed]:
    model, path = here.subject, here.scratch / f"{here.subject.folder.name}-{name}.safetensors"
    healed = heal_plan(
        model.checkpoint, model.geometry, plan, fit_on, here.select, path, OPTIONS, notify=say, advance=silent
    )
    distilled = distil_healed(
        model.checkpoint, model.geometry, healed, fit_on, here.select, path.with_suffix(".routers.safetensors"),
        OPTIONS, steps=here.given.steps, notify=say, advance=silent,
    )  # fmt: skip
    return healed, distilled


def _gain(healed: Healed, plan: Plan) -> tuple[str, Plan]:
    """The gain that helps most on the select half, and the plan with it."""
    helping = [name for name in healed.gained if healed.found.difference(name, PLAN).sign < 0]
    best = min(helping, key=lambda name: healed.found.mean("nll", name), default="none")
    return best, healed.gained.get(best, plan)


def report(subject: Subject, share: float, runs: list[Run]) -> None:
    """Print one table."""
    found, base = pooled([run.found for run in runs]), runs[0].correct["base"]
    out(f"\n#### {subject.title}, {share:.0%} dropped\n",
        f"Base: {found.mean('nll', 'base'):.3f} nats per token over {found.count():,} tokens in {found.sequences()} "
        f"sequences; {base:.1%} of the arithmetic right.\n")  # fmt: skip
    rows: list[list[object]] = []
    for name in found.names[1:]:
        single, right = _changes(runs, name), [run.correct[name] for run in runs]
        kept = "; ".join(dict.fromkeys(run.kept[name] for run in runs if name in run.kept))
        rows.append([name, found.change(name).shown, f"{min(single):.3f} to {max(single):.3f}",
                     f"{found.mean('kl', name):.3f}", f"{sum(right) / len(right):.1%}",
                     _ratio(_ratios(runs, name)), kept])  # fmt: skip
    columns = ["plan", "change of the loss", "over seeds", "KL", "arithmetic right", f"beside {BESIDE}", "kept"]
    out(table(columns, rows))


def _changes(runs: list[Run], name: str) -> list[float]:
    return [run.found.change(name).value for run in runs]


def _ratios(runs: list[Run], name: str) -> list[float]:
    """What a plan loses as a share of what plain reap does, seed by seed; none where either loses nothing."""
    pairs = list(zip(_changes(runs, name), _changes(runs, BESIDE), strict=True))
    return [one / other for one, other in pairs] if all(min(pair) > 0 for pair in pairs) else []


def _ratio(ratios: list[float]) -> str:
    return f"{geometric_mean(ratios):.2f}" if ratios else "–"


def left_out(here: Setting) -> None:
    """Print what healing does to a domain whose calibration text it has seen, and has not: half dropped, one seed.

    Text sampled from the model itself stands in for what is left out, or is all there is.
    """
    model, share, seed = here.subject, HALF, SEEDS[0]
    plan, text = here.plan(BESIDE, share, here.profile(seed)[1], seed), here.fit_on(seed)
    own = model.text(["self"], here.given.own_tokens, seed + OTHER_SEED)
    plans = {"plain": plan, "all": _fitted(here, plan, text, "all"), "own": _fitted(here, plan, own, "own")}
    for domain in text.domains:
        rest = tuple(s for s in text.sequences if s.domain != domain)
        others = replace(text, sequences=rest, domains=tuple(d for d in text.domains if d != domain))
        both = replace(others, sequences=(*rest, *own.sequences), domains=(*others.domains, *own.domains))
        plans[domain] = _fitted(here, plan, others, domain)
        plans[f"{domain}, own"] = _fitted(here, plan, both, f"{domain}-own")
    found = model.whatif(here.report, plans)
    out(f"\n#### {model.title}, {share:.0%} dropped by {BESIDE}: domains left out of the text to heal with\n")
    columns = ["domain", "plain", "healed with it", "healed without it", "without it, with own text", "own text alone",
               "without − plain", "without, with own text − plain"]  # fmt: skip
    rows: list[list[object]] = [["all", *(found.change(n).shown for n in ("plain", "all")), "", "",
                                 found.change("own").shown, "", ""]]  # fmt: skip
    rows += [
        [d, *(found.change(n, d).shown for n in ("plain", "all", d, f"{d}, own", "own")),
         *(found.difference(n, "plain", d).shown for n in (d, f"{d}, own"))]
        for d in text.domains if d in found.domains
    ]  # fmt: skip
    out(table(columns, rows))


def _fitted(here: Setting, plan: Plan, text: CalibrationSet, name: str) -> Plan:
    """The plan with all its layers healed on a text, whatever held-out text says."""
    model, path = here.subject, here.scratch / f"{here.subject.folder.name}-without-{name}.safetensors"
    deltas, _ = fit_deltas(model.checkpoint, model.geometry, plan, text, path, OPTIONS, notify=say, advance=silent)
    return plan.beside(path.parent, deltas)


class _Clock:
    """Says how long each part takes."""

    def __init__(self, what: str) -> None:
        self.what, self.since = what, time.monotonic()

    def __call__(self, part: str) -> None:
        now = time.monotonic()
        say(f"{self.what}: {part}: {now - self.since:.1f} s")
        self.since = now


def main() -> None:
    parser = arguments("What healing wins back.", 16384, 65536)
    parser.add_argument("--heal-tokens", type=int, default=131072, help="calibration tokens to fit on")
    parser.add_argument("--own-tokens", type=int, default=32768, help="sampled from the model, to fit on besides")
    parser.add_argument("--steps", type=int, default=STEPS, help="of router distillation")
    parser.add_argument("--items", type=int, default=2000, help="arithmetic problems")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds to run")
    parser.add_argument(
        "--dropped", nargs="*", type=float, default=DROPPED, help="shares of the experts; none: domains only"
    )
    given = parser.parse_args()
    ratios: dict[str, list[float]] = {f"{AUTO}{HEALED}": [], f"{AUTO}{DISTILLED}": []}
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(given, Path(folder)):
            select, held = subject.text(subject.heldout, given.heldout_tokens, 0).parted(2)
            here = Setting(subject, select, held, Path(folder), given)
            for share in given.dropped:
                runs = [run(here, seed, share) for seed in SEEDS[: given.seeds]]
                report(subject, share, runs)
                for name in ratios:
                    ratios[name] += _ratios(runs, name) if share == HALF else []
            clock = _Clock(subject.folder.name)
            left_out(here)
            clock("domains left out")
    told = "; ".join(f"{name} {_ratio(some)}" for name, some in ratios.items() if some)
    if told:
        out(f"\nHalf dropped, all models: loss beside plain {BESIDE}'s, geometric mean over models and seeds: {told}.")


if __name__ == "__main__":
    main()
