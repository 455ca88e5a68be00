"""Numeric verification: the written checkpoint computes what the source computes with its router narrowed.

Four runs in float32 over the same tokens, each streamed: the written checkpoint; the source under the plan (router rows
gathered, expert numbers mapped back), which must agree bit for bit; the source with the dropped experts masked by minus
infinity, an independent way that must agree within rounding; and two controls that must not agree: the source as it is,
and the source under the plan with its routers' rows in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream, find_experts, find_router
from expertcut.calibrate.passage import Notify, Passage
from expertcut.calibrate.run import Advance
from expertcut.calibrate.transfer import resolve_device
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Plan, kept_by_block
from expertcut.measure.variants import Variant
from expertcut.model import Geometry, read_geometry
from expertcut.rewrite.verify import Check

TOLERANCE = 1e-5
"""Largest difference to the independently masked source, relative to the logits' standard deviation: matrix products of
another width add up in another order."""
_FAR_BELOW = -1e9


def verify_numeric(
    written: Checkpoint, source: Checkpoint, plan: Plan, data: CalibrationSet, *,
    device: str = "auto", notify: Notify, advance: Advance, micro_tokens: int = 4096,
) -> list[Check]:  # fmt: skip
    """Compare the logits of a written checkpoint with those of its source under the plan, in float32.

    Returns one check each for equality, the independent mask, and the two controls.

    Raises:
        CheckpointError: one of the two cannot be run.
    """
    geometry = read_geometry(source)
    where = resolve_device(device)
    sequences = [s.ids for s in data.sequences]
    batches = make_batches(sequences, [0] * len(sequences), micro_tokens)

    def stream(checkpoint: Checkpoint, own: Geometry) -> LayerStream:
        return LayerStream(checkpoint, own, device=where, dtype=torch.float32)

    with _open(stream(written, read_geometry(written))) as new:
        found = _logits(_through(new, batches, notify, advance, lambda index, layer: [layer]), 0)
    with _open(stream(source, geometry)) as old:
        variant, kept = Variant(old, plan), kept_by_block(plan, geometry)

        def tracks(index: int, layer: torch.nn.Module) -> list[torch.nn.Module]:
            return [layer, variant.layer(index, layer), _reversed(variant.layer(index, layer), geometry)]

        passage = _through(old, batches, notify, advance, tracks)
        base, expected, swapped = (_logits(passage, track) for track in range(3))
        variant_of_k = Variant(old, plan.model_copy(update={"layers": _all_kept(plan, geometry)}))

        def masked(index: int, layer: torch.nn.Module) -> list[torch.nn.Module]:
            block = old.block(index)
            wide = variant_of_k.layer(index, layer)
            return [wide if block is None else _Masked(wide, geometry, kept[block.prefix])]

        independent = _logits(_through(old, batches, notify, advance, masked), 0)
    return _checks(found, expected, independent, base, swapped, plan, geometry)


def _checks(
    found: torch.Tensor, expected: torch.Tensor, independent: torch.Tensor, base: torch.Tensor, swapped: torch.Tensor,
    plan: Plan, geometry: Geometry,
) -> list[Check]:  # fmt: skip
    spread = float(expected.std()) or 1.0

    def apart(other: torch.Tensor) -> float:
        return float((found - other).abs().max()) / spread

    tokens = found.shape[0]
    equal = torch.equal(found, expected)
    detail = f"{tokens} tokens in float32, " + (
        "bit for bit" if equal else f"apart by {apart(expected):.2e} of the spread"
    )
    off = apart(independent)
    checks = [
        Check("numeric: logits equal the source's under the plan", equal, detail),
        Check("numeric: logits equal the masked source's", off <= TOLERANCE, f"apart by {off:.2e}, limit {TOLERANCE}"),
    ]
    identity = plan.experts == geometry.num_experts and plan.top_k(geometry) == geometry.top_k
    if not identity:
        off = apart(base)
        checks.append(Check("numeric: the unmasked source differs (control)", off > TOLERANCE, f"apart by {off:.2e}"))
    off = apart(swapped)
    checks.append(Check("numeric: a swapped router differs (control)", off > TOLERANCE, f"apart by {off:.2e}"))
    return checks


def _through(
    stream: LayerStream, batches: Any, notify: Notify, advance: Advance,
    tracks: Callable[[int, torch.nn.Module], list[Any]],
) -> Passage:  # fmt: skip
    passage: Passage | None = None
    for index in range(len(stream)):
        layer = stream.load(index)
        stream.read_ahead(index + 1)
        layers = tracks(index, layer)
        passage = passage or Passage(stream, batches, len(layers), notify)
        for track, module in enumerate(layers):
            passage.step(index, module, track)
        stream.release(index)
        advance(index + 1, len(stream))
    assert passage is not None
    return passage


def _logits(passage: Passage, track: int) -> torch.Tensor:
    """(tokens, V) float32 on the host, padding left out."""
    parts = []
    for batch, where, logits in passage.logits(track):
        parts.append(logits.float().cpu()[batch.domain[:, where] >= 0])
    return torch.cat(parts)


def _all_kept(plan: Plan, geometry: Geometry) -> dict[str, Any]:
    """The plan's layers with every expert kept, so that only its top-k remains."""
    everything = tuple(range(geometry.num_experts))
    return {prefix: entry.model_copy(update={"kept": everything}) for prefix, entry in plan.layers.items()}


def _reversed(layer: torch.nn.Module, geometry: Geometry) -> torch.nn.Module:
    if find_experts(layer) is not None:
        router: Any = find_router(layer, geometry.family.router)
        router.weight = torch.nn.Parameter(router.weight.flip(0), requires_grad=False)
    return layer


class _Masked(torch.nn.Module):
    """A layer whose router never chooses a dropped expert, by minus infinity on logits or on the correction bias."""

    def __init__(self, layer: torch.nn.Module, geometry: Geometry, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        router: Any = find_router(layer, geometry.family.router)
        dropped = torch.ones(geometry.num_experts, dtype=torch.bool, device=router.weight.device)
        dropped[list(kept)] = False
        bias = geometry.family.correction_bias
        self._mode = _MaskLogits(router.weight, dropped)
        if bias is not None:
            leaf = bias.rpartition(".")[2]
            setattr(router, leaf, getattr(router, leaf).masked_fill(dropped, _FAR_BELOW))
            self._mode = _MaskLogits(router.weight, torch.zeros_like(dropped))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._mode:
            return self.layer(*args, **kwargs)


class _MaskLogits(TorchFunctionMode):
    """Adds minus infinity to the dropped experts' logits wherever a linear map uses the router's weight."""

    def __init__(self, weight: torch.Tensor, dropped: torch.Tensor) -> None:
        super().__init__()
        self.pointer, self.dropped = weight.data_ptr(), dropped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].data_ptr() == self.pointer:
            return out.masked_fill(self.dropped, float("-inf"))
        return out


@contextmanager
def _open(stream: LayerStream) -> Iterator[LayerStream]:
    try:
        yield stream
    finally:
        stream.close()
