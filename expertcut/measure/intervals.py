"""Sums over sequences in, a ratio and its interval out: a bootstrap over whole sequences. numpy only.

Every quantity is drawn with the same sequences, so a difference of two candidates is judged on what both were given.
Invariant: the same sums give the same interval, to the last bit of a matrix product.

Shapes: S sequences, R draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Share of such intervals that hold the true value, if sequences are drawn independently."""
DRAWS = 10_000
LEAST = 5
"""Sequences that an interval needs: with fewer, resampling says next to nothing about the spread."""
_FEW = (12.7062, 4.3027, 3.1824)
"""Upper quantiles of Student's t for one to three degrees of freedom, at `LEVEL`; `_student` has the others."""
_SEED = 0
_BLOCK = 1 << 20
_NORMAL = NormalDist()

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A quantity per token, and between which values it lies; None where the sequences are too few to tell."""

    value: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 if the interval lies above 0, -1 if below; 0 if it holds 0 or there is none."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)

    @property
    def shown(self) -> str:
        """A change in words: with its sign, and the interval if there is one."""
        return f"{self.value:+.4f}" + ("" if self.low is None else f" ({self.low:+.4f} to {self.high:+.4f})")

    def map(self, rising: Callable[[float], float]) -> Estimate:
        """Return the estimate of a rising function of the quantity."""
        low, high = (None if end is None else rising(end) for end in (self.low, self.high))
        return Estimate(rising(self.value), low, high)


def ratio(sums: Floats, weights: Floats) -> Estimate:
    """Estimate Σ sums / Σ weights, both (S,) per sequence, all weights above 0.

    The interval is the bootstrap's expanded percentile interval (arXiv:1411.5279): quantiles of the ratio over `DRAWS`
    draws of S sequences with replacement, taken a little further out than the level says, because few sequences
    underestimate their own spread. It covers the choice of sequences and nothing else. None below `LEAST` sequences.
    """
    value = float(sums.sum() / weights.sum())
    if len(sums) < LEAST:
        return Estimate(value, None, None)
    if not np.isfinite(sums).all():
        return Estimate(value, np.nan, np.nan)
    drawn = _drawn_sums(np.stack((sums, weights)))
    low, high = np.quantile(drawn[0] / drawn[1], _tails(len(sums)))
    return Estimate(value, float(low), float(high))


def _drawn_sums(sums: Floats) -> Floats:
    """Sums (2, S) over every draw, (2, R)."""
    size, step = sums.shape[1], max(1, _BLOCK // sums.shape[1])
    counts = _counts(size)
    return np.concatenate(
        [sums @ counts[start : start + step].T.astype(np.float64) for start in range(0, DRAWS, step)], axis=1
    )


@lru_cache(maxsize=16)
def _counts(size: int) -> NDArray[np.uint8]:
    """How often each sequence is in each draw, (R, S)."""
    random, step = np.random.default_rng(_SEED), max(1, _BLOCK // size)
    parts = []
    for start in range(0, DRAWS, step):
        rows = min(step, DRAWS - start)
        drawn = random.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.uint8))
    return np.concatenate(parts)


def _tails(size: int) -> tuple[float, float]:
    """Shares below which the interval of so many sequences begins and ends."""
    below = _NORMAL.cdf(-((size / (size - 1)) ** 0.5) * _student(size - 1))
    return below, 1 - below


def _student(freedom: int) -> float:
    """Upper quantile of Student's t, within 1 % from 4 degrees of freedom on (Abramowitz and Stegun, 26.7.5)."""
    z, v = _NORMAL.inv_cdf((1 + LEVEL) / 2), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def geometric(ratios: Floats) -> Estimate:
    """Estimate the ratio that paired ratios (R,), all above 0, scatter around: their geometric mean.

    The interval is Student's t of their logarithms, which a few repetitions suffice for; None if there is but one.
    """
    logs, count = np.log(ratios), len(ratios)
    centre = float(logs.mean())
    if count < 2:
        return Estimate(float(np.exp(centre)), None, None)
    quantile = _FEW[count - 2] if count - 2 < len(_FEW) else _student(count - 1)
    half = quantile * float(logs.std(ddof=1)) / count**0.5
    return Estimate(*(float(np.exp(end)) for end in (centre, centre - half, centre + half)))
