"""Numeric verification: the written checkpoint computes what the source computes with its routers narrowed.

Runs in float32 over the same tokens, all streamed: the written checkpoint; the source under the plan (router rows
gathered, expert numbers mapped back), which must agree bit for bit; the source with the dropped experts masked by minus
infinity, an independent way that must agree within rounding; and two controls that must not agree: the source as it is,
and the source under the plan with its routers' rows in reverse. Host memory: one (tokens, vocabulary) float32 table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream, find_bias, find_experts, find_matrix, find_router
from expertcut.calibrate.passage import Advance, Notify, Passage, run_through
from expertcut.calibrate.transfer import resolve_device
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Plan, kept_by_block
from expertcut.measure.variants import Variant, changes_of
from expertcut.model import Geometry, read_geometry
from expertcut.rewrite.verify import Check, written_values

TOLERANCE = 1e-5
"""Largest difference of the middle token to the masked source, relative to the logits' standard deviation.

Matrix products of another width add up in another order; now and then that turns a tie between two experts, so single
tokens may differ by more.
"""
_FAR_BELOW = -1e9
_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def verify_numeric(
    written: Checkpoint, source: Checkpoint, plan: Plan, data: CalibrationSet, *,
    device: str = "auto", notify: Notify, advance: Advance, micro_tokens: int = 2048,
) -> list[Check]:  # fmt: skip
    """Compare the logits of a written checkpoint with those of its source under the plan, in float32.

    New values that the plan gives to tensors are taken from the written checkpoint, as far as they have its sha256.
    Returns one check each for equality, the independent mask, and the two controls.

    Raises:
        CheckpointError: one of the two cannot be run.
        PlanError: new values are not those that the plan names.
    """
    geometry = read_geometry(source)
    where = resolve_device(device)
    sequences = [s.ids for s in data.sequences]
    batches = make_batches(sequences, [0] * len(sequences), micro_tokens)

    def stream(checkpoint: Checkpoint, own: Geometry) -> LayerStream:
        return LayerStream(checkpoint, own, device=where, dtype=torch.float32)

    with closing(stream(written, read_geometry(written))) as new:
        found = _table(run_through(new, batches, 1, lambda index, layer: [layer], notify, advance))
    spread = float(torch.cat(list(found.values())).std()) or 1.0
    with closing(stream(source, geometry)) as old:
        changes = changes_of(old, plan, written_values(written, source, geometry, plan))
        variant, everything = Variant(old, plan, changes), Variant(old, _all_kept(plan, geometry), changes)
        by_prefix = kept_by_block(plan, geometry)
        kept = {block.layer: by_prefix[prefix] for prefix, block in geometry.blocks.items()}
        uses = _Uses(geometry, kept)

        def tracks(index: int, layer: nn.Module) -> list[nn.Module]:
            uses.watch(index, layer)
            reverse = _reversed(variant.layer(index, layer), geometry, len(variant.kept.get(index, ())))
            narrowed, masked = variant.layer(index, layer), everything.layer(index, layer)
            if find_experts(layer) is not None:
                masked = _Masked(masked, geometry, kept[index], narrowed)
            return [layer, narrowed, masked, reverse]

        passage = run_through(old, batches, 4, tracks, notify, advance)
        base, expected, masked, swapped = (_apart(found, passage, track) / spread for track in range(4))
    return _checks(base, expected, masked, swapped, uses.dropped > 0)


def _checks(
    base: torch.Tensor, expected: torch.Tensor, masked: torch.Tensor, swapped: torch.Tensor, used: bool
) -> list[Check]:
    """Judge by how far each token is apart, (tokens,) in units of the logits' spread."""
    worst, middle = float(expected.max()), float(masked.median())
    detail = "bit for bit" if worst == 0 else f"apart by up to {worst:.2e} of the spread"
    unmasked = f"apart by up to {float(base.max()):.2e}" if used else "these tokens use no dropped expert"
    return [
        Check(
            "numeric: logits equal the source's under the plan", worst == 0,
            f"{len(expected)} tokens in float32, {detail}",
        ),
        Check(
            "numeric: logits equal the masked source's", middle <= TOLERANCE,
            f"the middle token apart by {middle:.2e}, limit {TOLERANCE} (the furthest {float(masked.max()):.2e})",
        ),
        Check("numeric: the unmasked source differs (control)", float(base.max()) > TOLERANCE or not used, unmasked),
        Check(
            "numeric: a swapped router differs (control)", float(swapped.max()) > TOLERANCE,
            f"apart by up to {float(swapped.max()):.2e}",
        ),
    ]  # fmt: skip


