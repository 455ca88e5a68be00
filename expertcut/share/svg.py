"""Numbers in, diagrams as SVG text out: lines with intervals, and heatmaps of any size. No library draws them.

Colours are CSS variables that the page sets for light and dark, and every series has a dash and a marker of its own, so
that no figure needs its colours. Invariant: the same numbers give the same text; what comes from files is escaped.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 16, 52
"""Pixels around the plot, for axes."""
LINE, CHARACTER = 22, 7.0
"""Pixels of a legend's line, and about what a character takes."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
SCALE = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
"""Colours of a heatmap from low to high: dark to light in any eye, and in print."""
CELL, ACROSS = 20, 760
"""Pixels of a heatmap's cell at most, and of all cells of a row, about, unless cells would be too small to hit."""
TICKS = 6
"""About so many on an axis."""


@dataclass(frozen=True)
class Axis:
    """What an axis counts, with its unit, and how its numbers are written."""

    label: str
    form: str = "g"
    log: bool = False
    zero: bool = False
    """True if it begins at 0 where all numbers are above."""
    whole: bool = False
    """True if there is nothing between whole numbers."""


@dataclass(frozen=True)
class Mark:
    """A point; its interval, if it has one, is on the vertical axis."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    """What it is, for reading; the numbers are added."""


@dataclass(frozen=True)
class Series:
    """Points that belong together."""

    name: str
    marks: Sequence[Mark]
    line: bool = True
    """False: points only."""
    faint: bool = False
    """True: a thin line behind the others, without points and without a place in the legend."""
    steps: bool = False
    """True: the line keeps a point's height back to the point before it."""


