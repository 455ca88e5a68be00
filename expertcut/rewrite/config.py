"""The raw config in, the same config with the owned keys replaced out; every other key keeps its value and place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from typing import Any

from expertcut.model import Edit

ABSENT = "(absent)"


def edit_config(config: dict[str, Any], edits: Iterable[Edit]) -> dict[str, Any]:
    """Return a deep copy of `config` with the edits applied; each must find the old value that it names."""
    edited = copy.deepcopy(config)
    for edit in edits:
        scope = edited
        for key in edit.path[:-1]:
            scope = scope[key]
        assert scope.get(edit.path[-1], ABSENT) == edit.old
        scope[edit.path[-1]] = edit.new
    return edited


def config_bytes(config: dict[str, Any]) -> bytes:
    """Return the file's contents, formatted as transformers formats it."""
    return (json.dumps(config, indent=2) + "\n").encode()


def differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[Edit]:
    """Yield what differs between two parsed configs; a key that one of them lacks shows as `(absent)`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            if key in old and key in new:
                yield from differences(old[key], new[key], (*path, key))
            else:
                yield Edit((*path, key), old.get(key, ABSENT), new.get(key, ABSENT))
    elif json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):  # 1 is not true, NaN is NaN
        yield Edit(path, old, new)


def describe(edit: Edit) -> str:
    """One line for people: `num_experts 8 → 4`, and of long lists and objects their numbers of entries."""
    long = any(isinstance(v, (list, dict)) and len(str(v)) > 40 for v in (edit.old, edit.new))
    old, new = (f"{len(v)} entries" if long else v for v in (edit.old, edit.new))
    return f"{'.'.join(edit.path)} {old} → {new}"
