"""What a MoE block was given in; how much its routed output changes when a set of its experts is dropped, out.

Nothing is estimated: the block runs again with its router narrowed to the experts that are left, so that tokens are
rerouted as the model itself would. Experts run once per token: what they make of it is kept as products G = ⟨f_i, f_j⟩.
With w the gate weights after, less those before, a token's output changes by ‖Σ w_i f_i‖² = wᵀGw.

Shapes: T replayed tokens, E experts (and what comes behind them), K top-k, S sets, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from expertcut.calibrate.executor import LayerStream, find_block, find_experts
from expertcut.choose.make import Request
from expertcut.errors import PlanError
from expertcut.measure.variants import Renumbered, Variant
from expertcut.model import Family

TOKENS = 1024
"""Tokens that are replayed, at most, evenly spaced over the calibration text."""
AT_ONCE = 32
"""Tokens whose outputs of all experts are in memory at a time."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Sample:
    """Notes what a MoE block and its experts are called with, for every so manieth token; watches a `Passage`."""

    def __init__(self, every: int) -> None:
        self.every, self._seen = every, 0
        self.domain_T: torch.Tensor | None = None
        self.calls: list[Call] = []
        """What the block is called with, one per micro-batch."""
        self.parts: list[tuple[torch.Tensor, ...]] = []
        """(T, H) given to the experts, (T, K) numbers and (T, K) gate weights, (T,) domains, one per call."""
        self._block: Call | None = None
        self._experts: Call | None = None

    @contextmanager
    def watching(self, layer: nn.Module, family: Family) -> Iterator[None]:
        """Take notes of a decoder layer while this lasts.

        Raises:
            PlanError: its router is no part of a block that could run by itself.
        """
        block, experts = find_block(layer, family), layer.get_submodule(find_experts(layer) or "")
        if block is layer:
            raise PlanError("the router lies outside the MoE block, which cannot be replayed", "use another --strategy")

        def on_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._block = args, kwargs

        def on_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._experts = args, kwargs

        hooks = [block.register_forward_pre_hook(on_block, with_kwargs=True),
                 experts.register_forward_pre_hook(on_experts, with_kwargs=True)]  # fmt: skip
        yield
        for hook in hooks:
            hook.remove()

    def commit(self) -> None:
        """Keep the sampled tokens of the micro-batch that has run."""
        assert self.domain_T is not None
        tokens, block, experts = len(self.domain_T), self._block, self._experts
        self.discard()
        assert block is not None and experts is not None, "commit without a forward pass"
        valid = torch.nonzero(self.domain_T >= 0).flatten()
        at = valid[-self._seen % self.every :: self.every]
        self._seen += len(valid)
        if len(at):
            args, kwargs = block
            self.calls.append(
                (tuple(_only(v, at, tokens) for v in args), {k: _only(v, at, tokens) for k, v in kwargs.items()})
            )
            given, index, gates = (t.reshape(tokens, -1)[at] for t in (*experts[0], *experts[1].values()))
            self.parts.append((given, index, gates, self.domain_T[at]))

    def discard(self) -> None:
        """Forget the micro-batch at hand."""
        self._block = self._experts = None


def _only(value: Any, at: torch.Tensor, tokens: int) -> Any:
    """The tokens `at` of an argument (B, S, …) or (B·S, …); what has no tokens stays."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] * value.shape[1] == tokens:
        return value.flatten(0, 1)[at][None]
    return value[at] if isinstance(value, torch.Tensor) and value.dim() and len(value) == tokens else value


class _Outputs:
    """In the place of an observer: keeps every expert's output."""

    moments, residual = False, None

    def __init__(self) -> None:
        self.found_TEH = torch.empty(0)

    def record(self, index: torch.Tensor, gates: torch.Tensor, weighted_TKH: torch.Tensor, *others: Any) -> None:
        self.found_TEH = weighted_TKH


