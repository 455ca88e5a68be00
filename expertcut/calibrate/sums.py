"""Accumulators of one MoE block: what the observer saw of a micro-batch in, float64 sums on the device out.

Shapes: T tokens, K top-k, E experts, D domains, P = D or 1 (pair matrices), H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expertcut.calibrate.profile import CONTRIBUTION, MAXIMA_E, MIXED_E, PAIRS, SUMS_E, SUMS_K


@dataclass
class Routed:
    """What one forward pass of a block revealed, valid tokens only, the K choices in rank order."""

    expert_TK: torch.Tensor
    """int64, the routed experts, best choice first."""
    gate_TK: torch.Tensor
    """float64, the weight that the model multiplies the expert's output by."""
    gram_TKK: torch.Tensor
    """float64, inner products of the gate-weighted outputs."""
    act_TK: torch.Tensor
    """Largest |activation| entering the down projection."""
    entropy_T: torch.Tensor
    """Entropy of the router's distribution, nats."""
    domain_T: torch.Tensor
    """int64, the token's domain."""
    out_TKH: torch.Tensor | None
    """Unweighted outputs; only when moments are asked for."""
    turn_T: torch.Tensor | None = None
    """float64, how far the token's residual stream turned; None where that is not known."""

    def only(self, keep_T: torch.Tensor) -> Routed:
        """Return the tokens where `keep_T` is true."""
        out = None if self.out_TKH is None else self.out_TKH[keep_T]
        turn = None if self.turn_T is None else self.turn_T[keep_T]
        return Routed(
            self.expert_TK[keep_T], self.gate_TK[keep_T], self.gram_TKK[keep_T], self.act_TK[keep_T],
            self.entropy_T[keep_T], self.domain_T[keep_T], out, turn,
        )  # fmt: skip


