"""Numbers of a raw config under any of their names: positive integers, on which all names that are present agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertcut.errors import ConfigConflictError
from expertcut.model.families import GROUP_KEYS, LAYER_KEYS, LAYER_LISTS, Family, dig


class Numbers:
    """Reads numbers of a raw config, below the family's root or, where they are not there, at the top."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        scope = dig(config, family.root)
        if scope is None:
            raise ConfigConflictError(f"config.json: {'.'.join(family.root)} is missing or not an object")
        self.scope, self.top = scope, config

    def agreed(self, keys: tuple[str, ...]) -> int:
        """The number that all present keys agree on."""
        present = {key: _number(self.scope, key) for key in keys if self.scope.get(key) is not None}
        if not present:
            raise ConfigConflictError(f"config.json: none of {', '.join(keys)} is set")
        if len(set(present.values())) > 1:
            raise ConfigConflictError(
                "config.json: " + " but ".join(f"{key}={value}" for key, value in present.items()),
                "make the aliases agree with the tensors",
            )
        return next(iter(present.values()))

    def first(self, keys: tuple[str, ...], per_set: bool = False) -> int:
        """The number under the first present key; of a list with an entry per set of experts the first set's."""
        for scope in (self.scope, self.top):
            for key in keys:
                if (found := scope.get(key)) is not None:
                    return _number({key: found[:1]} if per_set and isinstance(found, list) else scope, key)
        raise ConfigConflictError(f"config.json: none of {', '.join(keys)} is set")

    def layers(self) -> int:
        """The number of decoder layers."""
        if not any(scope.get(key) is not None for scope in (self.scope, self.top) for key in LAYER_KEYS):
            for key in LAYER_LISTS:
                if self.scope.get(key):
                    return len(self.scope[key])
        return self.first(LAYER_KEYS)

    def groups(self, family: Family, experts: int) -> tuple[int, int]:
        """The number of expert groups, and how many of them a token uses."""
        key = next((key for key in GROUP_KEYS if self.scope.get(key)), None)
        n_group = self.scope[key] if key else 1
        if n_group == 1 or (family.grouped_if and self.scope.get(family.grouped_if[0]) != family.grouped_if[1]):
            return 1, 1
        topk_group = _number(self.scope, "topk_group")
        if experts % _number(self.scope, str(key)) or topk_group > n_group:
            raise ConfigConflictError(
                f"config.json: {experts} experts in {key}={n_group} groups of which topk_group={topk_group} are used"
            )
        return n_group, topk_group


def _number(scope: Mapping[str, Any], key: str) -> int:
    value = scope.get(key)
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigConflictError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value
