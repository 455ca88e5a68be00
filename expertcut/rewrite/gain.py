"""A plan's gains in; how they reach the checkpoint out: by one number of the config, or folded into tensors.

Where all layers have one gain and the config has a factor on what the routed experts add up to, that factor changes and
nothing else. Otherwise the gain is multiplied into what the experts' last projection is stored by (its outermost scale
where it is quantised, else its weight) and into its bias. Invariant: a tensor that cannot hold a factor but for the
rounding of its dtype is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from expertcut.checkpoint import Checkpoint, TensorInfo
from expertcut.choose.plan import Plan, gains
from expertcut.errors import PlanError
from expertcut.model import Edit, ExpertTensor, Geometry, MoeBlock, Sliced
from expertcut.model.families import SCALING_KEYS, dig

ROUNDING: Mapping[str, float] = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Dtypes that a gain can be folded into, and by what share of itself it may round a value."""

LAST = re.compile(r"(?:^|\.)(?:down_projs?|output_linear|w2|fc2)(?=[._]|$)")
"""The last projection of an expert, in the name of a tensor below its block."""
_PARTS = (
    "weight_scale_2", "scale_2", "weight_global_scale", "weight_scale_inv", "scale_inv", "weight_scale", "scale",
    "scales", "weight", "",
)  # fmt: skip
"""What can carry a factor on a whole projection; the first one that is there does."""
_DIVISORS = ("weight_global_scale",)
_BIAS = "bias"


def config_gain(config: Mapping[str, Any], geometry: Geometry, plan: Plan) -> list[Edit]:
    """Return the values of the raw config that give all layers the plan's gain; none if the config cannot."""
    wanted = set(gains(plan, geometry).values())
    if len(wanted) > 1 or wanted == {1.0} or geometry.family.scales_shared:
        return []
    (gain,) = wanted
    return [
        Edit((*path, key), found, found * gain)
        for path in dict.fromkeys((geometry.family.root, ()))
        for key in SCALING_KEYS
        if isinstance(found := (dig(config, path) or {}).get(key), int | float) and not isinstance(found, bool)
    ]


def folded(ckpt: Checkpoint, geometry: Geometry, plan: Plan) -> dict[str, float]:
    """Return the factor of every tensor of the source that the plan's gains are folded into; empty if there is none.

    Tensors that the plan has new values for are left out: their values were found with the gain.

    Raises:
        PlanError: a gain that the family or the format cannot carry.
    """
    wanted = gains(plan, geometry)
    if set(wanted.values()) == {1.0} or config_gain(ckpt.config, geometry, plan):
        return {}
    family = geometry.family
    if family.unscalable:
        raise PlanError(
            f"gain: {family.model_type}: {family.unscalable}, so that it cannot be folded into their weights",
            "plan without a gain, or give all layers one gain where the config has a factor for it",
        )
    found: dict[str, float] = {}
    for block in geometry.blocks.values():
        for key, parts in last_projections(geometry, block):
            if wanted[key] != 1.0:
                found |= _carriers(ckpt, parts, wanted[key])
    replaced = plan.deltas.tensors if plan.deltas else {}
    return {name: factor for name, factor in found.items() if name not in replaced}


def rescaled(values: npt.NDArray[np.uint8], dtype: str, factor: float) -> npt.NDArray[np.uint8]:
    """Return the bytes of floats times `factor`, rounded to nearest; (N,) uint8 in and out, `dtype` as in headers."""
    if dtype == "BF16":
        wide = (values.view("<u2").astype(np.uint32) << 16).view(np.float32)
        bits = (wide.astype(np.float64) * factor).astype(np.float32).view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).astype("<u2").view(np.uint8)
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    return (values.view(kind).astype(np.float64) * factor).astype(kind).view(np.uint8)


def last_projections(geometry: Geometry, block: MoeBlock) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (key of the set, part → tensor name) of every last projection of a block, single or stacked."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in block.tensors:
        role = geometry.roles[name]
        if isinstance(role, ExpertTensor) and role.expert < geometry.num_experts * len(block.keys):
            key, below = block.keys[role.expert // geometry.num_experts], role.part
            where = f"{role.expert}."
        elif isinstance(role, Sliced):
            key, below, where = block.prefix, name.removeprefix(f"{block.prefix}."), ""
        else:
            continue
        if match := LAST.search(below):
            part = below[match.end() :].lstrip("._")
            found.setdefault((key, where + below[: match.end()]), {})[part] = name
    for (key, _), parts in found.items():
        yield key, parts


def _carriers(ckpt: Checkpoint, parts: Mapping[str, str], gain: float) -> Iterator[tuple[str, float]]:
    """Yield the tensors of one projection that the gain goes into, with their factors."""
    carrier = next((part for part in _PARTS if part in parts), None)
    for part in (carrier, _BIAS):
        if part is None or part not in parts:
            continue
        info: TensorInfo = ckpt.tensors[parts[part]]
        if info.dtype not in ROUNDING:
            raise PlanError(
                f"{info.shard}: gain: {info.name} is {info.dtype}, which holds no gain; expected one of "
                f"{', '.join(ROUNDING)}",
                "plan without a gain, or give all layers one gain where the config has a factor for it",
            )
        yield info.name, 1 / gain if part in _DIVISORS else gain
    if carrier is None:
        raise PlanError(f"gain: found nothing to fold it into among {', '.join(parts.values())}", "plan without a gain")
