"""Layers that differ in expert count or top-k: how a checkpoint says so.

Ordinary runtimes read one number for all layers, and would serve such a checkpoint wrongly or not at all. So it carries
a model type and architectures of its own, which they refuse; the original ones and the numbers of every MoE layer stand
under the key `expertcut`, for the plug-ins. The family's own keys hold the largest numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertcut.errors import ConfigConflictError
from expertcut.model.families import Family

KEY = "expertcut"
SCHEMA = "expertcut.layers/1"
PREFIX = "expertcut_"
"""In front of the original model type; in front of the architectures `Expertcut`."""


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """Expert count and top-k of every MoE layer, by absolute layer number."""

    experts: Mapping[int, int]
    top_k: Mapping[int, int]

    @property
    def uneven(self) -> bool:
        """True if no one pair of numbers serves all layers."""
        return len({*self.experts.values()}) > 1 or len({*self.top_k.values()}) > 1


def is_uneven(config: Mapping[str, Any]) -> bool:
    """True if a raw config says that its layers differ."""
    return str(config.get("model_type", "")).startswith(PREFIX)


def marked(config: Mapping[str, Any], numbers: LayerNumbers) -> dict[str, Any]:
    """Return a raw config that says that its layers differ, and how; its other keys are those of `config`."""
    originals = {key: config[key] for key in ("model_type", "architectures") if key in config}
    layers = {
        name: {str(layer): count for layer, count in sorted(counts.items())}
        for name, counts in (("experts", numbers.experts), ("top_k", numbers.top_k))
    }
    return {
        **config,
        "model_type": PREFIX + config["model_type"],
        "architectures": [f"Expertcut{name}" for name in config.get("architectures", ())],
        KEY: {"schema": SCHEMA, **originals, **layers},
    }


def stock_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a raw config as stock runtimes know it: original model type and architectures, one number for all layers.

    Raises:
        ConfigConflictError: the layers differ, but the key `expertcut` is absent or not of this schema.
    """
    if not is_uneven(config):
        return config
    record = _record(config)
    originals: dict[str, Any] = {key: record[key] for key in ("model_type", "architectures") if key in record}
    return {key: originals.get(key, value) for key, value in config.items() if key != KEY}


def layer_numbers(config: Mapping[str, Any]) -> LayerNumbers | None:
    """Return the numbers that a raw config carries for its layers, None if they are all alike.

    Raises:
        ConfigConflictError: the layers differ, but the key `expertcut` is absent or not of this schema.
    """
    if not is_uneven(config):
        return None
    record = _record(config)
    return LayerNumbers(_counts(record, "experts"), _counts(record, "top_k"))


def _record(config: Mapping[str, Any]) -> dict[str, Any]:
    record = config.get(KEY)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ConfigConflictError(f"config.json: {KEY}.schema is {found!r}, expected {SCHEMA!r}")
    if record.get("model_type") != str(config["model_type"]).removeprefix(PREFIX):
        raise ConfigConflictError(
            f"config.json: {KEY}.model_type is {record.get('model_type')!r}, "
            f"expected {str(config['model_type']).removeprefix(PREFIX)!r}"
        )
    return record


def _counts(record: Mapping[str, Any], name: str) -> dict[int, int]:
    counts = record.get(name)
    if not isinstance(counts, dict) or not counts:
        raise ConfigConflictError(f"config.json: {KEY}.{name} is not an object of layer numbers and counts")
    for layer, count in counts.items():
        if not layer.isdecimal() or type(count) is not int or count < 1:
            raise ConfigConflictError(f"config.json: {KEY}.{name}.{layer} is {count!r}, expected a count of 1 or more")
    return {int(layer): count for layer, count in counts.items()}


def set_numbers(config: Any, family: Family, experts: int, top_k: int) -> dict[str, Any]:
    """Set a config object's expert count and top-k under every name it has for them; return the old values.

    Raises:
        ConfigConflictError: it has no name for one of them, so that setting it would change nothing.
    """
    wanted = dict.fromkeys(family.experts, experts) | dict.fromkeys(family.top_k, top_k)
    old = {key: getattr(config, key) for key in wanted if getattr(config, key, None) is not None}
    for names in (family.experts, family.top_k):
        if old.keys().isdisjoint(names):
            raise ConfigConflictError(f"{type(config).__name__} of {family.model_type} has no {' or '.join(names)}")
    for key in old:
        setattr(config, key, wanted[key])
    return old
