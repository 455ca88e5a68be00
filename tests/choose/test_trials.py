"""Sets of experts that are tried one by one: all of them where they are few, else greedily, group by group."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from expertcut.choose import select_experts, trials
from expertcut.choose.trials import MAX_TRIED, least_tried

Mask = NDArray[np.bool_]


class Losses:
    """A number for every set, drawn from its members; counts what is asked."""

    def __init__(self, experts: int, seed: int) -> None:
        self.experts, self.seed, self.asked, self.sizes = experts, seed, 0, set[int]()

    def __len__(self) -> int:
        return self.experts

    def one(self, gone_E: Mask) -> float:
        return float(np.random.default_rng([self.seed, *np.flatnonzero(gone_E).tolist()]).random() + gone_E.sum())

    def __call__(self, gone_SE: Mask) -> NDArray[np.float64]:
        self.asked += len(gone_SE)
        self.sizes |= set(gone_SE.sum(axis=1).tolist())
        return np.array([self.one(gone_E) for gone_E in gone_SE])


def mask(experts: int, ids: tuple[int, ...]) -> Mask:
    return np.isin(np.arange(experts), ids)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("experts", "drop", "groups"), [(8, 3, 1), (6, 0, 1), (6, 6, 1), (12, 2, 3), (12, 1, 2)])
def test_few_sets_are_all_tried(experts: int, drop: int, groups: int, seed: int) -> None:
    losses, protected = Losses(experts, seed), (1,) if drop < experts // groups else ()
    may_go = ~mask(experts, protected)
    found = least_tried(losses, drop, may_go, groups)
    size = experts // groups
    ids = [[e for e in range(g * size, (g + 1) * size) if may_go[e]] for g in range(groups)]
    sets = [mask(experts, sum(chosen, ())) for chosen in product(*(combinations(some, drop) for some in ids))]
    assert losses.one(found) == min(map(losses.one, sets)) and losses.asked == len(sets) <= MAX_TRIED
    assert found.reshape(groups, -1).sum(axis=1).tolist() == [drop] * groups and not found[list(protected)].any()


def test_many_sets_are_approached_one_expert_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "MAX_TRIED", 1)
    losses = Losses(10, 0)
    found, expected = least_tried(losses, 4, ~mask(10, (2,))), mask(10, ())
    for _ in range(4):
        left = [e for e in range(10) if e != 2 and not expected[e]]
        goes = min(left, key=lambda e: losses.one(expected | mask(10, (e,))))
        expected = expected | mask(10, (goes,))
    assert found.tolist() == expected.tolist() and losses.asked == 9 + 8 + 7 + 6 and losses.sizes == {1, 2, 3, 4}


def test_groups_are_equal_in_every_set_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where experts of different groups have nothing to do with each other, greedy finds each group's own."""
    monkeypatch.setattr(trials, "MAX_TRIED", 1)
    price = np.random.default_rng(0).random(12)

    class Sums(Losses):
        def __call__(self, gone_SE: Mask) -> NDArray[np.float64]:
            assert (gone_SE.reshape(-1, 3, 4).sum(axis=2) == gone_SE[0].reshape(3, 4).sum(axis=1)).all()
            assert len(set(gone_SE[0].reshape(3, 4).sum(axis=1).tolist())) == 1
            cost: NDArray[np.float64] = gone_SE @ price
            return cost

    kept = select_experts(Sums(12, 0), 6, n_group=3, protected=(4,), layer=0)
    price[4] = 9
    expected = [g * 4 + int(e) for g in range(3) for e in np.sort(np.argsort(price.reshape(3, 4)[g])[2:])]
    assert list(kept) == expected


@pytest.mark.parametrize("limit", [1, MAX_TRIED])
def test_of_equals_the_higher_ids_go(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "MAX_TRIED", limit)

    class Alike(Losses):
        def one(self, gone_E: Mask) -> float:
            return 0.0

    assert select_experts(Alike(12, 0), 6, n_group=3, layer=0) == (0, 1, 4, 5, 8, 9)
    assert select_experts(Alike(6, 0), 3, protected=[5], layer=0) == (0, 1, 5)
