"""Limits and what a what-if pass found in; which limits hold out. The end of the interval counts that is worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from expertcut.choose.limits import EACH, Limit
from expertcut.errors import DataError, UsageError
from expertcut.measure.intervals import LEAST, Estimate
from expertcut.measure.quality import Metric, WhatIf, exp


@dataclass(frozen=True)
class Judgement:
    """One limit in one domain."""

    limit: Limit
    domain: str | None
    """None: all text together."""
    found: Estimate
    """What the limit is about; a fraction of the base's if the limit is relative."""

    @property
    def bound(self) -> float:
        """The worse end of the interval."""
        end = self.found.high if self.limit.upper else self.found.low
        assert end is not None
        return end

    @property
    def ok(self) -> bool:
        """True if the limit holds at the worse end of the interval."""
        return self.bound <= self.limit.value if self.limit.upper else self.bound >= self.limit.value

    @property
    def excess(self) -> float:
        """By how much the limit is missed, in its own unit; 0 or less if it holds."""
        return self.bound - self.limit.value if self.limit.upper else self.limit.value - self.bound

    def __str__(self) -> str:
        side, metric = "at most" if self.limit.upper else "at least", self.limit.metric
        more = " more than the base's" if self.limit.relative else ""
        where = f" in {self.domain}" if self.domain else ""
        return f"{metric}{where} is {side} {self._shown(self.bound)}{more}, wanted {self._shown(self.limit.value)}"

    def _shown(self, value: float) -> str:
        return f"{value:.2%}" if self.limit.relative else f"{value:.4g}"


def check_limits(limits: Sequence[Limit], sequences: dict[str, int]) -> None:
    """Check, before a pass, that limits can be judged on text of so many sequences by domain.

    Raises:
        UsageError: a limit names a domain that the text has not.
        DataError: a domain has too few sequences for an interval.
    """
    for limit in limits:
        domains = _domains(limit, tuple(sequences))
        if limit.domain not in (None, EACH, *sequences):
            raise UsageError(
                f"limit {limit}: the held-out text has no domain {limit.domain!r}; it has {', '.join(sequences)}"
            )
        for domain in domains:
            count = sum(sequences.values()) if domain is None else sequences[domain]
            if count < LEAST:
                where = "the held-out text" if domain is None else f"domain {domain}"
                raise DataError(
                    f"limit {limit}: {where} has {count} sequences, expected {LEAST} or more for an interval",
                    "give more --data, or a smaller --seq-len",
                )


def judge(found: WhatIf, name: str, limits: Sequence[Limit]) -> list[Judgement]:
    """Judge a candidate: one judgement per limit, or per domain where a limit is on each.

    The text must have passed `check_limits`.
    """
    return [
        Judgement(limit, domain, _estimate(found, name, limit, domain))
        for limit in limits
        for domain in _domains(limit, found.domains)
    ]


def _domains(limit: Limit, known: tuple[str, ...]) -> tuple[str | None, ...]:
    return known if limit.domain == EACH else (limit.domain,)


def _estimate(found: WhatIf, name: str, limit: Limit, domain: str | None) -> Estimate:
    if limit.metric == "ppl":
        if limit.relative:
            return found.change(name, domain).map(lambda nats: exp(nats) - 1)
        return found.estimate("nll", name, domain).map(exp)
    if limit.relative:
        return found.growth(name, domain)
    return found.estimate(cast(Metric, limit.metric), name, domain)
