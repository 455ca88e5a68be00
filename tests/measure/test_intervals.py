"""Intervals hold the truth as often as they say, and do what intervals do: scale, mirror, stay among the sequences."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.measure import intervals
from expertcut.measure.intervals import LEAST, Estimate, Floats, ratio

Random = np.random.Generator
Sequences = tuple[Floats, Floats]


def even(random: Random, size: int) -> Sequences:
    """Sequences of any length whose mean loss varies evenly around 0.03."""
    weights = random.integers(50, 256, size).astype(float)
    return weights * random.normal(0.03, 0.02, size), weights


def mixed(random: Random, size: int) -> Sequences:
    """Three in ten sequences of a domain that loses twenty times as much; 0.067 on average."""
    weights = random.integers(50, 256, size).astype(float)
    return weights * np.where(random.random(size) < 0.3, 0.2, 0.01), weights


def coverage(make: Callable[[Random, int], Sequences], truth: float, size: int, rounds: int = 600) -> float:
    random, hits = np.random.default_rng(size), 0
    for _ in range(rounds):
        found = ratio(*make(random, size))
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    return hits / rounds


@pytest.mark.parametrize(("size", "least"), [(5, 0.89), (8, 0.91), (20, 0.92), (60, 0.93)])
def test_nineteen_in_twenty_intervals_hold_the_truth(size: int, least: float) -> None:
    """Fewer sequences say less of their spread; the plain percentile interval would hold 0.83 of the time with five."""
    assert least <= coverage(even, 0.03, size) <= 0.975


def test_a_mixture_of_domains_is_covered_too() -> None:
    assert 0.9 <= coverage(mixed, 0.067, 40) <= 0.98


def test_pairing_removes_what_both_have_in_common() -> None:
    """Sequences differ by nats, two candidates by a hundredth: only the paired difference can tell them apart."""
    random = np.random.default_rng(1)
    weights = np.full(40, 255.0)
    common = weights * random.normal(3, 1, 40)
    first, second = (common + weights * random.normal(mean, 0.01, 40) for mean in (0.01, 0.02))
    paired, alone = ratio(second - first, weights), ratio(second, weights)
    assert paired.sign == 1 and paired.low is not None and paired.high is not None
    assert alone.low is not None and alone.high is not None
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)


def test_too_few_sequences_have_no_interval() -> None:
    for size in range(1, LEAST):
        assert ratio(np.arange(1.0, size + 1), np.ones(size)) == Estimate((size + 1) / 2, None, None)
    assert ratio(np.arange(1.0, LEAST + 1), np.ones(LEAST)).low is not None
    assert Estimate(1.0, None, None).sign == 0


def test_what_is_no_number_has_no_ends() -> None:
    for lost in (np.nan, np.inf):
        found = ratio(np.array([lost, *range(9)]), np.ones(10))
        assert np.isnan(ends(found)[1:]).all() and found.sign == 0


def test_what_never_varies_has_no_width() -> None:
    assert ratio(np.full(9, 0.5), np.full(9, 2.0)) == Estimate(0.25, 0.25, 0.25)


def test_the_same_sums_give_the_same_interval() -> None:
    sums, weights = even(np.random.default_rng(3), 30)
    first = ratio(sums, weights)
    intervals._counts.cache_clear()
    assert ratio(sums, weights) == first


def test_many_sequences_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw has as many sequences as there are, wherever the parts end."""
    monkeypatch.setattr(intervals, "_BLOCK", 1000)
    intervals._counts.cache_clear()
    counts = intervals._counts(30)
    assert counts.shape == (intervals.DRAWS, 30) and (counts.sum(axis=1) == 30).all()
    assert abs(counts.mean(axis=0) - 1).max() < 0.05
    intervals._counts.cache_clear()


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.776), (7, 2.365), (9, 2.262), (29, 2.045), (500, 1.965)])
def test_student(freedom: int, expected: float) -> None:
    assert intervals._student(freedom) == pytest.approx(expected, rel=0.01)


def ends(found: Estimate) -> Floats:
    """Value, lower and upper end."""
    return np.array([found.value, found.low, found.high], np.float64)


def _sums(bound: float) -> st.SearchStrategy[Sequences]:
    numbers = st.floats(-bound, bound).map(lambda x: round(x, 3))
    return st.integers(LEAST, 25).flatmap(
        lambda size: st.tuples(
            arrays.arrays(np.float64, size, elements=numbers),
            arrays.arrays(np.float64, size, elements=st.integers(1, 300).map(float)),
        )
    )


@given(_sums(100), st.floats(0.1, 10), st.floats(-10, 10))
def test_intervals_scale_shift_and_mirror(sequences: Sequences, scale: float, shift: float) -> None:
    sums, weights = sequences
    found = ratio(sums, weights)
    moved = ratio(scale * sums + shift * weights, weights)
    np.testing.assert_allclose(ends(moved), scale * ends(found) + shift, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ends(ratio(-sums, weights)), -ends(found)[[0, 2, 1]], rtol=1e-9, atol=1e-12)


@given(_sums(100))
def test_intervals_stay_among_the_sequences(sequences: Sequences) -> None:
    sums, weights = sequences
    found = ratio(sums, weights)
    assert found.low is not None and found.high is not None
    least, most = (sums / weights).min() - 1e-9, (sums / weights).max() + 1e-9
    assert least <= found.low <= found.high <= most and least <= found.value <= most


def test_estimates_of_functions() -> None:
    assert Estimate(1.0, 0.5, 2.0).map(lambda x: 10 * x) == Estimate(10.0, 5.0, 20.0)
    assert Estimate(1.0, None, None).map(lambda x: 10 * x) == Estimate(10.0, None, None)
    assert [Estimate(0.0, *ends).sign for ends in ((-1.0, 1.0), (0.0, 1.0), (0.1, 1.0), (-1.0, -0.1))] == [0, 0, 1, -1]
