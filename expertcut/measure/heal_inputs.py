"""What the down projections of one MoE layer are given while text goes through it: routed experts' and shared ones'.

Hidden states, choices and gates are noted; what each expert makes of them is computed again when it is asked for, so
that the inputs of one expert at a time are in memory.

Shapes: T tokens without padding, n those of an expert, H hidden, I width of a map's input, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from expertcut.calibrate.observer import activations
from expertcut.measure.refit import Linear


class Seen:
    """What the maps of a layer are given, noted while text goes through."""

    def __init__(self, layer: nn.Module, experts: str, shared: list[str], *, sums: bool = False) -> None:
        """`shared` are the down projections of shared experts; with `sums`, what the experts add up to is noted too."""
        self.domain_T: torch.Tensor | None = None
        self._layer, self._experts, self._shared, self._with_sums = layer, experts, shared, sums
        self._now: dict[str, torch.Tensor] = {}
        self._all: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what passes within the block."""
        with ExitStack() as hooks:
            experts = self._layer.get_submodule(self._experts)
            hooks.callback(experts.register_forward_hook(self._on_experts, with_kwargs=True).remove)
            for name in self._shared:
                module = self._layer.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(partial(self._on_shared, name)).remove)
                if gate := _gate(self._layer, name):
                    hooks.callback(gate.register_forward_hook(partial(self._on_gate, name)).remove)
            yield

    def commit(self) -> None:
        """Keep what a micro-batch showed, without padding."""
        assert self.domain_T is not None
        valid = self.domain_T >= 0
        for name, noted in self._now.items():
            self._all.setdefault(name, []).append(noted.flatten(0, -2)[valid])
        self._now.clear()

    def discard(self) -> None:
        """Forget it."""
        self._now.clear()

    def sums(self) -> torch.Tensor:
        """What the experts added up to, (T, H) float32."""
        return torch.cat(self._all["sums"]).float()

    def maps(self, experts: Any, kept: Sequence[int], factor: float) -> dict[int | str, Linear]:
        """The down projections: of kept experts by their new numbers, of shared ones by their names in the layer."""
        hidden_TH, index_TK, gates_TK = (torch.cat(self._all.pop(name)) for name in ("hidden", "index", "gates"))
        found: dict[int | str, Linear] = {}
        for place, expert in enumerate(kept):
            rows_n, slots_n = (index_TK == place).nonzero(as_tuple=True)
            gates_n = gates_TK[rows_n, slots_n]
            found[place] = Linear(rows_n, partial(_inputs, experts, expert, hidden_TH, rows_n, gates_n, factor))
        every = torch.arange(len(hidden_TH), device=hidden_TH.device)
        for name in self._shared:
            given_TI = torch.cat(self._all.pop(name)).float()
            if gate := self._all.pop(f"{name} gate", None):
                given_TI *= torch.cat(gate).float().sigmoid()
            found[name] = Linear(every, given_TI.__getitem__)
        return found

    def _on_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
        self._now |= zip(("hidden", "index", "gates"), (*args, *kwargs.values()), strict=False)
        if self._with_sums:
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


def _inputs(
    experts: Any, expert: int, hidden_TH: torch.Tensor, rows_n: torch.Tensor, gates_n: torch.Tensor, factor: float,
    places_m: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What an expert's down projection is given for some of its tokens, times gate and factor: (m, I) float32."""
    x, gates_m1 = hidden_TH[rows_n[places_m]], gates_n[places_m, None]
    scales_input = getattr(experts, "scales_input", False)
    if scales_input:
        x = x * gates_m1.to(x.dtype)
    ends = torch.tensor([len(x)], dtype=torch.int32, device=x.device)
    whose = torch.full((len(x),), expert, device=x.device)
    a = activations(experts, x, slice(expert, expert + 1), ends, whose).float() * factor
    return a if scales_input else a * gates_m1.float()
