"""Attention for the cost model: a raw config in, the KV cache and the FLOPs of a layer out, with what was assumed.

Grouped-query and latent (MLA) attention are counted as what they are, sliding windows and layers without a cache by
`layer_types`. Everything else is taken as full attention, an upper limit, and said so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertcut.model import Geometry
from expertcut.model.families import dig

VALUE = 2
"""Bytes of a cached value and of an activation: BF16, the engines' default, whatever the weights are in."""
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_STATELESS = ("linear", "mamba", "conv", "recurrent", "lightning")
"""In the name of layers whose state does not grow with the sequence."""

_ODD = (*_STATELESS, "sliding_window", "attention_chunk_size", "attn_layer_", "hybrid_", "index_topk", "compress_ratio")
"""In keys of configs whose layers do not all attend to everything."""


@dataclass(frozen=True)
class Attention:
    """What attention reads and computes; a pair is a query token and a cached token."""

    kv_nbytes: float
    """Per cached token and layer."""
    kv_heads: int
    """Into how many parts a cache can be sliced; further devices hold copies. 1 for MLA, which has one latent."""
    decode_flops: float
    """Per pair and layer."""
    prefill_flops: float
    """Per pair and layer; MLA is expanded to heads there, and absorbed into the projections when decoding."""
    full: int
    """Layers that attend to all of a sequence."""
    sliding: int = 0
    """Layers that attend to `window` tokens at most."""
    window: int = 0

    def cached(self, length: float) -> float:
        """Return the cached tokens that one token attends to at a length, added up over the layers."""
        return self.full * length + self.sliding * min(length, self.window)


def read_attention(config: Mapping[str, Any], geometry: Geometry) -> tuple[Attention, tuple[str, ...]]:
    """Return a model's attention, and notes on what the config does not say or this model of it does not know."""
    scope = dig(config, geometry.family.root) or {}
    scope = {**(scope.get("attn_config") or {}), **scope}
    layers, notes = _layers(scope, geometry.num_layers)
    heads = _first(scope, _HEADS)
    if rank := scope.get("kv_lora_rank"):
        rope = scope.get("qk_rope_head_dim") or 64
        nope, value = scope.get("qk_nope_head_dim") or 128, scope.get("v_head_dim") or 128
        if heads is None:
            notes.append("config.json names no attention heads: those of width 128 are assumed")
            heads = max(1, geometry.hidden // 128)
        decode, prefill = 2 * heads * (2 * rank + rope), 2 * heads * (nope + rope + value)
        return Attention(VALUE * (rank + rope), 1, decode, prefill, *layers), tuple(notes)
    if heads is None:
        notes.append("config.json names no attention heads: keys and values are taken as wide as the hidden states")
        wide = 4.0 * geometry.hidden
        return Attention(2 * VALUE * geometry.hidden, 1, wide, wide, *layers), tuple(notes)
    width = scope.get("head_dim") or geometry.hidden // heads
    kv_heads = _first(scope, _KV_HEADS) or heads
    flops = 4.0 * heads * width
    return Attention(2 * VALUE * kv_heads * width, kv_heads, flops, flops, *layers), tuple(notes)


def _first(scope: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((scope[key] for key in keys if isinstance(scope.get(key), int)), None)


def _layers(scope: Mapping[str, Any], layers: int) -> tuple[tuple[int, int, int], list[str]]:
    """Layers with full attention, with a window, and the window."""
    kinds = scope.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        unused = ("sliding_window",) if scope.get("use_sliding_window") is False else ()
        odd = sorted(k for k, value in scope.items() if value and k not in unused and any(part in k for part in _ODD))
        return (layers, 0, 0), [f"all layers are taken as full attention, in spite of {', '.join(odd)}"] if odd else []
    counts = Counter(str(kind) for kind in kinds)
    window = scope.get("sliding_window") or scope.get("attention_chunk_size") or 0
    sliding = sum(n for kind, n in counts.items() if window and ("sliding" in kind or "chunked" in kind))
    stateless = sum(n for kind, n in counts.items() if any(part in kind for part in _STATELESS))
    return (layers - sliding - stateless, sliding, window), []
