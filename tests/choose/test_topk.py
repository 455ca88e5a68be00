"""Schedules as the paper draws them, and the knapsack against every possibility."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertcut.choose.topk import Schedule, allocate
from expertcut.errors import UsageError


@pytest.mark.parametrize(
    ("text", "layers", "num_layers", "top_k", "expected"),
    [
        ("8,8,8,61", range(3, 61), 61, 8, (8,) * 58),
        ("1,5,1,5", range(9), 9, 8, (1, 2, 3, 4, 5, 4, 3, 2, 1)),
        ("6,4,2,26", range(1, 27), 27, 6, (6,) * 6 + (5,) * 12 + (4,) * 7 + (2,)),
        ("4,2,2,1", range(3), 3, 4, (2, 2, 2)),
        ("4,4,2,3", range(3), 3, 4, (4, 4, 4)),
    ],
)
def test_a_schedule_is_linear_between_its_points(
    text: str, layers: range, num_layers: int, top_k: int, expected: tuple[int, ...]
) -> None:
    assert Schedule.parse(text).over(layers, num_layers, top_k) == expected


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,2,3,4", "0,2,3,4", "-1,2,3,4", "1.5,2,3,4", "²,1,1,1"])
def test_other_text_is_no_schedule(text: str) -> None:
    with pytest.raises(UsageError, match="expected four numbers"):
        Schedule.parse(text)


@pytest.mark.parametrize(("text", "what"), [("9,8,8,5", "top-9"), ("8,8,8,7", "layer 7.*layers 1 to 6")])
def test_a_schedule_stays_within_the_model(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Schedule.parse(text).over(range(6), 6, 8)


@given(
    st.integers(1, 4).flatmap(
        lambda layers: st.tuples(
            st.lists(st.lists(st.integers(0, 9).map(float), min_size=4, max_size=4), min_size=layers, max_size=layers),
            st.integers(layers, 4 * layers + 2),
        )
    )
)
@settings(derandomize=True, deadline=None)
def test_the_knapsack_finds_the_least_loss(case: tuple[list[list[float]], int]) -> None:
    errors, total = np.array(case[0]), case[1]
    found = allocate(errors, total)
    every = [ks for ks in product(range(1, 5), repeat=len(errors)) if sum(ks) <= total]
    loss = {ks: sum(errors[layer, k - 1] for layer, k in enumerate(ks)) for ks in every}
    assert found == min(every, key=lambda ks: (loss[ks], sum(ks), [-k for k in ks]))


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 6"):
        allocate(np.zeros((3, 4)), 5, least=2)
