"""Limits and what a what-if pass found in; which limits hold out. The end of the interval counts that is worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.passage import Advance, Notify
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import Checkpoint
from expertcut.choose.again import with_experts
from expertcut.choose.limits import EACH, Limit
from expertcut.choose.plan import Plan
from expertcut.errors import DataError, ExpertcutError, UsageError
from expertcut.measure.intervals import LEAST, Estimate
from expertcut.measure.quality import Metric, WhatIf, exp
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry

TRIES = 7
"""Expert counts that are tried to find one that passes."""


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
        where = f" in {self.domain}" if self.limit.domain == EACH else ""
        side, more = "up to" if self.limit.upper else "down to", " over the base" if self.limit.relative else ""
        missed = "" if self.ok else f", {self._shown(self.excess)} too {'much' if self.limit.upper else 'little'}"
        return f"{self.limit}{where}: {side} {self._shown(self.bound)}{more}{missed}"

    def _shown(self, value: float) -> str:
        return f"{value:.2%}" if self.limit.relative else f"{value:.4f}"


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


def suggest(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, profile: Profile | None, text: CalibrationSet,
    limits: Sequence[Limit], options: ProfileOptions, *, notify: Notify, advance: Advance,
) -> str:  # fmt: skip
    """Return what may help a plan that fails: the fewest experts that pass, of several counts tried in one more pass.

    They are chosen as the plan's own were; where the plan does not say how, nothing is tried.
    """
    counts = _more(plan.experts, geometry)
    if not counts:
        return "every expert is kept: activate more, or see what other plans cost with expertcut eval"
    try:
        plans = {str(n): with_experts(checkpoint, geometry, plan, n, profile) for n in counts}
    except ExpertcutError as error:
        why = f"{error.message}; {error.hint}" if error.hint else error.message
        return f"keep more experts, or see with expertcut eval what other plans cost (nothing else was tried: {why})"
    notify(f"trying {', '.join(plans)} of {geometry.num_experts} experts")
    found = evaluate(checkpoint, geometry, text, plans, options, notify=notify, advance=advance)
    passed = [n for n in counts if all(judgement.ok for judgement in judge(found, str(n), limits))]
    tried = f"(tried: {', '.join(plans)})"
    if not passed:
        other = "a higher top-k" if plan.top_k(geometry) < geometry.top_k else "another --strategy"
        return f"even {counts[-1]} of {geometry.num_experts} experts fail: try {other} {tried}"
    share = passed[0] / geometry.num_experts
    return f"{passed[0]} of {geometry.num_experts} experts would pass: --experts {passed[0]}, {share:.0%} {tried}"


def _more(experts: int, geometry: Geometry) -> list[int]:
    """At most `TRIES` larger counts at equal distances, all of which the groups can share, short of all experts."""
    steps = (geometry.num_experts - experts) // geometry.n_group
    tries = min(TRIES, steps - 1)
    return [experts + geometry.n_group * round(steps * i / (tries + 1)) for i in range(1, tries + 1)]


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
