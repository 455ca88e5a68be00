"""Held-out loss of a model and of any number of plans, in one read of the weights.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from expertcut.calibrate.batches import Batch, make_batches
from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.passage import Advance, Notify, Passage, run_through
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Plan, validate
from expertcut.errors import DataError
from expertcut.measure.variants import Variant
from expertcut.model import Geometry, check_fingerprint

BASE = "base"
"""Name of the unchanged model among the results."""


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood of the next token, nats per predicted token."""

    nll: float
    tokens: int
    """Predicted tokens: all but the first of every sequence."""

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class ModelLoss:
    """Loss of one model or plan."""

    name: str
    overall: Loss
    """Mean over all tokens of all domains."""
    domains: dict[str, Loss]


def evaluate(
    checkpoint: Checkpoint, geometry: Geometry, data: CalibrationSet, plans: Mapping[str, Plan],
    options: ProfileOptions, *, notify: Notify, advance: Advance,
) -> list[ModelLoss]:  # fmt: skip
    """Return the loss of the checkpoint (named `base`) and of it under each plan, all from one pass over the weights.

    Raises:
        PlanError: a plan does not fit the checkpoint.
        DataError: no sequence has two tokens.
        ProfileError: sequences are longer than the model's positions.
    """
    for plan in plans.values():
        check_fingerprint(plan.source.fingerprint, checkpoint, geometry)
        validate(plan, geometry)
    with open_stream(checkpoint, geometry, data, options, notify) as stream:
        variants = [Variant(stream, plan) for plan in plans.values()]
        domains = [data.domains.index(s.domain) for s in data.sequences]
        batches = make_batches([s.ids for s in data.sequences], domains, options.micro_tokens)

        def tracks(index: int, layer: nn.Module) -> Iterator[nn.Module]:
            yield layer
            for variant in variants:
                yield variant.layer(index, layer)

        passage = run_through(stream, batches, 1 + len(variants), tracks, notify, advance)
        return [_loss(name, passage, track, data.domains) for track, name in enumerate((BASE, *plans))]


def _loss(name: str, passage: Passage, track: int, domains: tuple[str, ...]) -> ModelLoss:
    sums = torch.zeros(len(domains), dtype=torch.float64)
    counts = torch.zeros(len(domains), dtype=torch.int64)
    for batch, where, logits in passage.logits(track):
        nll, domain = token_nll(batch, where, logits)
        sums.index_add_(0, domain, nll)
        counts += torch.bincount(domain, minlength=len(domains))
    total = int(counts.sum())
    if not total:
        raise DataError("the held-out text has no sequence of two tokens, so that there is nothing to predict")
    by_domain = {
        d: Loss(float(sums[i]) / int(counts[i]), int(counts[i])) for i, d in enumerate(domains) if int(counts[i])
    }
    return ModelLoss(name, Loss(float(sums.sum()) / total, total), by_domain)


def token_nll(batch: Batch, where: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (nll, domain) of every token that the logits (B, chunk, V) at positions `where` predict; float64, int64.

    Padding predicts nothing and is not predicted.
    """
    stop = min(where.stop, batch.ids.shape[1] - 1)
    logits = logits[:, : stop - where.start].float()
    target = batch.ids[:, where.start + 1 : stop + 1].to(logits.device)
    domain = batch.domain[:, where.start + 1 : stop + 1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").cpu().double()
    valid = domain.flatten() >= 0
    return nll[valid], domain.flatten()[valid]
