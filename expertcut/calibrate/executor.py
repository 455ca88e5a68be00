"""The streaming executor: one decoder layer in memory at a time, every micro-batch through it.

The model is built on the meta device and its layers are replaced by recorders. One cheap pass (embeddings, masks,
rotary embeddings) captures what each layer is called with; then each layer is filled from the shards, run, and
released. Memory: about one layer plus the hidden states. Each weight is read once.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expertcut.calibrate import hf, observer
from expertcut.calibrate.batches import Batch
from expertcut.calibrate.quantised import open_reader
from expertcut.checkpoint.types import Checkpoint
from expertcut.errors import CheckpointError
from expertcut.model import Family, Geometry, MoeBlock
from expertcut.model.places import in_tower

CARRIED = ("prev_topk_indices", "prev_router_hidden_states")
"""Arguments in which decoder layers take over, besides the hidden states, what the layer before found."""
CHUNK_TOKENS, CHUNK_LOGITS = 256, 1 << 24
"""Tokens whose logits are computed at a time, and how many logits at most (64 MB in float32)."""


@dataclass
class Call:
    """What a decoder layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Prepared:
    """A micro-batch ready to enter the first layer."""

    batch: Batch
    hidden: torch.Tensor
    """(B, S, H) input of the first layer."""
    calls: list[Call]
    """One per layer."""


class _Recorded(Exception):
    """Ends a recording pass at the last layer: norm and head need not be loaded yet."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes the call, passes the hidden states on (or hands out given ones)."""

    def __init__(self, layer: nn.Module, carries: bool, last: bool) -> None:
        super().__init__()
        self.__dict__["_layer"], self.carries, self.last = layer, carries, last
        self.call: Call | None = None
        self.entered: torch.Tensor | None = None
        self.output: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.entered, self.call = hidden_states, Call(args, kwargs)
        if self.last and self.output is None:
            raise _Recorded
        out = hidden_states if self.output is None else self.output
        return (out, None) if self.carries else out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)


