"""All that is needed of transformers' internals: a model without weights, and weights for one module at a time.

Checkpoint names become parameters through transformers' own conversion mapping. The common conversion (stack the
experts, put gate and up side by side) is done by copying each tensor straight to its place, so that loading a layer
needs its final size and nothing more; every other conversion runs transformers' own operations.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from expertcut.calibrate.adapters import adapt
from expertcut.calibrate.legacy import modern
from expertcut.calibrate.reader import TensorReader
from expertcut.calibrate.uneven import per_layer
from expertcut.checkpoint.types import Checkpoint
from expertcut.errors import CheckpointError, RuntimeLintError
from expertcut.model.uneven import stock_config

TESTED = ("5.19", "5.23")
"""First and last minor release of transformers that the executor was tested with."""


def check_version() -> str | None:
    """Return a warning if the installed transformers is newer than the tested ones.

    Raises:
        RuntimeLintError: it is older than the first tested one.
    """
    version = Version(transformers.__version__)
    if version < Version(TESTED[0]):
        raise RuntimeLintError(
            f"running a model needs transformers {TESTED[0]} or later, found {version}",
            f"pip install 'transformers>={TESTED[0]}'",
        )
    if (version.major, version.minor) > tuple(map(int, TESTED[1].split("."))):
        return f"transformers {version} is newer than the tested {TESTED[0]} to {TESTED[1]}"
    return None


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return transformers' config object of a checkpoint, without what it says of quantisation: weights come plain.

    Raises:
        CheckpointError: transformers does not know the model type.
    """
    try:
        config, _ = read_config(checkpoint.config)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.name}: transformers cannot read config.json: {_line(error)}") from error
    for scope in (config, config.get_text_config()):
        if hasattr(scope, "quantization_config"):
            del scope.quantization_config
    return config


