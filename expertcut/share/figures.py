"""What a figure of a report is, and the two kinds of it: numbers, words and axes in, a figure with its table out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertcut.share.heat import cell_width, heatmap
from expertcut.share.svg import LEFT, RIGHT, WIDTH, Axis, Series, diagram, table_of

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]
"""Columns and rows."""
BESIDE = WIDTH + 24
"""Pixels of a picture that leaves room for words at its side."""


@dataclass(frozen=True)
class Figure:
    """One figure of a report."""

    key: str
    """Its anchor, and the name of the file that it is exported to."""
    title: str
    caption: str
    """What it shows, from what, and what is to be seen."""
    svg: str
    table: Table
    cells: dict[str, Any] = field(default_factory=dict)
    """Of a heatmap: what its cells are, for the cursor."""
    wide: bool = False
    """True if it needs the page's whole width."""

    @property
    def data(self) -> str:
        """`cells` as JSON, safe between HTML tags."""
        return json.dumps(self.cells, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def line_figure(
    key: str, title: str, caption: str, x: Axis, y: Axis, series: Sequence[Series], *, table: Table | None = None,
    interval: str = "95 % interval", apart: float = 0,
) -> Figure:  # fmt: skip
    """Return a diagram; without a table of its own it gets one of its points, whose whiskers are an `interval`."""
    columns, rows = table or table_of(series, x, y, interval)
    return Figure(key, title, caption, diagram(title, x, y, series, apart), (columns, rows))


def heat_figure(
    key: str, title: str, caption: str, values: NDArray[np.float64], rows: Sequence[str], scale: str, table: Table, *,
    low: float = 0.0, high: float = 1.0, kinds: Mapping[str, str] | None = None, also: Mapping[str, Any] | None = None,
) -> Figure:  # fmt: skip
    """Return a heatmap of (L, E) values.

    `kinds` are names and colours, if the values are numbers of kinds; `also` is what the cursor tells besides: a `name`
    and values `of` every cell, numbers of `names` if it has those.
    """
    kinds = kinds or {}
    svg = heatmap(title, values, rows, "expert", "layer", scale, low=low, high=high, kinds=kinds)
    cells: dict[str, Any] = {"rows": rows, "values": rounded(values), "scale": scale, "names": list(kinds)}
    if also is not None:
        cells["also"] = dict(also)
    wide = LEFT + values.shape[1] * cell_width(values.shape[1]) + RIGHT > BESIDE
    return Figure(key, title, caption, svg, table, cells, wide)


def rounded(values: NDArray[np.float64], form: str = ".3f") -> list[list[float | None]]:
    """Return rows of short numbers, None for what is none."""
    return [[None if np.isnan(value) else float(format(value, form)) for value in line] for line in values]


def layer_names(blocks: Sequence[tuple[int, str]]) -> list[str]:
    """Return the numbers of layers, with the last part of the block's name where two share one."""
    numbers = [layer for layer, _ in blocks]
    return [
        str(layer) if numbers.count(layer) == 1 else f"{layer} {prefix.rpartition('.')[2]}" for layer, prefix in blocks
    ]
