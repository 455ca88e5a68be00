"""A top-k tried on a running engine before anything is written: what to add to each runtime's command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertcut.model import Edit, Geometry

GGUF: Mapping[str, str] = {
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "qwen3_vl_moe": "qwen3vlmoe", "qwen3_5_moe": "qwen35moe",
    "olmoe": "olmoe", "mixtral": "llama", "phimoe": "phimoe", "dbrx": "dbrx", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2", "kimi_k2": "deepseek2", "glm4_moe": "glm4moe", "gpt_oss": "gpt-oss", "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe", "minimax_m2": "minimax-m2", "llama4": "llama4", "lfm2_moe": "lfm2moe",
}  # fmt: skip
"""What llama.cpp calls a model type's architecture."""


@dataclass(frozen=True, slots=True)
class Override:
    """Arguments that make one runtime take another top-k."""

    runtime: str
    arguments: str
    """As typed in a shell."""


def top_k_overrides(
    geometry: Geometry, config: Mapping[str, Any], top_k: int, gain: Sequence[Edit] = ()
) -> list[Override]:
    """Return the arguments by which runtimes serve the unchanged checkpoint with another top-k; none if it is the same.

    `gain` are the config's values by which the routed experts get a gain with it. Routers that know one top-k only, and
    configs with a list of them, have none.
    """
    edits = [*geometry.config_edits(config, geometry.num_experts, top_k), *gain]
    if len(edits) == len(gain) or geometry.family.fixed_top_k or any(isinstance(edit.new, list) for edit in edits):
        return []
    document: dict[str, Any] = {}
    for edit in edits:
        scope = document
        for key in edit.path[:-1]:
            scope = scope.setdefault(key, {})
        scope[edit.path[-1]] = edit.new
    text = shlex.quote(json.dumps(document))
    found = [
        Override("vLLM", f"--hf-overrides {text}"),
        Override("SGLang", f"--json-model-override-args {text}"),
    ]
    name = GGUF.get(geometry.family.model_type)
    if name:
        scales = [f" --override-kv {name}.expert_weights_scale=float:{edit.new:g}" for edit in gain[:1]]
        found.append(Override("llama.cpp", f"--override-kv {name}.expert_used_count=int:{top_k}{''.join(scales)}"))
    return found
