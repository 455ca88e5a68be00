"""Verdicts in words, the table and the JSON of a what-if pass, from figures made up by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest

from expertcut.cli.common import console
from expertcut.cli.whatif import record, table, verdict, verdicts
from expertcut.measure.quality import BASE, WhatIf


def made(*rises: float, sequences: int = 12, noise: float = 0.001) -> WhatIf:
    """Plans `p0`, `p1`, … that raise the loss by so much, in the domain `far` twice that."""
    random = np.random.default_rng(0)
    tokens = np.full(sequences, 100)
    domain = np.arange(sequences) * 2 // sequences
    base = tokens * random.normal(3, 0.5, sequences)
    nll = [base, *(base + tokens * (rise * (1 + domain) + random.normal(0, noise, sequences)) for rise in rises)]
    kl = np.abs(np.stack(nll) - base)
    share = np.stack([tokens * max(0.0, 1 - abs(rise)) for rise in (0.0, *rises)])
    names = (BASE, *(f"p{i}" for i in range(len(rises))))
    return WhatIf(names, ("near", "far"), domain, tokens, np.stack(nll), kl, share, share)


def test_what_is_worse_or_better_is_said_with_the_interval_and_the_worst_domain() -> None:
    found = made(0.02, -0.02)
    change = found.change("p0")
    assert verdict(found, "p0") == (
        f"p0: worse by {change.value:.4f} nats per token ({change.low:.4f} to {change.high:.4f}, 95%); "
        f"worst in far ({found.change('p0', 'far').value:+.4f})"
    )
    better = verdict(found, "p1")
    low, high = (float(word) for word in better.partition("(")[2].partition(",")[0].split(" to "))
    assert better.startswith("p1: better by 0.0") and 0 < low < high and "worst in near (-0.0" in better


def test_what_may_be_chance_is_not_called_a_difference() -> None:
    said = verdict(made(0.001, noise=0.05), "p0")
    assert said.startswith("p0: no significant difference (-0.0")
    assert " to +0.0" in said and "nats per token, 95%)" in said


def test_no_difference_at_all() -> None:
    assert verdict(made(0.0, noise=0.0), "p0").startswith("p0: no difference; ")


def test_too_few_sequences_are_said() -> None:
    said = verdict(made(0.02, sequences=4), "p0")
    assert "; no interval: 4 sequences, 5 or more are needed; " in said


def test_a_loss_that_overflowed_is_no_verdict() -> None:
    found = made(0.02)
    found.nll[:, 3] = np.inf
    assert verdict(found, "p0") == "p0: the loss is not finite: try --dtype float32"


def test_the_best_of_several_is_named_beside_the_second() -> None:
    lines = verdicts(made(0.06, 0.02, 0.03))
    assert len(lines) == 4 and lines[3].startswith("best: p1; p2: behind it by 0.0")
    assert len(verdicts(made(0.02))) == 1
    assert "no significant difference" in verdicts(made(0.02, 0.02, noise=0.05))[-1]


def test_the_table_has_a_line_for_every_model_and_domain() -> None:
    found, printed = made(0.02), io.StringIO()
    console(printed).print(table(found))
    lines = [line.split() for line in printed.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["model", "domain", "tokens", "loss", "perplexity", "change", "KL", "top-1", "accepted"]
    rows = {tuple(cells[:2]): cells[2:] for cells in lines[2:]}
    assert list(rows) == [(name, domain) for name in (BASE, "p0") for domain in ("near", "far", "all")]
    assert rows[BASE, "all"] == ["1,200", f"{found.mean('nll', BASE):.4f}", f"{found.perplexity(BASE):.2f}"]
    change = found.change("p0", "far")
    assert rows["p0", "far"][3:] == [
        f"{change.value:+.4f}", f"({change.low:+.4f}", "to", f"{change.high:+.4f})",
        f"{found.mean('kl', 'p0', 'far'):.4f}", "98.0%", "98.0%",
    ]  # fmt: skip


def test_the_record_holds_everything() -> None:
    found = made(0.02, 0.05)
    document = record(found)
    assert (document["sequences"], document["level"], document["draws"]) == (12, 0.95, 10_000)
    base, first, _ = document["results"]
    assert "verdict" not in base and base["overall"]["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert first["verdict"] == verdict(found, "p0") and first["worst"] == "far"
    assert first["domains"]["far"]["change"]["value"] == found.change("p0", "far").value
    assert first["domains"]["near"]["sequences"] == 6
    (pair,) = document["differences"]
    assert (pair["name"], pair["other"]) == ("p0", "p1") and pair["high"] < 0
    assert pair["value"] == pytest.approx(first["overall"]["nll"] - document["results"][2]["overall"]["nll"])
