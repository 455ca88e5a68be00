"""Budgets: one of four ways to say how many experts stay."""

import re
from pathlib import Path
from typing import Any

import pytest
from choose_models import geometry, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from expertcut.checkpoint import Checkpoint
from expertcut.choose import format_size, parse_keep, parse_size, resolve_budget
from expertcut.choose.budget import fit_experts
from expertcut.errors import PlanError, UsageError
from expertcut.model import read_geometry

NOWHERE = Checkpoint("nowhere", Path("nowhere"), {}, {}, {}, False, ())
EXPERT = 3 * 4 * 4 * 4 + 4 * 4
"""Bytes of an expert in `write_checkpoint`: three float32 matrices 4 x 4 and a router row."""


def chosen(n_group: int = 1, experts: int = 32, **options: Any) -> int:
    model = geometry(experts, n_group=n_group, topk_group=max(1, n_group // 2))
    return resolve_budget(NOWHERE, model, **{"experts": None, **options}).experts


def test_experts_and_drop() -> None:
    assert chosen(experts=32, drop=0) == 32
    assert chosen(experts=32, drop=31) == 1
    assert resolve_budget(NOWHERE, geometry(32), experts=24).experts == 24
    assert resolve_budget(NOWHERE, geometry(32, n_group=4), drop=8).experts == 24


@pytest.mark.parametrize(
    ("keep", "n_group", "expected"),
    [(1.0, 1, 32), (0.75, 1, 24), (0.7, 1, 22), (0.5, 4, 16), (0.7, 4, 24), (0.01, 1, 2), (0.01, 4, 8), (1.0, 4, 32)],
)
def test_keep(keep: float, n_group: int, expected: int) -> None:
    assert chosen(keep=keep, n_group=n_group) == expected


def test_keep_rounds_exact_halves_up() -> None:
    """0.145 of 100 is 14.5, which floating point would make 14.499…"""
    assert chosen(experts=100, keep=0.145) == 15


@given(keep=st.floats(0.001, 1.0), n_group=st.sampled_from([1, 2, 4, 8]))
def test_keep_is_the_nearest_multiple_of_the_groups(keep: float, n_group: int) -> None:
    model = geometry(64, n_group=n_group)
    budget = resolve_budget(NOWHERE, model, keep=keep)
    assert budget.experts % n_group == 0
    least = 2 * n_group
    assert least <= budget.experts <= 64
    assert abs(budget.experts - keep * 64) <= n_group / 2 + 1e-9 or budget.experts == least
    assert budget.note is not None
    assert f"keeping {budget.experts} of 64 experts" in budget.note


@pytest.mark.parametrize("options", [{}, {"experts": 8, "keep": 0.5}, {"drop": 1, "fit": 10}])
def test_exactly_one_budget(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected exactly one of --experts, --keep, --drop, --fit"):
        resolve_budget(NOWHERE, geometry(32), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "--experts 0: keeps 0 of 32 experts, expected 1 to 32"),
        ({"experts": 33}, "--experts 33: keeps 33 of 32 experts, expected 1 to 32"),
        ({"drop": 32}, "--drop 32: keeps 0 of 32 experts"),
        ({"drop": -1}, "--drop -1: keeps 33 of 32 experts"),
        ({"keep": 0.0}, "--keep 0: expected a share above 0"),
        ({"keep": 1.5}, "--keep 1.5: expected a share above 0"),
        ({"keep": float("nan")}, "--keep nan: expected a share above 0"),
        ({"fit": 10, "tp": 0}, "--tp 0: expected a number of devices of 1 or more"),
        ({"experts": 8, "tp": 2}, "--tp 2: expected .* and --fit with it"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_budget(NOWHERE, geometry(32), **options)


@pytest.mark.parametrize(
    ("experts", "hint"),
    [(30, "keep 28 or 32"), (9, "keep 8 or 12"), (3, "keep 8"), (6, "keep 8"), (31, "keep 28 or 32")],
)
def test_counts_that_groups_cannot_share(experts: int, hint: str) -> None:
    with pytest.raises(UsageError, match=f"keeps {experts} experts, which the router's 4 groups cannot") as caught:
        resolve_budget(NOWHERE, geometry(32, n_group=4), experts=experts)
    assert caught.value.hint == hint


@given(
    experts=st.integers(1, 512), each=st.integers(1, 10**9), rest=st.integers(0, 10**12),
    budget=st.integers(1, 10**12), candidates=st.sets(st.integers(1, 512), min_size=1),
)  # fmt: skip
def test_fit_is_the_largest_that_fits(experts: int, each: int, rest: int, budget: int, candidates: set[int]) -> None:
    candidates = {min(n, experts) for n in candidates}
    sizes = {n: rest + n * each for n in {*candidates, experts}}
    fitting = [n for n in sizes if sizes[n] <= budget]
    if fitting:
        assert fit_experts(rest + experts * each, each, experts, budget, candidates) == max(fitting)
    else:
        with pytest.raises(PlanError, match=f"even with {min(sizes)} of {experts} experts"):
            fit_experts(rest + experts * each, each, experts, budget, candidates)


@pytest.mark.parametrize("grouped", [False, True])
def test_fit_counts_the_bytes_of_every_layer(tmp_path: Path, grouped: bool) -> None:
    """The multi-token-prediction layer of the grouped model is cut too; budgets one byte apart differ."""
    checkpoint = write_checkpoint(tmp_path / "model", grouped=grouped)
    model = read_geometry(checkpoint)
    six = checkpoint.nbytes - 2 * EXPERT * (3 if grouped else 2)
    assert resolve_budget(checkpoint, model, fit=six).experts == 6
    assert resolve_budget(checkpoint, model, fit=six - 1).experts == (4 if grouped else 5)
    assert resolve_budget(checkpoint, model, fit=six // 2, tp=2).experts == 6
    assert resolve_budget(checkpoint, model, fit=six, candidates=[2, 4, 5]).experts == (4 if grouped else 5)
    assert resolve_budget(checkpoint, model, fit=checkpoint.nbytes, candidates=[4]).experts == 8, "nothing to cut"


def test_fit_leaves_what_top_k_and_groups_need(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", grouped=True)
    model = read_geometry(checkpoint)
    least = checkpoint.nbytes - 3 * 4 * EXPERT
    assert resolve_budget(checkpoint, model, fit=least, candidates=range(1, 9)).experts == 4
    with pytest.raises(PlanError, match="even with 4 of 8 experts"):
        resolve_budget(checkpoint, model, fit=least - 1, candidates=range(1, 9))
    with pytest.raises(PlanError, match="even with 6 of 8 experts"):
        resolve_budget(checkpoint, model, fit=least, candidates=range(1, 9), top_k=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48GiB", 48 * 2**30), ("48 GB", 48 * 10**9), ("1.5TiB", 3 * 2**39), ("7B", 7), ("0.5kib", 512),
        ("2mb", 2_000_000), (" 1KB ", 1000), ("0.29GB", 290_000_000),
    ],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "48", "48G", "GiB", "-1GiB", "1e3GB", "1,5GB", "48GiBs", "0GB", "0.1B", "nan GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=f"^size {re.escape(repr(text))}: expected a positive number and one of B, KB"):
        parse_size(text)


@given(st.integers(1, 2**50))
def test_sizes_written_read_back(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.006)


@pytest.mark.parametrize(
    ("text", "expected"), [("0.75", 0.75), ("75%", 0.75), ("100%", 1.0), ("1", 1.0), (" 12.5 % ", 0.125)]
)
def test_shares(text: str, expected: float) -> None:
    assert parse_keep(text) == expected


@pytest.mark.parametrize("text", ["", "%", "75", "0", "0%", "101%", "-0.5", "nan", "inf", "half", "0.5%%"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected a share above 0 and at most 1"):
        parse_keep(text)