@torch.inference_mode()
def output_products(experts: Any, given_TH: torch.Tensor, tail: int) -> torch.Tensor:
    """Return ⟨f_i, f_j⟩ of all experts' outputs, (T, E, E) float32; `tail` more behind them do nothing at all.

    Raises:
        PlanError: gates scale what goes into the experts, so that no output stands without its gate.
    """
    if getattr(experts, "scales_input", False):
        raise PlanError("gates scale what goes into the experts, which cannot be replayed", "use another --strategy")
    outputs, found = _Outputs(), []
    experts.__dict__["_expertcut_observer"] = outputs
    try:
        for some_TH in torch.split(given_TH, AT_ONCE):
            index = torch.arange(experts.num_experts, device=given_TH.device).expand(len(some_TH), -1).contiguous()
            experts(some_TH, index, torch.ones_like(index, dtype=given_TH.dtype))
            behind = some_TH if getattr(experts, "hands_through", False) else torch.zeros_like(some_TH)
            all_TEH = torch.cat((outputs.found_TEH, behind[:, None].expand(-1, tail, -1)), dim=1).float()
            found.append(torch.bmm(all_TEH, all_TEH.transpose(1, 2)))
    finally:
        del experts.__dict__["_expertcut_observer"]
    return torch.cat(found)


class _Decisions(Renumbered):
    """In the place of a variant's experts: keeps what its router decides, in the base's numbers, and adds nothing."""

    def __init__(self, experts: nn.Module, kept: torch.Tensor) -> None:
        super().__init__(experts, kept)
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        top_k = index.shape[-1]
        self.found.append((self.kept[index].reshape(-1, top_k), gates.reshape(-1, top_k)))
        return torch.zeros_like(hidden)


class Variants:
    """The model with so many experts per layer, built when asked for; which ones is set layer by layer."""

    def __init__(self, stream: LayerStream, request: Request) -> None:
        self._stream, self._request = stream, request
        self._made: dict[int, Variant] = {}

    def __getitem__(self, experts: int) -> Variant:
        if experts not in self._made:
            self._made[experts] = Variant(self._stream, self._request.draft(experts))
        return self._made[experts]


class Replay:
    """The losses of dropping sets of experts of one block: Σ‖y' − y‖² of the routed output, over replayed tokens."""

    def __init__(
        self, stream: LayerStream, variants: Variants, index: int, base: nn.Module, sample: Sample,
        weights: NDArray[np.float64],
    ) -> None:  # fmt: skip
        """`weights` multiply the tokens of each domain."""
        self._stream, self._variants, self._index, self._base, self._sample = stream, variants, index, base, sample
        self._name = find_experts(base) or ""
        given_TH, self._index_TK, self._gate_TK, domain_T = map(torch.cat, zip(*sample.parts, strict=True))
        self._weight_T = torch.from_numpy(weights).to(domain_T.device)[domain_T]
        self._products_TEE = output_products(base.get_submodule(self._name), given_TH, stream.geometry.tail)

    def __len__(self) -> int:
        return self._stream.geometry.num_experts

    @torch.inference_mode()
    def __call__(self, gone_SE: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the loss of each set, (S,); as many go in all of them."""
        variant = self._variants[len(self) - int(gone_SE[0].sum())]
        layer = variant.layer(self._index, self._base)
        parent, _, leaf = self._name.rpartition(".")
        decisions = _Decisions(self._base.get_submodule(self._name), torch.empty(0))
        setattr(layer.get_submodule(parent), leaf, decisions)
        block = find_block(layer, self._stream.geometry.family)
        losses = np.empty(len(gone_SE))
        for at, gone_E in enumerate(gone_SE):
            variant.kept[self._index] = tuple(np.flatnonzero(~gone_E).tolist())
            decisions.kept = variant.numbers(self._index, self._base)
            variant.fill(self._index, layer, self._base)
            decisions.found.clear()
            for args, kwargs in self._sample.calls:
                block(*args, **kwargs)
            losses[at] = self._loss(*map(torch.cat, zip(*decisions.found, strict=True)))
        return losses

    def _loss(self, index_TK: torch.Tensor, gate_TK: torch.Tensor) -> float:
        at = torch.cat((self._index_TK, index_TK), dim=1)
        w = torch.cat((-self._gate_TK.double(), gate_TK.double()), dim=1)
        rows = torch.arange(len(at), device=at.device)[:, None, None]
        change_T = (w[:, :, None] * w[:, None, :] * self._products_TEE[rows, at[:, :, None], at[:, None, :]]).sum(
            (1, 2)
        )
        return float((change_T * self._weight_T).sum())
