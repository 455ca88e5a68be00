"""A checkpoint and plans for it in; how each plan would change its predictions out. Nothing is written.

The base and all candidates go through the layers together, each layer read once. Candidates that do the same so far
share their hidden states, so a plan costs time only from the first layer on that it changes. Logits are compared a few
hundred tokens at a time, the base's with one candidate's after the other.

Shapes: B sequences, C positions, T = B·C tokens, V vocabulary, N models, S sequences of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from expertcut.calibrate.batches import Batch, make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.executor import LayerStream
from expertcut.calibrate.passage import Advance, Notify, Passage
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.calibrate.transfer import fetch
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import LayerPlan, Plan, deltas_of, validate
from expertcut.errors import DataError, UsageError
from expertcut.measure.quality import BASE, WhatIf
from expertcut.measure.variants import Variant
from expertcut.model import Geometry, check_fingerprint

__all__ = ["BASE", "WhatIf", "evaluate"]

METRICS = ("nll", "kl", "agreement", "acceptance")
_IN_CACHE = 1 << 18
"""Logits that are compared at a time on a CPU."""


def evaluate(
    checkpoint: Checkpoint, geometry: Geometry, data: CalibrationSet, plans: Mapping[str, Plan],
    options: ProfileOptions, *, notify: Notify, advance: Advance,
) -> WhatIf:  # fmt: skip
    """Return what the checkpoint (named `base`) and it under each plan make of held-out text, from one pass.

    Host memory: about one layer, the hidden states of every candidate, and a few hundred tokens' logits. The figures
    are those of the checkpoint that the plan would write, run with the same options.

    Raises:
        PlanError: a plan does not fit the checkpoint.
        DataError: no sequence has two tokens.
        ProfileError: sequences are longer than the model's positions.
        UsageError: a plan is named `base`.
    """
    check_plans(plans, checkpoint, geometry)
    sequences = [s for s in data.sequences if len(s.ids) > 1]
    if not sequences:
        raise DataError("the held-out text has no sequence of two tokens, so that there is nothing to predict")
    domains = tuple(d for d in data.domains if any(s.domain == d for s in sequences))
    domain = [domains.index(s.domain) for s in sequences]
    batches = make_batches([s.ids for s in sequences], domain, options.micro_tokens)
    with open_stream(checkpoint, geometry, data, options, notify) as stream:
        passage, tracks = run_plans(stream, batches, list(plans.values()), notify, advance)
        sums = _compare(passage, len(sequences))[:, [0, *tracks]]
    tokens = np.array([len(s.ids) - 1 for s in sequences])
    return WhatIf((BASE, *plans), domains, np.array(domain), tokens, **dict(zip(METRICS, sums, strict=True)))


def check_plans(plans: Mapping[str, Plan], checkpoint: Checkpoint, geometry: Geometry) -> None:
    """Check, before anything runs, that every plan is one for this checkpoint.

    Raises:
        PlanError: a plan does not fit the checkpoint.
        UsageError: a plan is named `base`.
    """
    if BASE in plans:
        raise UsageError(f"a plan is named {BASE!r}, which is the unchanged model's name", "rename it")
    for plan in plans.values():
        check_fingerprint(plan.source.fingerprint, checkpoint, geometry)
        validate(plan, geometry)


def run_plans(
    stream: LayerStream, batches: Sequence[Batch], plans: Sequence[Plan], notify: Notify, advance: Advance
) -> tuple[Passage, list[int]]:
    """Take base (track 0) and plans through all layers. Returns the track of each plan, 0 if it changes nothing."""
    variants = [Variant(stream, plan) for plan in plans]
    passage, tracks = Passage(stream, batches, 1, notify), [0] * len(plans)
    for index, base in stream.layers():
        changes = [_change(plan, stream.geometry, index) for plan in plans]
        tracks = _part(passage, tracks, changes)
        for track in range(len(passage.hidden)):
            module = base if track == 0 else variants[tracks.index(track)].layer(index, base)
            passage.step(index, module, track)
        advance(index + 1, len(stream))
    return passage, tracks


@dataclass(frozen=True)
class _Change:
    """What a plan does in a layer."""

    entry: LayerPlan
    deltas: frozenset[tuple[str, str]]
    """Tensors with new values, and the sha256 of these."""


def _part(passage: Passage, tracks: Sequence[int], changes: Sequence[_Change | None]) -> list[int]:
    """Let plans that now do something else than the first on their track go on a track of their own."""
    stays: dict[int, _Change | None] = {0: None}
    branches: dict[tuple[int, _Change | None], int] = {}
    found = []
    for track, change in zip(tracks, changes, strict=True):
        if stays.setdefault(track, change) == change:
            found.append(track)
            continue
        if (track, change) not in branches:
            branches[track, change] = passage.branch(track)
        found.append(branches[track, change])
    return found


def _change(plan: Plan, geometry: Geometry, index: int) -> _Change | None:
    """What a plan does in a layer, None if that is nothing."""
    block = next((block for block in geometry.trunk if block.layer == index), None)
    if block is None:
        return None
    entry = plan.layers[block.prefix]
    if entry.top_k == geometry.top_k:
        entry = entry.model_copy(update={"top_k": None})
    change = _Change(entry, frozenset(deltas_of(plan, block).items()))
    untouched = _Change(LayerPlan(layer=index, kept=tuple(range(geometry.num_experts))), frozenset())
    return None if change == untouched else change


def _compare(passage: Passage, sequences: int) -> np.ndarray:
    """Sums of every metric over each sequence, for every track: (4, N, S) float64."""
    stream = passage.stream
    sums = torch.zeros(len(METRICS), len(passage.hidden), sequences, dtype=torch.float64)
    for at, prepared in enumerate(passage.prepared):
        batch, hidden = prepared.batch, [fetch(track[at], stream.device) for track in passage.hidden]
        for where in stream.chunks(batch):
            row, target, pick = predicted(batch, where)
            logits = (picked(stream.logits(batch, some, where), pick) for some in hidden)
            base = _Base(next(logits), target)
            sums[:, 0].index_add_(1, row, base.itself().cpu())
            for track, candidate in enumerate(logits, 1):
                sums[:, track].index_add_(1, row, base.against(candidate).cpu())
    return sums.numpy()


def predicted(batch: Batch, where: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequence number (T,) and id (T,) of every token that these positions predict, and which they are, (B, C) bool.

    Padding predicts nothing and is not predicted.
    """
    after = slice(where.start + 1, where.stop + 1)
    pick = torch.zeros(len(batch.rows), where.stop - where.start, dtype=torch.bool)
    valid = batch.domain[:, after] >= 0
    pick[:, : valid.shape[1]] = valid
    rows = torch.tensor(batch.rows)[:, None].expand_as(valid)
    return rows[valid], batch.ids[:, after][valid], pick


