"""What a what-if pass found in; one number per candidate out, by which the best is chosen. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from expertcut.errors import UsageError
from expertcut.measure.intervals import Estimate
from expertcut.measure.quality import WhatIf

By = Literal["nll", "kl", "worst"]


@dataclass(frozen=True)
class Objective:
    """The loss that a choice makes small.

    `nll`: how much higher the loss is than the base's. `kl`: the divergence from the base. `worst`: the largest growth
    of the loss over the base's in any domain, a fraction; minimax over domains.
    """

    by: By = "nll"
    weights: Mapping[str, float] | None = None
    """Weights of the text's domains, others count 0; None: each counts by its tokens."""

    @classmethod
    def parse(cls, by: str, weights: Mapping[str, float] | None) -> Objective:
        """Check a name.

        Raises:
            UsageError: it is unknown, or weights are given for `worst`.
        """
        if by not in get_args(By):
            raise UsageError(f"--by {by}: unknown; known: {', '.join(get_args(By))}")
        if by == "worst" and weights is not None:
            raise UsageError("--by worst looks at every domain alike; leave out --domain-weights")
        return cls(by, weights)  # type: ignore[arg-type]

    def check(self, domains: Iterable[str]) -> None:
        """Check that text of these domains can be weighed.

        Raises:
            UsageError: none of them has a weight.
        """
        if self.weights is not None and not any(self.weights.get(domain, 0) for domain in domains):
            raise UsageError(f"no domain of the text has a weight: it has {', '.join(domains)}")

    def loss(self, found: WhatIf, name: str) -> float:
        """Return the loss of a candidate."""
        if self.by == "worst":
            return max(found.growth(name, domain).value for domain in found.domains)
        if self.weights is None:
            return self._one(found, name, None)
        shares = {domain: self.weights.get(domain, 0.0) for domain in found.domains}
        return sum(w * self._one(found, name, d) for d, w in shares.items() if w) / sum(shares.values())

    def difference(self, found: WhatIf, name: str, other: str) -> Estimate | None:
        """Return how much one candidate loses beyond another, where an interval can be told; None otherwise."""
        return found.difference(name, other) if self.by == "nll" and self.weights is None else None

    def _one(self, found: WhatIf, name: str, domain: str | None) -> float:
        if self.by == "kl":
            return found.mean("kl", name, domain)
        return found.mean("nll", name, domain) - found.mean("nll", "base", domain)
