"""What a what-if pass found, for `eval` and `prune`: the table, one verdict per plan, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from math import isfinite
from typing import TYPE_CHECKING, Any

from expertcut.measure.intervals import DRAWS, LEAST, LEVEL, Estimate
from expertcut.measure.quality import BASE, WhatIf

if TYPE_CHECKING:
    from rich.table import Table

LEGEND = (
    "loss: nats per predicted token; change: of the loss, with its 95 % interval over sequences; KL: base‖plan, nats "
    "per token; top-1, accepted: shares of tokens; see docs/evaluation.md"
)


def record(found: WhatIf) -> dict[str, Any]:
    """Everything, as members of a JSON document."""
    names = found.names[1:]
    return {
        "sequences": found.sequences(), "level": LEVEL, "draws": DRAWS,
        "results": [_model(found, name) for name in found.names],
        "differences": [
            {"name": name, "other": other, **asdict(found.difference(name, other))}
            for name, other in combinations(names, 2)
        ],
    }  # fmt: skip


def _model(found: WhatIf, name: str) -> dict[str, Any]:
    def members(domain: str | None) -> dict[str, Any]:
        return {
            "tokens": found.count(domain), "sequences": found.sequences(domain),
            "nll": found.mean("nll", name, domain), "perplexity": found.perplexity(name, domain),
            "change": asdict(found.change(name, domain)), "kl": asdict(found.estimate("kl", name, domain)),
            "agreement": asdict(found.estimate("agreement", name, domain)),
            "acceptance": asdict(found.estimate("acceptance", name, domain)),
        }  # fmt: skip

    judged = {} if name == BASE else {"verdict": verdict(found, name), "worst": found.worst(name)}
    return {"name": name, "overall": members(None), "domains": {d: members(d) for d in found.domains}, **judged}


def table(found: WhatIf) -> Table:
    """One line per model and domain."""
    from expertcut.cli import tables

    columns = (">tokens", ">loss", ">perplexity", ">change", ">KL", ">top-1", ">accepted")
    made = tables.table(("model", "domain", *columns), ())
    for name in found.names:
        for domain in (*found.domains, None):
            cells = (name, domain or "all", f"{found.count(domain):,}", f"{found.mean('nll', name, domain):.4f}",
                     f"{found.perplexity(name, domain):.2f}")  # fmt: skip
            made.add_row(*cells, *_beside_base(found, name, domain), end_section=domain is None)
    return made


def _beside_base(found: WhatIf, name: str, domain: str | None) -> tuple[str, ...]:
    if name == BASE:
        return ("",) * 4
    change = found.change(name, domain)
    kl, agreement, acceptance = (found.mean(m, name, domain) for m in ("kl", "agreement", "acceptance"))
    return (change.shown, f"{kl:.4f}", f"{agreement:.1%}", f"{acceptance:.1%}")


def verdicts(found: WhatIf) -> list[str]:
    """One line per plan, and one that says which is best if there are several."""
    names = sorted(found.names[1:], key=lambda name: found.mean("nll", name))
    lines = [verdict(found, name) for name in found.names[1:]]
    if len(names) > 1:
        best, second = names[:2]
        ahead = _said(found.difference(second, best), "behind it", "ahead of it", found.sequences())
        lines.append(f"best: {best}; {second}: {ahead}")
    return lines


def verdict(found: WhatIf, name: str) -> str:
    """Whether a plan is worse than the base, by how much, and where most."""
    change = found.change(name)
    if not isfinite(change.value):
        return f"{name}: the loss is not finite: try --dtype float32"
    said = _said(change, "worse", "better", found.sequences())
    if len(found.domains) == 1:
        return f"{name}: {said}"
    worst = found.worst(name)
    return f"{name}: {said}; worst in {worst} ({found.change(name, worst).value:+.4f})"


def _said(difference: Estimate, above: str, below: str, sequences: int) -> str:
    amount = f"{above if difference.value > 0 else below} by {abs(difference.value):.4f} nats per token"
    if difference.low is None or difference.high is None:
        return f"{amount}; no interval: {sequences} sequences, {LEAST} or more are needed"
    if difference.low == difference.high == 0:
        return "no difference"
    low, high, level = difference.low, difference.high, f"{LEVEL:.0%}"
    if not difference.sign:
        return f"no significant difference ({low:+.4f} to {high:+.4f} nats per token, {level})"
    low, high = sorted((abs(low), abs(high)))
    return f"{amount} ({low:.4f} to {high:.4f}, {level})"
