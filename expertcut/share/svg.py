"""Numbers in, diagrams as SVG text out: lines and points with intervals, one axis each way. No library draws them.

Colours are CSS variables that the page sets for light and dark, and every series has a dash and a marker of its own, so
that no figure needs its colours. Invariant: the same numbers give the same text; what comes from files is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 16, 52
"""Pixels around the plot, for axes."""
LINE, CHARACTER = 22, 7.0
"""Pixels of a legend's line, and about what a character takes."""
TONES = 7
"""Colours of series, which the page names s0, s1, …: a cycle of another length than dashes and markers."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
TICKS, EVERY = 6, 16
"""About so many on an axis; of whole numbers up to so many, each has one."""


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
    """True: a line without points that keeps a point's height back to the point before it."""


def diagram(title: str, x: Axis, y: Axis, series: Sequence[Series], apart: float = 0) -> str:
    """Return a diagram of series over numeric axes; there is a point at least.

    Series are moved sideways by `apart` pixels each, so that whiskers at one place do not hide each other.
    """
    marks = [mark for one in series for mark in one.marks]
    across = _Range.of(x, [mark.x for mark in marks], LEFT, WIDTH - RIGHT)
    ends = [end for mark in marks for end in (mark.low, mark.y, mark.high) if end is not None]
    up = _Range.of(y, ends, HEIGHT - BOTTOM, TOP)
    named = [one for one in series if not one.faint]
    legend, depth = _legend(named) if len(named) > 1 else ([], 0)
    parts = [*_grid(across, up)]
    parts += [_faint(one, across, up) for one in series if one.faint]
    parts += [_line(one, across, up, "steps") for one in named if one.steps]
    for number, one in enumerate(named):
        if not one.steps:
            parts += _series(one, number, across.moved(apart * (number - (len(named) - 1) / 2)), up)
    return document(title, WIDTH, HEIGHT + depth, [*parts, *_labels(x, y), *legend])


