"""Diagrams as laws: well-formed, inside their frame, with every number, and the same for the same numbers."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.share.heat import SCALE, cell_width, heatmap
from expertcut.share.svg import DASHES, TONES, Axis, Mark, Series, _Range, _tick, diagram, nice, table_of

SVG = "{http://www.w3.org/2000/svg}"
numbers = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)
marks = st.builds(Mark, numbers, numbers, note=st.text("ab<&\"'", max_size=4))
lines = st.lists(
    st.builds(
        Series, st.text("xyz <>&\"'", max_size=8), st.lists(marks, min_size=1, max_size=6), line=st.booleans(),
        faint=st.booleans(), steps=st.booleans(),
    ),
    min_size=1, max_size=9,
)  # fmt: skip


@given(numbers, st.floats(0, 1e6), st.booleans(), st.booleans())
def test_ticks_are_round_even_and_within(low: float, width: float, zero: bool, whole: bool) -> None:
    span = _Range.of(Axis("x", zero=zero, whole=whole), [low, low + width], 0, 100)
    assert 1 <= len(span.ticks) <= 12 or whole
    assert all(span.low - 1e-6 <= tick <= span.high + 1e-6 for tick in span.ticks)
    steps = np.diff(span.ticks)
    if len(steps):
        assert steps == pytest.approx(np.full(len(steps), steps[0]), rel=1e-3)
        assert f"{steps[0]:.2e}"[0] in "125" or whole
    assert 0 <= span.at(low) <= 100 and 0 <= span.at(low + width) <= 100
    assert not (zero and low > 0) or span.low == 0


@given(st.floats(1e-9, 1e9))
def test_a_step_is_the_next_round_one(step: float) -> None:
    found = nice(step)
    assert step * (1 - 1e-6) <= found <= 2.5 * step * (1 + 1e-6)


@given(lines)
def test_a_diagram_is_well_formed_and_inside_its_frame(series: list[Series]) -> None:
    svg = diagram("a <title> & more", Axis("across, s"), Axis("up, m"), series)
    assert svg == diagram("a <title> & more", Axis("across, s"), Axis("up, m"), series)
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert root.find(f"{SVG}title").text == "a <title> & more"  # type: ignore[union-attr]
    assert {"across, s", "up, m"} <= set(texts)
    shown = sum(1 if one.faint else 0 if one.steps else len(one.marks) for one in series)
    assert len([node for node in root.iter(f"{SVG}g") if "data-tip" in node.attrib]) == shown
    for circle in root.iter(f"{SVG}circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width and 0 <= float(circle.attrib["cy"]) <= height


def test_a_mark_lies_where_its_numbers_say() -> None:
    svg = diagram("t", Axis("x"), Axis("y"), [Series("s", [Mark(0, 0), Mark(1, 1, 0.5, 1.5), Mark(2, 2)])])
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2 and y0 > y1 > y2, "up is up"
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2) and y1 == pytest.approx((y0 + y2) / 2, abs=0.2)
    top, bottom = map(float, re.findall(r'class="whisker" d="M[\d.]+ ([\d.]+)V([\d.]+)', svg)[0])
    assert (top, bottom) == pytest.approx((y1 - (y0 - y1) / 2, y1 + (y0 - y1) / 2), abs=0.2)
    assert "y: 1 (0.5 to 1.5)" in svg


def test_doublings_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    span = _Range.of(Axis("x", log=True), [1, 2, 4, 8], 0, 100)
    assert span.ticks == (1, 2, 4, 8)
    assert np.diff([span.at(tick) for tick in span.ticks]) == pytest.approx(np.full(3, span.at(2) - span.at(1)))


def test_series_that_stand_apart_keep_their_order_and_height() -> None:
    alike = [Series(name, [Mark(1, 1), Mark(2, 2)]) for name in ("a", "b")]
    plain, apart = (diagram("t", Axis("x"), Axis("y"), alike, pixels) for pixels in (0, 8))
    places = [
        [(float(x), float(y)) for x, y in re.findall(r'<(?:circle c|rect )x="([\d.]+)" (?:c)?y="([\d.]+)"', svg)]
        for svg in (plain, apart)
    ]
    (first, second), (moved_first, moved_second) = ([found[:2], found[2:4]] for found in places)
    assert np.subtract(moved_first, first) == pytest.approx(np.array([[-4, 0]] * 2), abs=0.11)
    assert np.subtract(moved_second, second) == pytest.approx(np.array([[4, 0]] * 2), abs=0.11)


def test_no_two_of_many_series_look_alike() -> None:
    many = [Series(str(n), [Mark(0, n), Mark(1, n)]) for n in range(TONES * len(DASHES))]
    root = ElementTree.fromstring(diagram("t", Axis("x"), Axis("y"), many))
    lines = [node.attrib for node in root.iter(f"{SVG}path") if re.fullmatch(r"line s\d", node.attrib.get("class", ""))]
    drawn = [(line["class"], line.get("stroke-dasharray")) for line in lines]
    assert len({*drawn}) == len(many) and len(drawn) == 2 * len(many), "in the plot and in the legend"


@given(st.floats(0, 1), st.floats(1e-5, 1))
def test_labels_of_a_share_differ(low: float, width: float) -> None:
    span = _Range.of(Axis("x", ".1%"), [low, low + width], 0, 100)
    told = [_tick(span, tick) for tick in span.ticks]
    assert len({*told}) == len(told)


def test_kinds_have_the_colours_that_the_key_names() -> None:
    values, kinds = np.array([[0.0, 1.0, np.nan]]), {"kept": "102030", "dropped <b>": "405060"}
    svg = heatmap("t", values, ["0"], "expert", "layer", "", low=0, high=1, kinds=kinds)
    root = ElementTree.fromstring(svg)
    found = pixels(base64.b64decode(next(root.iter(f"{SVG}image")).attrib["href"].partition(",")[2]))
    assert found[0].tolist() == [[16, 32, 48, 255], [64, 80, 96, 255], [0, 0, 0, 0]]
    keys = [node.attrib["style"] for node in root.iter(f"{SVG}rect") if "style" in node.attrib]
    assert keys == ["fill:#102030", "fill:#405060"]
    assert {"kept", "dropped <b>"} <= {node.text for node in root.iter(f"{SVG}text")}


@given(st.integers(1, 1024))
def test_cells_are_large_enough_to_hit_and_fill_the_width(columns: int) -> None:
    cell = cell_width(columns)
    assert 4 <= cell <= 20 and (columns * cell <= 650 or cell == 4)


def test_a_heatmap_has_one_pixel_a_cell() -> None:
    values = np.array([[0.0, 0.5, 1.0], [2.0, np.nan, -1.0]])
    svg = heatmap("t", values, ["3", "4"], "expert", "layer", "share", low=0, high=1, kinds={})
    root = ElementTree.fromstring(svg)
    href = next(root.iter(f"{SVG}image")).attrib["href"]
    found = pixels(base64.b64decode(href.removeprefix("data:image/png;base64,")))
    dark, middle, bright = (tuple(bytes.fromhex(SCALE[at])) for at in (0, len(SCALE) // 2, -1))
    assert [tuple(p) for p in found[0, :, :3]] == [dark, middle, bright]
    assert tuple(found[1, 0, :3]) == bright and tuple(found[1, 2, :3]) == dark, "beyond the ends: the ends"
    assert found[..., 3].tolist() == [[255, 255, 255], [255, 0, 255]]
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert {"expert", "layer", "share", "3", "4", "0.00", "1.00"} <= set(texts)


def pixels(png: bytes) -> np.ndarray:
    """Decode what `_png` writes, checksums included."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind], at = data, at + 12 + length
    width, height, *kind_of = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind_of == [8, 6, 0, 0, 0]
    raw = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 4 * width)
    assert not raw[:, 0].any()
    return raw[:, 1:].reshape(height, width, 4)


def test_the_table_has_every_number_and_no_empty_column() -> None:
    series = [Series("a", [Mark(1, 0.25, 0.2, 0.3), Mark(2, 0.5)]), Series("b", [Mark(1, -0.0)])]
    columns, rows = table_of(series, Axis("x"), Axis("y", ".0%"))
    assert columns == ("series", "x", "y", "95 % interval")
    assert rows == [("a", "1", "25%", "20% to 30%"), ("a", "2", "50%", ""), ("b", "1", "0%", "")]