def read_config(raw: Mapping[str, Any], **overrides: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Return transformers' config object of a raw config, and the overrides that are none of its keys.

    Raises:
        ValueError: transformers does not know the model type.
    """
    raw = modern(stock_config(raw))
    if raw.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers.__version__} has no model_type {raw.get('model_type')!r}")
    plain = PreTrainedConfig._decode_special_floats(dict(raw))
    found: Any = CONFIG_MAPPING[raw["model_type"]].from_dict(plain, return_unused_kwargs=True, **overrides)
    return found  # type: ignore[no-any-return]


def config_like(config: PreTrainedConfig, raw: dict[str, Any]) -> PreTrainedConfig:
    """Return a config object of the same class from a raw config."""
    return type(config).from_dict(type(config)._decode_special_floats(modern(stock_config(raw))))


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class named by `architectures`, or transformers' causal language model of the config.

    Raises:
        KeyError: there is none.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return cast(type[PreTrainedModel], named or AutoModelForCausalLM._model_mapping[type(config)])


def build_model(config: PreTrainedConfig, raw: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Build the model named by `architectures` on the meta device, in `dtype`, attention by scaled dot product.

    `raw` is the config as it is or would be on disk: it may give every layer its own numbers.

    Raises:
        CheckpointError: the class is unknown or refuses the config.
        RuntimeLintError: its layers cannot differ, but `raw` asks for it.
    """
    name = (config.architectures or [config.model_type])[0]
    try:
        kind = model_class(config)
        with torch.device("meta"), per_layer(kind, config, raw):
            model = kind._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot build {name}: {_line(error)}") from error
    adapt(model)
    return model.eval()  # type: ignore[no-any-return]


@dataclass
class _Group:
    """Checkpoint tensors that together become one parameter (or several, for splitting conversions)."""

    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        for names in self.sources.values():
            yield from names


class WeightLoader:
    """Fills modules of a meta model with the checkpoint's weights."""

    def __init__(self, model: PreTrainedModel, reader: TensorReader, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.reader, self.dtype, self.device = model, reader, dtype, device
        self._meta: dict[str, torch.Tensor] = model.state_dict()
        self._tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
        plan = model._get_dtype_plan(dtype)
        self._dtype_plan: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(pattern.replace("*", ".*")), to) for pattern, to in plan.items()
        ]
        self._groups = self._map_names(reader.names)
        self._shared: dict[str, nn.Parameter] = {}

    def sources(self, prefix: str) -> list[str]:
        """Names of the checkpoint tensors that a module's parameters are made of."""
        return [n for target, group in self._groups.items() if _below(target, prefix) for n in group.names()]

    def made_of(self, stored: Collection[str], prefix: str) -> list[str]:
        """Return the parameters of a module that any of these tensors of the checkpoint goes into."""
        below = (target for target in self._groups if _below(target, prefix))
        return [t for t in below if any(s in stored for n in self._groups[t].names() for s in self.reader.stored(n))]

    def parameter(self, name: str) -> torch.Tensor:
        """Return one parameter or buffer by its full name in the model, on the loader's device and in its dtype."""
        return dict(self._load(name, None))[name]

    def fill(self, module: nn.Module, prefix: str, *, recurse: bool, pool: Pool | None = None) -> None:
        """Give a module its weights, on the loader's device and in its dtype.

        `prefix` is the module's full name in the model; with `recurse` all modules below are filled too. `pool` lends
        memory of a module that was released before.

        Raises:
            CheckpointError: a parameter has no tensor in the checkpoint, or one of another shape.
        """
        wanted = dict(module.named_parameters(prefix, recurse=recurse))
        wanted |= {n: b for n, b in module.named_buffers(prefix, recurse=recurse) if n in self._meta}  # type: ignore[misc]
        wanted = {name: value for name, value in wanted.items() if value.is_meta}
        missing = set(wanted)
        for name in sorted(wanted):
            source = self._tied.get(name, name)
            if source in self._shared:
                self._place(module, prefix, name, self._shared[source])
                missing.discard(name)
            elif source in self._groups:
                for target, tensor in self._load(source, pool):
                    if target == source and not recurse:
                        self._remember(source, tensor)
                    self._place(module, prefix, name if target == source else target, tensor)
                    missing -= {name, target}
        if missing:
            raise CheckpointError(
                f"{self.reader.checkpoint.name}: no tensor in the checkpoint for the parameter {min(missing)}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}"
            )
        self._fill_buffers(module, recurse)

    def _remember(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._tied.values():
            self._shared[name] = nn.Parameter(tensor, requires_grad=False)

    def _load(self, target: str, pool: Pool | None) -> Iterator[tuple[str, torch.Tensor]]:
        group = self._groups[target]
        dtype = self._target_dtype(target)
        if group.converter is None or _stacks(group.converter):
            out = pool.take(self._meta[target].shape, dtype, self.device) if pool else None
            if out is None:
                out = torch.empty(self._meta[target].shape, dtype=dtype, device=self.device)
            self._copy(target, group, out)
            yield target, out
            return
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.sources.items():
            for name in names:
                converter.add_tensor(target, name, pattern, cast(Any, self.reader.view(name)))
        for name, value in converter.convert(target, model=self.model, config=self.model.config).items():
            tensor = value[0] if isinstance(value, list) else value
            self._check_shape(name, tensor.shape)
            yield name, tensor.to(device=self.device, dtype=self._target_dtype(name), copy=True).contiguous()

    def _copy(self, target: str, group: _Group, out: torch.Tensor) -> None:
        if group.converter is None:
            (name,) = group.names()
            self._check_shape(target, self.reader.shape(name))
            self.reader.copy(name, out)
            return
        start = 0
        for pattern in group.converter.source_patterns:
            names = group.sources.get(pattern, [])
            if len(names) != out.shape[0]:
                raise CheckpointError(f"{target}: {len(names)} tensors match {pattern}, expected {out.shape[0]}")
            for expert, name in enumerate(names):
                view = self.reader.view(name)
                slot = out[expert] if len(group.converter.source_patterns) == 1 else out[expert, start:][: len(view)]
                if slot.shape != view.shape:
                    raise CheckpointError(f"{name}: shape {list(view.shape)}, expected {list(slot.shape)}")
                slot.copy_(view)
            start += len(view)

    def _check_shape(self, target: str, found: Iterable[int]) -> None:
        if tuple(found) != tuple(self._meta[target].shape):
            raise CheckpointError(
                f"{self.reader.checkpoint.name}: {target}: shape {list(found)}, "
                f"expected {list(self._meta[target].shape)}"
            )

    def _target_dtype(self, target: str) -> torch.dtype:
        if not self._meta[target].is_floating_point():
            return self._meta[target].dtype
        for pattern, dtype in self._dtype_plan:
            if pattern.search(target):
                return dtype
        return self.dtype

    @staticmethod
    def _place(module: nn.Module, prefix: str, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.removeprefix(prefix + ".").rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            owner._parameters[leaf] = parameter
        else:
            owner._buffers[leaf] = tensor
            parameter = tensor  # type: ignore[assignment]
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    def _fill_buffers(self, module: nn.Module, recurse: bool) -> None:
        """Compute buffers that checkpoints do not store, such as rotary frequencies, as transformers does."""
        for owner in module.modules() if recurse else [module]:
            empty = {n: b for n, b in owner._buffers.items() if b is not None and b.is_meta}
            if empty:
                for name, buffer in empty.items():
                    owner._buffers[name] = torch.empty_like(buffer, device=self.device)
                with torch.device(self.device):
                    self.model._init_weights(owner)  # type: ignore[no-untyped-call]

    def _map_names(self, names: Iterable[str]) -> dict[str, _Group]:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        groups: dict[str, _Group] = {}
        for name in sorted(names, key=dot_natural_key):
            base = self.model.base_model_prefix
            target, pattern = rename_source_key(name, renamings, converters, base, self._meta)
            if target not in self._meta and name in self._meta:
                target, pattern = rename_source_key(name, [], [], base, self._meta)
            if target in self._meta:
                group = groups.setdefault(target, _Group(by_pattern[pattern] if pattern else None))
                group.sources.setdefault(pattern or name, []).append(name)
        return groups


class Pool:
    """Memory of released tensors, handed out again to tensors of the same shape, dtype and device."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def give(self, module: nn.Module) -> None:
        """Take over a module's tensors; the module must not be used afterwards."""
        self._free = [p.detach() for p in module.parameters()]

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Return a free tensor that fits, or None."""
        for i, tensor in enumerate(self._free):
            if (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, device):
                return self._free.pop(i)
        return None

    def clear(self) -> None:
        """Let go of everything."""
        self._free = []


def _stacks(converter: WeightConverter) -> bool:
    """True for the conversion that stacks experts and, with several sources, puts them side by side."""
    ops: list[Any] = converter.operations
    stack = isinstance(ops[0], MergeModulelist) and ops[0].dim == 0 and len(converter.target_patterns) == 1
    if len(converter.source_patterns) == 1:
        return stack and len(ops) == 1
    return stack and len(ops) == 2 and isinstance(ops[1], Concatenate) and ops[1].dim == 1


def _below(name: str, prefix: str) -> bool:
    return name.startswith(prefix + ".")


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
