"""What models make of the same documents in; differences with their intervals out. Numpy only.

A run is one model's results on tasks, down to the single document, so that two runs can be compared long after, and
wherever they were made. Every document counts the same and is drawn by itself; two models are always drawn together.

Shapes: D documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from expertcut.errors import DataError
from expertcut.measure.intervals import Estimate, ratio


class Metric(BaseModel):
    """One metric of one task, for one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    higher_is_better: bool | None
    """None: the task does not say."""
    value: float | None
    """None: not finite."""
    values: tuple[float, ...] | None
    """(D,) of every document, where their mean is `value`; None for a metric that is no mean over documents."""

    @property
    def share(self) -> bool:
        """True for a metric that lies between 0 and 1, which is read in percent."""
        return self.values is not None and all(0 <= value <= 1 for value in self.values)


class Run(BaseModel):
    """What one model makes of tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    engine: str
    """What computed it, and its version."""
    asked: tuple[str, ...]
    """The names that were asked for; groups have others below them."""
    documents: dict[str, tuple[str, ...]]
    """Task or group → (D,) start of a hash of every document and its prompt."""
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Gap:
    """How far two models lie apart in one metric."""

    base: Metric
    other: Metric
    change: Estimate | None
    """`other` minus `base`, document by document; None for a metric that is no mean over documents."""


def mean(values: ArrayLike) -> Estimate:
    """Estimate the mean of values (D,)."""
    found = np.asarray(values, np.float64)
    return ratio(found, np.ones_like(found))


def difference(values: ArrayLike, others: ArrayLike) -> Estimate:
    """Estimate how much higher the mean of values (D,) is than that of others (D,) on the same documents."""
    return mean(np.asarray(values, np.float64) - np.asarray(others, np.float64))


def compare(base: Run, other: Run) -> list[Gap]:
    """Compare a run with that of the base, metric by metric.

    Raises:
        DataError: they are not of the same tasks and documents.
    """
    for task in {**base.documents, **other.documents}:
        found, expected = other.documents.get(task, ()), base.documents.get(task, ())
        if found != expected:
            raise DataError(
                f"task {task}: {other.model} and {base.model} were not given the same documents: found {len(found)}, "
                f"expected {len(expected)}{' others' if len(found) == len(expected) else ''}",
                "run both with the same --tasks, --limit, --chat-template and version of lm-eval",
            )
    return [_gap(*pair) for pair in _pairs(base.metrics, other.metrics)]


def read_run(path: Path) -> Run:
    """Read the base's run back from what `expertcut eval --json` printed.

    Raises:
        DataError: the file holds no run.
    """
    try:
        return Run.model_validate(json.loads(path.read_text(encoding="utf-8"))["tasks"]["runs"][0])
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: found no results of tasks ({str(error).splitlines()[0]})",
            "make it with expertcut eval MODEL --tasks … --json > FILE",
        ) from error


def _pairs(base: Sequence[Metric], other: Sequence[Metric]) -> Iterator[tuple[Metric, Metric]]:
    theirs: Mapping[tuple[str, str], Metric] = {(m.task, m.metric): m for m in other}
    return ((m, theirs[m.task, m.metric]) for m in base if (m.task, m.metric) in theirs)


def _gap(base: Metric, other: Metric) -> Gap:
    paired = base.values is not None and other.values is not None
    return Gap(base, other, difference(other.values, base.values) if paired else None)  # type: ignore[arg-type]
