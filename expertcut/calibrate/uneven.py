"""transformers' own model classes, each decoder layer built with the expert count and top-k of its own."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from expertcut.errors import RuntimeLintError
from expertcut.model.families import Family, resolve_family
from expertcut.model.uneven import LayerNumbers, layer_numbers, set_numbers, stock_config


@contextmanager
def per_layer(kind: type[nn.Module], raw: Mapping[str, Any]) -> Iterator[None]:
    """While this lasts, decoder layers of `kind` are built with the numbers that a raw config gives their layers.

    Nothing changes if its layers are all alike.

    Raises:
        RuntimeLintError: the module that defines `kind` has no decoder layers that take a config and a layer's number.
    """
    numbers, family = layer_numbers(raw), resolve_family(stock_config(raw))
    if numbers is None:
        yield
        return
    inits = {
        value: value.__init__
        for value in vars(sys.modules[kind.__module__]).values()
        if inspect.isclass(value) and value.__name__.endswith("DecoderLayer") and _takes_number(value)
    }
    if not inits:
        raise RuntimeLintError(f"{kind.__name__}: its layers take no number, so that they cannot differ")
    try:
        for layer_class, init in inits.items():
            setattr(layer_class, "__init__", _adjusted(init, numbers, family))  # noqa: B010
        yield
    finally:
        for layer_class, init in inits.items():
            setattr(layer_class, "__init__", init)  # noqa: B010


def _takes_number(layer_class: type) -> bool:
    return {"config", "layer_idx"} <= inspect.signature(layer_class).parameters.keys()


def _adjusted(init: Callable[..., None], numbers: LayerNumbers, family: Family) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def adjusted(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        layer = given.arguments["layer_idx"]
        if layer in numbers.experts:
            given.arguments["config"] = copy.copy(given.arguments["config"])
            set_numbers(given.arguments["config"], family, numbers.experts[layer], numbers.top_k[layer])
        init(*given.args, **given.kwargs)

    return adjusted
