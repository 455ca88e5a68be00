"""Healing, for `heal` and `prune --heal`: new values for a plan's tensors, and what to say about them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.cli.common import Output
from expertcut.cli.options import Forward
from expertcut.cli.text import Texts

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.measure.heal import Healed
    from expertcut.measure.heal_record import HealRecord
    from expertcut.model import Geometry

DELTAS = ".deltas.safetensors"
"""What stands in the place of the plan's `.json` in the name of the file of new values."""


@dataclass(frozen=True)
class Outcome:
    """A plan as healing left it, and what to say about it."""

    plan: Plan
    members: dict[str, Any]
    """Members of the JSON document."""
    parts: list[RenderableType]


def heal_with(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, texts: Texts, path: Path, forward: Forward,
    distil: int = 0,
) -> Outcome:  # fmt: skip
    """Heal a plan, distil its routers for so many steps, and save it as `path`; its new values lie in a file beside it.

    Raises:
        PlanError: it cannot be healed.
        DestinationError: a file cannot be written.
    """
    from expertcut.calibrate.run import ProfileOptions
    from expertcut.measure.heal import heal_plan
    from expertcut.measure.heal_record import KEY

    assert texts.fit_on is not None
    with out.progress("healing", lambda speed: f"{speed:.2f} layers/s") as advance:
        healed = heal_plan(
            checkpoint, geometry, plan, texts.fit_on, texts.judge_on, deltas_file(path),
            ProfileOptions(**vars(forward)), distil=distil, notify=out.note, advance=advance,
        )  # fmt: skip
    record = _record(out, plan, texts, forward, healed)
    facts = {KEY: record.model_dump(mode="json"), "healing_text": texts.facts["healing_text"],
             "healing_judged_text": texts.facts["judged_text"]}  # fmt: skip
    made = healed.plan.model_copy(update={"provenance": plan.provenance | facts})
    made.save(path)
    return _outcome(out, made, record)


def deltas_file(path: Path) -> Path:
    """Return where the new values for a plan at `path` go."""
    return path.with_name(path.name.removesuffix(".json") + DELTAS)


def healed_for(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, texts: Texts, target: Path, forward: Forward
) -> Outcome:  # fmt: skip
    """Heal a plan for a checkpoint to be written at `target`; files lie beside it until `forget` removes them.

    What an interrupted run of the same healing left is used again.
    """
    from expertcut.choose.plan import Plan
    from expertcut.errors import ExpertcutError
    from expertcut.measure.heal_record import HealRecord
    from expertcut.rewrite.deltas import check_new, new_tensors

    path = _beside(target)
    if path.exists():
        try:
            found = Plan.load(path)
            record = HealRecord.of_plan(found)
            if record is not None and record.of == identity(plan, texts, forward):
                if found.deltas:
                    check_new(new_tensors(checkpoint, geometry, found).values(), found.deltas.tensors)
                out.note(f"{path}: healed before, by a run that did not end; used again")
                return _outcome(out, found, record)
        except ExpertcutError:
            pass  # a file of something else, or beside other values, is replaced
    return heal_with(out, checkpoint, geometry, plan, texts, path, forward)


def forget(target: Path) -> None:
    """Remove what `healed_for` left beside a checkpoint that is written."""
    for path in (_beside(target), deltas_file(_beside(target))):
        path.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.healed.json")


def identity(plan: Plan, texts: Texts, forward: Forward) -> str:
    """Return what tells one healing from another: a hash of the plan, of both texts, and of the dtype."""
    assert texts.fit_on is not None
    parts = (plan.model_dump_json(), texts.fit_on.fingerprint, texts.judge_on.fingerprint, forward.dtype)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _record(out: Output, plan: Plan, texts: Texts, forward: Forward, healed: Healed) -> HealRecord:
    from expertcut.measure.heal import PLAN
    from expertcut.measure.heal_record import HealRecord, Tried

    assert texts.fit_on is not None
    found = healed.found
    domains = found.domains if len(found.domains) > 1 and healed.name != PLAN else ()
    tried = (Tried(name, layers, found.change(name), found.difference(name, PLAN))
             for name, layers in healed.prefixes.items())  # fmt: skip
    return HealRecord(
        of=identity(plan, texts, forward), command=out.command, tokens=texts.fit_on.tokens,
        judged_tokens=found.count(), kept=healed.name,
        domains={domain: found.difference(healed.name, PLAN, domain) for domain in domains},
        distilled=healed.distilled, layers=healed.layers, tried=[one for one in tried if isfinite(one.change.value)],
    )  # fmt: skip


def _outcome(out: Output, plan: Plan, record: HealRecord) -> Outcome:
    from expertcut.measure.heal_record import KEY

    for domain in record.harmed:
        out.warn(
            f"healed, the plan does worse in {domain} than it did: {record.domains[domain].shown} nats per token; "
            "more text of that kind in --calibration helps"
        )
    return Outcome(plan, {KEY: record.model_dump(mode="json")}, _shown(record))


def _shown(record: HealRecord) -> list[RenderableType]:
    from expertcut.cli.tables import table

    layers = [
        (*layer.row, "yes" if at < record.best.layers and layer.changed else "no")
        for at, layer in enumerate(record.layers)
    ]
    domains = [
        (name, change.shown, "worse" if name in record.harmed else "") for name, change in record.domains.items()
    ]
    by_domain: list[RenderableType] = ["", table(("domain", ">beside the plan", ""), domains)] if domains else []
    return [
        "", table((">layer", ">ridge", ">projections refitted", ">residual left", "kept"), layers),
        "", table(("tried", ">change of the loss", ">beside the plan", ""), record.rows), *by_domain, "", record.told,
    ]  # fmt: skip
