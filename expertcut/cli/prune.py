"""`expertcut prune`: write the smaller checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.common import Output, output
from expertcut.cli.options import AS_IT_COMES, NO_CHOICE, NO_GATE, Choice, Forward, Heldout, Json, Model, Revision
from expertcut.errors import DestinationError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.cli.healing import Outcome
    from expertcut.measure.gate import Judgement
    from expertcut.model import Geometry


@dataclass(frozen=True)
class Writing:
    """Where and how a checkpoint is written."""

    out_dir: Path
    shard_size: int | None
    force: bool
    link: bool
    check: bool


def prune(
    ctx: typer.Context,
    model: Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="A plan; or give the options that make one.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that expertcut wrote.")] = False,
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="Hard-link the files of weights, if only the config changes: no copy, no space. Whoever edits "
            "one checkpoint in place then edits both; deleting one is harmless.",
        ),
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            show_default=False,
            help="Weights per file. Default: the source's files if only the config changes, else 5GB.",
        ),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check structure and bytes after.")] = False,
    heal: Annotated[
        bool, typer.Option("--heal", help="Refit what is left on --calibration first; kept as far as it helps.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option("--calibration", metavar="TEXT", show_default=False, help="Text for --heal. Repeatable."),
    ] = None,
    choice: Choice = NO_CHOICE,
    heldout: Heldout = NO_GATE,
    forward: Forward = AS_IT_COMES,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write the checkpoint that a plan leaves, and check it.

    If it is interrupted, the same command resumes. With --gate nothing is written if a limit fails: exit code 5.

    Example:
      expertcut prune MODEL OUT --plan half.json --dry-run
      expertcut prune MODEL OUT --plan half.json --heal --calibration general --tokens 131072
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.choose import parse_size
    from expertcut.cli.gate import hold, parse_gate
    from expertcut.cli.healing import forget, healed_for
    from expertcut.cli.text import read_texts
    from expertcut.model import read_geometry
    from expertcut.rewrite.destination import check_replaceable
    from expertcut.rewrite.writer import prepare

    out = output(ctx, as_json)
    shard_size = parse_size(max_shard_size) if max_shard_size is not None else None
    writing = Writing(out_dir, shard_size, force, link, check=not no_verify)
    limits = parse_gate(heldout, forward, heal)
    _check_heal(heal, calibration, link)
    checkpoint = open_checkpoint(model, revision, download=bool(limits) or heal)  # both run the model
    geometry = read_geometry(checkpoint)
    made = _plan(out, checkpoint, geometry, plan, choice, gated=bool(limits), healed=heal)
    judged: list[Judgement] = []
    healed: Outcome | None = None
    target = prepare(checkpoint, geometry, made, out_dir, shard_size, link).target if limits or heal else out_dir
    if limits or heal:
        check_replaceable(target, force)
    if heal and dry_run:
        out.note("--heal changes values only: nothing is fitted for a dry run")
    elif heal:
        from expertcut.measure.heal_fit import check_healable

        check_healable(checkpoint, geometry, made)
        texts = read_texts(
            out, checkpoint, geometry, made, forward, fit=calibration, judge=None, tokens=heldout.tokens,
            seq_len=heldout.seq_len, seed=choice.seed, what="healing",
        )  # fmt: skip
        healed = healed_for(out, checkpoint, geometry, made, texts, target, forward)
        made = healed.plan
    if limits:
        judged = hold(
            out, checkpoint, geometry, made, str(plan or "the plan"), limits, heldout, forward,
            profile=choice.profile, seed=choice.seed,
        )  # fmt: skip
    if dry_run:
        _preview(out, checkpoint, geometry, made, writing, judged)
    else:
        _prune(out, checkpoint, geometry, made, writing, judged, healed)
        if heal:
            forget(target)


def _check_heal(heal: bool, calibration: list[str] | None, link: bool) -> None:
    if heal and not calibration:
        raise UsageError("--heal needs --calibration", "for example --calibration general")
    if calibration and not heal:
        raise UsageError("--calibration has an effect with --heal only")
    if heal and link:
        raise UsageError("found --heal and --link", "give either: healing changes weights, links share them")


def _plan(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, path: Path | None, choice: Choice, *, gated: bool,
    healed: bool,
) -> Plan:  # fmt: skip
    from expertcut.choose.plan import Plan
    from expertcut.cli.planning import AUTO, build_plan, outcome

    if path is None:
        if choice == NO_CHOICE:
            raise UsageError(
                "found no plan", "pass --plan plan.json, or for example --strategy router-norm --keep 0.75"
            )
        if AUTO in (choice.top_k, choice.strategy):
            raise UsageError(f"{AUTO} is for `expertcut plan`", "make the plan first, then prune with --plan")
        made = build_plan(checkpoint, geometry, choice, out)
        for hint in outcome(checkpoint, geometry, made).hints:
            out.note(hint)
        return made
    profile, seed = None if gated else choice.profile, 0 if gated or healed else choice.seed  # for text, too
    if replace(choice, profile=profile, seed=seed) != NO_CHOICE:
        raise UsageError("found --plan and options that make another plan", "give either")
    return Plan.load(path)


def _preview(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, writing: Writing, judged: list[Judgement]
) -> None:
    from expertcut.cli.gate import gate_record
    from expertcut.cli.planning import outcome
    from expertcut.cli.tables import facts, size, table
    from expertcut.rewrite.config import describe
    from expertcut.rewrite.destination import check_replaceable
    from expertcut.rewrite.writer import prepare

    job = prepare(checkpoint, geometry, plan, writing.out_dir, writing.shard_size, writing.link)
    check_replaceable(job.target, writing.force)
    for check in (job.check_room, job.check_links):
        try:
            check()
        except DestinationError as error:  # a plan for another machine's disk is worth showing
            out.warn(f"{error.message}; {error.hint}")
    layout, files = job.layout, job.files
    edits = [{"key": ".".join(edit.path), "old": edit.old, "new": edit.new} for edit in layout.edits]
    result = outcome(checkpoint, geometry, plan)
    document = {"dry_run": True, "out": str(writing.out_dir), "model": checkpoint.name, "files": files,
                "taken": job.taken, "bytes_to_write": job.needed, "bytes_in_memory": layout.in_memory,
                "config": edits, "gate": gate_record(judged), **result.members}  # fmt: skip
    rows: list[tuple[str, object]] = [
        *(("gate", judgement) for judgement in judged),
        ("would write", f"{size(job.needed)} in {len(job.written)} files to {writing.out_dir}"),
        ("shards", f"{len(layout.shards)}, the source's, {job.taken}")
        if job.taken
        else ("through memory", f"{size(layout.in_memory)} of changed tensors; the kernel copies the rest"),
        ("config.json", ", ".join(map(describe, layout.edits)) or "unchanged"),
    ]
    listing = table(("file", ">bytes"), [(name, f"{nbytes:,}") for name, nbytes in sorted(files.items())])
    out.finish(document, facts(rows + result.rows), "", listing, "", result.lint)


def _prune(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, writing: Writing, judged: list[Judgement],
    healed: Outcome | None,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from expertcut.choose import format_size
    from expertcut.cli.gate import gate_record
    from expertcut.cli.planning import outcome
    from expertcut.cli.tables import checks_table, facts, records
    from expertcut.rewrite import Check, require, verify_bytes, verify_structure
    from expertcut.rewrite import prune as write

    out.resumable, out_dir = True, writing.out_dir
    with out.progress("writing", lambda speed: f"{format_size(int(speed))}/s") as advance:
        done = write(
            checkpoint, geometry, plan, out_dir, max_shard_size=writing.shard_size, force=writing.force,
            link=writing.link, progress=advance,
        )  # fmt: skip
    out.resumable, checks = False, list[Check]()
    if writing.check:
        with out.busy("checking structure and bytes"):
            checks = verify_structure(out_dir, checkpoint)
            checks += verify_bytes(out_dir, checkpoint) if checkpoint.remote is None else []
        require(checks)
        if checkpoint.remote:
            again = f"expertcut verify {out_dir} --source {checkpoint.name} --revision {checkpoint.remote.commit}"
            out.note(f"bytes are as the Hub sent them; to download the source and compare: {again}")
    result = outcome(checkpoint, geometry, plan)
    document = {**asdict(done), "out": str(out_dir), "model": checkpoint.name, "gate": gate_record(judged),
                "checks": records(checks), **result.members, **(healed.members if healed else {})}  # fmt: skip
    rate = f", {format_size(int(done.nbytes_written / done.seconds))}/s" if done.nbytes_written else ""
    rows: list[tuple[str, object]] = [
        *(("gate", judgement) for judgement in judged),
        ("written", f"{out_dir}{', resumed' if done.resumed else ''}"),
        ("shards", f"{done.shards}, the source's, {done.taken}" if done.taken else done.shards),
        ("time", f"{done.seconds:.2f} s{rate}, synced to disk"),
    ]
    parts: list[RenderableType] = [*healed.parts, ""] if healed and healed.parts else [""]
    parts += [checks_table(checks), ""] if checks else []
    out.finish(document, facts(rows + result.rows), *parts, result.lint)
