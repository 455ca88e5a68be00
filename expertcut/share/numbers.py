"""A written checkpoint and its record in, sizes and parameters before and after out. Headers and arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from expertcut.checkpoint import Checkpoint
from expertcut.model import Geometry
from expertcut.model.summary import Summary, is_second, summarise
from expertcut.rewrite.record import Record


@dataclass(frozen=True)
class Numbers:
    """How large a model is."""

    nbytes: int
    parameters: int | None
    """None: the headers do not tell, as of quantised weights."""
    activated: int | None
    """Of these, what a token of text uses."""


def after(summary: Summary) -> Numbers:
    """Return the numbers of a checkpoint."""
    return Numbers(summary.nbytes, summary.parameters, summary.activated)


def before(checkpoint: Checkpoint, geometry: Geometry, record: Record) -> Numbers:
    """Return the numbers of the source by arithmetic: what experts that are gone had, those that are left have.

    Parameters are None where multi-token-prediction layers were dropped, of which nothing is left to count by.
    """
    summary = summarise(checkpoint, geometry)
    if summary.parameters is None or record.plan.mtp == "drop":
        return Numbers(record.before.nbytes, None, None)
    experts, top_k = record.before.experts, record.before.top_k
    total, unused = summary.parameters, 0
    for block in geometry.blocks.values():
        shapes = {name: prod(checkpoint.tensors[name].shape) for name in block.tensors}
        blind = sum(size for name, size in shapes.items() if is_second(geometry, block, name))
        used, unread = (part * experts // block.experts for part in (sum(shapes.values()) - blind, blind))
        total += used + unread - sum(shapes.values())
        unused += unread + used * (experts - top_k) // experts
    return Numbers(record.before.nbytes, total, total - unused)
