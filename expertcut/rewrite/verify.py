"""A written checkpoint in, checks out: is it whole and consistent, and do the survivors' bytes equal the source's?

Nothing of the layout that wrote it is used: what must be where follows from the two checkpoints' own geometries and the
plan in `expertcut.json`. Checks are data; `require` raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from expertcut.checkpoint import Checkpoint, TensorInfo, load_json, open_checkpoint
from expertcut.checkpoint.local import INDEX, SINGLE
from expertcut.choose.plan import Plan, dropped_tensors, group_best, kept_by_block, numbers, reachable, validate
from expertcut.errors import CheckpointError, PlanError, VerifyError
from expertcut.model import Geometry, check_fingerprint, read_geometry
from expertcut.rewrite.compare import Survivor, changed_files, changed_tensors, survivors, wrong_files, wrong_tensors
from expertcut.rewrite.config import describe, differences, edit_config
from expertcut.rewrite.destination import partial_folder
from expertcut.rewrite.fitness import unfit_shards
from expertcut.rewrite.gain import folded
from expertcut.rewrite.layout import RECORD, config_edits, rewritten_companions
from expertcut.rewrite.record import Record

CARD = "README.md"
"""The one companion that need not be the source's: `push` writes another."""
SHOWN = 5
"""Findings that a failed check names; the others are counted."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer."""

    name: str
    ok: bool
    detail: str
    """What was found: where and against what, if it failed."""


def require(checks: Iterable[Check]) -> None:
    """Do nothing if all checks passed.

    Raises:
        VerifyError: naming the checks that failed and what they found.
    """
    failed = [check for check in checks if not check.ok]
    if failed:
        found = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise VerifyError(found, "write it again from its unchanged source with --force")


def verify_structure(out: str | Path | Checkpoint, source: Checkpoint | None = None) -> list[Check]:
    """Check a checkpoint by its headers, config and record, and against those of its source where that is given.

    Stops early where what is missing makes further questions pointless.
    """
    try:
        ckpt = out if isinstance(out, Checkpoint) else open_checkpoint(out)
    except CheckpointError as error:
        return [Check("opens", False, error.message)]
    shards = f"{len(ckpt.shards)} shard{'s' if len(ckpt.shards) > 1 else ''}"
    opened = f"{len(ckpt.tensors)} tensors in {shards}; headers, files and index agree"
    checks = [
        Check("opens", True, opened),
        _check("files", _wrong_files(ckpt), "named and numbered as runtimes expect; nothing stale, nothing unfinished"),
    ]
    try:
        geometry = read_geometry(ckpt)
        last = geometry.num_experts * geometry.family.sets - 1
        experts = f"0..{last} in {len(geometry.blocks)} blocks; routers, biases and config agree"
        routable = f"top-{geometry.top_k} of {geometry.num_experts} experts can be reached"
        checks.append(Check("experts", True, experts))
        checks.append(_check("routing", _unroutable(geometry), routable))
        record = Record.load(ckpt.path)
    except CheckpointError as error:
        return [*checks, Check("experts" if len(checks) == 2 else "record", False, error.message)]
    agreed = f"{RECORD} and its plan agree with the checkpoint"
    checks.append(_check("record", _wrong_record(record, ckpt, geometry), agreed))
    return checks + (_against(source, ckpt, record) if source else [])


def verify_bytes(out: str | Path | Checkpoint, source: Checkpoint) -> list[Check]:
    """Check that the bytes of every tensor and of every companion are the source's; both are read once.

    Raises:
        CheckpointError: the source cannot be read.
    """
    geometry = read_geometry(source)
    try:
        ckpt = out if isinstance(out, Checkpoint) else open_checkpoint(out)
        plan = Record.load(ckpt.path).plan
        expected = list(_survivors(source, geometry, plan))
        documents = rewritten_companions(source, geometry, plan)
    except (CheckpointError, PlanError) as error:
        return [Check("tensor bytes", False, error.message)]
    files = [name for name in source.companions if name not in (RECORD, CARD, *documents)]
    companions = [*changed_files(ckpt, source, files), *wrong_files(ckpt, documents)]
    rewritten = f", {len(documents)} rewritten" if documents else ""
    scaled = [survivor for survivor in expected if survivor.factor is not None]
    healed = [survivor for survivor in expected if survivor.digest is not None]
    equal = f"{ckpt.nbytes - sum(s.nbytes for s in scaled + healed)} bytes equal the source's"
    equal += f"; {len(scaled)} tensors times their gain, rounded to nearest" if scaled else ""
    equal += f"; {len(healed)} tensors have the new values that the plan says" if healed else ""
    return [
        _check("tensor bytes", changed_tensors(ckpt, source, expected), equal),
        _check("companions", companions, f"{len(files)} files equal the source's{rewritten}"),
    ]