class LayerStream:
    """A checkpoint's model, one decoder layer at a time."""

    def __init__(
        self, checkpoint: Checkpoint, geometry: Geometry, *, device: torch.device, dtype: torch.dtype,
        resident: bool = False,
    ) -> None:  # fmt: skip
        self.checkpoint, self.geometry, self.device, self.dtype, self.resident = (
            checkpoint, geometry, device, dtype, resident,
        )  # fmt: skip
        self.gradients = False
        """Let gradients pass through what is run; to be set before anything is."""
        observer.register()
        self.reader = open_reader(checkpoint, dtype, device)
        self.config = hf.load_config(checkpoint)
        self.model = hf.build_model(self.config, checkpoint.config, dtype)
        self.loader = hf.WeightLoader(self.model, self.reader, dtype, device)
        self._language: Any = getattr(self.model, "thinker", self.model)
        embeddings = self._language.get_input_embeddings()
        self._embeddings = next(item for item in self.model.named_modules() if item[1] is embeddings)
        self.prefix, layers = find_layers(self.model)
        self._layers = list(layers)
        self._carried = _carried(self._layers[0])
        carries, last = self._carried is not None, self._layers[-1]
        self._recorders = [_Recorder(layer, carries, layer is last) for layer in self._layers]
        for i, recorder in enumerate(self._recorders):
            layers[i] = recorder
        self._loaded: dict[int, nn.Module] = {}
        self._pool = hf.Pool()
        self._fill_on_first_use()

    def __len__(self) -> int:
        return len(self._layers)

    def block(self, index: int) -> MoeBlock | None:
        """Return the MoE block of a layer, None if the layer is dense."""
        return next((b for b in self.geometry.trunk if b.layer == index), None)

    def prepare(self, batch: Batch, like: Prepared | None = None) -> Prepared:
        """Embed a micro-batch and record what every layer is called with; arguments equal to `like`'s are shared.

        Raises:
            CheckpointError: the model's layers are not a plain sequence.
        """
        for recorder in self._recorders:
            recorder.call = recorder.entered = recorder.output = None
        with self._mode(), contextlib.suppress(_Recorded):
            self._forward(batch, logits_to_keep=1)
        first = self._recorders[0].entered
        if first is None or any(r.call is None or r.entered is not first for r in self._recorders):
            raise CheckpointError(
                f"{type(self.model).__name__}: its decoder layers are not a plain sequence, "
                "so that they cannot be streamed"
            )
        calls = [r.call for r in self._recorders if r.call is not None]
        if like is not None:
            calls = [_share(new, old) for new, old in zip(calls, like.calls, strict=True)]
        for i, call in enumerate(calls[1:], 1):
            calls[i] = _share(call, calls[i - 1])
        return Prepared(batch, first, calls)

    def load(self, index: int) -> nn.Module:
        """Return a decoder layer with its weights."""
        if index not in self._loaded:
            layer = copy.deepcopy(self._layers[index])
            self.reader.begin(self._sources(index))
            self.loader.fill(layer, f"{self.prefix}.{index}", recurse=True, pool=self._pool)
            self.reader.release(self._sources(index))
            self._loaded[index] = _with_observed_experts(layer)
        return self._loaded[index]

    def read_ahead(self, index: int) -> None:
        """Bring a layer's bytes into the page cache in the background; nothing happens past the last layer."""
        if index < len(self) and index not in self._loaded:
            self.reader.read_ahead(self._sources(index))

    def release(self, index: int) -> None:
        """Let go of a layer's weights, unless the stream is resident."""
        if not self.resident:
            self._pool.give(self._loaded.pop(index))

    def close(self) -> None:
        """Release everything."""
        self._loaded.clear()
        self._pool.clear()
        self.reader.close()
        gc.collect()

    def call(
        self, layer: nn.Module, hidden: torch.Tensor, call: Call, carried: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Run one layer: (B, S, H) → (B, S, H), and what the layer hands on to the next besides, if it does."""
        args, kwargs = call.args, call.kwargs
        if self._carried is not None:
            name, place = self._carried
            if name in kwargs:
                kwargs = kwargs | {name: carried}
            else:
                args = (*args[:place], carried, *args[place + 1 :])
        with self._mode():
            out = layer(hidden, *args, **kwargs)
        result, *more = out if isinstance(out, tuple) else (out,)
        return result, more[0] if self._carried is not None else None

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield number and weights of every decoder layer, one at a time, while the next one's bytes are read ahead."""
        for index in range(len(self)):
            layer = self.load(index)
            self.read_ahead(index + 1)
            yield index, layer
            self.release(index)

    def logits(self, batch: Batch, hidden: torch.Tensor, where: slice) -> torch.Tensor:
        """Return the logits (B, chunk, V) of these positions, from the last layer's output (B, S, H)."""
        last, keep = self._recorders[-1], torch.arange(where.start, where.stop, device=self.device)
        last.output = hidden
        try:
            with self._mode():
                found: torch.Tensor = self._forward(batch, logits_to_keep=keep).logits
        finally:
            last.output = None
        return found

    def chunks(self, batch: Batch, tokens: int | None = None) -> Iterator[slice]:
        """Yield all positions of a micro-batch in runs whose logits are few enough to be held several times.

        A run has at most so many tokens, `CHUNK_TOKENS` unless given, or a single position of each sequence.
        """
        tokens = min(tokens or CHUNK_TOKENS, CHUNK_LOGITS // self.config.get_text_config().vocab_size)
        size, positions = max(1, tokens // len(batch.rows)), batch.ids.shape[1]
        for start in range(0, positions, size):
            yield slice(start, min(start + size, positions))

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.gradients else torch.inference_mode()

    def _forward(self, batch: Batch, logits_to_keep: int | torch.Tensor) -> Any:
        mask = batch.mask
        name, embeddings = self._embeddings
        self.loader.fill(embeddings, name, recurse=False)  # some models look where they are before they call them
        return self._language(
            input_ids=batch.ids.to(self.device),
            attention_mask=None if mask is None else mask.to(self.device),
            use_cache=False,
            logits_to_keep=logits_to_keep,
        )

    def _sources(self, index: int) -> list[str]:
        return self.loader.sources(f"{self.prefix}.{index}")

    def _fill_on_first_use(self) -> None:
        """Load everything outside the decoder layers when it is first called; what is never called is never read."""
        for name, module in self.model.named_modules():
            if not isinstance(module, _Recorder) and (module._parameters or module._buffers):

                def fill(module: nn.Module, args: Any, name: str = name) -> None:
                    self.loader.fill(module, name, recurse=False)

                module.register_forward_pre_hook(fill)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of the decoder layers: the module list that holds routed experts.

    Raises:
        CheckpointError: there is none, or several.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not in_tower(name)
        and any(find_experts(layer) is not None for layer in module)
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"{type(model).__name__}: found {len(found)} stacks of decoder layers with routed experts, expected 1"
        )
    return found[0]


def _carried(layer: nn.Module) -> tuple[str, int] | None:
    """Name and place, behind the hidden states, of the argument in which a layer takes over from the one before."""
    parameters = list(inspect.signature(type(layer).forward).parameters)
    return next(((name, i - 2) for i, name in enumerate(parameters) if name in CARRIED), None)


def find_experts(layer: nn.Module) -> str | None:
    """Return the name of a layer's experts module (transformers' experts interface), None in a dense layer."""
    return next(_all_experts(layer), None)


def idle_experts(layer: nn.Module) -> tuple[str, ...]:
    """Return what the names of a layer's experts begin with that text does not use: those of a second set."""
    return tuple(f"{name}." for name in list(_all_experts(layer))[1:])


def _all_experts(layer: nn.Module) -> Iterator[str]:
    return (name for name, m in layer.named_modules() if hasattr(m, "has_gate") and hasattr(m, "_apply_gate"))


def find_router(layer: nn.Module, family: Family) -> nn.Module:
    """Return the router module of a layer: the one whose output holds the logits."""
    return find_block(layer, family).get_submodule(family.live[0] if family.live else family.router)


def find_matrix(layer: nn.Module, family: Family, rows: int) -> tuple[nn.Module, str]:
    """Return the module that holds the router's matrix, (rows, H), and the matrix's name there."""
    router = find_router(layer, family)
    found = [name for name, p in router.named_parameters() if p.dim() == 2 and len(p) == rows]
    path, _, leaf = found[-1].rpartition(".")
    return router.get_submodule(path), leaf


def find_bias(layer: nn.Module, family: Family) -> tuple[nn.Module, str] | None:
    """Return the module that holds a layer's correction bias, and the bias's name there; None if it has none."""
    path = family.live[1] if family.live else family.correction_bias
    if path is None:
        return None
    name, _, leaf = path.rpartition(".")
    owner = find_block(layer, family).get_submodule(name)
    return (owner, leaf) if hasattr(owner, leaf) else None


def find_block(layer: nn.Module, family: Family) -> nn.Module:
    """Return the module of a layer that holds the router."""
    return layer.get_submodule(family.block if family.live_block is None else family.live_block)


def _with_observed_experts(layer: nn.Module) -> nn.Module:
    experts = find_experts(layer)
    if experts is not None and hasattr(layer.get_submodule(experts), "config"):
        module: Any = layer.get_submodule(experts)
        module.config = copy.copy(module.config)
        module.config._experts_implementation = observer.NAME
    return layer


def _share(new: Any, old: Any) -> Any:
    """Return `old` where it equals `new`, so that equal masks and rotary embeddings are kept once."""
    if new is old:
        return old
    if isinstance(new, Call) and isinstance(old, Call):
        return Call(_share(new.args, old.args), _share(new.kwargs, old.kwargs))
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        same = new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_share(n, o) for n, o in zip(new, old, strict=True))
    if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
        return {key: _share(new[key], old[key]) for key in new}
    return new
