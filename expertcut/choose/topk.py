"""How many experts a token activates in each layer: schedules and budgets in, one top-k per MoE layer out.

Legend: L MoE layers, K the model's own top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from expertcut.errors import UsageError

FORM = "expected four numbers b,h,e,p: top-k of the first layer, of layer p, of the last layer, and p"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Top-k that is linear in the layer number between three points (arXiv:2505.03531)."""

    first: int
    """Top-k of the first decoder layer."""
    middle: int
    """Top-k of decoder layer `place`."""
    last: int
    """Top-k of the last decoder layer."""
    place: int
    """Number of a decoder layer; the first is 1, dense layers count."""

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Parse `b,h,e,p`.

        Raises:
            UsageError: not four whole numbers of 1 or more.
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 4 or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            raise UsageError(f"--top-k-schedule {text}: {FORM}", "for example 6,8,8,61")
        return cls(*map(int, parts))

    def over(self, layers: Sequence[int], num_layers: int, top_k: int) -> tuple[int, ...]:
        """Return the top-k of the MoE layers with these absolute numbers (from 0), halves rounded up.

        Raises:
            UsageError: a point lies above the model's `top_k`, or `place` behind its last layer.
        """
        most = max(self.first, self.middle, self.last)
        if most > top_k:
            raise UsageError(f"--top-k-schedule: asks for top-{most}, the model activates {top_k}")
        if self.place > num_layers:
            raise UsageError(f"--top-k-schedule: layer {self.place}, but the model has layers 1 to {num_layers}")
        points = {1: self.first, num_layers: self.last} | {self.place: self.middle}
        places = sorted(points)
        wanted = np.interp([layer + 1 for layer in layers], places, [points[place] for place in places])
        return tuple(floor(k + 0.5) for k in wanted.tolist())


def allocate(error_LK: NDArray[np.float64], total: int, least: int = 1) -> tuple[int, ...]:
    """Return the top-k of every layer that loses least, at most `total` experts together: an exact knapsack.

    `error_LK[l, k-1]` is what layer l loses with a top-k of k. Layers get `least` to K experts. Of equal losses the one
    that activates fewer experts is taken, then the one that gives more to earlier layers. Time and memory O(L·K·total).

    Raises:
        UsageError: `total` is less than L·least.
    """
    layers, most = error_LK.shape
    if total < layers * least:
        raise UsageError(f"a top-k of {total} experts in {layers} layers together, expected at least {layers * least}")
    spare, steps = min(total - layers * least, layers * (most - least)), most - least
    best_S = np.zeros(spare + 1)  # least loss of the layers behind with exactly s experts beyond `least` each
    best_S[1:] = np.inf
    choice_LS = np.zeros((layers, spare + 1), np.int64)
    for layer in range(layers - 1, -1, -1):
        options = np.full((steps + 1, spare + 1), np.inf)
        for extra in range(min(steps, spare) + 1):
            options[extra, extra:] = best_S[: spare + 1 - extra] + error_LK[layer, least - 1 + extra]
        choice_LS[layer] = steps - options[::-1].argmin(axis=0)  # of equal ones the largest
        best_S = options.min(axis=0)
    left = int(best_S.argmin())
    found = []
    for layer in range(layers):
        extra = int(choice_LS[layer, left])
        found.append(least + extra)
        left -= extra
    return tuple(found)
