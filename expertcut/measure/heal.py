"""A plan in; the same plan with new values for its down projections out, as far as held-out text shows that they help.

New values are fitted layer by layer (`heal_fit`), so that healing only the first layers is a choice too: several such
prefixes are compared on text that was not fitted, beside the plan as it came and, where the checkpoint can carry one,
beside the plan with a gain. The routers of the best may be distilled after that (`distil`). Invariant: what is returned
is not worse than the plan as it came, as that text tells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.passage import Advance, Notify
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint.types import Checkpoint
from expertcut.choose.plan import Deltas, Plan, deltas_of
from expertcut.errors import PlanError
from expertcut.measure.distil import distil_routers
from expertcut.measure.gain import fit_gains, gain_kinds
from expertcut.measure.heal_fit import fit_deltas
from expertcut.measure.heal_record import LayerHealed
from expertcut.measure.quality import BASE, WhatIf
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry
from expertcut.rewrite.deltas import copied, new_tensors

PREFIXES = 4
"""How many numbers of healed layers are tried."""
PLAN = "the plan"
DISTILLED = "{}, routers distilled"
"""What the plan of a name is called with its routers distilled."""


@dataclass(frozen=True)
class Healed:
    """What came of healing a plan."""

    plan: Plan
    """The best of what was tried."""
    name: str
    """Its name in what the pass found; `PLAN` if nothing helps."""
    layers: list[LayerHealed]
    """What was fitted, layer by layer."""
    prefixes: dict[str, int]
    """Of what was tried, by its name in `found`, the plan as it came first: how many layers have their new values."""
    gained: dict[str, Plan]
    """The plan with gains instead, by the name in what the pass found."""
    distilled: bool
    """Whether the plan has distilled routers."""
    found: WhatIf

    @property
    def kept(self) -> int:
        """How many layers, the first ones, have their new values in the plan."""
        return self.prefixes[self.name]


def heal_plan(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, fit_on: CalibrationSet, judge_on: CalibrationSet,
    path: Path, options: ProfileOptions, *, distil: int = 0, notify: Notify, advance: Advance,
) -> Healed:  # fmt: skip
    """Fit new values on `fit_on`, and keep those that lower the loss on `judge_on`, in the file `path`.

    Where none help, there is no such file. Passes over the weights: one to fit, one to fit gains, one to judge. With
    `distil`, the routers of the best plan are then trained for so many steps on `fit_on`, with the whole model in
    memory, and kept if that lowers the loss on `judge_on` once more.

    Raises:
        PlanError: the plan has new values already, its format or family cannot be healed or distilled, or the loss is
            not finite.
        DestinationError: the file cannot be written.
    """
    deltas, layers = fit_deltas(checkpoint, geometry, plan, fit_on, path, options, notify=notify, advance=advance)
    try:
        healed = dict(_prefixes(geometry, plan.beside(path.absolute().parent, deltas)))
        gained = dict(_gained(checkpoint, geometry, plan, fit_on, options, notify, advance))
        candidates = {PLAN: plan} | {_named(n, len(layers)): made for n, made in healed.items()} | gained
        prefixes = dict.fromkeys(candidates, 0) | {_named(n, len(layers)): n for n in healed}
        found = evaluate(checkpoint, geometry, judge_on, candidates, options, notify=notify, advance=advance)
        if not isfinite(found.mean("nll", BASE) + found.mean("nll", PLAN)):
            raise PlanError("the loss on the text to judge on is not finite", "try --dtype float32")
        name = _best(found)
        kept = prefixes[name]
        if kept and kept < len(layers):
            _shorten(checkpoint, geometry, healed[kept], deltas, path)
        if not kept:
            path.unlink(missing_ok=True)
        done = Healed(candidates[name], name, layers, prefixes, gained, False, found)
        if distil:
            done = distil_healed(
                checkpoint, geometry, done, fit_on, judge_on, path, options, steps=distil, notify=notify,
                advance=advance,
            )  # fmt: skip
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return done


def distil_healed(
    checkpoint: Checkpoint, geometry: Geometry, healed: Healed, fit_on: CalibrationSet, judge_on: CalibrationSet,
    path: Path, options: ProfileOptions, *, steps: int, notify: Notify, advance: Advance,
) -> Healed:  # fmt: skip
    """Distil the routers of a healed plan, and keep them if that does significantly better; see `heal_plan`.

    `path` is where the new values go then, healed ones included; it may be the healed plan's own file. What is found of
    the plan with distilled routers stands beside the other candidates in either case.

    Raises:
        PlanError: see `distil_routers`.
        DestinationError: the file cannot be written.
    """
    trial, name = path.with_name(f".{path.name}.routers"), DISTILLED.format(healed.name)
    try:
        deltas = distil_routers(
            checkpoint, geometry, healed.plan, fit_on, trial, options, steps=steps, notify=notify, advance=advance
        )
        plan = healed.plan.beside(trial.absolute().parent, deltas)
        judged = evaluate(checkpoint, geometry, judge_on, {name: plan}, options, notify=notify, advance=advance)
        found = WhatIf.joined([healed.found, judged])
        tried = replace(healed, prefixes=healed.prefixes | {name: healed.kept}, found=found)
        if found.difference(name, healed.name).sign >= 0:
            return tried
        os.replace(trial, path)
    finally:
        trial.unlink(missing_ok=True)
    kept = plan.beside(path.absolute().parent, Deltas(file=path.name, tensors=deltas.tensors))
    return replace(tried, plan=kept, name=name, distilled=True)


def _prefixes(geometry: Geometry, plan: Plan) -> Iterator[tuple[int, Plan]]:
    """Yield the plan with the new values of the first layers only, for several numbers of layers up to all."""
    assert plan.deltas is not None
    blocks = geometry.trunk
    for count in sorted({-(-len(blocks) * part // PREFIXES) for part in range(1, PREFIXES + 1)}):
        tensors = {name: digest for block in blocks[:count] for name, digest in deltas_of(plan, block).items()}
        if tensors:
            yield count, plan.beside(plan.deltas_path.parent, Deltas(file=plan.deltas.file, tensors=tensors))


def _named(count: int, layers: int) -> str:
    return "healed" if count == layers else f"healed, the first {count} of {layers} layers"


def _gained(
    checkpoint: Checkpoint, geometry: Geometry, plan: Plan, fit_on: CalibrationSet, options: ProfileOptions,
    notify: Notify, advance: Advance,
) -> Iterator[tuple[str, Plan]]:  # fmt: skip
    """Yield the plan with gains, unless it has some or the checkpoint cannot carry any."""
    if any(entry.gain for entry in plan.layers.values()):
        return
    fitted = fit_gains(checkpoint, geometry, {PLAN: plan}, fit_on, options, notify=notify, advance=advance)
    try:
        yield from gain_kinds(checkpoint, geometry, plan, fitted[PLAN])
    except PlanError as error:
        notify(f"not compared with a gain: {error.message}")


def _best(found: WhatIf) -> str:
    """The candidate of the lowest loss among those that do significantly better than the plan as it came."""
    helping = [name for name in found.names[2:] if found.difference(name, PLAN).sign < 0]
    return min(helping, key=lambda name: found.mean("nll", name), default=PLAN)


def _shorten(checkpoint: Checkpoint, geometry: Geometry, plan: Plan, whole: Deltas, path: Path) -> None:
    """Leave in the file what the plan names."""
    assert plan.deltas is not None
    infos = new_tensors(checkpoint, geometry, plan)
    copied(infos, path, infos, whole.tensors)
