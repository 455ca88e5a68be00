"""Experts that are kept whatever their score: those that the user names, and super experts.

Both come out as prefix → ids of the trunk's blocks; the selection treats them as a constraint. Multi-token-prediction
blocks follow the last layer of the trunk and are not named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from expertcut.errors import UsageError
from expertcut.model import Geometry, MoeBlock

Protected = dict[str, frozenset[int]]
"""Prefix of a MoE block → protected ids; blocks without any are absent."""

PERCENTILE = 99.5
SHARE_OF_MAXIMUM = 0.1
_ENTRY = re.compile(r"(?:(?P<layer>\d+):)?(?P<ids>\d+(?:,\d+)*)", re.ASCII)


def parse_protect(entries: Iterable[str], geometry: Geometry) -> Protected:
    """Parse `LAYER:ID[,ID…]` (absolute layer number) and `ID[,ID…]` (in every layer).

    Ids are those on disk: where a block has two sets of experts, the second set's follow the first's.

    Raises:
        UsageError: an entry is neither, or names a layer or an expert that the model lacks.
    """
    found: dict[str, set[int]] = {}
    for entry in entries:
        match = _ENTRY.fullmatch(entry.strip())
        if not match:
            raise UsageError(
                f"--protect {entry!r}: expected LAYER:ID[,ID…] or ID[,ID…]", "for example --protect 3:17,42"
            )
        ids = {int(i) for i in match["ids"].split(",")}
        experts = geometry.num_experts
        if max(ids) >= experts * geometry.family.sets:
            raise UsageError(
                f"--protect {entry}: expert {max(ids)}, but ids end at {experts * geometry.family.sets - 1}"
            )
        for block in _blocks(entry, match["layer"], geometry):
            for e in ids:
                found.setdefault(block.keys[e // experts], set()).add(e % experts)
    return {prefix: frozenset(ids) for prefix, ids in found.items()}


def super_experts(act_max: Mapping[str, NDArray[np.float64]]) -> Protected:
    """Find super experts (arXiv:2507.23279) by the largest activation that entered each expert's down projection.

    Takes prefix → (E,) maxima. Super is what lies above the 99.5th percentile of all experts of all layers and above a
    tenth of the largest maximum.
    """
    everything = np.concatenate(list(act_max.values()))
    threshold = max(np.percentile(everything, PERCENTILE), SHARE_OF_MAXIMUM * everything.max())
    found = {prefix: frozenset(np.flatnonzero(a > threshold).tolist()) for prefix, a in act_max.items()}
    return {prefix: ids for prefix, ids in found.items() if ids}


def union(first: Protected, second: Protected) -> Protected:
    """Return the experts that either protects."""
    nothing: frozenset[int] = frozenset()
    return {p: first.get(p, nothing) | second.get(p, nothing) for p in {**first, **second}}


def _blocks(entry: str, layer: str | None, geometry: Geometry) -> list[MoeBlock]:
    if layer is None:
        return list(geometry.trunk)
    found = [block for block in geometry.blocks.values() if block.layer == int(layer)]
    if not found:
        layers = ", ".join(str(block.layer) for block in geometry.trunk)
        raise UsageError(f"--protect {entry}: layer {layer} has no routed experts; layers that have: {layers}")
    if found[0].mtp:
        last = geometry.trunk[-1].layer
        raise UsageError(
            f"--protect {entry}: layer {layer} predicts further tokens and keeps the experts that layer {last} keeps",
            f"protect them in layer {last}",
        )
    return found
