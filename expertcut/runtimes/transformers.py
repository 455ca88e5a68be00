"""Checkpoints whose layers differ in expert count or top-k, loaded in transformers.

from expertcut.runtimes.transformers import from_pretrained
model = from_pretrained("OUT", dtype="bfloat16")
"""

from __future__ import annotations

import functools
import json
from os import PathLike
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from expertcut.calibrate.hf import model_class, read_config
from expertcut.calibrate.uneven import per_layer
from expertcut.model.uneven import LayerNumbers, layer_numbers, marked

OF_THE_MODEL = ("dtype", "torch_dtype", "quantization_config")
"""Arguments that transformers' automatic classes keep from the config."""


def from_pretrained(path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint directory or Hub repository; `kwargs` as for `AutoModelForCausalLM.from_pretrained`.

    The model's `save_pretrained` writes a checkpoint of the same kind. Layers that are alike are no obstacle.

    Raises:
        ConfigConflictError: the config's numbers for single layers are damaged.
        RuntimeLintError: transformers' layers of that model type take no number.
        ValueError: transformers does not know the model type.
    """
    raw, others = PreTrainedConfig.get_config_dict(path, **kwargs)
    where = {key: value for key, value in kwargs.items() if key not in others}
    kept = {key: others.pop(key) for key in OF_THE_MODEL if key in others}
    config, others = read_config(raw, **others)
    kind, numbers = model_class(config), layer_numbers(raw)
    with per_layer(kind, config, raw):
        loaded = kind.from_pretrained(path, config=config, **where, **kept, **others)
    if numbers is not None:
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.save_pretrained = functools.partial(_save, model, numbers)
    return loaded


def _save(model: PreTrainedModel, numbers: LayerNumbers, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained` with a config that says its layers' numbers."""
    plain = type(model.config)

    def to_json_string(config: PreTrainedConfig, use_diff: bool = True) -> str:
        raw = json.loads(plain.to_json_string(config, use_diff))
        return json.dumps(marked(raw, numbers), indent=2, sort_keys=True) + "\n"

    model.config.__class__ = type(plain.__name__, (plain,), {"to_json_string": to_json_string})
    try:
        type(model).save_pretrained(model, *args, **kwargs)
    finally:
        model.config.__class__ = plain
