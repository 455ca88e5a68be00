"""Tables of expert ids under a plan, against the rule in loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.errors import CheckpointError
from expertcut.model.hashing import remap, stand_ins


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int], int]:
    experts = draw(st.integers(2, 12))
    columns = draw(st.integers(1, min(4, experts)))
    top_k = draw(st.integers(1, columns))
    kept = sorted(draw(st.permutations(range(experts)))[: draw(st.integers(top_k, experts))])
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    router = random.standard_normal((experts, 5)).astype(np.float32)
    table = np.array([random.permutation(experts)[:columns] for _ in range(draw(st.integers(1, 30)))])
    return router, table.astype(draw(st.sampled_from([np.int32, np.int64]))), kept, top_k


@given(cases())
def test_remap_by_the_rule_in_loops(case: tuple[np.ndarray, np.ndarray, list[int], int]) -> None:
    router, table, kept, top_k = case
    unit = router.astype(np.float64) / np.linalg.norm(router.astype(np.float64), axis=1, keepdims=True)
    found = remap(table, stand_ins(router, kept), top_k)
    assert (found.dtype, found.shape) == (table.dtype, (len(table), top_k))
    for old, new in zip(table[:, :top_k].tolist(), found.tolist(), strict=True):
        taken = {e for e in old if e in kept}
        expected = []
        for e in old:
            if e not in kept:
                likeness = unit @ unit[e]
                e = max((c for c in kept if c not in taken), key=likeness.__getitem__)
                taken.add(e)
            expected.append(kept.index(e))
        assert new == expected
        assert len(set(new)) == top_k


def test_all_kept_changes_nothing() -> None:
    table = np.arange(12, dtype=np.int64).reshape(4, 3)
    assert np.array_equal(remap(table, stand_ins(np.eye(12, dtype=np.float32), range(12)), 3), table)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_ids_of_no_expert_are_refused(wrong: int) -> None:
    with pytest.raises(CheckpointError, match=f"{min(wrong, 0)} to {max(wrong, 0)}, of 4 experts"):
        remap(np.array([[0, wrong]]), stand_ins(np.eye(4, dtype=np.float32), [0, 1]), 2)
