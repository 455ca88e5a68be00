"""What tells one model from another, whatever its storage format: a hash of the geometry and a sketch per router.

Sketch: eight numbers per router W (E, H), aᵀWb/‖W‖_F for fixed random signs a, b. Each has unit variance over models,
so that two different routers agree on all eight within the tolerance with a probability below 1e-12, while rounding W
to bfloat16 moves them by less than 0.005.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cache

import numpy as np
from pydantic import BaseModel, ConfigDict

from expertcut.checkpoint import read_array
from expertcut.checkpoint.types import Checkpoint
from expertcut.errors import PlanError
from expertcut.model.geometry import Geometry

SKETCH = 8
TOLERANCE = 0.02
"""Largest difference between two sketches of the same router; half-precision rounding stays below 0.005."""


class Fingerprint(BaseModel):
    """Identity of a model: same geometry hash and close sketches mean the same model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    geometry: str
    """sha256 of the canonical geometry, hexadecimal."""
    sketch: dict[str, tuple[float, ...]]
    """Eight numbers per MoE block of the trunk, by prefix."""


def geometry_hash(geometry: Geometry) -> str:
    """Return the sha256 of layers, expert count, top-k, groups and widths; names and storage formats do not enter.

    Multi-token-prediction layers do not enter either: quantised siblings often lack them.
    """
    facts = {
        "moe_layers": [block.layer for block in geometry.trunk],
        "num_layers": geometry.num_layers,
        "experts": geometry.num_experts,
        "top_k": geometry.top_k,
        "n_group": geometry.n_group,
        "topk_group": geometry.topk_group,
        "hidden": geometry.hidden,
        "expert_width": geometry.expert_width,
        "scoring": geometry.family.scoring,
        "renormalise": geometry.renormalise,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint, geometry: Geometry) -> Fingerprint:
    """Return the fingerprint; reads the routers of the trunk, nothing else.

    Raises:
        CheckpointError: a router is stored in a dtype that has no plain value.
    """
    sketch = {block.prefix: _sketch(read_array(checkpoint, block.router)) for block in geometry.trunk}
    return Fingerprint(geometry=geometry_hash(geometry), sketch=sketch)


def check_fingerprint(
    expected: Fingerprint, checkpoint: Checkpoint, geometry: Geometry, what: str = "plan"
) -> Fingerprint:
    """Compare a stored fingerprint with a checkpoint, and return the checkpoint's own.

    Raises:
        PlanError: the geometry differs, or the routers of some layer do.
    """
    if expected.geometry != geometry_hash(geometry):
        raise PlanError(
            f"the {what} was made for a model of another geometry than {checkpoint.name}, which has "
            f"{len(geometry.trunk)} MoE layers of {geometry.num_layers}, {geometry.num_experts} experts of width "
            f"{geometry.expert_width} in {geometry.n_group} groups, top-{geometry.top_k}, hidden size "
            f"{geometry.hidden}, {geometry.family.scoring} routers (compared: all of these, not the storage format)",
            f"make a {what} for this model, or pass the model it was made for",
        )
    own = fingerprint(checkpoint, geometry)
    found = own.sketch
    if [len(v) for v in expected.sketch.values()] != [SKETCH] * len(found):
        raise PlanError(f"the {what} is damaged: its fingerprint does not hold {SKETCH} numbers for each MoE layer")
    for old, new in zip(expected.sketch, found, strict=True):  # both in layer order
        distance = float(np.abs(np.subtract(expected.sketch[old], found[new])).max())
        if not distance <= TOLERANCE:
            raise PlanError(
                f"the {what} was made for another model than {checkpoint.name}: the router "
                f"{geometry.blocks[new].router} differs (compared: {SKETCH} numbers of each router's weights, whatever "
                f"their dtype; distance {distance:.3f}, tolerance {TOLERANCE})",
                f"make a {what} for this model",
            )
    return own


def _sketch(router: np.ndarray) -> tuple[float, ...]:
    """Without BLAS, whose threads wait for each other on a busy machine: sums over rows first, then over columns."""
    values_EH = router.astype(np.float64)
    rows, columns = router.shape
    norm = math.sqrt(float(np.einsum("eh,eh->", values_EH, values_EH))) or 1.0
    sums_SH = np.einsum("se,eh->sh", _signs("rows", SKETCH, rows), values_EH)
    values_S = np.einsum("sh,sh->s", sums_SH, _signs("columns", SKETCH, columns)) / norm
    return tuple(round(float(v), 6) for v in values_S)


@cache
def _signs(label: str, count: int, length: int) -> np.ndarray:
    """Fixed random signs, (count, length) float64, the same on every platform."""
    bits = hashlib.shake_256(f"expertcut.sketch/1 {label} {length}".encode()).digest((count * length + 7) // 8)
    flags = np.unpackbits(np.frombuffer(bits, np.uint8))[: count * length]
    return flags.reshape(count, length).astype(np.float64) * 2 - 1
