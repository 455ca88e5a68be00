"""Checkpoints whose layers differ in expert count or top-k, loaded in transformers.

from expertcut.runtimes.transformers import from_pretrained
model = from_pretrained("OUT", dtype="bfloat16")
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from expertcut.calibrate.hf import model_class
from expertcut.calibrate.uneven import per_layer
from expertcut.checkpoint.jsonio import load_json
from expertcut.model.uneven import stock_config


def from_pretrained(path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint directory; `kwargs` as for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ConfigConflictError: the config's numbers for single layers are damaged.
        RuntimeLintError: transformers' layers of that model type take no number.
    """
    raw = load_json(Path(path) / "config.json")
    config = AutoConfig.for_model(**stock_config(raw))
    kind = model_class(config)
    with per_layer(kind, raw):
        return kind.from_pretrained(path, config=config, **kwargs)