def _table(passage: Passage) -> dict[int, torch.Tensor]:
    """Logits of track 0 by sequence, each (S, V) float32 on the host, padding left out."""
    parts: dict[int, list[torch.Tensor]] = {}
    for row, _, logits in _by_row(passage, 0):
        parts.setdefault(row, []).append(logits)
    return {row: torch.cat(chunks) for row, chunks in parts.items()}


def _apart(found: dict[int, torch.Tensor], passage: Passage, track: int) -> torch.Tensor:
    """Largest difference of every token's logits to the table, (tokens,)."""
    return torch.cat(
        [(logits - found[row][where]).abs().amax(1) for row, where, logits in _by_row(passage, track)]
    )  # fmt: skip


def _by_row(passage: Passage, track: int) -> Iterator[tuple[int, slice, torch.Tensor]]:
    for batch, where, logits in passage.logits(track):
        for b, row in enumerate(batch.rows):
            real = logits[b, batch.domain[b, where].to(logits.device) >= 0].float().cpu()
            yield row, slice(where.start, where.start + len(real)), real


def _all_kept(plan: Plan, geometry: Geometry) -> Plan:
    """The plan with every expert kept, so that only its top-k remains."""
    everything = tuple(range(geometry.num_experts))
    layers = {prefix: entry.model_copy(update={"kept": everything}) for prefix, entry in plan.layers.items()}
    return plan.model_copy(update={"layers": layers})


def _reversed(layer: nn.Module, geometry: Geometry, experts: int) -> nn.Module:
    if find_experts(layer) is not None:
        owner, leaf = find_matrix(layer, geometry.family, experts + geometry.tail)
        weight = getattr(owner, leaf)
        weight = torch.cat((weight[:experts].flip(0), weight[experts:]))
        setattr(owner, leaf, nn.Parameter(weight, requires_grad=False))
    return layer


class _Uses:
    """Counts how often the source routes a token to an expert that the plan drops."""

    def __init__(self, geometry: Geometry, kept: dict[int, tuple[int, ...]]) -> None:
        self.geometry, self.kept, self.dropped = geometry, kept, 0

    def watch(self, index: int, layer: nn.Module) -> None:
        """Count in this layer of the source."""
        experts = find_experts(layer)
        if experts is None:
            return
        lost = torch.zeros(self.geometry.num_experts + self.geometry.tail, dtype=torch.bool)
        lost[: self.geometry.num_experts] = True
        lost[list(self.kept[index])] = False

        def count(module: nn.Module, args: Any) -> None:
            self.dropped += int(lost.to(args[1].device)[args[1]].sum())

        layer.get_submodule(experts).register_forward_pre_hook(count)


class _Masked(nn.Module):
    """A layer whose router never chooses a dropped expert: logits minus infinity, correction bias far below any score.

    A table of expert ids is the plan's, with the experts' old numbers.
    """

    def __init__(self, layer: nn.Module, geometry: Geometry, kept: tuple[int, ...], narrowed: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        weight = getattr(*find_matrix(layer, geometry.family, geometry.num_experts + geometry.tail))
        dropped = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        dropped[: geometry.num_experts] = True
        dropped[list(kept)] = False
        if found := find_bias(layer, geometry.family):
            bias = getattr(*found)
            masked = bias.detach().masked_fill(dropped[: bias.shape[-1]], _FAR_BELOW)
            setattr(*found, nn.Parameter(masked, requires_grad=False) if isinstance(bias, nn.Parameter) else masked)
        if (leaf := (geometry.family.hash_table or "").rpartition(".")[2]) and hasattr(
            router := find_router(layer, geometry.family), leaf
        ):
            table = getattr(find_router(narrowed, geometry.family), leaf)
            setattr(router, leaf, torch.tensor(kept, device=table.device)[table])
        self._mode = _MaskLogits(weight, dropped)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._mode:
            return self.layer(*args, **kwargs)


class _MaskLogits(TorchFunctionMode):
    """Puts minus infinity on the dropped experts' logits wherever a linear map uses the router's weight."""

    def __init__(self, weight: torch.Tensor, dropped: torch.Tensor) -> None:
        super().__init__()
        self.pointer, self.dropped = weight.data_ptr(), dropped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and args[1].data_ptr() == self.pointer:
            return out.masked_fill(self.dropped, float("-inf"))
        return out
