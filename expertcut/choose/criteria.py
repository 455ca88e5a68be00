"""One layer's statistics in, what its experts are worth out; a criterion is one registered function.

It returns scores, (E,): higher means keep, and an expert that was never routed to scores 0 where data decide. Or
losses, (E, E), where experts count together: entry (i, j) is what dropping both costs, the diagonal what dropping one
does, and the set goes whose entries sum to the least. Or, where the model itself is asked, a function that tells what
dropping whole sets costs. Invariant: float64 and finite. Ties are the selection's business
(the lower id wins). Legend: E experts.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.calibrate.stats import LayerStats
    from expertcut.choose.weights import WeightStats

Scores = NDArray[np.float64]


class SetLosses(Protocol):
    """Tells what dropping whole sets of experts costs."""

    def __len__(self) -> int:
        """Return E."""

    def __call__(self, gone_SE: NDArray[np.bool_]) -> Scores:
        """Sets to drop, one a row → what each costs, (S,), finite. As many go from every group, in all rows."""


Found = Scores | SetLosses
_F = TypeVar("_F", bound=Callable[[Any], Scores])


@dataclass(frozen=True, slots=True)
class PatternStats:
    """What is known of a layer without looking at it: enough for index patterns and random controls."""

    experts: int
    layer: int
    """Absolute layer number, counted on for a second set of experts; makes random draws of all sets independent."""
    seed: int


@dataclass(frozen=True, slots=True)
class Criterion:
    """A registered criterion and where it comes from."""

    name: str
    paper: str | None
    """`arXiv:…` of the source, if it has one."""
    needs: tuple[str, ...]
    """Fields of the statistics that it reads; none for index patterns."""
    score: Callable[[Any], Any]
    """`PatternStats`, `WeightStats` or `LayerStats` → (E,) scores or (E, E) losses; `SetLosses` as they are."""

    @property
    def needs_weights(self) -> bool:
        """True if it reads a `WeightStats`."""
        return bool(self.needs) and set(self.needs) <= OF_WEIGHTS

    @property
    def needs_profile(self) -> bool:
        """True if it reads a profile's `LayerStats`."""
        return not self.needs_replay and not set(self.needs) <= OF_WEIGHTS

    @property
    def needs_replay(self) -> bool:
        """True if it asks the model itself, layer by layer: see `expertcut.measure.replay`."""
        return self.needs == REPLAY


OF_WEIGHTS = {"router_norm", "weight_mean", "weight_rms"}
"""What a `WeightStats` has."""
REPLAY = ("replay",)
"""What is asked of the model itself: a `SetLosses`."""
FAMILY = "unified:A,B[,sum]"
"""How strategies are written that are a family of criteria; see `unified`."""
_SUMS = {
    (0, 0): "count", (1, 0): "gate_sum", (2, 0): "gate_sq_sum", (0, 1): "norm_sum", (0, 2): "norm_sq_sum",
    (1, 1): "gated_norm_sum", (1, 2): "gate_norm_sq_sum", (2, 1): "gate_sq_norm_sum", (2, 2): "gated_norm_sq_sum",
}  # fmt: skip
"""Exponents of gate weight and output norm → the sum that profiles hold."""
_UNIFIED = "arXiv:2606.15716"
_registry: dict[str, Criterion] = {}
CRITERIA = MappingProxyType(_registry)
"""Every criterion by name, in the order of this file, but those that ask the model itself."""
NAEE = Criterion("naee", "arXiv:2402.14800", REPLAY, lambda replay: replay)
"""How much the layer's routed output changes when a set is dropped and its tokens are rerouted."""