def written_values(ckpt: Checkpoint, source: Checkpoint, geometry: Geometry, plan: Plan) -> dict[str, TensorInfo]:
    """Return where a written checkpoint has the plan's new values, by the source's names; `shard` is a whole path."""
    found = ((s.source.name, ckpt.tensors[s.name]) for s in _survivors(source, geometry, plan) if s.digest)
    return {name: replace(info, name=name, shard=str(ckpt.path / info.shard)) for name, info in found}


def _survivors(source: Checkpoint, geometry: Geometry, plan: Plan) -> Iterator[Survivor]:
    kept, dropped, factors = (
        kept_by_block(plan, geometry), dropped_tensors(plan, geometry), folded(source, geometry, plan)
    )  # fmt: skip
    digests = plan.deltas.tensors if plan.deltas else {}
    for survivor in survivors(source, geometry, kept, numbers(plan, geometry).top_k, dropped, factors):
        yield replace(survivor, digest=digests.get(survivor.source.name))


def _check(name: str, findings: Iterable[str], passed: str) -> Check:
    found = list(findings)
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    return Check(name, not found, "; ".join(found[:SHOWN]) + more if found else passed)


def _wrong_files(ckpt: Checkpoint) -> Iterator[str]:
    count = len(ckpt.shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if list(ckpt.shards) != names:
        yield f"{ckpt.path}: shards are {', '.join(ckpt.shards)}, expected {names[0]} … {names[-1]}"
    yield from unfit_shards(ckpt)
    if ckpt.indexed:
        total = load_json(ckpt.path / INDEX).get("metadata", {}).get("total_size")
        if total != ckpt.nbytes:
            yield f"{ckpt.path / INDEX}: total_size is {total}, expected {ckpt.nbytes}"
    known = {"config.json", *ckpt.shards, *ckpt.companions, *([INDEX] if ckpt.indexed else [])}
    for folder, folders, files in os.walk(ckpt.path):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in files:
            if not name.startswith(".") and Path(folder, name).relative_to(ckpt.path).as_posix() not in known:
                yield f"{Path(folder, name)}: stale, belongs to no part of the checkpoint"
    if partial_folder(ckpt.path.absolute()).exists():
        yield f"{partial_folder(ckpt.path.absolute())}: left by an unfinished run"


def _unroutable(geometry: Geometry) -> Iterator[str]:
    groups, best = geometry.n_group, group_best(geometry)
    for experts, top_k in sorted({(block.experts, block.top_k) for block in geometry.blocks.values()}):
        if experts // groups < best:
            found = f"config.json: {experts // groups} experts per group"
            yield f"{found}, but the router ranks groups by their {best} best"
        usable = reachable(geometry, experts)
        if top_k > usable:
            yield f"config.json: top-{top_k}, but a token can reach only {usable} of {experts} experts"


def _wrong_record(record: Record, ckpt: Checkpoint, geometry: Geometry) -> Iterator[str]:
    facts = (
        ("nbytes", record.after.nbytes, ckpt.nbytes),
        ("experts", record.after.experts, geometry.num_experts),
        ("top_k", record.after.top_k, geometry.top_k),
    )
    for what, recorded, found in facts:
        if recorded != found:
            yield f"{ckpt.path / RECORD}: {what} is {recorded}, the checkpoint has {found}"
    for block in geometry.trunk:
        layer = record.plan.layers.get(block.prefix)
        count = len(layer.kept) if layer else 0
        if count != block.experts:
            yield f"{ckpt.path / RECORD}: plan keeps {count} experts in {block.prefix}, found {block.experts}"
        top_k = layer.top_k or record.before.top_k if layer else 0
        if top_k != block.top_k:
            yield f"{ckpt.path / RECORD}: plan has top-{top_k} in {block.prefix}, found top-{block.top_k}"


def _against(source: Checkpoint, ckpt: Checkpoint, record: Record) -> list[Check]:
    geometry = read_geometry(source)
    try:
        validate(record.plan, geometry)
        check_fingerprint(record.plan.source.fingerprint, source, geometry)
    except PlanError as error:
        return [Check("plan", False, f"{ckpt.path / RECORD}: {error.message}")]
    expected = list(_survivors(source, geometry, record.plan))
    edits = config_edits(source, geometry, record.plan)
    config = (
        f"{ckpt.path / 'config.json'}: {'.'.join(d.path)} is {d.new!r}, expected {d.old!r}"
        for d in differences(edit_config(source.config, edits), ckpt.config)
    )
    changed = ", ".join(map(describe, edits)) or "nothing"
    survived = f"{len(expected)} of {len(source.tensors)} survive, in the source's dtypes and shapes"
    return [
        Check("plan", True, f"fits {source.name}, which it was made for"),
        _check("tensors", wrong_tensors(ckpt, expected), survived),
        _check("config", config, f"changed: {changed}; all else as in the source"),
    ]
