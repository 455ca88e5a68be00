"""How far a token's residual stream turns when the routed experts add to it: h before, h̃ = h + c·y after.

h is what entered the norm whose output the experts are given, y the experts' sum, c what the layer multiplies it by.
Nothing is recomputed: a hook on the layer's norms keeps the last input and output. Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

CHUNK_ROWS = 512
"""Tokens whose products are in memory at a time."""
ELSEWHERE = frozenset({
    "afmoe", "axk1", "beam", "flex_olmo", "gemma4_text", "kolibri1", "muse_spark_text",  # a norm comes between
    "cohere2_moe",  # averaged with the shared expert
    "inkling_text", "inkling2_text",  # a convolution comes between
    "longcat_flash",  # added later on
    "minimax",  # added to the norm's output
    "deepseek_v4", "glm5_next_text", "hy_v4", "qwen4_exp_text",  # several streams
})  # fmt: skip
"""transformers' types of language models whose experts' sum is not plainly added to what their norm was given."""
FACTORS = {
    **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), "residual_multiplier"),
    "laguna": "moe_routed_scaling_factor", "minimax_m3_vl_text": "routed_scaling_factor",
    "step3p5": "moe_router_scaling_factor",
}  # fmt: skip
"""Model type → config key of c, where it is not 1."""


class ResidualStream:
    """Watches the residual stream of one decoder layer."""

    def __init__(self, layer: nn.Module, block: str, factor: float) -> None:
        """`block` is the name of the layer's MoE block, whose own norms do not count; `factor` is c."""
        self._factor = factor
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hooks = [
            module.register_forward_hook(self._on_norm, with_kwargs=True)
            for name, module in layer.named_modules()
            if "norm" in type(module).__name__.lower() and not name.startswith(f"{block}.")
        ]

    def turn(self, given_TH: torch.Tensor, y_TH: torch.Tensor) -> torch.Tensor | None:
        """Return max(1 − cos(h, h̃), 0), (T,) float64; None if what the experts were given is not a norm's output."""
        last, self._last = self._last, None
        if last is None or last[1].data_ptr() != given_TH.data_ptr() or last[0].numel() != y_TH.numel():
            return None
        h_TH = last[0].reshape(y_TH.shape)
        rows = zip(torch.split(h_TH, CHUNK_ROWS), torch.split(y_TH, CHUNK_ROWS), strict=True)
        hh_T, hy_T, yy_T = torch.cat([_products(h.float(), y.float()) for h, y in rows], dim=1).double()
        hy_T, yy_T = self._factor * hy_T, self._factor**2 * yy_T
        lengths_T = (hh_T * (hh_T + 2 * hy_T + yy_T).clamp_min(0)).sqrt()
        cos_T = torch.where(lengths_T == 0, 1.0, (hh_T + hy_T) / lengths_T)
        return (1 - cos_T).clamp_min(0)

    def close(self) -> None:
        """Detach from the layer."""
        for hook in self._hooks:
            hook.remove()

    def _on_norm(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
        if entered is not None and isinstance(output, torch.Tensor):
            self._last = entered, output


def open_residual(layer: nn.Module, experts: str, config: PreTrainedConfig) -> ResidualStream | None:
    """Watch the residual stream of a decoder layer; None in model types where the experts' sum joins it otherwise."""
    factor = joining_factor(config)
    return None if factor is None else ResidualStream(layer, experts.rpartition(".")[0], factor)


def joining_factor(config: PreTrainedConfig) -> float | None:
    """Return c; None in model types where the experts' sum joins the residual stream otherwise."""
    text: Any = config.get_text_config()
    if text.model_type in ELSEWHERE:
        return None
    key = FACTORS.get(text.model_type)
    return 1.0 if key is None else float(getattr(text, key))


def _products(h_TH: torch.Tensor, y_TH: torch.Tensor) -> torch.Tensor:
    """(3, T): h·h, h·y and y·y."""
    return torch.stack([(h_TH * h_TH).sum(-1), (h_TH * y_TH).sum(-1), (y_TH * y_TH).sum(-1)])
