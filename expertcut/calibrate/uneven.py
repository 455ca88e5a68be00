"""transformers' own model classes, each decoder layer built with the expert count and top-k of its own."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from expertcut.errors import RuntimeLintError
from expertcut.model.families import Family, resolve_family
from expertcut.model.uneven import LayerNumbers, layer_numbers, set_numbers, stock_config


@contextmanager
def per_layer(kind: type[nn.Module], config: PreTrainedConfig, raw: Mapping[str, Any]) -> Iterator[None]:
    """While this lasts, decoder layers of `kind` are built with the numbers that a raw config gives their layers.

    `config` is the model's; other towers than that of text keep theirs. Nothing changes if the layers are all alike.

    Raises:
        RuntimeLintError: there are no classes of decoder layers that take a config and a layer's number, or a layer
            with numbers of its own is not built by one.
        ConfigConflictError: the config object has no such numbers.
    """
    numbers, family, text = layer_numbers(raw), resolve_family(stock_config(raw)), config.get_text_config()
    if numbers is None:
        yield
        return
    modules = (kind.__module__, type(text).__module__.replace(".configuration_", ".modeling_"))
    inits = {
        value: value.__init__
        for module in modules
        for value in vars(importlib.import_module(module)).values()
        if inspect.isclass(value) and value.__name__.endswith(("DecoderLayer", "Block")) and _takes_number(value)
    }
    if not inits:
        raise RuntimeLintError(f"{kind.__name__}: its layers take no number, so that they cannot differ")
    built: set[int] = set()
    try:
        for layer_class, init in inits.items():
            setattr(layer_class, "__init__", _adjusted(init, type(text), numbers, family, built))  # noqa: B010
        yield
    finally:
        for layer_class, init in inits.items():
            setattr(layer_class, "__init__", init)  # noqa: B010
    lacking = {layer for layer in numbers.experts if layer < text.num_hidden_layers} - built
    if lacking:
        raise RuntimeLintError(f"{kind.__name__} is built without numbers of its own for layer {min(lacking)}")


def _takes_number(layer_class: type) -> bool:
    return {"config", "layer_idx"} <= inspect.signature(layer_class).parameters.keys()


def _adjusted(
    init: Callable[..., None], kind: type, numbers: LayerNumbers, family: Family, built: set[int]
) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def adjusted(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        config, layer = given.arguments["config"], given.arguments["layer_idx"]
        if type(config) is kind and layer in numbers.experts:
            config = given.arguments["config"] = copy.copy(config)
            set_numbers(config, family, numbers.experts[layer], numbers.top_k[layer])
            built.add(layer)
        init(*given.args, **given.kwargs)

    return adjusted
