"""A model under a plan, riding on the base model's layers in the streaming executor.

A variant is built from the config that the plan would write and shares the base layer's tensors. It differs in two
things: its router's rows are those of the kept experts, and its experts are the base's, called by their original
numbers. So one read of the weights serves the base and any number of plans. Of tensors that a plan folds a gain into,
or has new values for, the variant has its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from expertcut.calibrate import hf
from expertcut.calibrate.executor import LayerStream, find_experts, find_layers, idle_experts
from expertcut.calibrate.quantised import Coded, DequantisingReader
from expertcut.calibrate.reader import DTYPES, times
from expertcut.checkpoint import TensorInfo, read_array
from expertcut.choose.plan import Plan, kept_by_block, numbers
from expertcut.model import Sliced
from expertcut.model.hashing import remap, stand_ins
from expertcut.rewrite.config import edit_config
from expertcut.rewrite.deltas import new_tensors, read_new
from expertcut.rewrite.gain import folded
from expertcut.rewrite.layout import config_edits

Changes = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
"""Name of a tensor in the source → what becomes of its values, as they are stored."""


class Renumbered(nn.Module):
    """The base's experts, called with numbers 0..E'-1 of a plan's kept experts."""

    def __init__(self, experts: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["_experts"], self.kept = experts, kept

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Run the base's experts: (T, H), (T, K), (T, K) → (T, H)."""
        out: torch.Tensor = self.__dict__["_experts"](hidden, self.kept[index], gates)
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_experts"], name)


def _replaced(module: nn.Module, path: str, tensor: torch.Tensor) -> nn.Module:
    """A module with another parameter at a path; it shares all others with the given one."""
    own, (head, _, rest) = copy.copy(module), path.partition(".")
    if rest:
        own._modules = module._modules | {head: _replaced(module.get_submodule(head), rest, tensor)}
    elif head in module._buffers:
        own._buffers = module._buffers | {head: tensor}
    else:
        own._parameters = module._parameters | {head: nn.Parameter(tensor, requires_grad=False)}
    return own


def changes_of(stream: LayerStream, plan: Plan, new: Mapping[str, TensorInfo]) -> Changes:
    """Return what becomes of the values of tensors that the plan changes; `new` says where its new values lie."""
    checkpoint, geometry = stream.checkpoint, stream.geometry
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        name: partial(times, factor=factor) for name, factor in folded(checkpoint, geometry, plan).items()
    }
    kept = kept_by_block(plan, geometry)
    for name, info in new.items():
        assert plan.deltas is not None
        role, read = geometry.roles[name], partial(_new_values, info, plan.deltas.tensors[name])
        if isinstance(role, Sliced):
            ids = (*kept[role.block], *range(geometry.num_experts, geometry.num_experts + role.tail))
            rows = [e * role.unit + row for e in ids for row in range(role.unit)]
            changes[name] = partial(_with_rows, read=read, axis=role.axis, rows=rows)
        else:
            changes[name] = partial(_instead, read=read)
    return changes


def _new_values(info: TensorInfo, digest: str) -> torch.Tensor:
    return torch.from_numpy(read_new(info, digest)).view(DTYPES[info.dtype]).view(info.shape)


def _instead(stored: torch.Tensor, read: Callable[[], torch.Tensor]) -> torch.Tensor:
    return read()


def _with_rows(stored: torch.Tensor, read: Callable[[], torch.Tensor], axis: int, rows: list[int]) -> torch.Tensor:
    """The stored tensor with new values in some rows; those of dropped experts are never used."""
    bits, new = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (stored, read()))
    return bits.index_copy(axis, torch.tensor(rows), new).view(stored.dtype)


