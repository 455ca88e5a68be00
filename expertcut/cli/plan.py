"""`expertcut plan`: choose the experts to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expertcut.cli.common import output
from expertcut.cli.options import (
    AS_IT_COMES,
    NO_CHOICE,
    SERVICE,
    UNMEASURED,
    UNSERVED,
    Choice,
    Forward,
    Json,
    Measured,
    Model,
    Revision,
    Service,
)


def plan(
    ctx: typer.Context,
    model: Model,
    out_file: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the plan goes.", show_default=False)
    ],
    choice: Choice = NO_CHOICE,
    measured: Measured = UNMEASURED,
    goal: Annotated[
        str | None,
        typer.Option("--goal", metavar="GOAL", rich_help_panel=SERVICE, show_default=False,
                     help="What to reach at the least loss on --data, within --max-loss: throughput=+10%, tpot=-10%."),
    ] = None,
    service: Service = UNSERVED,
    forward: Forward = AS_IT_COMES,
    revision: Revision = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Choose the experts to keep and the top-k, and write them down.

    Equally many are kept in every layer, and in every group where the router has groups.

    Example:
      expertcut plan MODEL --profile DIR --strategy reap --experts 64 -o half.json
      expertcut plan MODEL --strategy reap --sequential --calibration general --experts 64 -o half.json
      expertcut plan MODEL --top-k auto --max-loss 'nll<=1%' --data heldout.jsonl -o faster.json
      expertcut plan MODEL --profile DIR --strategy reap --goal throughput=+10% --concurrency 32 --hardware h200x8
        --max-loss 'nll<=0.5%' --data heldout.jsonl -o faster.json
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.choose.plan import numbers
    from expertcut.cli.goal import check_goal, reach
    from expertcut.cli.measured import check_measured, refine
    from expertcut.cli.planning import outcome
    from expertcut.cli.searching import build_candidates
    from expertcut.cli.service import refuse_unused
    from expertcut.cli.tables import facts, records, table
    from expertcut.model import read_geometry
    from expertcut.rewrite.gain import config_gain
    from expertcut.runtimes.overrides import top_k_overrides

    out = output(ctx, as_json)
    aim = check_goal(goal, service, choice, measured) if goal is not None else None
    if aim is None:
        refuse_unused(service, None, "--goal")
        limits = check_measured(choice, measured)
    checkpoint = open_checkpoint(model, revision, download=measured != UNMEASURED)  # text runs through it
    geometry = read_geometry(checkpoint)
    if aim is not None:
        refined = reach(out, checkpoint, geometry, aim, choice, measured, forward)
    else:
        candidates = build_candidates(out, checkpoint, geometry, choice, measured, forward)
        refined = refine(out, checkpoint, geometry, candidates, choice, measured, limits, forward)
    made = refined.plan
    result = outcome(checkpoint, geometry, made)
    alike = not numbers(made, geometry).uneven
    gained = config_gain(checkpoint.config, geometry, made)
    overrides = top_k_overrides(geometry, checkpoint.config, made.top_k(geometry), gained) if alike else []
    made.save(out_file)
    for hint in result.hints:
        out.note(hint)
    provenance: dict[str, Any] = made.provenance
    note, strategy = provenance["budget"]["note"], choice.strategy if aim is None else provenance["criterion"]
    supers = {prefix: ids for prefix, ids in provenance["super_experts"].items() if ids}
    document = {
        "plan": str(out_file), "model": checkpoint.name, "strategy": strategy, "note": note, "super_experts": supers,
        **result.members, **refined.members, "overrides": records(overrides),
    }  # fmt: skip
    rows: list[tuple[str, object]] = [("plan", out_file), ("strategy", strategy or "none, every expert stays")]
    rows += [("budget", note)] * bool(note)
    rows += [("super experts kept", sum(map(len, supers.values())))] * choice.protect_super
    tries: list[Any] = []
    if overrides:
        columns = ("to try that top-k first", "on the whole model, add")
        tries = ["", table(columns, [(o.runtime, o.arguments) for o in overrides])]
    out.finish(
        document, facts(rows + result.rows), *refined.parts, "", result.lint, *tries, "",
        f"next: expertcut prune {model} OUT --plan {out_file}",
    )  # fmt: skip
