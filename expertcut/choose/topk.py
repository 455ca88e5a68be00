"""How many experts a token activates in each layer: schedules and budgets in, one top-k per MoE layer out.

Legend: L MoE layers, K the model's own top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expertcut.choose.plan import Plan, numbers
from expertcut.errors import UsageError
from expertcut.model import Geometry

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile
    from expertcut.calibrate.stats import LayerStats

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

    def __str__(self) -> str:
        return f"--top-k-schedule {self.first},{self.middle},{self.last},{self.place}"

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


@dataclass(frozen=True, slots=True)
class MeanTopK:
    """A top-k of so many experts on average over the layers, distributed by what each layer loses."""

    mean: float

    def __str__(self) -> str:
        return f"--mean-top-k {self.mean:g}"


TopK = int | Schedule | MeanTopK


def layer_top_k(
    wanted: TopK | None, geometry: Geometry, profile: Profile | None, domain_weights: Mapping[str, float] | None
) -> dict[str, int]:
    """Return the top-k of every MoE block of the trunk, by prefix.

    Raises:
        UsageError: out of range, or an average without a profile.
        ProfileError: a layer was not profiled.
    """
    trunk, most = geometry.trunk, geometry.top_k
    if isinstance(wanted, Schedule):
        found: Sequence[int] = wanted.over([block.layer for block in trunk], geometry.num_layers, most)
    elif isinstance(wanted, MeanTopK):
        if not (isfinite(wanted.mean) and 1 <= wanted.mean <= most):
            raise UsageError(f"{wanted}: expected 1 to {most}, which the model activates")
        if profile is None:
            raise UsageError(f"{wanted} needs --profile", "expertcut profile MODEL -o PROFILE")
        losses = np.stack([top_k_loss(profile.layer(block.prefix, domain_weights)) for block in trunk])
        found = allocate(losses, floor(wanted.mean * len(trunk) + 1e-9))
    else:
        if wanted is not None and wanted < 1:
            raise UsageError(f"--top-k {wanted}: expected 1 or more")
        found = [wanted or most] * len(trunk)
    return {block.prefix: k for block, k in zip(trunk, found, strict=True)}


def mean_top_k(plan: Plan, geometry: Geometry) -> float:
    """Return the experts activated per token and MoE layer of the trunk, on average."""
    found = numbers(plan, geometry).top_k
    return sum(found[block.layer] for block in geometry.trunk) / len(geometry.trunk)


def top_k_loss(stats: LayerStats) -> NDArray[np.float64]:
    """Return what a layer loses with a top-k of 1 … K, (K,): mean squared error of its output over its mean norm.

    Between the absolute error, which favours late layers of large outputs, and the relative one, which favours early
    ones whose outputs matter little: on trained models it ranks layers as the measured loss of each alone does.
    """
    tokens, energy = stats.tokens or 1.0, stats.out_sq or 1.0
    found: NDArray[np.float64] = stats.topk_error / np.sqrt(tokens * energy)
    return found


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
