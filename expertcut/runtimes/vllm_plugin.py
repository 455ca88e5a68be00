"""A general plug-in of vLLM: serves checkpoints whose layers differ in expert count or top-k.

`pip install expertcut` beside vLLM is all there is to do; vLLM finds the plug-in by its entry point, in every process.
The config that vLLM sees is the original one. While it builds a decoder layer, the config says that layer's numbers.
What cannot be served is refused when such a checkpoint is loaded; other checkpoints are not affected.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from expertcut.errors import RuntimeLintError
from expertcut.model.families import BY_TYPE
from expertcut.model.uneven import PREFIX, layer_numbers, set_numbers, stock_config

TESTED = "0.32"
"""Minor release of vLLM that the plug-in was tested with."""
PARAMETERS = ["num_hidden_layers", "layer_fn", "prefix"]
"""What vLLM's `make_layers` takes, in the tested release."""
NUMBERS = "expertcut_layers"
"""Attribute of a config object that holds the layers' numbers."""
QUANTISED = frozenset({"fp8", "compressed-tensors"})
"""Methods of quantisation whose buffers follow the layer's own expert count."""


def register() -> None:
    """Make vLLM build layers that differ; called by vLLM in each of its processes, harmless when repeated."""
    utils: Any = importlib.import_module("vllm.model_executor.models.utils")
    if hasattr(utils.make_layers, "__wrapped__"):
        return
    problem = _problem(utils.make_layers)
    if problem is None:
        utils.make_layers = _with_own_numbers(utils.make_layers)
    for model_type in BY_TYPE:
        AutoConfig.register(PREFIX + model_type, _config_class(model_type, problem), exist_ok=True)


def _problem(make_layers: Callable[..., Any]) -> str | None:
    """Why this vLLM cannot be served with, if it cannot."""
    parameters = list(inspect.signature(make_layers).parameters)
    if parameters == PARAMETERS:
        return None
    version = importlib.import_module("vllm").__version__
    return f"vLLM {version}: make_layers takes {', '.join(parameters)}, expected {', '.join(PARAMETERS)} as in {TESTED}"


def _with_own_numbers(make_layers: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_layers)
    def wrapped(num_hidden_layers: int, layer_fn: Callable[..., Any], prefix: str) -> Any:
        vllm_config = importlib.import_module("vllm.config").get_current_vllm_config()
        config = vllm_config.model_config.hf_text_config
        numbers: dict[int, tuple[int, int]] | None = getattr(config, NUMBERS, None)
        if numbers is None:
            return make_layers(num_hidden_layers, layer_fn, prefix)
        _refuse_run(vllm_config)
        family = BY_TYPE[config.model_type]

        def build(prefix: str) -> Any:
            own = numbers.get(int(prefix.rpartition(".")[2]))
            old = set_numbers(config, family, *own) if own else {}
            try:
                return layer_fn(prefix=prefix)
            finally:
                for key, value in old.items():
                    setattr(config, key, value)

        return make_layers(num_hidden_layers, build, prefix)

    return wrapped


def _config_class(model_type: str, problem: str | None) -> type[PreTrainedConfig]:
    """A config class for checkpoints of `expertcut_<model_type>` whose objects are of the original class."""

    def from_dict(cls: type[PreTrainedConfig], raw: dict[str, Any], /, **kwargs: Any) -> Any:
        if problem:
            raise RuntimeLintError(problem, f"pip install 'vllm=={TESTED}.*'")
        numbers, stock = layer_numbers(raw), dict(stock_config(raw))
        assert numbers is not None
        _refuse_checkpoint(stock)
        found = CONFIG_MAPPING[model_type].from_dict(stock, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        pairs = {layer: (count, numbers.top_k[layer]) for layer, count in numbers.experts.items()}
        setattr(config.get_text_config(), NUMBERS, pairs)
        return found

    members = {"model_type": PREFIX + model_type, "from_dict": classmethod(from_dict)}
    return type(f"Expertcut{model_type.title().replace('_', '')}Config", (PreTrainedConfig,), members)


def _refuse_checkpoint(config: dict[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method is not None and method not in QUANTISED:
        raise RuntimeLintError(f"layers that differ, quantised by {method}: not served; served: {', '.join(QUANTISED)}")
    models = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry.models
    for name in config.get("architectures", ()):
        module = getattr(models.get(name), "module_name", None)
        if module is None or not hasattr(importlib.import_module(module), "make_layers"):
            raise RuntimeLintError(f"layers that differ: not served for {name}, which vLLM builds without make_layers")


def _refuse_run(vllm_config: Any) -> None:
    if vllm_config.parallel_config.enable_eplb:
        raise RuntimeLintError("layers that differ: no expert-parallel load balancing", "leave out --enable-eplb")
    speculative = vllm_config.speculative_config
    if speculative is not None and "mtp" in str(speculative.method):
        raise RuntimeLintError("layers that differ: no multi-token prediction", "leave out --speculative-config")