def criterion(name: str, *, paper: str | None = None, needs: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Register a function as the criterion `name`; `needs` names the statistics that it reads."""

    def register(function: _F) -> _F:
        assert name not in _registry, f"criterion {name} is registered twice"
        _registry[name] = Criterion(name, paper, needs, function)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    """Return the criterion called `name`, or the one of the family `unified` that is written so.

    Raises:
        UsageError: there is none; the message lists all, the hint the closest.
    """
    if name.partition(":")[0] == "unified":
        return unified(name)
    if name == NAEE.name:
        return NAEE
    if name not in CRITERIA:
        close = difflib.get_close_matches(name, [*CRITERIA, NAEE.name], n=1)
        raise UsageError(
            f"unknown strategy {name!r}; known: {', '.join(CRITERIA)}, {NAEE.name}, {FAMILY}",
            f"--strategy {close[0]}" if close else None,
        )
    return CRITERIA[name]


def judging() -> tuple[str, ...]:
    """Return the names of the criteria that look at the model: all but patterns of ids and random draws."""
    return tuple(c.name for c in CRITERIA.values() if c.needs)


def without_profile() -> tuple[str, ...]:
    """Return the names of the criteria that need no profile."""
    return tuple(c.name for c in CRITERIA.values() if not c.needs_profile)


def unified(name: str) -> Criterion:
    """Return the criterion `unified:A,B[,mean|sum]`: Σ g^A ‖f‖^B over the routed tokens, by default divided by them.

    The family of arXiv:2606.15716. A and B are 0, 1 or 2: the exponents whose sums profiles hold.

    Raises:
        UsageError: written otherwise.
    """
    match = re.fullmatch(r"unified:([012]),([012])(,mean|,sum)?", name, re.ASCII)
    if match is None:
        raise UsageError(
            f"--strategy {name}: expected unified:A,B with exponents 0, 1 or 2 of gate weight and output norm, and "
            "mean (as without it) or sum behind them",
            "for example --strategy unified:1,2,sum",
        )
    total = _SUMS[int(match[1]), int(match[2])]
    if match[3] == ",sum":
        return Criterion(name, _UNIFIED, (total,), lambda stats: getattr(stats, total))
    return Criterion(name, _UNIFIED, (total, "count"), lambda stats: _mean(getattr(stats, total), stats.count))


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


@criterion("man", paper=_UNIFIED, needs=("norm_sum", "count"))
def man(stats: LayerStats) -> Scores:
    """Mean output norm per routed token, the name that the unified family gives ean-mean. (E,) float64."""
    return ean_mean(stats)


@criterion("msan", paper=_UNIFIED, needs=("norm_sq_sum", "count"))
def msan(stats: LayerStats) -> Scores:
    """Mean squared output norm per routed token. (E,) float64."""
    return _mean(stats.norm_sq_sum, stats.count)


@criterion("energy", paper=_UNIFIED, needs=("gated_norm_sq_sum",))
def energy(stats: LayerStats) -> Scores:
    """Sum of the squared gate-weighted output norms. (E,) float64."""
    return stats.gated_norm_sq_sum


@criterion("easy-ep", paper="arXiv:2504.06792", needs=("contribution_sum",))
def easy_ep(stats: LayerStats) -> Scores:
    """Sum of the gate-weighted output norms, each times how far the token's residual stream turned. (E,) float64."""
    return stats.contribution_sum


@criterion("mone", paper="arXiv:2507.00390", needs=("out_sum", "out_sq_sum_h", "count", "gate_sum"))
def mone(stats: LayerStats) -> Scores:
    """Norm of the outputs' standard deviation, times the sum of the gate weights. (E,) float64.

    The deviation is elementwise, over the routed tokens. The source divides it by one token less, and the sum by all
    tokens of the layer, which ranks alike.
    """
    squared_mean_E = (_mean(stats.out_sum.T, stats.count) ** 2).sum(axis=0)
    variance_E = _mean(stats.out_sq_sum_h.sum(axis=1), stats.count) - squared_mean_E
    scores: Scores = np.sqrt(np.maximum(variance_E, 0)) * stats.gate_sum
    return scores


@criterion("hope", paper="arXiv:2609.18916", needs=("coenergy",))
def hope(stats: LayerStats) -> Scores:
    """What dropping experts together loses at most: Σ a_i a_j over tokens, a = g‖f‖. (E, E) float64."""
    return stats.coenergy


@criterion("gram", needs=("gram",))
def gram(stats: LayerStats) -> Scores:
    """What dropping experts together changes before rerouting: Σ g_i g_j ⟨f_i, f_j⟩ over tokens. (E, E) float64."""
    return stats.gram


@criterion("router-norm", needs=("router_norm",))
def router_norm(stats: WeightStats) -> Scores:
    """Norm of the expert's router row. (E,) float64; the magnitude pruner of compressed-tensors."""
    return stats.router_norm


@criterion("aimer", paper="arXiv:2603.18492", needs=("weight_mean", "weight_rms"))
def aimer(stats: WeightStats) -> Scores:
    """Mean magnitude of the expert's weights over their root mean square, negative. (E,) float64.

    The more alike its weights are in magnitude, the sooner an expert goes; one of zeros goes first.
    """
    mean, rms = stats.weight_mean, stats.weight_rms
    return -np.divide(mean, rms, out=np.ones_like(mean), where=rms > 0)


def _mean(total: Scores, count: Scores) -> Scores:
    """total / count, 0 where nothing was counted. Domain weights make counts fractional, so no `maximum(count, 1)`."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)
