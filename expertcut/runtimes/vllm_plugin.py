"""A general plug-in of vLLM: serves checkpoints whose layers differ in expert count or top-k.

`pip install expertcut` beside vLLM is all there is to do; vLLM finds the plug-in by its entry point, in every process.
The config that vLLM sees is the original one. While it builds a decoder layer, the config says that layer's numbers;
the layer that comes out must have them. What cannot be served is refused by name when such a checkpoint is loaded;
other checkpoints are not affected.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from packaging.version import InvalidVersion, Version
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from expertcut.errors import RuntimeLintError
from expertcut.model.families import BY_TYPE, Family
from expertcut.model.uneven import PREFIX, layer_numbers, set_numbers, stock_config
from expertcut.runtimes.rules import QUANTISED

TESTED = "0.32"
"""Minor release of vLLM that the plug-in was tested with."""
PARAMETERS = ["num_hidden_layers", "layer_fn", "prefix"]
"""What vLLM's `make_layers` takes, in the tested release."""
CURRENT = "get_current_vllm_config_or_none"
"""What tells, in `vllm.config`, which model is being built."""
NUMBERS = "expertcut_layers"
"""Attribute of a config object that holds the layers' numbers."""
REFUSED: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("--enable-eplb, which balances as many experts in every layer", lambda c: c.parallel_config.enable_eplb),
    (
        "--enable-ep-weight-filter, which picks a rank's experts by the count of the largest layer",
        lambda c: c.parallel_config.enable_ep_weight_filter,
    ),
    (
        "enable_return_routed_experts, which returns as many from every layer",
        lambda c: c.aux_output_config.enable_return_routed_experts,
    ),
    (
        "--enable-expert-parallel for gpt_oss, whose loader splits experts by the count of the largest layer",
        lambda c: c.parallel_config.enable_expert_parallel and c.model_config.hf_text_config.model_type == "gpt_oss",
    ),
    (
        "speculation by multi-token prediction, whose layers vLLM builds without make_layers",
        lambda c: c.speculative_config is not None and "mtp" in str(c.speculative_config.method),
    ),
)
"""What a run must leave out, and whether a vLLM config asks for it."""


def register() -> None:
    """Make vLLM build layers that differ; called by vLLM in each of its processes, harmless when repeated."""
    utils: Any = importlib.import_module("vllm.model_executor.models.utils")
    if hasattr(utils.make_layers, NUMBERS):
        return
    problem = _problem(utils.make_layers)
    if problem is None:
        _replace(utils.make_layers, _with_own_numbers(utils.make_layers))
    for model_type in BY_TYPE:
        AutoConfig.register(PREFIX + model_type, _config_class(model_type, problem), exist_ok=True)


def _problem(make_layers: Callable[..., Any]) -> str | None:
    """Why this vLLM cannot be served with, if it cannot."""
    parameters, version = list(inspect.signature(make_layers).parameters), _version()
    if version is not None and version < Version(TESTED):
        return f"vLLM {version} is older than {TESTED}, with which layers that differ were tested"
    if parameters != PARAMETERS:
        return (
            f"vLLM {version or 'of unknown version'}: make_layers takes {', '.join(parameters)}, "
            f"expected {', '.join(PARAMETERS)} as in {TESTED}"
        )
    if not hasattr(importlib.import_module("vllm.config"), CURRENT):
        return f"vLLM {version or 'of unknown version'}: vllm.config has no {CURRENT}, which {TESTED} has"
    return None


def _version() -> Version | None:
    """vLLM's version, None for a build that does not know its own."""
    try:
        return Version(importlib.import_module("vllm").__version__)
    except InvalidVersion:
        return None


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put another `make_layers` in place everywhere: model files that are imported already hold it by name."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})  # not getattr, which would import what a lazy module offers
        if names.get("make_layers") is old:
            names["make_layers"] = new


def _with_own_numbers(make_layers: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_layers)
    def wrapped(num_hidden_layers: int, layer_fn: Callable[..., Any], prefix: str) -> Any:
        vllm_config = getattr(importlib.import_module("vllm.config"), CURRENT)()
        config = vllm_config and vllm_config.model_config and vllm_config.model_config.hf_text_config
        numbers: dict[int, tuple[int, int]] | None = getattr(config, NUMBERS, None)
        if numbers is None:
            return make_layers(num_hidden_layers, layer_fn, prefix)
        _refuse_run(vllm_config)
        build = functools.partial(_build, layer_fn, config, BY_TYPE[config.model_type], numbers)
        return make_layers(num_hidden_layers, build, prefix)

    setattr(wrapped, NUMBERS, True)
    return wrapped


