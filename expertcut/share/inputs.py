"""Paths in, what a report is made of out: at most one of each kind, and all of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertcut.calibrate.profile import JSON, Profile
from expertcut.checkpoint import Checkpoint, load_json, open_checkpoint
from expertcut.choose.plan import Plan
from expertcut.errors import CheckpointError, DataError, UsageError
from expertcut.measure.bench import FILE as BENCH
from expertcut.measure.bench import Bench, load_bench
from expertcut.rewrite.layout import RECORD
from expertcut.rewrite.record import Record

SWEEP = "sweep.json"
TAKEN = "a profile, a checkpoint that expertcut wrote, a plan, the folder of a sweep or of a benchmark"


@dataclass
class Inputs:
    """What was given, at most one of each kind."""

    profile: Profile | None = None
    plan: Plan | None = None
    record: Record | None = None
    checkpoint: Checkpoint | None = None
    sweep: dict[str, Any] | None = None
    bench: Bench | None = None
    names: dict[str, str] = field(default_factory=dict)
    """Kind → the model's name there."""
    geometries: dict[str, str] = field(default_factory=dict)
    """Kind → hash of the source's geometry, where it is known."""

    def put(self, kind: str, value: Any, path: Path) -> None:
        """Set one of the fields.

        Raises:
            UsageError: there is one already.
        """
        if getattr(self, kind) is not None:
            raise UsageError(f"{path}: a second {kind}", "one of each kind goes on a page")
        setattr(self, kind, value)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read what a report is made of, and check that it is all of one model.

    Raises:
        UsageError: a path is none of these, two of a kind, or of different models.
        ProfileError, PlanError, CheckpointError, DataError: one of them is damaged.
    """
    found = Inputs()
    for path in paths:
        _read(found, path)
    if len(set(found.geometries.values())) > 1:
        told = ", ".join(f"{kind}: {found.names.get(kind, '?')}" for kind in found.geometries)
        raise UsageError(f"these are of different models: {told}", "make a page for each")
    _check_bench(found)
    if found.sweep is not None:
        own = last_part(str(found.sweep["model"]))
        others = {kind: name for kind, name in found.names.items() if kind != "sweep" and last_part(name) != own}
        if others and len(others) == len(found.names) - 1:
            raise UsageError(
                f"the sweep is of {own}, the others of {', '.join(others.values())}", "make a page for each"
            )
    return found


def _read(found: Inputs, path: Path) -> None:
    if path.is_dir() and (path / JSON).exists():
        profile = Profile.load(path)
        found.put("profile", profile, path)
        found.names["profile"], found.geometries["profile"] = profile.meta.source, profile.meta.fingerprint.geometry
    elif path.is_dir() and (path / RECORD).exists():
        record = Record.load(path)
        found.put("record", record, path)
        found.put("checkpoint", open_checkpoint(path), path)
        _take_plan(found, record.plan, path)
    elif path.is_dir() and ((path / SWEEP).exists() or (path / BENCH).exists()):
        for name in (SWEEP, BENCH):
            if (path / name).exists():
                _read_document(found, path / name)
    elif path.is_file():
        _read_document(found, path)
    else:
        raise UsageError(f"{path}: expected {TAKEN}")


def _read_document(found: Inputs, path: Path) -> None:
    try:
        document = load_json(path)
    except CheckpointError as error:
        raise DataError(error.message, f"expected {TAKEN}") from None
    schema = str(document.get("schema", "")) if isinstance(document, dict) else ""
    if schema.startswith("expertcut.plan/"):
        _take_plan(found, Plan.load(path), path)
    elif schema.startswith("expertcut.bench/"):
        found.put("bench", load_bench(path), path)
    elif isinstance(document, dict) and isinstance(document.get("points"), list) and document["points"]:
        found.put("sweep", document, path)
        found.names["sweep"] = str(document.get("model"))
    else:
        raise UsageError(f"{path}: expected {TAKEN}")


def _take_plan(found: Inputs, plan: Plan, path: Path) -> None:
    if found.plan == plan:  # a checkpoint beside the plan that it was made by
        return
    found.put("plan", plan, path)
    found.names["plan"], found.geometries["plan"] = plan.source.name, plan.source.fingerprint.geometry


def _check_bench(found: Inputs) -> None:
    """A benchmark names directories, so that expert counts have to say of which model it is."""
    source = found.profile.meta.experts if found.profile else found.record.before.experts if found.record else None
    if found.bench is None or source is None:
        return
    measured = sorted({row.experts for row in found.bench.rows})
    known = {source, *([found.plan.experts] if found.plan else [])}
    if not known & {*measured}:
        told = ", ".join(f"{experts:g}" for experts in measured)
        raise UsageError(f"the benchmark is of {told} experts, the model has {source}", "make a page for each")


def last_part(name: str) -> str:
    """Return a name without its owner or folder."""
    return name.rstrip("/").rpartition("/")[2]
