"""What the name of a tensor says of its place: layer and stack, multi-token prediction, or no language model."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from functools import lru_cache

from expertcut.model.families import TOWERS

LAYER = re.compile(
    r"(?P<stack>(?:[^.]+\.)*?)(?P<list>layers|blocks|mtp|mtp_layers|mtp_block)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
"""Splits the name of a decoder layer's tensor."""


def in_tower(name: str) -> bool:
    """True if a tensor or module belongs to a part that is no language model."""
    return any(map(_is_tower, name.split(".", 3)[:3]))


@lru_cache(maxsize=1024)  # names are many, their first parts few
def _is_tower(part: str) -> bool:
    return any(fnmatchcase(part, tower) for tower in TOWERS)


def is_mtp(name: str, layers: int, stacks: Collection[str] | None = None) -> bool:
    """True if a tensor belongs to multi-token prediction: a stack of its own, or layers behind the last of `stacks`."""
    if in_tower(name):
        return False
    if any(part == "mtp" or part.startswith("mtp_") for part in name.split(".")[:3]):
        return True
    place = LAYER.match(name)
    if place is None or int(place["layer"]) < layers:
        return False
    return stacks is None or place["stack"] in stacks