class BlockSums:
    """Sums over all micro-batches of one MoE block."""

    def __init__(
        self, *, domains: int, experts: int, top_k: int, hidden: int, renormalise: bool,
        pair_domains: bool, moments: bool, device: torch.device, tail: int = 0, skips: bool = False,
    ) -> None:  # fmt: skip
        """`tail` classes behind the experts are summed and not reported; the last one means to `skip` the block."""
        experts += tail
        self.d, self.e, self.k, self.h, self.tail, self.skips = domains, experts, top_k, hidden, tail, skips
        self.renormalise, self.pair_domains = renormalise, pair_domains

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.per_expert = zeros(1 + len((*SUMS_E, *MIXED_E)), domains * experts)
        self.contribution: torch.Tensor | None = zeros(domains * experts)
        self.maxima = zeros(len(MAXIMA_E), domains * experts)
        self.per_rank = zeros(2, domains * experts * top_k)
        self.per_pair = zeros(len(PAIRS), (domains if pair_domains else 1) * experts * experts)
        self.per_token = zeros(3 + len(SUMS_K) * top_k, domains)
        ones = torch.ones(top_k, top_k, dtype=torch.float64, device=device)
        self.block = ones.tril() + ones.tril(-1)  # row k: what expert k adds to a block sum
        self.moments = zeros(domains * experts, 2 * hidden) if moments else None

    def add(self, r: Routed) -> None:
        """Add one micro-batch."""
        cell_TK = r.domain_T[:, None] * self.e + r.expert_TK
        gated_TK = r.gram_TKK.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        norm_TK = torch.where(r.gate_TK == 0, 0.0, gated_TK / r.gate_TK.abs())
        one_TK = torch.ones_like(norm_TK)
        _add(
            self.per_expert, cell_TK, one_TK, r.gate_TK, r.gate_TK**2, norm_TK, norm_TK**2, gated_TK, gated_TK**2,
            gated_TK * norm_TK, gated_TK * r.gate_TK.abs(),
        )  # fmt: skip
        if r.turn_T is None:
            self.contribution = None  # a sum over some of the tokens is none
        elif self.contribution is not None:
            self.contribution.index_add_(0, cell_TK.flatten(), (r.turn_T[:, None] * gated_TK).flatten())
        for row, peaks_TK in zip(self.maxima, (gated_TK, r.act_TK.double()), strict=True):
            row.scatter_reduce_(0, cell_TK.flatten(), peaks_TK.flatten(), "amax")
        rank_TK = cell_TK * self.k + torch.arange(self.k, device=cell_TK.device)
        _add(self.per_rank, rank_TK, one_TK, r.gate_TK)
        self._add_pairs(r, gated_TK)
        self._add_tokens(r)
        if self.moments is not None and r.out_TKH is not None:
            out = r.out_TKH.flatten(0, 1).double()
            self.moments.index_add_(0, cell_TK.flatten(), torch.cat((out, out**2), -1))

    def _add_pairs(self, r: Routed, gated_TK: torch.Tensor) -> None:
        first = r.expert_TK
        if self.pair_domains:
            first = first + r.domain_T[:, None] * self.e
        pair_TKK = first[:, :, None] * self.e + r.expert_TK[:, None, :]
        energy_TKK = gated_TK[:, :, None] * gated_TK[:, None, :]
        _add(self.per_pair, pair_TKK, torch.ones_like(energy_TKK), energy_TKK, r.gram_TKK)

    def _add_tokens(self, r: Routed) -> None:
        """Error of every smaller k from block sums of the Gram matrix: y_k = scale · Σ_{i≤k} z_i."""
        sq_TK = (r.gram_TKK * self.block).sum(2).cumsum(1)
        cross_TK = r.gram_TKK.sum(2).cumsum(1)
        out_sq_T = sq_TK[:, -1]
        mass_TK = r.gate_TK.cumsum(1)
        total_T1 = mass_TK[:, -1:]
        share_TK = torch.where(total_T1 == 0, 1.0, mass_TK / total_T1)
        if self.renormalise:
            scale_TK = torch.where(share_TK == 0, 1.0, 1 / share_TK)
            sq_TK, cross_TK = sq_TK * scale_TK**2, cross_TK * scale_TK
        error_TK = (sq_TK - 2 * cross_TK + out_sq_T[:, None]).clamp_min(0)
        error_TK[:, -1] = 0  # all K experts: exactly y
        by_k = (column for table in (error_TK, cross_TK, sq_TK, 1 - share_TK) for column in table.unbind(1))
        _add(self.per_token, r.domain_T, torch.ones_like(out_sq_T), out_sq_T, r.entropy_T.double(), *by_k)

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the profile's arrays of this block, names prefixed by the block."""
        d, e, k = self.d, self.e, self.k
        routed = e - self.tail
        out: dict[str, np.ndarray] = {}
        per_expert = self.per_expert.view(-1, d, e)[..., :routed].cpu().numpy()
        out["count"] = per_expert[0].astype(np.int64)
        out |= {name: per_expert[i + 1] for i, name in enumerate((*SUMS_E, *MIXED_E))}
        maxima = self.maxima.view(-1, d, e)[..., :routed].cpu().numpy()
        out |= {name: maxima[i] for i, name in enumerate(MAXIMA_E)}
        per_rank = self.per_rank.view(2, d, e, k)[:, :, :routed].cpu().numpy()
        out["rank_count"], out["rank_mass"] = per_rank[0].astype(np.int64), per_rank[1]
        per_pair = self.per_pair.view(len(PAIRS), -1, e, e).cpu().numpy()
        lower = np.tril_indices(routed)
        out |= {name: per_pair[i][:, lower[0], lower[1]] for i, name in enumerate(PAIRS)}
        out["coact"] = out["coact"].astype(np.int64)
        per_token = self.per_token.T.cpu().numpy()
        out["tokens"], out["out_sq"], out["entropy"] = (
            per_token[:, 0].astype(np.int64),
            per_token[:, 1],
            per_token[:, 2],
        )
        out |= {name: per_token[:, 3 + i * k : 3 + (i + 1) * k] for i, name in enumerate(SUMS_K)}
        if self.contribution is not None:
            out[CONTRIBUTION] = self.contribution.view(d, e)[:, :routed].cpu().numpy()
        if self.moments is not None:
            moments = self.moments.view(d, e, 2, self.h)[:, :routed].cpu().numpy()
            out["out_sum"], out["out_sq_sum_h"] = moments[:, :, 0], moments[:, :, 1]
        return {f"{prefix}/{name}": np.ascontiguousarray(value) for name, value in out.items()}


def _add(sums: torch.Tensor, index: torch.Tensor, *columns: torch.Tensor) -> None:
    """Add each column to its row of `sums` at `index`; one-dimensional scatters are by far the fastest on a CPU."""
    for row, column in zip(sums, columns, strict=True):
        row.index_add_(0, index.flatten(), column.flatten())
