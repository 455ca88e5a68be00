"""Quality limits as users write them: `nll<=1%`, `kl<=0.05@code`, `agreement>=0.9@each` in, one `Limit` each out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite

from expertcut.errors import UsageError

METRICS = {"nll": "<=", "ppl": "<=", "kl": "<=", "agreement": ">=", "acceptance": ">="}
"""Metric → the side on which quality lies."""
RELATIVE = ("nll", "ppl")
"""Metrics of the base itself, of which a limit may be a percentage."""
EACH = "each"
"""In place of a domain: every domain by itself."""
FORM = "METRIC<=VALUE or METRIC>=VALUE, then % for more than the base, then @DOMAIN or @each"
_EXAMPLE = "for example 'nll<=1%', 'kl<=0.05@each' or 'agreement>=0.9@code'"
_LIMIT = re.compile(r"(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<value>[^%@\s]+)\s*(?P<percent>%?)\s*(@(?P<domain>.+))?")


@dataclass(frozen=True)
class Limit:
    """A bound on a metric of a candidate."""

    metric: str
    """One of `METRICS`; `nll` and `kl` in nats per token, `agreement` and `acceptance` fractions."""
    value: float
    """The largest or smallest metric that will do; if `relative`, the largest growth over the base, a fraction."""
    relative: bool = False
    domain: str | None = None
    """None: all text together. `EACH`: every domain."""

    @property
    def upper(self) -> bool:
        """True if the metric must not lie above the value, False if not below."""
        return METRICS[self.metric] == "<="

    def __str__(self) -> str:
        value = f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"
        return f"{self.metric}{METRICS[self.metric]}{value}" + (f"@{self.domain}" if self.domain else "")


def parse_limit(text: str) -> Limit:
    """Parse one limit; whether the text has its domain is for `measure.gate` to say.

    Raises:
        UsageError: not of the form, an unknown metric, the wrong side, or a value out of range.
    """
    match = _LIMIT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"limit {text!r}: expected {FORM}", _EXAMPLE)
    metric, percent, domain = match["metric"], bool(match["percent"]), match["domain"]
    if metric not in METRICS:
        raise UsageError(f"limit {text!r}: unknown metric {metric!r}; known: {', '.join(METRICS)}", _EXAMPLE)
    if match["sign"] != METRICS[metric]:
        better = "lower" if METRICS[metric] == "<=" else "higher"
        raise UsageError(f"limit {text!r}: {metric} is better {better}", f"write {metric}{METRICS[metric]}…")
    if percent and metric not in RELATIVE:
        raise UsageError(f"limit {text!r}: % is relative to the base, which only {' and '.join(RELATIVE)} can be")
    try:
        value = float(match["value"]) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    most = 1.0 if METRICS[metric] == ">=" else float("inf")
    if not (isfinite(value) and 0 <= value <= most):
        raise UsageError(f"limit {text!r}: found {match['value']}, expected 0 {'to 1' if most == 1 else 'or more'}")
    return Limit(metric, value, percent, domain.strip() if domain else None)
