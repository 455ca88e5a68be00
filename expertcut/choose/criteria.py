"""One layer's statistics in, one score per expert out; a criterion is one registered function.

Invariant: scores are (E,) float64 and finite, higher means keep, and an expert that was never routed to scores 0 where
data decide. Ties are the selection's business (the lower id wins). Legend: E experts.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.calibrate.profile import LayerStats

Scores = NDArray[np.float64]
_F = TypeVar("_F", bound=Callable[[Any], Scores])


@dataclass(frozen=True, slots=True)
class PatternStats:
    """What is known of a layer without looking at it: enough for index patterns and random controls."""

    experts: int
    layer: int
    """Absolute layer number, counted on for a second set of experts; makes random draws of all sets independent."""
    seed: int


@dataclass(frozen=True, slots=True)
class WeightStats:
    """What a layer's weights say about its experts, without data."""

    router_norm: Scores
    """Euclidean norm of each expert's router row, (E,)."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """A registered criterion and where it comes from."""

    name: str
    paper: str | None
    """`arXiv:…` of the source, if it has one."""
    needs: tuple[str, ...]
    """Fields of the statistics that it reads; none for index patterns."""
    score: Callable[[Any], Scores]
    """`PatternStats`, `WeightStats` or `LayerStats` → (E,) float64, higher = keep."""

    @property
    def needs_weights(self) -> bool:
        """True if it reads a `WeightStats`."""
        return bool(self.needs) and set(self.needs) <= _WEIGHT_FIELDS

    @property
    def needs_profile(self) -> bool:
        """True if it reads a profile's `LayerStats`."""
        return not set(self.needs) <= _WEIGHT_FIELDS


_WEIGHT_FIELDS = {field.name for field in fields(WeightStats)}
_registry: dict[str, Criterion] = {}
CRITERIA = MappingProxyType(_registry)
"""Every criterion by name, in the order of this file."""


def criterion(name: str, *, paper: str | None = None, needs: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Register a function as the criterion `name`; `needs` names the statistics that it reads."""

    def register(function: _F) -> _F:
        assert name not in _registry, f"criterion {name} is registered twice"
        _registry[name] = Criterion(name, paper, needs, function)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    """Return the criterion called `name`.

    Raises:
        UsageError: there is none; the message lists all, the hint the closest.
    """
    if name not in CRITERIA:
        close = difflib.get_close_matches(name, CRITERIA, n=1)
        raise UsageError(
            f"unknown strategy {name!r}; known: {', '.join(CRITERIA)}", f"--strategy {close[0]}" if close else None
        )
    return CRITERIA[name]


def judging() -> tuple[str, ...]:
    """Return the names of the criteria that look at the model: all but patterns of ids and random draws."""
    return tuple(c.name for c in CRITERIA.values() if c.needs)


def without_profile() -> tuple[str, ...]:
    """Return the names of the criteria that need no profile."""
    return tuple(c.name for c in CRITERIA.values() if not c.needs_profile)


@criterion("random", paper="arXiv:2505.03531")
def random(stats: PatternStats) -> Scores:
    """Uniform draws in [0, 1), independent per layer, a fixed function of seed and layer number. (E,) float64."""
    label = f"expertcut.random/1 {stats.seed} {stats.layer}"
    bits = np.frombuffer(hashlib.shake_256(label.encode()).digest(8 * stats.experts), "<u8")
    return np.ldexp((bits >> np.uint64(11)).astype(np.float64), -53)


@criterion("odd", paper="arXiv:2505.03531")
def odd(stats: PatternStats) -> Scores:
    """Odd ids first, then even ones, each from the lowest. (E,) float64."""
    return (np.arange(stats.experts) % 2).astype(np.float64)


@criterion("even", paper="arXiv:2505.03531")
def even(stats: PatternStats) -> Scores:
    """Even ids first, then odd ones, each from the lowest. (E,) float64."""
    return 1.0 - odd(stats)


@criterion("first", paper="arXiv:2505.03531")
def first(stats: PatternStats) -> Scores:
    """The lowest ids (of each group, where the router has groups). (E,) float64."""
    return -last(stats)


@criterion("last", paper="arXiv:2505.03531")
def last(stats: PatternStats) -> Scores:
    """The highest ids (of each group, where the router has groups). (E,) float64."""
    return np.arange(stats.experts, dtype=np.float64)


@criterion("frequency", paper="arXiv:2404.05089", needs=("count",))
def frequency(stats: LayerStats) -> Scores:
    """Tokens routed to the expert. (E,) float64."""
    return stats.count


@criterion("soft", paper="arXiv:2404.05089", needs=("gate_sum",))
def soft(stats: LayerStats) -> Scores:
    """Sum of the gate weights. (E,) float64."""
    return stats.gate_sum


@criterion("gate-mean", paper="arXiv:2406.02500", needs=("gate_sum", "count"))
def gate_mean(stats: LayerStats) -> Scores:
    """Mean gate weight per routed token. (E,) float64; the source divides by all tokens."""
    return _mean(stats.gate_sum, stats.count)


@criterion("ean-sum", paper="arXiv:2510.13999", needs=("norm_sum",))
def ean_sum(stats: LayerStats) -> Scores:
    """Sum of the output norms. (E,) float64."""
    return stats.norm_sum


@criterion("ean-mean", paper="arXiv:2510.13999", needs=("norm_sum", "count"))
def ean_mean(stats: LayerStats) -> Scores:
    """Mean output norm per routed token. (E,) float64."""
    return _mean(stats.norm_sum, stats.count)


@criterion("reap", paper="arXiv:2510.13999", needs=("gated_norm_sum", "count"))
def reap(stats: LayerStats) -> Scores:
    """Mean gate-weighted output norm per routed token. (E,) float64."""
    return _mean(stats.gated_norm_sum, stats.count)


@criterion("gated-norm-sum", paper="arXiv:2510.13999", needs=("gated_norm_sum",))
def gated_norm_sum(stats: LayerStats) -> Scores:
    """Sum of the gate-weighted output norms, the numerator of reap. (E,) float64."""
    return stats.gated_norm_sum


@criterion("energy", paper="arXiv:2606.15716", needs=("gated_norm_sq_sum",))
def energy(stats: LayerStats) -> Scores:
    """Sum of the squared gate-weighted output norms. (E,) float64."""
    return stats.gated_norm_sq_sum


@criterion("router-norm", needs=("router_norm",))
def router_norm(stats: WeightStats) -> Scores:
    """Norm of the expert's router row. (E,) float64; the magnitude pruner of compressed-tensors."""
    return stats.router_norm


def _mean(total: Scores, count: Scores) -> Scores:
    """total / count, 0 where nothing was counted. Domain weights make counts fractional, so no `maximum(count, 1)`."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)
