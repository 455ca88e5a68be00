"""`expertcut plan`: choose the experts to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expertcut.cli.common import output
from expertcut.cli.options import NO_CHOICE, Choice, Json, Model, Revision, flat


@flat
def plan(
    ctx: typer.Context,
    model: Model,
    out_file: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the plan goes.", show_default=False)
    ],
    choice: Choice = NO_CHOICE,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Choose the experts to keep, and write them down.

    Equally many are kept in every layer, and in every group where the router has groups.

    Example:
      expertcut plan MODEL --profile DIR --strategy reap --experts 64 -o half.json
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.planning import build_plan, outcome
    from expertcut.cli.tables import facts
    from expertcut.model import read_geometry

    out = output(ctx, as_json)
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    made = build_plan(checkpoint, geometry, choice, out.command)
    result = outcome(checkpoint, geometry, made)
    made.save(out_file)
    for hint in result.hints:
        out.note(hint)
    provenance: dict[str, Any] = made.provenance
    note, strategy = provenance["budget"]["note"], choice.strategy
    supers = {prefix: ids for prefix, ids in provenance["super_experts"].items() if ids}
    document = {
        "plan": str(out_file), "model": checkpoint.name, "strategy": strategy, "note": note, "super_experts": supers,
        **result.members,
    }  # fmt: skip
    rows: list[tuple[str, object]] = [("plan", out_file), ("strategy", strategy)]
    rows += [("budget", note)] * bool(note)
    rows += [("super experts kept", sum(map(len, supers.values())))] * choice.protect_super
    out.finish(
        document, facts(rows + result.rows), "", result.lint, "", f"next: expertcut prune {model} OUT --plan {out_file}"
    )
