"""A raw config as repositories' own code reads it in, as transformers reads it out; only what a text pass needs.

Ernie-VL is published with its text model's numbers at the top and a list wherever text and images differ; transformers
has a class for the model, but reads those numbers from `text_config` only. Tensor names are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEGACY = {"ernie4_5_moe_vl": "ernie4_5_vl_moe"}
"""Model types that transformers knows under another name and with another config."""

_TEXT = (
    "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "moe_intermediate_size",
    "moe_k", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
    "use_bias", "vocab_size",
)  # fmt: skip


def modern(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a raw config as transformers reads it; the same object where it does so already.

    Raises:
        KeyError: a number is missing.
    """
    if raw.get("model_type") not in LEGACY:
        return raw
    layers, every = raw["num_hidden_layers"], raw.get("moe_layer_interval") or 1
    first = min(_list(raw.get("moe_layer_start_index", 0)))
    last = max(_list(raw.get("moe_layer_end_index", layers)))
    sparse = [first <= i <= last and (i + 1) % every == 0 for i in range(layers)]
    text = {key: raw[key] for key in _TEXT if raw.get(key) is not None}
    text |= {
        "moe_num_experts": _list(raw["moe_num_experts"])[0],
        "moe_num_shared_experts": raw.get("moe_num_shared_experts") or 0,
        "mlp_layer_types": ["sparse" if yes else "dense" for yes in sparse],
        "rope_parameters": {"rope_type": "default", "rope_theta": raw.get("rope_theta", 5e5),
                            "mrope_section": _sections(raw)},
    }  # fmt: skip
    kept = {key: raw[key] for key in ("architectures", "dtype", "torch_dtype", "tie_word_embeddings") if key in raw}
    return kept | {"model_type": LEGACY[raw["model_type"]], "text_config": text}


def _sections(raw: Mapping[str, Any]) -> list[int]:
    """Rotary frequencies of height, width and time: half a head in all, `freq_allocation` of it for time."""
    time = raw.get("freq_allocation") or 20
    half = (raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]) // 2
    return [(half - time) // 2, (half - time) // 2, time]


def _list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
