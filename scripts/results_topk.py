"""The tables of docs/results.md on lower top-k; see the script beside it. Prints Markdown."""

from __future__ import annotations

import tempfile
from pathlib import Path

from results_common import OPTIONS, SEEDS, Subject, arguments, out, pooled, say, silent, subjects, table

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.profile import Profile
from expertcut.choose import Plan, make_plan
from expertcut.choose.topk import MeanTopK, Schedule, TopK, mean_top_k
from expertcut.measure.gain import fit_gains, with_gains
from expertcut.measure.intervals import Estimate
from expertcut.measure.quality import WhatIf

SCHEDULES = (
    ("3/4, 1, 1, last", 3 / 4, 1, 1, -1),
    ("5/8, 1, 5/8, 2", 5 / 8, 1, 5 / 8, 2),
    ("1, 2/3, 1/3, last but one", 1, 2 / 3, 1 / 3, -2),
)
"""The paper's (6,8,8,61) and (5,8,5,10) of 8 experts in 61 layers and (6,4,2,26) of 6 in 27, as shares of the top-k."""

DROPPED, CRITERION = (0.25, 0.5), "gated-norm-sum"
"""Plans that drop experts, for gains on them."""


def plan(subject: Subject, top_k: TopK, profile: Profile | None = None) -> Plan:
    return make_plan(subject.checkpoint, subject.geometry, top_k=top_k, profile=profile, per_layer=True)


def pruned(subject: Subject, share: float, profile: Profile) -> Plan:
    return make_plan(subject.checkpoint, subject.geometry, strategy=CRITERION, keep=1 - share, profile=profile)


def gained(subject: Subject, plans: dict[str, Plan], data: CalibrationSet) -> dict[str, Plan]:
    """The plans with one gain for all layers and with one for each."""
    fitted = fit_gains(subject.checkpoint, subject.geometry, plans, data, OPTIONS, notify=say, advance=silent)
    found = {}
    for name, own in plans.items():
        mean = round(sum(fitted[name].values()) / len(fitted[name]), 4)
        found[f"{name} one gain"] = with_gains(own, dict.fromkeys(fitted[name], mean))
        found[f"{name} gain per layer"] = with_gains(own, fitted[name])
    return found


def schedules(subject: Subject) -> dict[str, Plan]:
    most, layers = subject.geometry.top_k, subject.geometry.num_layers
    found = {}
    for name, b, h, e, p in SCHEDULES:
        wanted = Schedule(*(max(1, round(share * most)) for share in (b, h, e)), p if p > 0 else layers + p + 1)
        found[f"schedule {name}"] = plan(subject, wanted)
    return found


def measure(subject: Subject, scratch: Path, tokens: int, heldout_tokens: int) -> tuple[WhatIf, dict[str, Plan]]:
    heldout = subject.text(subject.heldout, heldout_tokens, 0)
    most, runs, plans = subject.geometry.top_k, [], {}
    for seed in SEEDS:
        data = subject.text(subject.calibration, tokens, seed)
        profile = subject.profile(data, scratch / f"{subject.folder.name}-{seed}")
        cut = {f"{share:.0%} dropped": pruned(subject, share, profile) for share in DROPPED}
        plans = {f"k={k}": plan(subject, k) for k in range(most - 1, 0, -1)} | cut
        plans |= {f"k={k} per layer": plan(subject, MeanTopK(k), profile) for k in range(most - 1, 0, -1)}
        plans |= gained(subject, plans, data)
        followed = schedules(subject)
        plans |= followed
        plans |= {
            f"budget of {name}": plan(subject, MeanTopK(mean_top_k(own, subject.geometry)), profile)
            for name, own in followed.items()
        }
        runs.append(subject.whatif(heldout, plans))
        say(f"{subject.folder.name}: seed {seed} of {SEEDS} done, {len(plans)} plans")
    return pooled(runs), plans


def shown(found: Estimate) -> str:
    assert found.low is not None and found.high is not None
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def report(subject: Subject, found: WhatIf, plans: dict[str, Plan]) -> None:
    base, count = found.mean("nll", "base"), f"{found.count():,} held-out tokens in {found.sequences()} sequences"
    out(f"\n#### {subject.title}\n", f"Base: {base:.3f} nats per token; {count}.\n")
    columns = ["k", "plain", "one gain", "gain per layer", "k per layer", "both", "one gain − plain",
               "k per layer − plain"]  # fmt: skip
    out(table(columns, [_by_k(found, k) for k in range(subject.geometry.top_k - 1, 0, -1)]))
    columns = ["b, h, e, p", "mean k", "schedule", "`--mean-top-k` of equal mean", "difference"]
    rows = [
        [name.removeprefix("schedule "), f"{mean_top_k(own, subject.geometry):.2f}", shown(found.change(name)),
         shown(found.change(f"budget of {name}")), shown(found.difference(f"budget of {name}", name))]
        for name, own in plans.items() if name.startswith("schedule ")
    ]  # fmt: skip
    out("", table(columns, rows))
    columns = ["experts", "plain", "one gain", "gain per layer", "one gain − plain", "gain per layer − plain"]
    rows = []
    for name in (f"{share:.0%} dropped" for share in DROPPED):
        ways = [f"{name} one gain", f"{name} gain per layer"]
        rows.append([name, shown(found.change(name)), *(f"{found.change(way).value:+.4f}" for way in ways),
                     *(shown(found.difference(way, name)) for way in ways)])  # fmt: skip
    out("", table(columns, rows))


def _by_k(found: WhatIf, k: int) -> list[object]:
    plain, layers = f"k={k}", f"k={k} per layer"
    others = (f"{plain} one gain", f"{plain} gain per layer", layers, f"{layers} gain per layer")
    changes = (f"{found.change(name).value:+.4f}" for name in others)
    return [k, shown(found.change(plain)), *changes, shown(found.difference(others[0], plain)),
            shown(found.difference(layers, plain))]  # fmt: skip


def main() -> None:
    given = arguments("What a lower top-k costs.", 16384, 65536).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(given, Path(folder)):
            report(subject, *measure(subject, Path(folder), given.tokens, given.heldout_tokens))


if __name__ == "__main__":
    main()
