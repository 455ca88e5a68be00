"""Fitting a machine's five constants to measured throughput: rows of a JSON file in, a machine and its errors out.

The loss is the root mean square error of relative gains, in percentage points, plus that of throughput, in percent:
gains are what plans are judged by, and the throughput keeps the constants in seconds. The search is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertcut.errors import DataError
from expertcut.measure.cost import step_seconds, throughput
from expertcut.measure.cost_hardware import UNFITTED, Count, Machine, Positive, first_error
from expertcut.measure.cost_model import ModelCost
from expertcut.measure.cost_traffic import Load, stacked, tally

SHARES = ("bandwidth", "compute")
"""Constants between 0 and 1; the others are positive."""
NAMES = (*SHARES, "layer_us", "moe_us", "sequence_us")
LEAST = 6
"""Rows that a fit needs, at two loads or more."""
TIED = 0.03
"""Measured rows that differ by no more are in no order."""


class Row(BaseModel):
    """One measured throughput; fields that are not listed are for others."""

    model_config = ConfigDict(frozen=True)

    experts: Positive
    """Per layer with routed experts; the mean where layers differ. `top_k` likewise."""
    top_k: Positive
    concurrency: Count
    input_len: Count
    """Tokens of a prompt."""
    output_len: Count
    tokens_per_s: Positive
    """Tokens written per second."""
    ratio: Positive | None = None
    """To the unchanged model's where both were measured in turns: better than that of the two throughputs."""
    series: str = ""
    """Rows of one series and load were measured together; the first of them is the unchanged model."""


class Measured(BaseModel):
    """What was run, and its rows: the file of `expertcut bench`, or one's own."""

    model_config = ConfigDict(frozen=True)

    source: str = ""
    """For people; the file's name if it does not say."""
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    @property
    def concurrencies(self) -> list[int]:
        """The loads, ascending."""
        return sorted({row.concurrency for row in self.rows})


def read_rows(path: Path) -> Measured:
    """Read measured rows from a JSON file, or from `bench.json` in a directory.

    Raises:
        DataError: no such file, not JSON, or a field is missing or wrong.
    """
    path = path / "bench.json" if path.is_dir() else path
    try:
        found = Measured.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise DataError(f"{path}: {first_error(error)}", "the fields are listed in docs/estimate.md") from error
    return found.model_copy(update={"source": found.source or path.name, "rows": _paired(found.rows)})


