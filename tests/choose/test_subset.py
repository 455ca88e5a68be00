"""The least loss: against all sets one by one, and on what a real model's pairs look like."""

import time
from itertools import combinations, product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import profile

import expertcut.choose.subset as module
from expertcut.calibrate.data import load_calibration
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.tokenizer import load_tokenizer
from expertcut.choose.subset import least_loss

Array = np.ndarray[Any, np.dtype[np.float64]]


def loss(matrix: Array, gone: np.ndarray) -> float:
    return float(matrix[np.ix_(gone, gone)].sum())


def least(matrix: Array, drop: int, may_go: np.ndarray, n_group: int) -> float:
    """The least loss of all sets, each tried."""
    groups = np.flatnonzero(may_go)
    size = may_go.size // n_group
    choices = product(*(combinations(groups[groups // size == g].tolist(), drop) for g in range(n_group)))
    return min(loss(matrix, np.array([e for ids in chosen for e in ids], np.int64)) for chosen in choices)


def routed(random: np.random.Generator, experts: int, tokens: int, top_k: int, signs: bool) -> Array:
    """Pair sums of tokens that reach `top_k` experts each, outputs of 3 numbers: all positive, or of any direction."""
    size = random.exponential(size=(tokens, experts)) * (random.random((tokens, experts)).argsort(1) < top_k)
    direction = random.normal(size=(tokens, experts, 3)) if signs else np.ones((1, 1, 1))
    vectors = size[:, :, None] * direction
    pairs: Array = np.einsum("tih,tjh->ij", vectors, vectors)
    return pairs


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n_group, size = draw(st.sampled_from([(1, 5), (1, 9), (2, 4), (2, 5), (4, 3)]))
    drop = draw(st.integers(0, size))
    may_go = np.ones(n_group * size, np.bool_)
    for group in range(n_group):
        ids = st.sets(st.integers(group * size, (group + 1) * size - 1), max_size=size - drop)
        may_go[list(draw(ids))] = False
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    top_k = draw(st.integers(1, 4))
    matrix = routed(random, may_go.size, draw(st.integers(1, 60)), top_k, draw(st.booleans()))
    return {"loss_EE": matrix, "drop": drop, "may_go_E": may_go, "n_group": n_group}


@given(cases())
def test_few_sets_are_all_tried(case: dict[str, Any]) -> None:
    matrix, drop, may_go, n_group = case.values()
    before = matrix.copy()
    gone = least_loss(**case)
    np.testing.assert_array_equal(matrix, before)
    assert not (gone & ~may_go).any()
    assert gone.reshape(n_group, -1).sum(axis=1).tolist() == [drop] * n_group
    assert loss(matrix, np.flatnonzero(gone)) == pytest.approx(least(*case.values()), rel=1e-9, abs=1e-9)


@given(cases())
def test_no_exchange_within_a_group_helps(case: dict[str, Any]) -> None:
    matrix, drop, may_go, n_group = case.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_SETS", 0)
        gone = least_loss(**case)
        np.testing.assert_array_equal(gone, least_loss(**case))
    assert not (gone & ~may_go).any()
    assert gone.reshape(n_group, -1).sum(axis=1).tolist() == [drop] * n_group
    found, size = loss(matrix, np.flatnonzero(gone)), may_go.size // n_group
    for out, into in product(np.flatnonzero(gone), np.flatnonzero(may_go & ~gone)):
        if out // size == into // size:
            other = gone.copy()
            other[[out, into]] = False, True
            assert loss(matrix, np.flatnonzero(other)) >= found - 1e-9 * matrix.trace()


@pytest.mark.parametrize("signs", [False, True])
def test_how_far_from_the_least_without_trying_all(signs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 8 to 16 experts the least is missed once in hundreds of draws, and then by a percent or so."""
    monkeypatch.setattr(module, "MAX_SETS", 0)
    random = np.random.default_rng(7)
    above = []
    for _ in range(200):
        n_group, size = (1, int(random.integers(8, 14))) if random.random() < 0.5 else (2, int(random.integers(4, 9)))
        drop, may_go = int(random.integers(1, size)), np.ones(n_group * size, np.bool_)
        matrix = routed(random, may_go.size, int(random.integers(20, 400)), int(random.integers(1, 5)), signs)
        if comb(size, drop) ** n_group <= 1000:
            best = least(matrix, drop, may_go, n_group)
            found = loss(matrix, np.flatnonzero(least_loss(matrix, drop, may_go, n_group)))
            above.append(found / best - 1 if best > 1e-9 else 0.0)
    assert len(above) > 150
    assert sum(share > 1e-9 for share in above) <= 2
    assert max(above) < 0.05


@pytest.mark.parametrize("stat", ["coenergy", "gram"])
@pytest.mark.parametrize("drop", [8, 16])
def test_no_random_start_does_better_on_a_real_model(stat: str, drop: int, real: Profile) -> None:
    random = np.random.default_rng(0)
    for prefix in real.prefixes:
        matrix, may_go = getattr(real.layer(prefix), stat), np.ones(32, np.bool_)
        found = loss(matrix, np.flatnonzero(least_loss(matrix, drop, may_go)))
        problem = module._Loss(matrix, drop, may_go, 1)
        starts = (problem._lowest(random.random(32)) for _ in range(40))
        assert found <= min(loss(matrix, np.flatnonzero(problem.improved(start))) for start in starts) * (1 + 1e-9)


@pytest.fixture(scope="module")
def real(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """The built-in model's, on shipped text."""
    text = load_calibration(["builtin"], load_tokenizer(demo_model), tokens=3000, seq_len=128)
    return profile(demo_model, text, tmp_path_factory.mktemp("profile"))


@pytest.mark.parametrize(("experts", "n_group"), [(256, 8), (384, 1)])
def test_large_layers_take_a_moment(experts: int, n_group: int) -> None:
    matrix = routed(np.random.default_rng(0), experts, 2000, 8, signs=False)
    began = time.process_time()
    gone = least_loss(matrix, experts // n_group // 2, np.ones(experts, np.bool_), n_group)
    assert time.process_time() - began < 2
    assert gone.sum() == experts // 2


def test_experts_without_a_token_go_first_the_higher_ids_before_the_lower() -> None:
    matrix = np.diag([0.0, 3, 0, 2, 0, 1])
    for experts, gone in [(1, [4]), (2, [2, 4]), (3, [0, 2, 4]), (4, [0, 2, 4, 5])]:
        assert np.flatnonzero(least_loss(matrix, experts, np.ones(6, np.bool_))).tolist() == gone
    everything = np.zeros((40, 40))
    assert np.flatnonzero(least_loss(everything, 20, np.ones(40, np.bool_))).tolist() == list(range(20, 40))


def test_experts_that_stand_in_for_each_other_do_not_go_together() -> None:
    """Two of a pair lose twice each other's share besides their own, so one of each pair goes."""
    matrix = np.kron(np.eye(3), np.ones((2, 2))) + 0.01 * np.eye(6)
    gone = least_loss(matrix, 3, np.ones(6, np.bool_))
    assert gone.reshape(3, 2).sum(axis=1).tolist() == [1, 1, 1]