def diagram(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return a diagram of series over numeric axes; there is a point at least."""
    marks = [mark for one in series for mark in one.marks]
    across = _Range.of(x, [mark.x for mark in marks], LEFT, WIDTH - RIGHT)
    ends = [end for mark in marks for end in (mark.low, mark.y, mark.high) if end is not None]
    up = _Range.of(y, ends, HEIGHT - BOTTOM, TOP)
    named = [one for one in series if not one.faint]
    legend, depth = _legend([one.name for one in named]) if len(named) > 1 else ([], 0)
    parts = [*_grid(across, up)]
    parts += [_line(one, across, up, "faint") for one in series if one.faint]
    for number, one in enumerate(named):
        parts += _series(one, number, across, up)
    return _svg(title, WIDTH, HEIGHT + depth, [*parts, *_labels(x, y), *legend])


def heatmap(
    title: str, values: NDArray[np.float64], rows: Sequence[str], x: str, y: str, scale: str, *, low: float,
    high: float, form: str = ".2f", names: Sequence[str] = (),
) -> str:  # fmt: skip
    """Return a heatmap of (rows, columns) values, those beyond `low` and `high` in their colours, no number left empty.

    `names` are those of the values 0, 1, … where they are kinds and no amounts; `scale` says what a colour stands for.
    """
    height, width = values.shape
    cell = max(4, min(CELL, ACROSS // width))
    tall = max(cell, min(22, 320 // height))
    right, bottom = LEFT + width * cell, TOP + height * tall
    tint = (values - low) / ((high - low) or 1)
    image = _png(_colours(tint))
    parts = [
        f'<image class="cells" x="{LEFT}" y="{TOP}" width="{width * cell}" height="{height * tall}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" href="data:image/png;base64,{image}"/>',
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width * cell}" height="{height * tall}"/>',
        f'<rect class="cursor" x="{LEFT}" y="{TOP}" width="{cell}" height="{tall}" visibility="hidden"/>',
    ]
    every = max(1, math.ceil(14 / tall))
    parts += [_text(LEFT - 6, TOP + (at + 0.5) * tall + 4, name, "end")
              for at, name in enumerate(rows) if at % every == 0]  # fmt: skip
    step = _nice(width / max(2, min(8, width * cell / 60)))
    columns = range(0, width, max(1, round(step)))
    parts += [_text(LEFT + (at + 0.5) * cell, bottom + 16, str(at)) for at in columns]
    parts += [_text(LEFT + width * cell / 2, bottom + 36, x, css="name"), _turned(16, TOP + height * tall / 2, y)]
    parts += _colour_key(LEFT, bottom + 52, scale, low, high, form, names)
    wide = max(right + RIGHT, LEFT + 260)
    return _svg(title, wide, bottom + 92, parts)


def table_of(series: Sequence[Series], x: Axis, y: Axis) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the numbers of a diagram as columns and rows."""
    rows = [
        (one.name, mark.note, _number(x, mark.x), _number(y, mark.y),
         "" if mark.low is None or mark.high is None else f"{_number(y, mark.low)} to {_number(y, mark.high)}")
        for one in series for mark in one.marks
    ]  # fmt: skip
    columns = ("series", "point", x.label, y.label, "95 % interval")
    used = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    return tuple(columns[at] for at in used), [tuple(row[at] for at in used) for row in rows]


@dataclass(frozen=True)
class _Range:
    """An axis in pixels."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, axis: Axis, values: Sequence[float], start: float, end: float) -> _Range:
        low, high = min(values), max(values)
        if axis.log:
            exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
            ticks = sorted({*values}) if len({*values}) <= 2 * TICKS else [2.0**e for e in exponents]
            room = (high / low) ** 0.04 if high > low else 1.5
            return cls(axis, low / room, high * room, start, end, tuple(ticks))
        low = min(low, 0.0) if axis.zero else low
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - room * (low != 0 or not axis.zero), high + room
        step = max(_nice((high - low) / TICKS), float(axis.whole))
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        return cls(axis, low, high, start, end, tuple((first + i) * step for i in range(count)))

    def at(self, value: float) -> float:
        share = (
            math.log(value / self.low) / math.log(self.high / self.low)
            if self.axis.log
            else (value - self.low) / (self.high - self.low)
        )
        return self.start + share * (self.end - self.start)


def _nice(step: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(part * power for part in (1, 2, 5, 10) if part * power >= step * (1 - 1e-9))


def _number(axis: Axis, value: float) -> str:
    return format(value + 0.0, axis.form)  # no minus before a zero


def _grid(across: _Range, up: _Range) -> list[str]:
    parts = []
    for value in up.ticks:
        y = up.at(value)
        strong = " zero" if value == 0 else ""
        parts.append(f'<line class="grid{strong}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, _tick(up, value), "end"))
    for value in across.ticks:
        x = across.at(value)
        strong = " zero" if value == 0 and across.low < 0 else ""
        parts.append(f'<line class="grid{strong}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="{x:.1f}" x2="{x:.1f}"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 18, _tick(across, value)))
    return parts


def _tick(span: _Range, value: float) -> str:
    if span.axis.form.endswith("%"):
        fine = span.high - span.low < 0.06
        return f"{value:.1%}" if fine else f"{value:.0%}"
    return f"{value:.10g}"


def _labels(x: Axis, y: Axis) -> list[str]:
    middle = TOP + (HEIGHT - BOTTOM - TOP) / 2
    return [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x.label, css="name"), _turned(16, middle, y.label)]


def _series(one: Series, number: int, across: _Range, up: _Range) -> list[str]:
    css = f"s{number % len(DASHES)}"
    parts = [_line(one, across, up, css, DASHES[number % len(DASHES)])] if one.line else []
    for mark in one.marks:
        x, y = across.at(mark.x), up.at(mark.y)
        told = [f"{one.name}{', ' if one.name and mark.note else ''}{mark.note}",
                f"{across.axis.label}: {_number(across.axis, mark.x)}",
                f"{up.axis.label}: {_number(up.axis, mark.y)}"]  # fmt: skip
        whisker = ""
        if mark.low is not None and mark.high is not None:
            top, bottom = up.at(mark.high), up.at(mark.low)
            whisker = (
                f'<path class="whisker" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8'
                f'M{x - 4:.1f} {bottom:.1f}h8"/>'
            )
            told[-1] += f" ({_number(up.axis, mark.low)} to {_number(up.axis, mark.high)})"
        tip = escape("\n".join(filter(None, told)))
        parts.append(f'<g class="mark {css}" tabindex="0" role="img" aria-label="{tip}" data-tip="{tip}">{whisker}'
                     f"{_marker(number, x, y)}</g>")  # fmt: skip
    return parts


def _line(one: Series, across: _Range, up: _Range, css: str, dash: str = "") -> str:
    points = [(across.at(mark.x), up.at(mark.y)) for mark in one.marks]
    turn = "".join(f"V{y:.1f}H{x:.1f}" if one.steps else f"L{x:.1f} {y:.1f}" for x, y in points[1:])
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    name = f"<title>{escape(one.name)}</title>" if one.faint else ""
    return f'<path class="line {css}" d="M{points[0][0]:.1f} {points[0][1]:.1f}{turn}"{dashes}>{name}</path>'


def _marker(number: int, x: float, y: float) -> str:
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>',
        f'<path d="M{x:.1f} {y - 5:.1f}l4.8 8.4h-9.6z"/>',
        f'<path d="M{x:.1f} {y - 5.2:.1f}l5.2 5.2l-5.2 5.2l-5.2 -5.2z"/>',
        f'<path d="M{x:.1f} {y + 5:.1f}l4.8 -8.4h-9.6z"/>',
        f'<path class="cross" d="M{x - 4:.1f} {y - 4:.1f}l8 8M{x - 4:.1f} {y + 4:.1f}l8 -8"/>',
    )
    return shapes[number % len(shapes)]


def _legend(names: Sequence[str]) -> tuple[list[str], float]:
    """Entries in lines below the plot, and the height that they take."""
    parts, x, y = [], float(LEFT), HEIGHT + 10.0
    for number, name in enumerate(names):
        width = 40 + CHARACTER * len(name) + 14
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + LINE
        css, dash = f"s{number % len(DASHES)}", DASHES[number % len(DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(
            f'<path class="line {css}" d="M{x:.1f} {y:.1f}h28"{dashes}/><g class="mark {css}">'
            f"{_marker(number, x + 14, y)}</g>{_text(x + 36, y + 4, name, 'start')}"
        )
        x += width
    return parts, y - HEIGHT + 14


def _colours(tint: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(rows, columns) between 0 and 1 → (rows, columns, 4) RGBA; what is no number is clear."""
    anchors = np.array([[int(text[i : i + 2], 16) for i in (0, 2, 4)] for text in SCALE], float)
    at = np.clip(np.nan_to_num(tint), 0, 1) * (len(SCALE) - 1)
    first = np.minimum(at.astype(int), len(SCALE) - 2)
    part = (at - first)[..., None]
    colours = anchors[first] * (1 - part) + anchors[first + 1] * part
    return np.concatenate([colours, 255.0 * ~np.isnan(tint)[..., None]], axis=-1).round().astype(np.uint8)


def _png(pixels: NDArray[np.uint8]) -> str:
    """Encode (H, W, 4) RGBA as base64 of a PNG (ISO/IEC 15948), every line unfiltered."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def _colour_key(
    x: float, y: float, scale: str, low: float, high: float, form: str, names: Sequence[str]
) -> list[str]:  # fmt: skip
    if names:
        parts = []
        for number, name in enumerate(names):
            colour = "#" + "".join(f"{c:02x}" for c in _colours(np.array([[(number - low) / (high - low)]]))[0, 0, :3])
            parts.append(f'<rect class="frame" x="{x}" y="{y}" width="14" height="14" style="fill:{colour}"/>'
                         f'{_text(x + 20, y + 11, name, "start")}')  # fmt: skip
            x += 34 + CHARACTER * len(name)
        return parts
    ramp = _png(_colours(np.linspace(0, 1, 64)[None]))
    return [
        f'<image x="{x}" y="{y}" width="160" height="12" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{ramp}"/>',
        f'<rect class="frame" x="{x}" y="{y}" width="160" height="12"/>',
        _text(x, y + 28, format(low, form), "start"), _text(x + 160, y + 28, format(high, form), "end"),
        _text(x + 170, y + 11, scale, "start"),
    ]  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _turned(x: float, y: float, text: str) -> str:
    return (
        f'<text class="name" transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="group" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )
