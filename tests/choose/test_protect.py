"""Protection: the user's entries and super experts."""

import numpy as np
import pytest
from choose_models import geometry

from expertcut.choose import parse_protect, super_experts
from expertcut.errors import UsageError

MODEL = geometry(8, moe_layers=(1, 2), mtp=True)
ONE, TWO = "model.layers.1.mlp", "model.layers.2.mlp"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], {}),
        (["2:5"], {TWO: {5}}),
        (["2:5,0"], {TWO: {0, 5}}),
        (["3"], {ONE: {3}, TWO: {3}}),
        (["3,4", "1:7"], {ONE: {3, 4, 7}, TWO: {3, 4}}),
        (["1:7", " 1:7,6 "], {ONE: {6, 7}}),
    ],
)
def test_entries(entries: list[str], expected: dict[str, set[int]]) -> None:
    assert parse_protect(entries, MODEL) == expected


@pytest.mark.parametrize("entry", ["", "x", "1:", ":3", "1:2:3", "1,", "-1", "1:2, 3", "1.5", "２"])
def test_entries_of_another_form(entry: str) -> None:
    with pytest.raises(UsageError, match="expected LAYER:ID"):
        parse_protect([entry], MODEL)


def test_unknown_expert_and_layer() -> None:
    with pytest.raises(UsageError, match="--protect 1:8: expert 8, but ids end at 7"):
        parse_protect(["1:8"], MODEL)
    with pytest.raises(UsageError, match="layer 0 has no routed experts; layers that have: 1, 2"):
        parse_protect(["0:1"], MODEL)


def test_prediction_layers_follow_the_trunk() -> None:
    with pytest.raises(UsageError, match="layer 3 predicts further tokens and keeps the experts that layer 2 keeps"):
        parse_protect(["3:1"], MODEL)


def test_super_experts_stand_out_over_all_layers() -> None:
    """400 experts: the 99.5th percentile leaves the two largest; both are above a tenth of the maximum."""
    acts = {ONE: np.linspace(0, 1, 200), TWO: np.linspace(0, 1, 200)}
    acts[ONE][17], acts[TWO][3] = 100.0, 11.0
    assert super_experts(acts) == {ONE: {17}, TWO: {3}}


def test_a_super_expert_is_above_a_tenth_of_the_maximum() -> None:
    acts = {ONE: np.linspace(0, 1, 200), TWO: np.linspace(0, 1, 200)}
    acts[ONE][17], acts[TWO][3] = 100.0, 9.0
    assert super_experts(acts) == {ONE: {17}}
    acts[TWO][3] = 10.0
    assert super_experts(acts) == {ONE: {17}}, "exactly a tenth is not above"


def test_a_super_expert_is_above_the_percentile() -> None:
    """All within a factor of two: only the top half per cent counts, of all layers together."""
    acts = {ONE: np.linspace(1, 1.5, 200), TWO: np.linspace(1.5, 2, 200)}
    assert super_experts(acts) == {TWO: {198, 199}}


def test_equal_experts_are_not_super() -> None:
    assert super_experts({ONE: np.ones(8), TWO: np.ones(8)}) == {}
    assert super_experts({ONE: np.zeros(8)}) == {}
