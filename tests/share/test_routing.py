"""Measures of routing as laws: at their ends where they must be, and the same whatever experts are called."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expertcut.share.figures import Figure, layer_names
from expertcut.share.routing import _information, _load

uses = arrays(float, st.tuples(st.just(1), st.integers(2, 4), st.integers(2, 9)), elements=st.integers(1, 99))
counts = arrays(float, st.tuples(st.just(1), st.integers(2, 40)), elements=st.integers(0, 999)).filter(np.any)


@given(uses)
def test_a_choice_tells_between_nothing_and_the_domain(use_LDE: np.ndarray) -> None:
    domains = use_LDE.shape[1]
    (told,) = _information(use_LDE)
    assert 0 <= told <= np.log2(domains) + 1e-9
    assert _information(use_LDE[..., ::-1]) == pytest.approx(told), "names of experts do not matter"
    assert _information(use_LDE * np.arange(1, domains + 1)[:, None]) == pytest.approx(told), "nor how long domains are"
    assert _information(np.repeat(use_LDE[:, :1], domains, axis=1)) == pytest.approx(0), "all domains alike"
    own = np.kron(np.eye(domains), use_LDE[0, :1])[None]
    assert _information(own) == pytest.approx(np.log2(domains)), "each with experts of its own"


def load(count_LE: np.ndarray) -> list[float]:
    """Effective experts, choices of the busiest, the busiest over the mean, Gini."""
    figure: Figure = _load(["7"], [7], count_LE)
    ((_, effective, busiest, most, gini),) = figure.table[1]
    return [float(effective.strip("%")) / 100, float(busiest.strip("%")) / 100, float(most), float(gini)]


@given(counts)
def test_load_is_between_even_and_one_expert(count_LE: np.ndarray) -> None:
    experts = count_LE.shape[1]
    few = max(1, round(0.1 * experts))
    effective, busiest, most, gini = load(count_LE)
    assert 1 / experts - 1e-3 <= effective <= 1 and few / experts - 1e-3 <= busiest <= 1
    assert 1 <= most <= experts and 0 <= gini <= 1 - 1 / experts + 1e-3
    pairs = np.abs(count_LE[0][:, None] - count_LE[0]).sum()
    assert gini == pytest.approx(pairs / (2 * experts * count_LE.sum()), abs=1e-3), "its definition"
    even, single = np.ones_like(count_LE), np.zeros_like(count_LE)
    single[0, -1] = 9
    assert load(even) == pytest.approx([1, few / experts, 1, 0], abs=1e-3)
    assert load(single) == pytest.approx([1 / experts, 1, experts, 1 - 1 / experts], abs=6e-3)


def test_layers_have_their_own_numbers_and_sets_of_one_layer_their_names() -> None:
    assert layer_names([(3, "a.3.mlp"), (4, "a.4.mlp")]) == ["3", "4"]
    assert layer_names([(3, "a.3.text"), (3, "a.3.image")]) == ["3 text", "3 image"]
