"""What models made of tasks, for `eval`: the table, one verdict per comparison, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from expertcut.measure.intervals import LEAST, LEVEL

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from expertcut.measure.scores import Gap, Metric, Run

LEGEND = (
    "value: lm-eval's; change: with its 95 % interval over documents, in points of a hundred; see docs/evaluation.md"
)


def record(runs: Sequence[Run], limit: int | None) -> dict[str, Any]:
    """Everything, as members of a JSON document."""
    from expertcut.measure.scores import compare

    comparisons = [
        {"name": run.model, "base": runs[0].model, "task": gap.base.task, "metric": gap.base.metric,
         "change": gap.change and asdict(gap.change), "verdict": _said(gap)}
        for run in runs[1:] for gap in compare(runs[0], run)
    ]  # fmt: skip
    return {"limit": limit, "level": LEVEL, "runs": [run.model_dump() for run in runs], "comparisons": comparisons}


def shown(runs: Sequence[Run]) -> list[RenderableType]:
    """What is printed: the table, what it means, and one line for each comparison."""
    lines = verdicts(runs)
    return [table(runs), "", LEGEND, *(["", *lines] if lines else [])]


def table(runs: Sequence[Run]) -> Table:
    """One line per task, metric and model."""
    from expertcut.cli import tables
    from expertcut.measure.scores import compare

    made = tables.table(("task", "metric", "model", ">documents", ">value", ">change"), ())
    gaps = [compare(runs[0], run) for run in runs[1:]]
    for i, metric in enumerate(runs[0].metrics):
        lines = [(metric, ""), *((found[i].other, _change(found[i])) for found in gaps)]
        for run, (own, change) in zip(runs, lines, strict=True):
            count = len(run.documents[metric.task])
            made.add_row(metric.task, metric.metric, run.model, f"{count:,}", _value(own), change,
                         end_section=run is runs[-1])  # fmt: skip
    return made


def verdicts(runs: Sequence[Run]) -> list[str]:
    """One line per model that is compared, and task or group that was asked for, and metric of it."""
    from expertcut.measure.scores import compare

    return [
        f"{run.model}: {gap.base.task}, {gap.base.metric}: {_said(gap)}"
        for run in runs[1:]
        for gap in compare(runs[0], run)
        if gap.base.task in run.asked
    ]


def _value(metric: Metric) -> str:
    from expertcut.measure.scores import mean

    if metric.value is None:
        return "not finite"
    if not metric.share:
        return f"{metric.value:.4f}"
    found = mean(metric.values or ())
    between = "" if found.low is None else f" ({found.low:.1%} to {found.high:.1%})"
    return f"{found.value:.1%}{between}"


def _change(gap: Gap) -> str:
    if gap.change is None:
        return f"{_plain(gap):+.4f}"
    scale, digits, _ = _unit(gap)
    value, low, high = (
        "" if end is None else f"{scale * end:+.{digits}f}"
        for end in (gap.change.value, gap.change.low, gap.change.high)
    )
    return f"{value} ({low} to {high})" if low else value


def _said(gap: Gap) -> str:
    """Whether a model is worse than the base in a metric, and by how much."""
    scale, digits, unit = _unit(gap)
    value = _plain(gap) if gap.change is None else gap.change.value
    words = {True: ("better", "worse"), False: ("worse", "better"), None: ("higher", "lower")}
    if isnan(value):
        return "not finite: try --dtype float32"
    above, below = words[gap.base.higher_is_better]
    amount = f"{above if value > 0 else below} by {abs(scale * value):.{digits}f}{unit}"
    if gap.change is None:
        return f"{amount}; no interval: the metric is no mean over documents"
    low, high = gap.change.low, gap.change.high
    if low is None or high is None:
        return f"{amount}; no interval: {len(gap.base.values or ())} documents, {LEAST} or more are needed"
    if low == high == 0:
        return "no difference in any document"
    if not gap.change.sign:
        return f"no significant difference ({scale * low:+.{digits}f} to {scale * high:+.{digits}f}{unit}, {LEVEL:.0%})"
    low, high = sorted((abs(low), abs(high)))
    return f"{amount} ({scale * low:.{digits}f} to {scale * high:.{digits}f}, {LEVEL:.0%})"


def _unit(gap: Gap) -> tuple[float, int, str]:
    """Factor, decimals and name of the unit in which a difference is told."""
    return (100, 1, " points") if gap.base.share and gap.other.share else (1, 4, "")


def _plain(gap: Gap) -> float:
    """The difference of the two figures; not a number if one is not finite."""
    base, other = (nan if metric.value is None else metric.value for metric in (gap.base, gap.other))
    return other - base
