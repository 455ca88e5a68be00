"""What a what-if pass found: sums per sequence and candidate in, figures per token with intervals out. numpy only.

Shapes: N models (the base first), S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from expertcut.measure.intervals import Estimate, Floats, ratio

BASE = "base"
"""Name of the unchanged model."""

Metric = Literal["nll", "kl", "agreement", "acceptance"]


@dataclass(frozen=True)
class WhatIf:
    """Base and candidates on the same text. Sums over predicted tokens: all but the first of every sequence.

    Intervals say what another choice of sequences of the same kind would change, by a bootstrap over whole sequences:
    not what other text, another model, another calibration or a decoded answer would. Sequences cut from one document
    count as independent. Fewer than five sequences have no interval. All domains together means all tokens, so that a
    domain counts by its length.
    """

    names: tuple[str, ...]
    """(N,) `BASE`, then the candidates."""
    domains: tuple[str, ...]
    domain: NDArray[np.int64]
    """(S,) number of each sequence's domain."""
    tokens: NDArray[np.int64]
    """(S,) predicted tokens, at least 1."""
    nll: Floats
    """(N, S) negative log-likelihood, nats."""
    kl: Floats
    """(N, S) KL(base‖candidate) of the next token's distribution, nats."""
    agreement: Floats
    """(N, S) tokens whose most likely successor is the base's."""
    acceptance: Floats
    """(N, S) Σ over the vocabulary of min(p_base, p_candidate): tokens that speculative decoding would accept from
    the candidate (arXiv:2211.17192), each after the true text."""

    @classmethod
    def joined(cls, runs: Sequence[WhatIf]) -> WhatIf:
        """Return passes over the same text as one; the base is the first one's."""
        first, *others = runs
        names = first.names + tuple(name for run in others for name in run.names[1:])
        sums: dict[str, Any] = {
            metric: np.concatenate([getattr(first, metric), *(getattr(run, metric)[1:] for run in others)])
            for metric in get_args(Metric)
        }
        return replace(first, names=names, **sums)

    def count(self, domain: str | None = None) -> int:
        """Return the predicted tokens."""
        return int(self.tokens[self._of(domain)].sum())

    def sequences(self, domain: str | None = None) -> int:
        """Return the number of sequences."""
        return int(self._of(domain).sum())

    def mean(self, metric: Metric, name: str, domain: str | None = None) -> float:
        """Return a metric of a model per token."""
        some = self._of(domain)
        return float(self._sums(metric, name)[some].sum() / self.tokens[some].sum())

    def estimate(self, metric: Metric, name: str, domain: str | None = None) -> Estimate:
        """Return a metric of a model per token, with its interval."""
        return self._ratio(self._sums(metric, name), self.tokens, domain)

    def perplexity(self, name: str, domain: str | None = None) -> float:
        """Return exp of the mean negative log-likelihood."""
        return exp(self.mean("nll", name, domain))

    def difference(self, name: str, other: str, domain: str | None = None) -> Estimate:
        """Return how much higher the loss of one model is than that of another, nats per token, sequence by sequence.

        Below 0 the first is better; an interval without 0 says that more sequences would hardly change which one is.
        """
        return self._ratio(self._apart(name, other), self.tokens, domain)

    def change(self, name: str, domain: str | None = None) -> Estimate:
        """Return how much higher the loss is than the base's, nats per token."""
        return self.difference(name, BASE, domain)

    def growth(self, name: str, domain: str | None = None) -> Estimate:
        """Return how much higher the loss is than the base's, as a fraction of the base's."""
        return self._ratio(self._apart(name, BASE), self._sums("nll", BASE), domain)

    def worst(self, name: str) -> str:
        """Return the domain in which the loss rises most."""
        return max(self.domains, key=lambda domain: self.change(name, domain).value)

    def _apart(self, name: str, other: str) -> Floats:
        with np.errstate(invalid="ignore"):  # both infinite where a head rules out what the text says
            return self._sums("nll", name) - self._sums("nll", other)

    def _sums(self, metric: Metric, name: str) -> Floats:
        sums: Floats = getattr(self, metric)[self.names.index(name)]
        return sums

    def _of(self, domain: str | None) -> NDArray[np.bool_]:
        if domain is None:
            return np.ones(len(self.domain), np.bool_)
        some: NDArray[np.bool_] = self.domain == self.domains.index(domain)
        return some

    def _ratio(self, sums: Floats, weights: NDArray[np.float64] | NDArray[np.int64], domain: str | None) -> Estimate:
        some = self._of(domain)
        return ratio(sums[some], weights[some].astype(np.float64))


def exp(nll: float) -> float:
    """Return the perplexity of a loss; infinite beyond what a float holds."""
    return math.exp(nll) if nll < 700 else math.inf