def _build(
    layer_fn: Callable[..., Any], config: Any, family: Family, numbers: dict[int, tuple[int, int]], prefix: str
) -> Any:
    """Build the decoder layer at `prefix` with numbers of its own, and make sure that it has them."""
    own = numbers.get(int(prefix.rpartition(".")[2]))
    if own is None:
        return layer_fn(prefix=prefix)
    old = set_numbers(config, family, *own)
    try:
        layer = layer_fn(prefix=prefix)
    finally:
        for key, value in old.items():
            setattr(config, key, value)
    experts: Any = importlib.import_module("vllm.model_executor.layers.fused_moe").RoutedExperts
    blocks = [module.moe_config for module in layer.modules() if isinstance(module, experts)]
    found = sorted({(block.num_experts, block.experts_per_token) for block in blocks})
    if found != [own]:
        raise RuntimeLintError(
            f"layers that differ: vLLM builds {prefix} of {config.model_type} with (experts, top-k) {found}, expected "
            f"{own}: not served"
        )
    return layer


def _config_class(model_type: str, problem: str | None) -> type[PreTrainedConfig]:
    """A config class for checkpoints of `expertcut_<model_type>` whose objects are of the original class."""

    def from_dict(cls: type[PreTrainedConfig], raw: dict[str, Any], /, **kwargs: Any) -> Any:
        if problem:
            raise RuntimeLintError(f"{problem}: pip install 'vllm=={TESTED}.*'")
        numbers, stock = layer_numbers(raw), dict(stock_config(raw))
        assert numbers is not None
        _refuse_checkpoint(stock)
        _warn_of_version()
        found = _original(model_type).from_dict(stock, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        pairs = {layer: (count, numbers.top_k[layer]) for layer, count in numbers.experts.items()}
        setattr(config.get_text_config(), NUMBERS, pairs)
        return found

    members = {"model_type": PREFIX + model_type, "from_dict": classmethod(from_dict)}
    return type(f"Expertcut{model_type.title().replace('_', '')}Config", (PreTrainedConfig,), members)


def _original(model_type: str) -> type[PreTrainedConfig]:
    """The config class that vLLM takes for a model type: one of its own comes before transformers'."""
    own = importlib.import_module("vllm.transformers_utils.config")._CONFIG_REGISTRY
    if model_type in own:
        return own[model_type]  # type: ignore[no-any-return]
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    raise RuntimeLintError(f"layers that differ: not served for {model_type}, whose config vLLM has no class for")


@functools.cache
def _warn_of_version() -> None:
    version, tested = _version(), Version(TESTED)
    if version is None or (version.major, version.minor) > (tested.major, tested.minor):
        logging.getLogger(__name__).warning(
            "layers that differ: vLLM %s is not the tested %s, but newer", version or "of unknown version", TESTED
        )


def _refuse_checkpoint(config: dict[str, Any]) -> None:
    for scope in (config, config.get("text_config") or {}):
        method = (scope.get("quantization_config") or {}).get("quant_method")
        if method is not None and method not in QUANTISED:
            raise RuntimeLintError(
                f"layers that differ, quantised by {method}: not served; served: {', '.join(sorted(QUANTISED))}"
            )
    for name in config.get("architectures", ()):
        if not _uses_make_layers(name):
            raise RuntimeLintError(f"layers that differ: not served for {name}, which vLLM builds without make_layers")


def _uses_make_layers(architecture: str) -> bool:
    """True if the file of vLLM's model class, or one that it takes classes from, has `make_layers`."""
    entry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry.models.get(architecture)
    if entry is None:
        return False
    home = getattr(importlib.import_module(entry.module_name), entry.class_name).__module__
    classes = {value.__module__ for value in vars(sys.modules[home]).values() if isinstance(value, type)}
    return any("make_layers" in vars(sys.modules[module]) for module in {home, *classes} & sys.modules.keys())


def _refuse_run(vllm_config: Any) -> None:
    for what, asked_for in REFUSED:
        if asked_for(vllm_config):
            raise RuntimeLintError(f"layers that differ: not served with {what}")
