"""Selection: counts, groups, protection and ties, for any scores."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.choose import select_experts
from expertcut.errors import PlanError


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n_group = draw(st.sampled_from([1, 1, 2, 4]))
    size = draw(st.integers(1, 8))
    quota = draw(st.integers(1, size))
    score = st.one_of(st.floats(-1e9, 1e9), st.sampled_from([0.0, -0.0, 1.0]))  # ties are common
    scores = draw(st.lists(score, min_size=n_group * size, max_size=n_group * size))
    protected: list[int] = []
    for group in range(n_group):
        ids = st.sets(st.integers(group * size, (group + 1) * size - 1), max_size=quota)
        protected.extend(draw(ids))
    return {"found": np.array(scores), "experts": quota * n_group, "n_group": n_group, "protected": protected}


@given(cases())
def test_what_is_kept(case: dict[str, Any]) -> None:
    scores, n_group = case["found"], case["n_group"]
    before = scores.copy()
    kept = select_experts(**case, layer=0)
    assert list(kept) == sorted(set(kept))
    assert set(case["protected"]) <= set(kept)
    np.testing.assert_array_equal(scores, before)
    for group in np.arange(scores.size).reshape(n_group, -1).tolist():
        inside = set(group) & set(kept)
        assert len(inside) == case["experts"] // n_group
        for loser in set(group) - inside:  # whoever is dropped is beaten by everyone kept on merit
            for winner in inside - set(case["protected"]):
                assert (scores[winner], -winner) > (scores[loser], -loser)


@given(cases(), st.integers(0, 2**32))
def test_what_is_kept_of_experts_that_count_together(case: dict[str, Any], seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(case["found"].size, 5))
    losses, n_group = vectors @ vectors.T, case["n_group"]
    kept = select_experts(**case | {"found": losses}, layer=0)
    assert list(kept) == sorted(set(kept)) and set(case["protected"]) <= set(kept)
    for group in np.arange(len(losses)).reshape(n_group, -1).tolist():
        assert len(set(group) & set(kept)) == case["experts"] // n_group


@given(cases(), st.floats(0.001, 1000))
def test_scaling_scores_changes_nothing(case: dict[str, Any], factor: float) -> None:
    integral = case | {"found": np.round(case["found"])}
    scaled = integral | {"found": integral["found"] * factor}
    assert select_experts(**integral, layer=0) == select_experts(**scaled, layer=0)


def test_ties_keep_the_lower_ids_per_group() -> None:
    assert select_experts(np.zeros(8), 4, n_group=2, layer=0) == (0, 1, 4, 5)
    assert select_experts(np.array([1.0, 2, 2, 2]), 2, layer=0) == (1, 2)


def test_groups_do_not_compete() -> None:
    scores = np.array([9.0, 8, 7, 6, 0, 1, 2, 3])
    assert select_experts(scores, 4, layer=0) == (0, 1, 2, 3)
    assert select_experts(scores, 4, n_group=2, layer=0) == (0, 1, 6, 7)


def test_protection_takes_the_place_of_the_worst_kept() -> None:
    assert select_experts(np.array([4.0, 3, 2, 1]), 2, protected=[3], layer=0) == (0, 3)
    assert select_experts(np.array([4.0, 3, 2, 1]), 2, protected=[0], layer=0) == (0, 1)


def test_protection_beyond_the_budget_names_layer_and_counts() -> None:
    with pytest.raises(PlanError, match=r"^layer 7: 3 experts are protected, but only 2 are kept$") as caught:
        select_experts(np.zeros(4), 2, protected=[0, 1, 2], layer=7)
    assert caught.value.hint == "keep at least 3 experts or protect fewer"


def test_protection_beyond_a_groups_share_names_the_group() -> None:
    with pytest.raises(PlanError, match=r"^layer 7, group 1 of 2: 3 experts are protected, but only 2") as caught:
        select_experts(np.zeros(8), 4, n_group=2, protected=[4, 5, 7], layer=7)
    assert caught.value.hint == "keep at least 6 experts or protect fewer"


def test_losses_that_are_no_numbers_are_refused() -> None:
    losses = np.zeros((3, 3))
    losses[1, 2] = losses[2, 1] = np.nan
    with pytest.raises(PlanError, match=r"^layer 7: the loss of experts 1, 2 is nan, expected a finite number$"):
        select_experts(losses, 1, layer=7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(PlanError, match=r"layer 7: the score of expert 1 is -?(nan|inf), expected a finite number"):
        select_experts(np.array([0.0, bad, 1.0]), 1, layer=7)
