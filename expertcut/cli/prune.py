"""`expertcut prune`: write the smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.common import Output, output
from expertcut.cli.options import NO_CHOICE, Choice, Json, Model, Revision, flat
from expertcut.errors import DestinationError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.model import Geometry


@flat
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
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Weights per file.")] = "5GB",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check structure and bytes after.")] = False,
    choice: Choice = NO_CHOICE,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write the checkpoint that a plan leaves, and check it.

    If it is interrupted, the same command resumes.

    Example:
      expertcut prune MODEL OUT --plan half.json --dry-run
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.choose import parse_size
    from expertcut.model import read_geometry

    out = output(ctx, as_json)
    shard_size = parse_size(max_shard_size)
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    made = _plan(out, checkpoint, geometry, plan, choice)
    if dry_run:
        _preview(out, checkpoint, geometry, made, out_dir, shard_size, force)
    else:
        _prune(out, checkpoint, geometry, made, out_dir, shard_size, force, not no_verify)


def _plan(out: Output, checkpoint: Checkpoint, geometry: Geometry, path: Path | None, choice: Choice) -> Plan:
    from expertcut.choose.plan import Plan
    from expertcut.cli.planning import build_plan, outcome

    if path is None:
        if choice == NO_CHOICE:
            raise UsageError(
                "found no plan", "pass --plan plan.json, or for example --strategy router-norm --keep 0.75"
            )
        made = build_plan(checkpoint, geometry, choice, out)
        for hint in outcome(checkpoint, geometry, made).hints:
            out.note(hint)
        return made
    if choice != NO_CHOICE:
        raise UsageError("found --plan and options that make another plan", "give either")
    return Plan.load(path)


def _preview(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, out_dir: Path, shard_size: int, force: bool
) -> None:
    from expertcut.cli.planning import outcome
    from expertcut.cli.tables import facts, size, table
    from expertcut.rewrite.config import describe
    from expertcut.rewrite.destination import check_replaceable, check_space
    from expertcut.rewrite.writer import prepare

    job = prepare(checkpoint, geometry, plan, out_dir, shard_size)
    check_replaceable(job.target, force)
    try:
        check_space(job.target, job.needed)
    except DestinationError as error:  # a plan for another machine's disk is worth showing
        out.warn(f"{error.message}; {error.hint}")
    layout, files = job.layout, job.files
    edits = [{"key": ".".join(edit.path), "old": edit.old, "new": edit.new} for edit in layout.edits]
    result = outcome(checkpoint, geometry, plan)
    document = {"dry_run": True, "out": str(out_dir), "model": checkpoint.name, "files": files,
                "bytes_to_write": job.needed, "bytes_in_memory": layout.in_memory, "config": edits,
                **result.members}  # fmt: skip
    rows: list[tuple[str, object]] = [
        ("would write", f"{size(job.needed)} in {len(files)} files to {out_dir}"),
        ("through memory", f"{size(layout.in_memory)} of sliced tensors; the kernel copies the rest"),
        ("config.json", ", ".join(map(describe, layout.edits)) or "unchanged"),
    ]
    listing = table(("file", ">bytes"), [(name, f"{nbytes:,}") for name, nbytes in sorted(files.items())])
    out.finish(document, facts(rows + result.rows), "", listing, "", result.lint)


def _prune(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, out_dir: Path, shard_size: int, force: bool,
    check: bool,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from expertcut.choose import format_size
    from expertcut.cli.planning import outcome
    from expertcut.cli.tables import checks_table, facts, records
    from expertcut.rewrite import Check, require, verify_bytes, verify_structure
    from expertcut.rewrite import prune as write

    out.resumable = True
    with out.progress("writing", lambda speed: f"{format_size(int(speed))}/s") as advance:
        done = write(
            checkpoint, geometry, plan, out_dir, max_shard_size=shard_size, force=force, progress=advance
        )  # fmt: skip
    out.resumable, checks = False, list[Check]()
    if check:
        with out.busy("checking structure and bytes"):
            checks = [*verify_structure(out_dir, checkpoint), *verify_bytes(out_dir, checkpoint)]
        require(checks)
    result = outcome(checkpoint, geometry, plan)
    document = (
        asdict(done) | {"out": str(out_dir), "model": checkpoint.name, "checks": records(checks)} | result.members
    )
    rate = f", {format_size(int(done.nbytes_written / done.seconds))}/s" if done.seconds else ""
    rows: list[tuple[str, object]] = [
        ("written", f"{out_dir}{', resumed' if done.resumed else ''}"),
        ("shards", done.shards),
        ("time", f"{done.seconds:.2f} s{rate}, synced to disk"),
    ]
    parts: list[RenderableType] = [checks_table(checks), ""] if checks else []
    out.finish(document, facts(rows + result.rows), "", *parts, result.lint)