def table_of(
    series: Sequence[Series], x: Axis, y: Axis, interval: str = "95 % interval"
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the numbers of a diagram as columns and rows; whiskers are an `interval`."""
    rows = [
        (one.name, mark.note, _number(x, mark.x), _number(y, mark.y),
         "" if mark.low is None or mark.high is None else f"{_number(y, mark.low)} to {_number(y, mark.high)}")
        for one in series for mark in one.marks
    ]  # fmt: skip
    columns = ("series", "point", x.label, y.label, interval)
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
    zero: bool
    """True if it has a line at 0: some numbers are below it, or none is."""

    @classmethod
    def of(cls, axis: Axis, values: Sequence[float], start: float, end: float) -> _Range:
        low, high = min(values), max(values)
        if axis.log:
            exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
            ticks = sorted({*values}) if len({*values}) <= 2 * TICKS else [2.0**e for e in exponents]
            room = (high / low) ** 0.04 if high > low else 1.5
            return cls(axis, low / room, high * room, start, end, tuple(ticks), False)
        low = min(low, 0.0) if axis.zero else low
        zero = axis.zero or low < 0
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - room * (low != 0 or not axis.zero), high + room
        step = 1.0 if axis.whole and high - low <= EVERY else max(nice((high - low) / TICKS), float(axis.whole))
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        return cls(axis, low, high, start, end, tuple((first + i) * step for i in range(count)), zero)

    def moved(self, pixels: float) -> _Range:
        """The same axis, so many pixels further."""
        return replace(self, start=self.start + pixels, end=self.end + pixels)

    def at(self, value: float) -> float:
        share = (
            math.log(value / self.low) / math.log(self.high / self.low)
            if self.axis.log
            else (value - self.low) / (self.high - self.low)
        )
        return self.start + share * (self.end - self.start)


def nice(step: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(part * power for part in (1, 2, 5, 10) if part * power >= step * (1 - 1e-9))


def _number(axis: Axis, value: float) -> str:
    return format(value + 0.0, axis.form)  # no minus before a zero


def _grid(across: _Range, up: _Range) -> list[str]:
    parts = []
    for value in up.ticks:
        y = up.at(value)
        strong = " zero" if value == 0 and up.zero else ""
        parts.append(f'<line class="grid{strong}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text_at(LEFT - 8, y + 4, _tick(up, value), "end"))
    for value in across.ticks:
        x = across.at(value)
        strong = " zero" if value == 0 and across.zero else ""
        parts.append(f'<line class="grid{strong}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="{x:.1f}" x2="{x:.1f}"/>')
        parts.append(text_at(x, HEIGHT - BOTTOM + 18, _tick(across, value)))
    return parts


def _tick(span: _Range, value: float) -> str:
    if span.axis.form.endswith("%"):
        step = 100 * (span.ticks[1] - span.ticks[0]) if len(span.ticks) > 1 else 1.0
        return f"{value + 0.0:.{max(0, -math.floor(math.log10(step) + 1e-9))}%}"
    return f"{value:.10g}"


def _labels(x: Axis, y: Axis) -> list[str]:
    middle = TOP + (HEIGHT - BOTTOM - TOP) / 2
    return [text_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x.label, css="name"), turned(16, middle, y.label)]


def _series(one: Series, number: int, across: _Range, up: _Range) -> list[str]:
    css = f"s{number % TONES}"
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
        parts.append(_told(told, f"mark {css}", whisker + _marker(number, x, y)))
    return parts


def _faint(one: Series, across: _Range, up: _Range) -> str:
    """A thin line that is as easily hit as a thick one, and tells all its points."""
    told = [
        one.name,
        f"{up.axis.label} by {across.axis.label}:",
        *(f"{_number(across.axis, m.x)}: {_number(up.axis, m.y)}" for m in one.marks),
    ]
    return _told(told, "mark thin", _line(one, across, up, "hit") + _line(one, across, up, "faint"))


def _told(lines: Sequence[str], css: str, drawn: str) -> str:
    tip = escape("\n".join(filter(None, lines)))
    return f'<g class="{css}" tabindex="0" role="img" aria-label="{tip}" data-tip="{tip}">{drawn}</g>'


def _line(one: Series, across: _Range, up: _Range, css: str, dash: str = "") -> str:
    points = [(across.at(mark.x), up.at(mark.y)) for mark in one.marks]
    turn = "".join(f"V{y:.1f}H{x:.1f}" if one.steps else f"L{x:.1f} {y:.1f}" for x, y in points[1:])
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="line {css}" d="M{points[0][0]:.1f} {points[0][1]:.1f}{turn}"{dashes}/>'


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


def _legend(series: Sequence[Series]) -> tuple[list[str], float]:
    """Entries in lines below the plot, and the height that they take."""
    parts = []
    places, depth = placed([one.name for one in series], 36, HEIGHT + 10, WIDTH)
    for number, (one, (x, y)) in enumerate(zip(series, places, strict=True)):
        if one.steps:
            drawn = f'<path class="line steps" d="M{x:.1f} {y:.1f}h28"/>'
        else:
            css, dash = f"s{number % TONES}", DASHES[number % len(DASHES)]
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            line = f'<path class="line {css}" d="M{x:.1f} {y:.1f}h28"{dashes}/>' if one.line else ""
            drawn = f'{line}<g class="mark {css}">{_marker(number, x + 14, y)}</g>'
        parts.append(drawn + text_at(x + 36, y + 4, one.name, "start"))
    return parts, depth


def placed(names: Sequence[str], key: float, y: float, wide: float) -> tuple[list[tuple[float, float]], float]:
    """Where the entries of a legend begin, `key` pixels before each name, and the height of all."""
    places, x, first = [], float(LEFT), y
    for name in names:
        width = key + CHARACTER * len(name)
        if x > LEFT and x + width > wide:
            x, y = float(LEFT), y + LINE
        places.append((x, y))
        x += width + 18
    return places, y - first + LINE + 2


def text_at(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> str:
    """Return words at a place."""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def turned(x: float, y: float, text: str) -> str:
    """Return an axis's words, from below upwards."""
    return (
        f'<text class="name" transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def document(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """Return a whole picture."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="group" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )
