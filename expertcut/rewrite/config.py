"""The raw config in, the same config with the owned keys replaced out; every other key keeps its value and place."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from expertcut.checkpoint import Checkpoint
from expertcut.errors import ConfigConflictError
from expertcut.model import Edit, Geometry

ABSENT = "(absent)"


def edit_config(config: dict[str, Any], edits: Iterable[Edit]) -> dict[str, Any]:
    """Return a deep copy of `config` with the edits applied; each must find the old value that it names."""
    edited = copy.deepcopy(config)
    for edit in edits:
        scope = edited
        for key in edit.path[:-1]:
            scope = scope[key]
        assert scope[edit.path[-1]] == edit.old
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


def check_quantization(ckpt: Checkpoint, geometry: Geometry) -> None:
    """Refuse a `quantization_config` that names routed experts by number: renumbering would make it lie.

    Raises:
        ConfigConflictError: naming the entry.
    """
    numbered = re.compile(rf"(?:^|[.\\]){re.escape(geometry.family.expert)}\\?\.\d")
    for key in ("quantization_config", "compression_config"):
        for scope in (ckpt.config, *(ckpt.config.get(root) or {} for root in geometry.family.root)):
            for text in _strings(scope.get(key)):
                if numbered.search(text):
                    raise ConfigConflictError(
                        f"config.json: {key} names a single expert ({text!r}), whose number would change",
                        "replace the entry by one that covers all experts",
                    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield key
            yield from _strings(member)
    elif isinstance(value, list):
        for member in value:
            yield from _strings(member)
