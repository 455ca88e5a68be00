"""Checkpoints whose layers differ in expert count or top-k, loaded in transformers.

    from expertcut.runtimes.transformers import from_pretrained
    model = from_pretrained("OUT", dtype="bfloat16")
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from expertcut.calibrate.uneven import per_layer
from expertcut.checkpoint.jsonio import load_json
from expertcut.model.families import resolve_family
from expertcut.model.uneven import is_uneven, layer_numbers, restored


def from_pretrained(path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint directory; `kwargs` as for `AutoModelForCausalLM.from_pretrained`.

    Checkpoints with one expert count and one top-k are loaded as by transformers itself.

    Raises:
        ConfigConflictError: the config's numbers for single layers are damaged.
        RuntimeLintError: transformers' layers of that model type take no number.
    """
    raw = load_json(Path(path) / "config.json")
    if not is_uneven(raw):
        plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        return plain
    stock = restored(raw)
    config = AutoConfig.for_model(**stock)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    with per_layer(kind, layer_numbers(raw), resolve_family(stock)):
        model: PreTrainedModel = kind.from_pretrained(path, config=config, **kwargs)
    return model
