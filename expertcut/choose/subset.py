"""Losses of dropping experts together in, the set that goes out. numpy only. Legend: E experts.

The loss of a set is the sum of a symmetric matrix over all its pairs, the diagonal included: pᵀMp for its indicator p.
As many go from every group of the router. Finding the least is a quadratic programme in zeros and ones: if there are
few sets all are tried, else several starts are improved by exchanges. Invariant: the same matrix gives the same set,
and no exchange of two experts of a group would make it better.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_SETS = 20_000
"""Up to so many sets all are tried."""
STEPS = 200
"""Of the continuous relaxation; more move no expert across the rounding."""
ROUNDING = 1e-12
"""An exchange must gain more than this share of the trace."""


def least_loss(loss_EE: Floats, drop: int, may_go_E: Mask, n_group: int = 1) -> Mask:
    """Return which experts go, (E,): `drop` of every group, all of them from `may_go_E`, at the least loss together.

    Exact where at most `MAX_SETS` sets come into question. Else the best of three starts, each improved by exchanges:
    experts dropped one by one, or taken back one by one, whichever costs least; and the largest shares of the
    continuous relaxation. Of equal losses the higher ids go.
    """
    loss = _Loss(loss_EE[::-1, ::-1], drop, may_go_E[::-1], n_group)  # the first of equals is that of the highest id
    if loss.sets <= MAX_SETS:
        return loss.best(loss.every_set())[::-1]
    starts = (loss.dropped_one_by_one(), loss.taken_back_one_by_one(), loss.relaxed())
    return loss.best(np.stack([loss.improved(gone_E) for gone_E in starts]))[::-1]


def count_sets(groups: Sequence[NDArray[np.intp]], drop: int) -> float:
    """Return the number of sets of `drop` experts of every group."""
    return float(np.prod([float(comb(ids.size, drop)) for ids in groups]))


def every_set(groups: Sequence[NDArray[np.intp]], drop: int, size: int) -> Mask:
    """Return every set of `drop` experts of every group, of `size` experts in all: (S, E), one a row."""
    gone_SE = np.zeros((int(count_sets(groups, drop)), size), np.bool_)
    for row, chosen in zip(gone_SE, product(*(combinations(ids.tolist(), drop) for ids in groups)), strict=True):
        row[[expert for ids in chosen for expert in ids]] = True
    return gone_SE


class _Loss:
    """One problem; ids run backwards here."""

    def __init__(self, loss_EE: Floats, drop: int, may_go_E: Mask, n_group: int) -> None:
        self.loss_EE, self.drop, self.may_go_E = loss_EE, drop, may_go_E
        self.group_E = np.arange(may_go_E.size) // (may_go_E.size // n_group)
        self.groups = [np.flatnonzero(may_go_E & (self.group_E == group)) for group in range(n_group)]
        self.sets = count_sets(self.groups, drop)

    def best(self, gone_SE: Mask) -> Mask:
        """The first set of the least loss."""
        gone = gone_SE.astype(np.float64)
        best: Mask = gone_SE[((gone @ self.loss_EE) * gone).sum(axis=1).argmin()]
        return best

    def every_set(self) -> Mask:
        return every_set(self.groups, self.drop, self.may_go_E.size)

    def dropped_one_by_one(self) -> Mask:
        gone_E, diagonal_E = np.zeros(self.may_go_E.size, np.bool_), self.loss_EE.diagonal()
        pull_E = np.zeros(gone_E.size)  # Σ over those gone
        for _ in range(self.drop * len(self.groups)):
            room_E = self._gone_by_group(gone_E) < self.drop
            cost_E = np.where(self.may_go_E & ~gone_E & room_E, diagonal_E + 2 * pull_E, np.inf)
            gone_E[cost_E.argmin()] = True
            pull_E += self.loss_EE[cost_E.argmin()]
        return gone_E

    def taken_back_one_by_one(self) -> Mask:
        gone_E, diagonal_E = self.may_go_E.copy(), self.loss_EE.diagonal()
        pull_E = self.loss_EE[gone_E].sum(axis=0)
        while (self._gone_by_group(gone_E) > self.drop).any():
            gain_E = np.where(gone_E & (self._gone_by_group(gone_E) > self.drop), 2 * pull_E - diagonal_E, -np.inf)
            back = gain_E.size - 1 - int(gain_E[::-1].argmax())  # the last of equals: the lowest id stays
            gone_E[back] = False
            pull_E -= self.loss_EE[back]
        return gone_E

    def relaxed(self) -> Mask:
        """Shares between 0 and 1 instead of zeros and ones, by Frank and Wolfe's steps, then the largest ones."""
        share_E = np.zeros(self.may_go_E.size)
        for ids in self.groups:
            share_E[ids] = self.drop / max(ids.size, 1)
        slope_E = self.loss_EE @ share_E
        for _ in range(STEPS):
            way_E = self._lowest(slope_E) - share_E
            curve_E = self.loss_EE @ way_E
            fall, bend = -float(slope_E @ way_E), float(curve_E @ way_E)
            if fall <= ROUNDING * abs(float(slope_E @ share_E)):
                break
            step = min(1.0, fall / bend) if bend > 0 else 1.0
            share_E, slope_E = share_E + step * way_E, slope_E + step * curve_E
        return self._lowest(-share_E)

    def improved(self, gone_E: Mask) -> Mask:
        """Exchange the two experts of a group that it helps most, until it helps no more."""
        gone_E, diagonal_E = gone_E.copy(), self.loss_EE.diagonal()
        least = ROUNDING * float(np.abs(diagonal_E).sum())
        pull_E = self.loss_EE[gone_E].sum(axis=0)
        while True:
            out, into = np.flatnonzero(gone_E), np.flatnonzero(self.may_go_E & ~gone_E)
            change = (diagonal_E - 2 * pull_E)[out, None] + (diagonal_E + 2 * pull_E)[into]
            change -= 2 * self.loss_EE[np.ix_(out, into)]
            change[self.group_E[out, None] != self.group_E[into]] = np.inf
            if not change.size or change.min() >= -least:
                return gone_E
            i, j = np.unravel_index(change.argmin(), change.shape)
            gone_E[out[i]], gone_E[into[j]] = False, True
            pull_E += self.loss_EE[into[j]] - self.loss_EE[out[i]]

    def _gone_by_group(self, gone_E: Mask) -> NDArray[np.intp]:
        """(E,) how many of the expert's group are gone."""
        return np.bincount(self.group_E, gone_E).astype(np.intp)[self.group_E]

    def _lowest(self, value_E: Floats) -> Mask:
        """As many of each group as go, those of the lowest values."""
        lowest_E = np.zeros(value_E.size, np.bool_)
        for ids in self.groups:
            lowest_E[ids[np.argsort(value_E[ids], kind="stable")[: self.drop]]] = True
        return lowest_E
