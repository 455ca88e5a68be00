"""Experts of model types that do not use transformers' experts interface, made to look as if they did.

A module keeps its class, parameters and names; it is given a subclass that adds what the observing forward needs, and
computes with it. So loading, copying and finding experts work as for all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expertcut.calibrate.observer import observed_experts


class _Experts:
    """What `observed_experts` asks for: gate and up side by side, (E, H, 2I) or (E, 2I, H); down; the activation."""

    has_gate, has_bias, is_transposed = True, False, False

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return observed_experts(self, flat, index, gates).view(hidden_states.shape)

    def _apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up  # type: ignore[no-any-return]


class _Dbrx(_Experts):
    """Three matrices (E·I, H) below `mlp`; gate and up are put side by side on first use."""

    is_transposed = True

    @property
    def gate_up_proj(self: Any) -> torch.Tensor:
        if "_gate_up" not in self.__dict__:
            shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
            both = torch.cat((self.mlp.w1.view(shape), self.mlp.v1.view(shape)), dim=1)
            self.__dict__["_gate_up"] = both.transpose(1, 2)
        return self.__dict__["_gate_up"]  # type: ignore[no-any-return]

    @property
    def down_proj(self: Any) -> torch.Tensor:
        return self.mlp.w2.view(self.num_experts, self.ffn_hidden_size, self.hidden_size)  # type: ignore[no-any-return]

    def _apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.mlp.activation_fn(gate) * up  # type: ignore[no-any-return]


class _Longcat(_Experts):
    """Numbers behind those of the experts hand their input through."""

    hands_through = True

    @property
    def num_experts(self: Any) -> int:
        return self.num_routed_experts  # type: ignore[no-any-return]


class _Step(_Experts):
    """Only the marks are missing."""

    def _apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        return super(_Experts, self)._apply_gate(gate_up)  # type: ignore[misc, no-any-return]


class _Llama4(_Experts):
    """The gate scales an expert's input, not its output."""

    is_transposed, scales_input = True, True

    def _apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)  # type: ignore[no-any-return]


class _Llama4Block:
    """Runs an expert on the tokens routed to it; transformers runs all experts on all tokens, most of them zeroed."""

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(flat)
        gates, index = scores.topk(self.top_k, dim=1)
        return self.shared_expert(flat) + self.experts(flat, index, gates), logits


ADAPTERS: dict[str, type] = {
    "DbrxExperts": _Dbrx, "LongcatFlashExperts": _Longcat, "Step3p7Experts": _Step, "Llama4TextExperts": _Llama4,
    "Llama4TextMoe": _Llama4Block,
}  # fmt: skip
"""transformers' class → what it is given."""


def adapt(model: nn.Module) -> None:
    """Give the modules of a model that need it the experts interface, in place; harmless when repeated."""
    for module in model.modules():
        mixin = ADAPTERS.get(type(module).__name__)
        if mixin is not None:
            module.__class__ = type(f"Observed{type(module).__name__}", (mixin, type(module)), {})