class Variant:
    """The model under a plan, sharing the base's weights."""

    def __init__(self, stream: LayerStream, plan: Plan, changes: Changes | None = None) -> None:
        """`changes` are those of tensors' values; None: the plan's own, its new values read from the file beside it.

        Raises:
            PlanError: that file is missing or damaged.
        """
        geometry = stream.geometry
        kept = kept_by_block(plan, geometry)
        self.kept = {block.layer: kept[block.prefix] for block in geometry.trunk}
        self.top_k, self._stream = numbers(plan, geometry).top_k, stream
        raw = edit_config(stream.checkpoint.config, config_edits(stream.checkpoint, geometry, plan))
        self._layers = find_layers(hf.build_model(hf.config_like(stream.config, raw), raw, stream.dtype))[1]
        if changes is None:
            changes = changes_of(stream, plan, new_tensors(stream.checkpoint, geometry, plan))
        self._changes = changes

    def layer(self, index: int, base: nn.Module) -> nn.Module:
        """Return the layer of this variant; valid as long as the base's layer is."""
        base = self._with_changes(index, base)
        layer, experts = copy.deepcopy(self._layers[index]), find_experts(base)
        if experts is not None:
            parent, _, leaf = experts.rpartition(".")
            own = Renumbered(base.get_submodule(experts), self.numbers(index, base))
            setattr(layer.get_submodule(parent), leaf, own)
        self.fill(index, layer, base)
        return layer

    def fill(self, index: int, layer: nn.Module, base: nn.Module) -> None:
        """Give a layer of this variant all tensors but the experts', narrowed to what is `kept` there now."""
        experts, idle = find_experts(base), idle_experts(base)
        kept = None if experts is None else self.numbers(index, base)
        for name, tensor in (*base.named_parameters(), *base.named_buffers()):
            path, _, leaf = name.rpartition(".")
            if experts is not None and name.startswith((experts + ".", *idle)):
                continue  # those that text does not use stay empty
            owner = layer.get_submodule(path)
            store = owner._parameters if leaf in owner._parameters else owner._buffers
            mine = store[leaf]
            assert mine is not None
            if experts is not None and self._is_table(leaf):
                tensor = self._remapped(index, tensor)
            elif kept is not None and mine.shape != tensor.shape:
                axis = next(a for a in range(tensor.dim()) if mine.shape[a] != tensor.shape[a])
                tensor = nn.Parameter(tensor.index_select(axis, kept[: mine.shape[axis]]), requires_grad=False)
            store[leaf] = tensor  # type: ignore[assignment]

    def stored(self, name: str) -> torch.Tensor:
        """Return a tensor of the source as the plan leaves its values, in the dtype and order that it is stored in."""
        with self._changing():
            return self._stream.reader.view(name)

    def coded(self, name: str, at: int | None = None) -> Coded:
        """Return a quantised tensor as the plan leaves it: see the reader."""
        reader = self._stream.reader
        assert isinstance(reader, DequantisingReader)
        with self._changing():
            return reader.coded(name, at)

    def numbers(self, index: int, base: nn.Module) -> torch.Tensor:
        """Return the base's numbers of this variant's experts, and of what comes behind them: (E' + tail,) int64."""
        geometry = self._stream.geometry
        tail = range(geometry.num_experts, geometry.num_experts + geometry.tail)
        return torch.tensor((*self.kept[index], *tail), device=next(base.parameters()).device)

    def _with_changes(self, index: int, base: nn.Module) -> nn.Module:
        """The base's layer, with those tensors whose values the plan changes read again, as they would be written."""
        loader, prefix = self._stream.loader, f"{self._stream.prefix}.{index}"
        with self._changing():
            for target in loader.made_of(self._changes, prefix):
                base = _replaced(base, target.removeprefix(f"{prefix}."), loader.parameter(target))
        return base

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let the reader hand out tensors with the values that the plan gives them."""
        self._stream.reader.changes = self._changes
        try:
            yield
        finally:
            self._stream.reader.changes = {}

    def _is_table(self, leaf: str) -> bool:
        table = self._stream.geometry.family.hash_table
        return table is not None and leaf == table.rpartition(".")[2]

    def _remapped(self, index: int, table: torch.Tensor) -> torch.Tensor:
        """The table of expert ids of a layer that routes by token id, as the plan makes it."""
        block = self._stream.block(index)
        assert block is not None
        who = stand_ins(read_array(self._stream.checkpoint, block.router), self.kept[index])
        return torch.from_numpy(remap(table.cpu().numpy(), who, self.top_k[index])).to(table.device)