def picked(logits: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
    """The logits (T, V) of the positions that are picked, without a copy where all are."""
    return logits.flatten(0, 1) if bool(pick.all()) else logits[pick]


class _Base:
    """The base's predictions for T tokens, to compare candidates' with."""

    def __init__(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        self._log_p = logits.float().log_softmax(-1)
        self._p, self._top = self._log_p.exp(), self._log_p.argmax(-1)
        self._target = target.to(logits.device)[:, None]

    def itself(self) -> torch.Tensor:
        """The metrics of every token for the base, (4, T) float64."""
        nll = -self._log_p.gather(1, self._target)[:, 0].double()
        return torch.stack((nll, torch.zeros_like(nll), torch.ones_like(nll), torch.ones_like(nll)))

    def against(self, logits: torch.Tensor) -> torch.Tensor:
        """The metrics of every token for a candidate of these logits (T, V), (4, T) float64."""
        size = max(1, _IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        parts = (torch.split(t, size) for t in (logits, self._log_p, self._p, self._top, self._target))
        return torch.cat([_metrics(*some) for some in zip(*parts, strict=True)], dim=1)


def _metrics(
    logits: torch.Tensor, log_p: torch.Tensor, p: torch.Tensor, top: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    log_q = logits.float().log_softmax(-1)
    nll, agrees = -log_q.gather(1, target)[:, 0], log_q.argmax(-1) == top
    # Heads that rule tokens out give both minus infinity, whose difference is no number; p is 0 there.
    kl = ((log_p - log_q) * p).nansum(-1)
    apart = (p - log_q.exp_()).abs_().sum(-1)  # twice the total variation; 1 - half of it is the sum of the minima
    return torch.stack([found.double() for found in (nll, kl.clamp_min(0), agrees, 1 - apart / 2)])
