"""The observer: an experts implementation that computes what transformers' grouped one does, and watches it.

It receives the router's real decisions, runs an expert on the tokens routed to it and on no other, and derives every
statistic from one K×K Gram matrix per token. Ranks come from a hook on the router: routers with a correction bias
choose by score + bias, weigh by score and return unsorted indices, so neither weight nor order is the rank.

Shapes: T tokens, K top-k, S = T·K routed pairs sorted by expert, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from expertcut.calibrate.residual import ResidualStream
from expertcut.calibrate.sums import BlockSums, Routed
from expertcut.errors import CheckpointError
from expertcut.model.families import Scoring

NAME = "expertcut"
"""Name under which the experts implementation is registered with transformers."""

CHUNK_ROWS = 512
"""Routed pairs whose intermediates are held at a time, on a CPU."""

Given = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with the first of some experts, how many rows each has (E,), the rows' tokens (S,), and what their down
projections are given, times their gates (S, I)."""


def register() -> None:
    """Make the observing experts implementation known to transformers; harmless when repeated."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, observed_experts)


def observed_experts(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Grouped forward of all routed experts, (T, H) → (T, H), equal bit for bit to transformers' `grouped_mm`.

    With an `Observer` attached to the module, its statistics are recorded on the way; with `given_to`, what the down
    projections are given is handed out. On a CPU a few experts are taken
    at a time: their intermediates stay in the cache, and only the (S, H) outputs are held whole. Numbers behind those
    of the experts hand their input through; `scales_input` of a module says that gates scale inputs, not outputs.
    """
    observer: Observer | None = experts.__dict__.get("_expertcut_observer")
    given: Given | None = experts.__dict__.get("_expertcut_given")
    scales_input = getattr(experts, "scales_input", False)
    tokens, top_k = top_k_index.shape
    ids_S, perm = torch.sort(top_k_index.reshape(-1))
    gate_S1 = top_k_weights.reshape(-1)[perm].unsqueeze(-1)
    counts_E = torch.bincount(ids_S, minlength=experts.num_experts)[: experts.num_experts]
    weighted_SH = act_S = plain_SH = None
    for some, rows in _chunks(counts_E, getattr(experts, "hands_through", False)):
        at = perm[rows]
        offsets = counts_E[some].cumsum(0, dtype=torch.int32)
        x = hidden_states[at // top_k]
        if scales_input:
            x = x * gate_S1[rows].to(x.dtype)
        x = activations(experts, x, some, offsets, ids_S[rows])
        if given is not None:
            given(some.start, counts_E[some], at // top_k, x if scales_input else x * gate_S1[rows].to(x.dtype))
        if observer is not None:
            act_S = _put(act_S, x.abs().amax(-1), at, perm)
        x = _project(experts, "down_proj", x, some, offsets, ids_S[rows])
        if getattr(experts, "has_post_expert_norm", False):  # since transformers 5.20
            x = experts.post_expert_norm(x)
        if observer is not None and observer.moments:
            plain_SH = _put(plain_SH, x, at, perm)
        weighted_SH = _put(weighted_SH, x if scales_input else x * gate_S1[rows], at, perm)
    assert weighted_SH is not None
    if getattr(experts, "hands_through", False):
        at = perm[int(counts_E.sum()) :]
        weighted_SH[at] = hidden_states[at // top_k] * gate_S1[len(perm) - len(at) :]
    weighted_TKH = weighted_SH.view(tokens, top_k, -1)
    sum_TH = weighted_TKH.sum(dim=1).to(hidden_states.dtype)
    if observer is not None and act_S is not None:
        out = None if plain_SH is None else plain_SH.view(tokens, top_k, -1)
        turn = observer.residual.turn(hidden_states, sum_TH) if observer.residual else None
        observer.record(top_k_index, top_k_weights, weighted_TKH, act_S.view(tokens, top_k), out, turn)
    return sum_TH


def activations(
    experts: Any, x_SH: torch.Tensor, some: slice, offsets: torch.Tensor, ids_S: torch.Tensor
) -> torch.Tensor:
    """Return what the down projections of `some` experts make their output of, (S, I), for inputs in their order.

    `offsets` says where each one's rows end, `ids_S` whose each row is.
    """
    x = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", x_SH, some, offsets, ids_S)
    found: torch.Tensor = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    return found


@contextmanager
def given_to(experts: nn.Module, given: Given) -> Iterator[None]:
    """Let a function have what the down projections of a module of experts are given."""
    experts.__dict__["_expertcut_given"] = given
    try:
        yield
    finally:
        del experts.__dict__["_expertcut_given"]


def _chunks(counts_E: torch.Tensor, hands_through: bool) -> Iterator[tuple[slice, slice]]:
    """Yield (experts, their rows) of at most `CHUNK_ROWS` rows or one expert; all at once where counting would wait."""
    experts = len(counts_E)
    if counts_E.device.type != "cpu":
        yield slice(0, experts), slice(0, int(counts_E.sum()) if hands_through else None)
        return
    first = start = stop = 0
    for expert, count in enumerate(counts_E.tolist()):
        if stop > start and stop + count - start > CHUNK_ROWS:
            yield slice(first, expert), slice(start, stop)
            first, start = expert, stop
        stop += count
    yield slice(first, experts), slice(start, stop)


def _put(all_S: torch.Tensor | None, rows: torch.Tensor, at: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Write rows to their places in the tokens' order; the first call makes room for all S of them."""
    if all_S is None:
        all_S = rows.new_empty(len(perm), *rows.shape[1:])
    all_S[at] = rows
    return all_S


def _project(
    experts: Any, name: str, x: torch.Tensor, some: slice, offsets: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    bias = getattr(experts, f"{name}_bias")[ids] if experts.has_bias else None
    return _grouped_linear(x, getattr(experts, name)[some], offsets, bias, experts.is_transposed)


class Observer:
    """Watches one MoE block of a running model and keeps what a micro-batch showed until it is committed."""

    def __init__(
        self, scoring: Scoring, sums: BlockSums, router: nn.Module, bias: torch.Tensor | None, experts: nn.Module,
        residual: ResidualStream | None,
    ) -> None:  # fmt: skip
        self.scoring, self.sums, self.moments = scoring, sums, sums.moments is not None
        self._bias = bias
        self._choice_TE: torch.Tensor | None = None
        self._entropy_T: torch.Tensor | None = None
        self._pending: Routed | None = None
        self.domain_T: torch.Tensor | None = None
        """Domain of each token of the coming micro-batch, −1 for padding; set by the caller."""
        self._experts, self.residual = experts, residual
        experts.__dict__["_expertcut_observer"] = self
        self._hook = router.register_forward_hook(self._on_router)

    def _on_router(self, router: nn.Module, args: Any, output: Any) -> None:
        widths = (self.sums.e, self.sums.e - self.sums.tail)
        outputs = output if isinstance(output, tuple) else (output,)
        if self.scoring == "sigmoid-input":
            outputs = outputs[::-1]  # (scores, logits), both (T, E)
        logits = next((t for t in outputs if isinstance(t, torch.Tensor) and t.shape[-1] in widths), None)
        if logits is None:
            name = type(router).__name__
            raise CheckpointError(f"{name} returns no logits of {widths[1]} experts; cannot observe it")
        logits = logits.reshape(-1, logits.shape[-1]).float()
        score, p = _scores(logits, self.scoring)
        self._choice_TE = score if self._bias is None else score + self._bias.float().reshape(1, -1)
        self._entropy_T = torch.special.entr(p).sum(-1)

    def record(
        self, index_TK: torch.Tensor, gate_TK: torch.Tensor, weighted_TKH: torch.Tensor, act_TK: torch.Tensor,
        out_TKH: torch.Tensor | None, turn_T: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Keep one micro-batch's observations; called by the experts implementation."""
        assert self._choice_TE is not None and self._entropy_T is not None and self.domain_T is not None
        if self.sums.skips:  # a token that chose to skip is reported as one of expert 0 with weight 0
            index_TK = index_TK.masked_fill(gate_TK == 0, self.sums.e - 1)
        order = self._choice_TE.gather(1, index_TK).argsort(dim=1, descending=True, stable=True)
        gram = _gram(weighted_TKH)
        k = order.shape[1]
        gram = gram.gather(1, order[:, :, None].expand(-1, -1, k)).gather(2, order[:, None, :].expand(-1, k, -1))
        if out_TKH is not None:
            out_TKH = out_TKH.gather(1, order[:, :, None].expand_as(out_TKH))
        routed = Routed(
            index_TK.gather(1, order), gate_TK.gather(1, order).double(), gram.double(), act_TK.gather(1, order),
            self._entropy_T, self.domain_T, out_TKH, turn_T,
        )  # fmt: skip
        self._pending = routed

    def commit(self) -> None:
        """Add the pending observations to the sums, padding left out."""
        routed, self._pending = self._pending, None
        assert routed is not None, "commit without a forward pass"
        valid = routed.domain_T >= 0
        if not bool(valid.all()):
            routed = routed.only(valid)
        self.sums.add(routed)

    def discard(self) -> None:
        """Forget the pending observations (the forward pass failed)."""
        self._pending = None

    def close(self) -> None:
        """Detach from the model."""
        self._hook.remove()
        if self.residual is not None:
            self.residual.close()
        self._experts.__dict__.pop("_expertcut_observer", None)


def _scores(logits_TE: torch.Tensor, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router chooses by before any correction bias, and its distribution over experts, both (T, E)."""
    if scoring in ("softmax", "softmax-after-topk", "sparsemixer"):
        p = logits_TE.softmax(-1)
        return (p if scoring == "softmax" else logits_TE), p
    score = nn.functional.softplus(logits_TE).sqrt() if scoring == "sqrtsoftplus" else logits_TE.sigmoid()
    p = score / score.sum(-1, keepdim=True)
    return (logits_TE if scoring.startswith("sigmoid-") else score), p


def _gram(weighted_TKH: torch.Tensor) -> torch.Tensor:
    """(T, K, K) float32 inner products."""
    if weighted_TKH.dtype in (torch.float32, torch.float64):
        return torch.bmm(weighted_TKH, weighted_TKH.transpose(1, 2))
    if weighted_TKH.is_cuda:
        return torch.bmm(weighted_TKH, weighted_TKH.transpose(1, 2), out_dtype=torch.float32)
    wide = (some.float() for some in torch.split(weighted_TKH, CHUNK_ROWS // weighted_TKH.shape[1] or 1))
    return torch.cat([torch.bmm(some, some.transpose(1, 2)) for some in wide])
