"""What a raw config says of quantisation: a parsed `config.json` in, its quantization config and block sizes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization config, wherever it stands; empty if there is none."""
    text = config.get("text_config")
    for scope in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := scope.get(key), dict):
                return found
    return {}


def block_sizes(quantization: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Return the (rows, columns) that may share a scale, by a quantization config."""
    blocks = [quantization.get("weight_block_size")]
    for group in (quantization.get("config_groups") or {}).values():
        blocks.append((group.get("weights") or {}).get("block_structure"))
    return tuple(tuple(block) for block in blocks if isinstance(block, list))
