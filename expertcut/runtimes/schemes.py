"""Whether vLLM takes a layer's experts for unquantised although they are stored quantised.

It decides once for all experts of a layer: with compressed-tensors by what `ignore` says of expert 0, with FP8 by any
entry that begins with the layer's experts, whichever expert it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from expertcut.model import ExpertTensor, Geometry, MoeBlock

_PLAIN = ("weight", "bias")


def misread_layer(quantization: Mapping[str, Any], geometry: Geometry) -> int | None:
    """Return the first layer that is taken for unquantised against what its tensors say, None if there is none."""
    for block in geometry.blocks.values():
        parts = [
            role.part for name in block.tensors
            if isinstance(role := geometry.roles[name], ExpertTensor) and role.expert == 0
        ]  # fmt: skip
        quantised = any(part.rpartition(".")[2] not in _PLAIN for part in parts)
        if quantised and _ignored(quantization, block, parts):
            return block.layer
    return None


def _ignored(quantization: Mapping[str, Any], block: MoeBlock, parts: Iterable[str]) -> bool:
    if quantization.get("quant_method") == "compressed-tensors":
        names = {f"{block.expert_prefix}0.{part.rpartition('.')[0]}" for part in parts}
        return any(_names(entry, name) for entry in quantization.get("ignore") or () for name in names)
    if quantization.get("quant_method") == "fp8":
        entries = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or ()
        return any(block.expert_prefix.rstrip(".") in entry for entry in entries)
    return False


def _names(entry: str, name: str) -> bool:
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
