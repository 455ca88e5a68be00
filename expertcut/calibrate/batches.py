"""Sequences in, micro-batches out: rectangular, right-padded, padding marked so that it is never counted.

Shapes: B sequences, S positions, T = B·S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

PADDING = -1
"""Domain of padding positions."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    rows: tuple[int, ...]
    """(B,) number of each sequence in the data set."""
    ids: torch.Tensor
    """(B, S) int64 token ids; padding is 0."""
    domain: torch.Tensor
    """(B, S) int64 domain of every token, `PADDING` where there is none."""

    @property
    def mask(self) -> torch.Tensor | None:
        """(B, S) int64 attention mask, None without padding."""
        valid = self.domain != PADDING
        return None if bool(valid.all()) else valid.long()

    def halves(self, narrow: bool = True) -> tuple[Batch, Batch]:
        """Split by sequences, B at least 2; each half as wide as its longest one, or as the whole if not `narrow`."""
        cut = len(self.rows) // 2
        return self._part(slice(0, cut), narrow), self._part(slice(cut, None), narrow)

    def _part(self, which: slice, narrow: bool) -> Batch:
        domain = self.domain[which]
        width = int((domain != PADDING).sum(1).max()) if narrow else domain.shape[1]
        return Batch(self.rows[which], self.ids[which, :width], domain[:, :width])


def make_batches(sequences: Sequence[np.ndarray], domains: Sequence[int], micro_tokens: int) -> list[Batch]:
    """Group sequences of similar length into micro-batches of at most `micro_tokens` tokens (at least one sequence).

    `sequences` are 1-D int64 arrays, `domains` their domain numbers. Longest first, so that a lack of memory shows at
    once.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    batches: list[Batch] = []
    while order:
        count = max(1, micro_tokens // len(sequences[order[0]]))
        rows, order = order[:count], order[count:]
        batches.append(batch_of(rows, sequences, domains))
    return batches


def batch_of(rows: Sequence[int], sequences: Sequence[np.ndarray], domains: Sequence[int]) -> Batch:
    """Build the micro-batch of the sequences with these numbers."""
    width = max(len(sequences[row]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    domain = torch.full((len(rows), width), PADDING, dtype=torch.int64)
    for b, row in enumerate(rows):
        length = len(sequences[row])
        ids[b, :length] = torch.from_numpy(np.asarray(sequences[row], dtype=np.int64))
        domain[b, :length] = domains[row]
    return Batch(tuple(rows), ids, domain)
