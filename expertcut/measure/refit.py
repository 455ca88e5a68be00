"""Linear maps and what they should add to in; changes of their weights out, by ridge regression, map after map.

For inputs A (n, I) of a map, already times gate and factor, and what is left R (n, H) of the residual at its tokens,

    ΔW = argmin ‖R − A ΔWᵀ‖² + μ ‖ΔW‖²,  μ = ridge · mean diagonal of AᵀA,

taken on what the other maps leave, in a few rounds: block coordinate descent on all of them. Sums and solutions are
float32 on the residual's device. Memory: the residual, and of one map at a time AᵀA, AᵀR and inputs of CHUNK tokens.

Shapes: T tokens, n those of a map, H hidden, I width of a map's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

CHUNK = 16384
"""Tokens whose inputs are in memory at a time."""
LEAST = 16
"""A map that sees fewer tokens is left alone."""
TRIED = 8
"""Maps of a layer, the busiest, that its ridge is chosen by."""


@dataclass
class Linear:
    """A linear map whose weight may change."""

    rows_n: torch.Tensor
    """(n,) int64: which tokens it sees."""
    inputs: Callable[[torch.Tensor], torch.Tensor]
    """Places in `rows_n`, (m,) → what the map is given there, (m, I) float32, times all that its output is."""
    change: torch.Tensor | None = field(default=None)
    """ΔW found so far, (H, I) float32."""


def refit(maps: Sequence[Linear], left_TH: torch.Tensor, ridge: float, rounds: int) -> None:
    """Change maps so that they add what is left, and take what they add from `left_TH`, (T, H) float32, in place."""
    for _ in range(rounds):
        for linear in maps:
            if len(linear.rows_n) >= LEAST:
                _improve(linear, left_TH, ridge)


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
        fit, test = _sums(linear, left_TH, ~held), _sums(linear, left_TH, held)
        if min(fit.count, test.count) < LEAST:
            continue
        whole += test.square
        for i, ridge in enumerate(ridges):
            change = _solved(fit, ridge, None)
            taken[i] += 2 * (test.cross * change.T).sum().double() - ((change @ test.gram) * change).sum().double()
    best = int(taken.argmax())
    return (ridges[best], float(taken[best]) / whole) if taken[best] > 0 else (None, 0.0)


@dataclass
class _Sums:
    gram: torch.Tensor
    """(I, I): AᵀA."""
    cross: torch.Tensor
    """(I, H): AᵀR."""
    count: int
    square: float
    """‖R‖²."""


def _sums(linear: Linear, left_TH: torch.Tensor, chosen_n: torch.Tensor | None) -> _Sums:
    gram = cross = None
    square = torch.zeros((), dtype=torch.float64)
    places = torch.arange(len(linear.rows_n), device=left_TH.device)
    places = places if chosen_n is None else places[chosen_n]
    for some in _chunks(places):
        a, r = linear.inputs(some), left_TH[linear.rows_n[some]]
        gram = a.T @ a if gram is None else gram.addmm_(a.T, a)
        cross = a.T @ r if cross is None else cross.addmm_(a.T, r)
        square += r.square().sum().double().cpu()
    if gram is None or cross is None:
        gram = cross = left_TH.new_zeros(0, 0)
    return _Sums(gram, cross, len(places), float(square))


def _improve(linear: Linear, left_TH: torch.Tensor, ridge: float) -> None:
    step = _solved(_sums(linear, left_TH, None), ridge, linear.change)
    linear.change = step if linear.change is None else linear.change + step
    for some in _chunks(torch.arange(len(linear.rows_n), device=left_TH.device)):
        left_TH.index_add_(0, linear.rows_n[some], linear.inputs(some) @ step.T, alpha=-1)


def _solved(sums: _Sums, ridge: float, before: torch.Tensor | None) -> torch.Tensor:
    """ΔW, (H, I), or by how much one found `before` is to change."""
    gram, cross = sums.gram.clone(), sums.cross
    mu = gram.diagonal().mean() * ridge
    if before is not None:
        cross = cross - mu * before.T
    gram.diagonal().add_(mu)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or not bool(mu > 0):  # inputs that are all 0
        return torch.zeros_like(cross).T
    return torch.cholesky_solve(cross, factor).T


def _chunks(places: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(places, CHUNK) if len(places) else ()
