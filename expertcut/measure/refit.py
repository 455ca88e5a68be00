"""Linear maps and what they should add to in; changes of their weights out, by ridge regression, map after map.

For inputs A (n, I) of a map, already times gate and factor, and what is left R (n, H) of the residual at its tokens,

    ΔW = argmin ‖R − A ΔWᵀ‖² + μ ‖ΔW‖²,  μ = ridge · mean diagonal of AᵀA,

taken on what the other maps leave, in a few rounds: block coordinate descent on all of them. Sums and solutions are
float32 on the residual's device. Memory: the residual, all maps' inputs, a factor (I, I) of each map between rounds,
and of one map at a time copies of CHUNK tokens.

Shapes: T tokens, n those of a map, H hidden, I width of a map's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

CHUNK = 16384
"""Tokens of a map that are taken at a time."""
LEAST = 16
"""A map that sees fewer tokens is left alone."""
TRIED = 4
"""Maps of a layer, the busiest, that its ridge is chosen by."""


@dataclass
class Linear:
    """A linear map whose weight may change."""

    rows_n: torch.Tensor
    """(n,) int64: which tokens it sees."""
    given_nI: torch.Tensor
    """(n, I): what it is given there, times all that its output is."""
    change: torch.Tensor | None = None
    """ΔW found so far, (H, I) float32."""


def adopt(linear: Linear, change_HI: torch.Tensor, left_TH: torch.Tensor) -> None:
    """Let a map's change be another one, such as a rounded one, and `left_TH` what is left with it, in place."""
    assert linear.change is not None
    step_IH = (change_HI - linear.change).T
    linear.change = change_HI
    _take(linear, step_IH, left_TH)


def refit(maps: Sequence[Linear], left_TH: torch.Tensor, ridge: float, rounds: int) -> None:
    """Change maps so that they add what is left, and take what they add from `left_TH`, (T, H) float32, in place."""
    busy = [linear for linear in maps if len(linear.rows_n) >= LEAST]
    factors: list[tuple[torch.Tensor, float] | None] = []
    for at in range(rounds):
        for i, linear in enumerate(busy):
            if at == 0:
                factors.append(_factor(_gram(linear.given_nI), ridge))
            if (found := factors[i]) is not None:
                _improve(linear, left_TH, *found)


def best_ridge(
    maps: Sequence[Linear], left_TH: torch.Tensor, held_T: torch.Tensor, ridges: Sequence[float]
) -> tuple[float | None, float]:
    """Choose the ridge by what one round leaves on held-back tokens, each of the busiest maps by itself.

    `held_T` is bool. Also returns the share of their held-back squares that the best ridge takes away; None if no ridge
    takes any.
    """
    taken = torch.zeros(len(ridges), dtype=torch.float64)
    whole = 0.0
    for linear in sorted(maps, key=lambda linear: -len(linear.rows_n))[:TRIED]:
        held = held_T[linear.rows_n]
        fit, test = (Linear(linear.rows_n[some], linear.given_nI[some]) for some in (~held, held))
        if min(len(fit.rows_n), len(test.rows_n)) < LEAST:
            continue
        gram, cross = _gram(fit.given_nI), _cross(fit, left_TH)
        test_gram, test_cross = _gram(test.given_nI), _cross(test, left_TH)
        whole += left_TH[test.rows_n].square().sum().item()
        for i, ridge in enumerate(ridges):
            if (found := _factor(gram, ridge)) is not None:
                step = torch.cholesky_solve(cross, found[0])
                taken[i] += 2 * (test_cross * step).sum().item() - ((test_gram @ step) * step).sum().item()
    best = int(taken.argmax())
    return (ridges[best], float(taken[best]) / whole) if taken[best] > 0 else (None, 0.0)


def _improve(linear: Linear, left_TH: torch.Tensor, factor: torch.Tensor, mu: float) -> None:
    cross = _cross(linear, left_TH)
    if linear.change is not None:
        cross.addcmul_(linear.change.T, cross.new_tensor(-mu))
    step_IH = torch.cholesky_solve(cross, factor)
    linear.change = step_IH.T if linear.change is None else linear.change + step_IH.T
    _take(linear, step_IH, left_TH)


def _take(linear: Linear, step_IH: torch.Tensor, left_TH: torch.Tensor) -> None:
    """Take what a step of a map's weight adds from what is left."""
    for rows, given in _chunks(linear):
        left_TH.index_add_(0, rows, given @ step_IH, alpha=-1)  # a token that skips may be there twice


def _factor(gram_II: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float] | None:
    """The Cholesky factor of a Gram matrix with its ridge, and μ; None where inputs are all 0."""
    mu = float(gram_II.diagonal().mean()) * ridge
    factor, failed = torch.linalg.cholesky_ex(gram_II + mu * torch.eye(len(gram_II), device=gram_II.device))
    return None if failed or not mu > 0 else (factor, mu)


def _gram(given_nI: torch.Tensor) -> torch.Tensor:
    """(I, I) float32: AᵀA."""
    gram = torch.zeros(given_nI.shape[1], given_nI.shape[1], device=given_nI.device)
    for some in torch.split(given_nI, CHUNK):
        wide = some.float()
        gram.addmm_(wide.T, wide)
    return gram


def _cross(linear: Linear, left_TH: torch.Tensor) -> torch.Tensor:
    """(I, H) float32: AᵀR."""
    cross = left_TH.new_zeros(linear.given_nI.shape[1], left_TH.shape[1])
    for rows, given in _chunks(linear):
        cross.addmm_(given.T, left_TH[rows])
    return cross


def _chunks(linear: Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the rows of some tokens, and what is given there in float32."""
    for rows, given in zip(torch.split(linear.rows_n, CHUNK), torch.split(linear.given_nI, CHUNK), strict=True):
        yield rows, given.float()
