"""What the down projections of one MoE layer are given while text goes through it: routed experts' and shared ones'.

Nothing is computed twice: the experts hand out what they are given, each token's times its gate. All of a layer is in
memory, T·(K + shared)·I numbers of the forward pass's dtype.

Shapes: T tokens without padding, n those of an expert, H hidden, I width of a map's input, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from expertcut.calibrate.observer import given_to
from expertcut.measure.refit import Linear


class Seen:
    """Notes what the maps of a layer are given."""

    def __init__(self, layer: nn.Module, experts: str, shared: list[str], *, sums: bool = False) -> None:
        """`shared` are the down projections of shared experts; with `sums`, what the experts add up to is noted too."""
        self.domain_T: torch.Tensor | None = None
        self._layer, self._experts, self._shared, self._with_sums = layer, experts, shared, sums
        self._now: dict[str, torch.Tensor] = {}
        self._all: dict[str, list[torch.Tensor]] = {}
        self._routed_now: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._routed: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._tokens = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what passes within the block."""
        with ExitStack() as hooks:
            experts: Any = self._layer.get_submodule(self._experts)
            if self._with_sums:
                hooks.callback(experts.register_forward_hook(self._on_sums).remove)
            hooks.enter_context(given_to(experts.__dict__.get("_experts", experts), self._on_experts))
            for name in self._shared:
                module = self._layer.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(partial(self._on_shared, name)).remove)
                if gate := _gate(self._layer, name):
                    hooks.callback(gate.register_forward_hook(partial(self._on_gate, name)).remove)
            yield

    def commit(self) -> None:
        """Keep what a micro-batch showed, without padding."""
        assert self.domain_T is not None
        valid_T = self.domain_T >= 0
        for name, noted in self._now.items():
            self._all.setdefault(name, []).append(noted.flatten(0, -2)[valid_T])
        place_T = valid_T.cumsum(0) - 1 + self._tokens
        whole = bool(valid_T.all())
        for expert, tokens_n, given_nI in self._routed_now:
            if not whole:
                real = valid_T[tokens_n]
                tokens_n, given_nI = tokens_n[real], given_nI[real]
            self._routed.setdefault(expert, []).append((place_T[tokens_n], given_nI))
        self._tokens += int(valid_T.sum())
        self.discard()

    def discard(self) -> None:
        """Forget it."""
        self._now.clear()
        self._routed_now.clear()

    def sums(self) -> torch.Tensor:
        """What the experts added up to, (T, H) float32."""
        return torch.cat(self._all["sums"]).float()

    def maps(self, kept: Sequence[int], factor: float) -> dict[int | str, Linear]:
        """The down projections that saw tokens: of kept experts by their new numbers, of shared ones by their names.

        `factor` is on all that routed experts add. What was noted is forgotten.
        """
        found: dict[int | str, Linear] = {}
        for place, expert in enumerate(kept):
            if parts := self._routed.pop(expert, None):
                rows, given = (torch.cat(some) for some in zip(*parts, strict=True))
                found[place] = Linear(rows, given if factor == 1 else given * factor)
        self._routed.clear()
        for name in self._shared:
            given = torch.cat(self._all.pop(name))
            if gate := self._all.pop(f"{name} gate", None):
                given = given * torch.cat(gate).sigmoid()
            found[name] = Linear(torch.arange(len(given), device=given.device), given)
        return found

    def _on_experts(self, first: int, counts_E: torch.Tensor, tokens_S: torch.Tensor, given_SI: torch.Tensor) -> None:
        counts = counts_E.tolist()
        tokens, given = (torch.split(all_S[: sum(counts)], counts) for all_S in (tokens_S, given_SI))
        self._routed_now += [(first + i, tokens[i], given[i]) for i, count in enumerate(counts) if count]

    def _on_sums(self, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        self._now["sums"] = out

    def _on_shared(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._now[name] = args[0]

    def _on_gate(self, name: str, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        self._now[f"{name} gate"] = out


def _gate(layer: nn.Module, down_proj: str) -> nn.Module | None:
    """What weighs a shared expert's output after a sigmoid, if there is such."""
    block = layer.get_submodule(down_proj.rpartition(".")[0].rpartition(".")[0])
    gate = getattr(block, "shared_expert_gate", None)
    return gate if isinstance(gate, nn.Module) else None
