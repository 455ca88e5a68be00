"""Rows of numbers in, a heatmap as SVG text out: an image of one pixel a cell, so that any number of cells stays small.

Colours run from dark to light, so that any eye and a grey print order them alike. Invariant: the same numbers give the
same text; what comes from files is escaped.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from expertcut.share.svg import LEFT, RIGHT, TOP, document, nice, placed, text_at, turned

SCALE = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
"""Colours of a heatmap from low to high: dark to light in any eye, and in print."""
CELL, ACROSS = 20, 650
"""Pixels of a heatmap's cell at most, and of all cells of a row, about, unless cells would be too small to hit."""


def cell_width(columns: int) -> int:
    """Return the pixels that a heatmap of so many columns gives to each."""
    return max(4, min(CELL, ACROSS // columns))


def heatmap(
    title: str, values: NDArray[np.float64], rows: Sequence[str], x: str, y: str, scale: str, *, low: float,
    high: float, kinds: Mapping[str, str],
) -> str:  # fmt: skip
    """Return a heatmap of (rows, columns) values, those beyond `low` and `high` in their colours, no number left empty.

    `kinds`, if there are any, are names and colours of the values 0, 1, …; `scale` says else what a colour stands for.
    """
    height, width = values.shape
    cell = cell_width(width)
    tall = max(cell, min(22, 320 // height))
    right, bottom = LEFT + width * cell, TOP + height * tall
    pixels = _kinds(values, list(kinds.values())) if kinds else _colours((values - low) / ((high - low) or 1))
    parts = [
        f'<image class="cells" x="{LEFT}" y="{TOP}" width="{width * cell}" height="{height * tall}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" href="data:image/png;base64,{_png(pixels)}"/>',
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width * cell}" height="{height * tall}"/>',
        f'<rect class="cursor" x="{LEFT}" y="{TOP}" width="{cell}" height="{tall}" visibility="hidden"/>',
    ]
    every = max(1, math.ceil(14 / tall))
    parts += [text_at(LEFT - 6, TOP + (at + 0.5) * tall + 4, name, "end")
              for at, name in enumerate(rows) if at % every == 0]  # fmt: skip
    step = nice(width / max(2, min(8, width * cell / 60)))
    columns = range(0, width, max(1, round(step)))
    parts += [text_at(LEFT + (at + 0.5) * cell, bottom + 16, str(at)) for at in columns]
    parts += [text_at(LEFT + width * cell / 2, bottom + 36, x, css="name"), turned(16, TOP + height * tall / 2, y)]
    wide = max(right + RIGHT, LEFT + 260)
    if kinds:
        key, depth = _kinds_key(bottom + 52, wide, kinds)
    else:
        key, depth = _colour_key(bottom + 52, scale, low, high), 34.0
    return document(title, wide, bottom + 52 + depth, [*parts, *key])


def _colours(tint: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(rows, columns) between 0 and 1 → (rows, columns, 4) RGBA; what is no number is clear."""
    anchors = np.array([[int(text[i : i + 2], 16) for i in (0, 2, 4)] for text in SCALE], float)
    at = np.clip(np.nan_to_num(tint), 0, 1) * (len(SCALE) - 1)
    first = np.minimum(at.astype(int), len(SCALE) - 2)
    part = (at - first)[..., None]
    colours = anchors[first] * (1 - part) + anchors[first + 1] * part
    return np.concatenate([colours, 255.0 * ~np.isnan(tint)[..., None]], axis=-1).round().astype(np.uint8)


def _kinds(values: NDArray[np.float64], colours: Sequence[str]) -> NDArray[np.uint8]:
    """(rows, columns) of 0, 1, … → (rows, columns, 4) RGBA; what is no number is clear."""
    table = np.array([[int(text[i : i + 2], 16) for i in (0, 2, 4)] + [255] for text in colours] + [[0] * 4], np.uint8)
    found: NDArray[np.uint8] = table[np.where(np.isnan(values), len(colours), np.nan_to_num(values)).astype(int)]
    return found


def _png(pixels: NDArray[np.uint8]) -> str:
    """Encode (H, W, 4) RGBA as base64 of a PNG (ISO/IEC 15948), every line unfiltered."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def _kinds_key(y: float, wide: float, kinds: Mapping[str, str]) -> tuple[list[str], float]:
    places, depth = placed(list(kinds), 20, y, wide)
    return [
        f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="14" height="14" style="fill:#{colour}"/>'
        f"{text_at(x + 20, y + 11, name, 'start')}"
        for (name, colour), (x, y) in zip(kinds.items(), places, strict=True)
    ], depth


def _colour_key(y: float, scale: str, low: float, high: float) -> list[str]:
    ramp = _png(_colours(np.linspace(0, 1, 64)[None]))
    return [
        f'<image x="{LEFT}" y="{y}" width="160" height="12" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{ramp}"/>',
        f'<rect class="frame" x="{LEFT}" y="{y}" width="160" height="12"/>',
        text_at(LEFT, y + 28, f"{low:.2f}", "start"), text_at(LEFT + 160, y + 28, f"{high:.2f}", "end"),
        text_at(LEFT + 170, y + 11, scale, "start"),
    ]  # fmt: skip