def _paired(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows with a ratio have the throughput that follows from it."""
    base: dict[tuple[str, int, int, int], float] = {}
    found = []
    for row in rows:
        first = base.setdefault((row.series, row.concurrency, row.input_len, row.output_len), row.tokens_per_s)
        found.append(row if row.ratio is None else row.model_copy(update={"tokens_per_s": first * row.ratio}))
    return tuple(found)


def read_measured(path: Path) -> Measured:
    """Read rows that constants can be fitted to.

    Raises:
        DataError: see `read_rows`, or too few rows or loads for five constants.
    """
    found = read_rows(path)
    if len(found.rows) < LEAST:
        raise DataError(f"{path}: found {len(found.rows)} rows, expected {LEAST} or more")
    if len(found.concurrencies) < 2:
        raise DataError(f"{path}: all rows have concurrency {found.concurrencies[0]}, expected two or more loads")
    return found


class Experiment:
    """Measured rows of one model, beside what the model of costs says of them on any machine.

    Raises:
        DataError: a row has more experts than the model.
    """

    def __init__(self, work: ModelCost, measured: Measured) -> None:
        most = max(len(moe.chosen) for moe in work.moe)
        for at, row in enumerate(measured.rows):
            if not row.top_k <= row.experts <= most:
                found = f"{row.experts:g} experts with top-{row.top_k:g}"
                raise DataError(f"{measured.source}: rows.{at}: {found}, the model has {most}")
        self.measured, self._work = measured, work
        self.rates = np.array([row.tokens_per_s for row in measured.rows])
        self._loads = [Load(row.concurrency, row.input_len, row.output_len) for row in measured.rows]
        self._traffic = stacked([
            tally(work.with_counts(round(row.experts), row.top_k), load)
            for row, load in zip(measured.rows, self._loads, strict=True)
        ])  # fmt: skip
        keys = [(row.series, load) for row, load in zip(measured.rows, self._loads, strict=True)]
        groups: dict[tuple[str, Load], list[int]] = {}
        for at, key in enumerate(keys):
            groups.setdefault(key, []).append(at)
        self.groups = groups
        """Rows that were measured together, by series and load; the first is what gains are over."""
        self._base = np.array([groups[key][0] for key in keys])

    def only(self, keep: Callable[[Row], bool]) -> Experiment:
        """Return the experiment with those rows."""
        rows = tuple(filter(keep, self.measured.rows))
        return Experiment(self._work, self.measured.model_copy(update={"rows": rows}))

    def predicted(self, machine: Machine) -> np.ndarray:
        """Tokens per second of every row: (R,)."""
        return throughput(self._traffic, step_seconds(self._traffic, self._work, machine), self._loads)

    def gains(self, rates: np.ndarray) -> np.ndarray:
        """Gains over the unchanged model, in percentage points: (R,) → (R,), 0 for that one."""
        gains: np.ndarray = 100 * (rates / rates[self._base] - 1)
        return gains

    @property
    def changed(self) -> np.ndarray:
        """(R,) True where a row has a gain, False for the unchanged model."""
        changed: np.ndarray = self._base != np.arange(len(self._base))
        return changed

    def errors(self, machine: Machine) -> np.ndarray:
        """Predicted minus measured gains, in percentage points, of rows that have one."""
        errors: np.ndarray = (self.gains(self.predicted(machine)) - self.gains(self.rates))[self.changed]
        return errors

    def loss(self, machine: Machine) -> float:
        """What fitting makes small, see the module's docstring."""
        drift = 100 * np.log(self.predicted(machine) / self.rates)
        errors = self.errors(machine)
        return float(np.sqrt(np.mean(drift**2)) + (np.sqrt(np.mean(errors**2)) if len(errors) else 0))

    def ordered(self, machine: Machine) -> tuple[int, int]:
        """Pairs of rows measured together that differ by more than `TIED`: how many are in the right order, of all."""
        predicted, right, every = self.predicted(machine), 0, 0
        for rows in self.groups.values():
            for a, b in combinations(rows, 2):
                if abs(np.log(self.rates[a] / self.rates[b])) > np.log(1 + TIED):
                    every += 1
                    right += bool((self.rates[a] > self.rates[b]) == (predicted[a] > predicted[b]))
        return right, every

    def levers(self, top_k: float, experts: float) -> list[tuple[float, float, float]]:
        """Return (concurrency, measured gain of that top-k, of so many experts), in percentage points, by load.

        A load at which only one of them was measured takes the other from its neighbours, linear in the logarithm.
        """
        gains, rows = self.gains(self.rates), self.measured.rows
        base = rows[0]
        lower = {r.concurrency: float(g) for r, g in zip(rows, gains, strict=True)
                 if (r.top_k, r.experts) == (top_k, base.experts)}  # fmt: skip
        fewer = {r.concurrency: float(g) for r, g in zip(rows, gains, strict=True)
                 if (r.top_k, r.experts) == (base.top_k, experts)}  # fmt: skip
        loads = sorted({*lower, *fewer})

        def everywhere(found: Mapping[int, float]) -> list[float]:
            known = sorted(found)
            values: list[float] = np.interp(np.log(loads), np.log(known), [found[c] for c in known]).tolist()
            return values

        return list(zip(map(float, loads), everywhere(lower), everywhere(fewer), strict=True))


def boundaries(levers: Sequence[tuple[float, float, float]]) -> list[float]:
    """Return the concurrencies at which the larger of two gains changes, linear in the logarithm between loads."""
    found = []
    for (c, top_k, experts), (after, next_top_k, next_experts) in pairwise(levers):
        before, behind = top_k - experts, next_top_k - next_experts
        if (before > 0) != (behind > 0):
            found.append(c * (after / c) ** (before / (before - behind)))
    return found


@dataclass(frozen=True)
class Fit:
    """Fitted constants and how far they are to be trusted."""

    machine: Machine
    error: float
    """Mean absolute error of relative gains, percentage points."""
    left_out: float
    """The same of every load by constants fitted to the others."""
    drift: float
    """Mean absolute error of the throughput, fraction."""


def fit(experiment: Experiment, machine: Machine) -> Machine:
    """Fit a machine's constants to measurements; those that it has do not matter, and equal rows give equal ones."""

    def at(point: np.ndarray) -> Machine:
        values = [1 / (1 + np.exp(-x)) if name in SHARES else np.exp(x) for name, x in zip(NAMES, point, strict=True)]
        constants = machine.constants.model_copy(update=dict(zip(NAMES, map(float, values), strict=True)))
        return machine.model_copy(update={"constants": constants, "fitted": experiment.measured.source})

    start = [getattr(UNFITTED, name) for name in NAMES]
    point = np.array([np.log(v / (1 - v)) if n in SHARES else np.log(v) for n, v in zip(NAMES, start, strict=True)])
    for _ in range(3):  # the simplex may collapse before it is there: begin again around what it found
        point = nelder_mead(lambda x: experiment.loss(at(x)), point)
    return at(point)


def judge(experiment: Experiment, machine: Machine) -> Fit:
    """Fit, and say how well: on all rows, and on every load by constants that have not seen it."""
    found = fit(experiment, machine)
    drift = np.abs(np.log(experiment.predicted(found) / experiment.rates)).mean()
    unseen = np.concatenate(left_out(experiment, machine))
    return Fit(found, _mean(np.abs(experiment.errors(found))), _mean(np.abs(unseen)), float(drift))


def left_out(experiment: Experiment, machine: Machine) -> list[np.ndarray]:
    """Errors of the gains of every load, by constants fitted to the other loads."""
    errors = []
    for load in experiment.measured.concurrencies:
        rest = fit(experiment.only(lambda row, load=load: row.concurrency != load), machine)  # type: ignore[misc]
        errors.append(experiment.only(lambda row, load=load: row.concurrency == load).errors(rest))  # type: ignore[misc]
    return errors


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def nelder_mead(loss: Callable[[np.ndarray], float], start: np.ndarray, turns: int = 400) -> np.ndarray:
    """Return a point near `start` where the loss is small, by the simplex of Nelder and Mead (1965)."""
    points = [start, *(start + 0.4 * axis for axis in np.eye(len(start)))]
    simplex = sorted(((loss(point), at, point) for at, point in enumerate(points)), key=lambda entry: entry[:2])
    for turn in range(turns):
        (best, _, first), (worst, _, last) = simplex[0], simplex[-1]
        if worst - best < 1e-6:
            break
        centre = np.mean([point for _, _, point in simplex[:-1]], axis=0)
        far = 2.0 if (near := loss(2 * centre - last)) < best else 0.5 if near < worst else -0.5
        tried, found = 2 * centre - last, near
        if near < best or near >= simplex[-2][0]:
            other = centre + far * (centre - last)
            if (value := loss(other)) < found:
                tried, found = other, value
        if found < worst:
            simplex[-1] = (found, len(points) + turn, tried)
        else:
            points = [(first + point) / 2 for _, _, point in simplex]
            simplex = [(loss(point), at, point) for at, point in enumerate(points)]
        simplex.sort(key=lambda entry: entry[:2])
    return simplex[0][2]
