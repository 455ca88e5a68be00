"""Figures of a what-if pass from sums made up by hand; limits on them, and what they decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.choose.limits import EACH, METRICS, RELATIVE, Limit, parse_limit
from expertcut.errors import DataError, UsageError
from expertcut.measure.gate import check_limits, judge
from expertcut.measure.quality import BASE, WhatIf

SIZES = np.array([40, 60, 80, 100, 50, 70, 90, 30, 110, 60, 75, 85])
DOMAINS = np.array([0] * 5 + [1] * 7)


def made(shift: float = 0.1, spread: float = 0.02) -> WhatIf:
    """Two domains; `near` is `shift` nats above the base, half of it in the first domain, `far` five times as much."""
    random = np.random.default_rng(0)
    base = SIZES * random.normal(3, 0.5, len(SIZES))
    rise = SIZES * shift * np.where(DOMAINS == 0, 0.5, 1.0) * random.normal(1, spread, len(SIZES))
    nll = np.stack((base, base + rise, base + 5 * rise))
    shares = np.array([[1.0], [0.9], [0.5]]) * SIZES
    return WhatIf((BASE, "near", "far"), ("prose", "code"), DOMAINS, SIZES, nll, nll - base, shares, shares)


def test_means_are_over_tokens_not_over_domains_or_sequences() -> None:
    found = made()
    assert (found.count(), found.count("prose"), found.count("code")) == (SIZES.sum(), 330, 520)
    assert (found.sequences(), found.sequences("prose")) == (12, 5)
    assert found.mean("nll", BASE) == pytest.approx(found.nll[0].sum() / 850)
    parts = [found.mean("nll", "near", domain) * found.count(domain) for domain in found.domains]
    assert sum(parts) / 850 == pytest.approx(found.mean("nll", "near"))
    assert found.perplexity("near", "code") == pytest.approx(math.exp(found.mean("nll", "near", "code")))
    assert found.mean("acceptance", "far", "code") == 0.5


def test_changes_are_beside_the_base() -> None:
    found = made()
    change = found.change("near")
    assert change.value == pytest.approx(found.mean("nll", "near") - found.mean("nll", BASE))
    assert change.value == pytest.approx(found.mean("kl", "near"))
    assert change.sign == 1 and change.low is not None and change.low < change.value
    assert found.growth("near").value == pytest.approx(change.value / found.mean("nll", BASE))
    assert found.change(BASE).value == 0 and found.change(BASE).sign == 0
    assert found.worst("near") == "code"


def test_differences_are_between_any_two() -> None:
    found = made()
    ahead, behind = found.difference("near", "far"), found.difference("far", "near")
    assert (ahead.sign, behind.sign) == (-1, 1)
    assert ahead.value == -behind.value == pytest.approx(found.change("near").value - found.change("far").value)


def test_a_loss_beyond_all_numbers_has_an_infinite_perplexity() -> None:
    nll = np.array([[3000.0]])
    found = WhatIf((BASE,), ("a",), np.array([0]), np.array([1]), nll, 0 * nll, nll / nll, nll / nll)
    assert found.perplexity(BASE) == math.inf
    assert found.change(BASE).low is None


LIMITS = {
    "nll<=1%": Limit("nll", 0.01, True),
    " ppl <= 2.5 % ": Limit("ppl", 0.025, True),
    "ppl<=12": Limit("ppl", 12.0),
    "kl<=5e-2": Limit("kl", 0.05),
    "kl<=0.05@each": Limit("kl", 0.05, domain=EACH),
    "agreement>=0.9@my code": Limit("agreement", 0.9, domain="my code"),
    "acceptance>=1": Limit("acceptance", 1.0),
    "nll<=0%": Limit("nll", 0.0, True),
}


@pytest.mark.parametrize("text", LIMITS)
def test_limits_as_they_are_written(text: str) -> None:
    assert parse_limit(text) == LIMITS[text]


@given(st.sampled_from(sorted(METRICS)), st.integers(0, 100), st.booleans(), st.sampled_from([None, EACH, "a b", "c"]))
def test_limits_are_parsed_as_they_are_shown(metric: str, percent: int, relative: bool, domain: str | None) -> None:
    limit = Limit(metric, percent / 100, relative and metric in RELATIVE, domain)
    assert parse_limit(str(limit)) == limit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected METRIC"), ("nll", "expected METRIC"), ("nll<1%", "expected METRIC"), ("1%", "expected METRIC"),
        ("loss<=1%", "unknown metric 'loss'; known: nll, ppl, kl, agreement, acceptance"),
        ("nll>=1%", "nll is better lower"), ("agreement<=0.9", "agreement is better higher"),
        ("kl<=1%", "% is relative to the base, which only nll and ppl can be"), ("agreement>=90%", "only nll and ppl"),
        ("nll<=x", "found x, expected 0 or more"), ("nll<=-1%", "found -1"), ("nll<=nan", "found nan"),
        ("kl<=inf", "found inf"), ("agreement>=1.5", "found 1.5, expected 0 to 1"), ("nll<=1%@", "expected METRIC"),
    ],
)  # fmt: skip
def test_limits_that_are_none(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_limit(text)
    assert words in caught.value.message


def passes(found: WhatIf, name: str, *limits: str) -> list[bool]:
    return [judgement.ok for judgement in judge(found, name, [parse_limit(text) for text in limits])]


def test_the_worse_end_of_the_interval_counts() -> None:
    found = made(spread=0.5)
    change = found.change("near")
    assert change.high is not None and change.high > 1.1 * change.value
    between = 100 * (change.value + change.high) / 2 / found.mean("nll", BASE)
    assert found.growth("near").value < between / 100
    assert passes(found, "near", f"nll<={between}%", f"nll<={2 * between}%") == [False, True]
    (judged,) = judge(found, "near", [parse_limit(f"nll<={between}%")])
    assert judged.bound == found.growth("near").high
    assert judged.excess == pytest.approx(judged.bound - between / 100)


def test_every_metric_can_be_limited() -> None:
    found = made()
    loss, kl = found.estimate("nll", "near"), found.estimate("kl", "near")
    assert loss.high is not None and kl.high is not None
    assert passes(found, "near", f"nll<={loss.high + 1e-9}", f"nll<={loss.high - 1e-9}") == [True, False]
    assert passes(found, "near", f"ppl<={math.exp(loss.high) + 1e-6}", f"ppl<={math.exp(loss.high) - 1e-6}") == [
        True, False
    ]  # fmt: skip
    assert passes(found, "near", f"kl<={kl.high + 1e-9}", f"kl<={kl.high - 1e-9}") == [True, False]
    assert passes(found, "far", "agreement>=0.49", "acceptance>=0.51") == [True, False]
    change = found.change("near")
    assert change.high is not None
    percent = 100 * (math.exp(change.high) - 1)
    assert passes(found, "near", f"ppl<={percent + 1e-6}%", f"ppl<={percent - 1e-6}%") == [True, False]


def test_a_domain_or_each_of_them() -> None:
    found = made()
    assert passes(found, "near", "kl<=0.06@prose", "kl<=0.06@code", "kl<=0.06@each") == [True, False, True, False]
    last = judge(found, "near", [parse_limit("kl<=0.06@each")])[-1]
    assert last.domain == "code"
    assert str(last) == f"kl<=0.06@each in code: up to {last.bound:.4f}, {last.bound - 0.06:.4f} too much"
    good, bad = judge(found, "near", [parse_limit("nll<=9%"), parse_limit("nll<=1%@code")])
    assert str(good) == f"nll<=9%: up to {good.bound:.2%} over the base"
    assert str(bad) == f"nll<=1%@code: up to {bad.bound:.2%} over the base, {bad.bound - 0.01:.2%} too much"
    (low,) = judge(found, "far", [parse_limit("agreement>=0.9")])
    assert str(low) == "agreement>=0.9: down to 0.5000, 0.4000 too little"


def test_what_is_no_number_fails() -> None:
    found = made()
    found.nll[1] = math.nan
    assert passes(found, "near", "nll<=100%", "ppl<=1e9") == [False, False]


def test_limits_are_checked_against_the_text_first() -> None:
    limits = [parse_limit("nll<=1%@prose")]
    check_limits(limits, {"prose": 5, "code": 1})
    check_limits([parse_limit("nll<=1%")], {"prose": 4, "code": 1})
    with pytest.raises(UsageError, match="no domain 'prose'; it has code"):
        check_limits(limits, {"code": 9})
    with pytest.raises(DataError, match="domain code has 4 sequences, expected 5 or more"):
        check_limits([parse_limit("nll<=1%@each")], {"prose": 5, "code": 4})
    with pytest.raises(DataError, match="the held-out text has 4 sequences"):
        check_limits([parse_limit("nll<=1%")], {"prose": 2, "code": 2})
