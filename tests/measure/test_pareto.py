"""The front of gains and losses against its definition, and rows of a benchmark beside cells of a sweep."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.checkpoint import open_checkpoint
from expertcut.errors import DataError
from expertcut.measure.cost_fit import Measured, Row
from expertcut.measure.pareto import Speed, front, measured_speeds, rated
from expertcut.measure.sweep import Cell, Point
from expertcut.model import Geometry, read_geometry

few = st.integers(-3, 3).map(float)
"""Few values, so that many are equal."""
value = few | st.floats(-1, 1) | st.just(float("nan"))


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """At least as fast and no higher loss, and better in one."""
    return one[0] >= other[0] and one[1] <= other[1] and one != other


@given(st.lists(st.tuples(value, value), max_size=30))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    finite = [one for one in points if one[0] == one[0] and one[1] == one[1]]
    expected = [one in finite and not any(beats(other, one) for other in [*finite, (0.0, 0.0)]) for one in points]
    assert front(points) == expected


@given(st.lists(st.tuples(few, few), min_size=1, max_size=20), st.integers(0, 99))
def test_the_order_of_points_does_not_matter(points: list[tuple[float, float]], seed: int) -> None:
    order = Random(seed).sample(range(len(points)), len(points))
    found = front(points)
    assert front([points[at] for at in order]) == [found[at] for at in order]


def test_points_without_a_speed_are_not_on_the_front() -> None:
    point = Point("reap", 8, 2, 100, 0.1, 0.05, 0.15, 0.1, 0.9, 0.9, False)
    slow, unknown, fast = rated([point] * 3, [Speed(5.0, 0.05), None, Speed(6.0, 0.2)])
    assert [one.front for one in (slow, unknown, fast)] == [False, False, True]
    assert (unknown.gain, fast.gain, fast.tokens_per_second, fast.change) == (None, 0.2, 6.0, 0.1)


@pytest.fixture(scope="module")
def geometry(demo_model: Path) -> Geometry:
    """Of the built-in model: 32 experts, top-4."""
    return read_geometry(open_checkpoint(demo_model))


def row(experts: int, top_k: float, rate: float, clients: int = 8, prompt: int = 16, series: str = "") -> Row:
    """A measured row."""
    return Row(experts=experts, top_k=top_k, concurrency=clients, input_len=prompt, output_len=16, tokens_per_s=rate,
               series=series)  # fmt: skip


def test_rows_match_cells_of_their_load_and_series(geometry: Geometry) -> None:
    rows = (row(32, 4, 100), row(32, 2, 120), row(32, 4, 50, series="b"), row(32, 2, 70, series="b"),
            row(16, 2, 999, series="c"), row(16, 4, 900, clients=1), row(32, 3, 110))  # fmt: skip
    cells = [Cell("all", 32, 2), Cell("reap", 16, 2), Cell("reap", 16, 4), Cell("all", 32, 3, True)]
    found = measured_speeds(Measured(source="s", rows=rows), geometry, cells, 8)
    assert found.keys() == {cells[0]}  # no base in series c, another load, and layers that differ
    assert vars(found[cells[0]]) == pytest.approx({"tokens_per_second": 95, "gain": 0.3})


def test_rows_that_cannot_be_compared_are_refused(geometry: Geometry) -> None:
    rows = (row(32, 4, 100), row(32, 4, 80, prompt=64), row(32, 2, 90, prompt=64), row(32, 2, 5, clients=2))
    measured = Measured(source="bench.json", rows=rows)
    for clients, told in ((8, r"concurrency 8: 16\+16, 64\+16; expected one"), (4, "concurrency 4: none"),
                          (2, r"no row of the unchanged model \(32 experts, top-4\)")):  # fmt: skip
        with pytest.raises(DataError, match=told):
            measured_speeds(measured, geometry, [], clients)
    cell = Cell("all", 32, 2)
    assert measured_speeds(measured, geometry, [cell], 8, input_len=64)[cell].gain == pytest.approx(0.125)
