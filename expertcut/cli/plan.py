"""`expertcut plan`: choose the experts to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expertcut.cli import options as o
from expertcut.cli.common import output


def plan(
    ctx: typer.Context,
    model: o.Model,
    out_file: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the plan goes.", show_default=False)
    ],
    strategy: o.Strategy = None,
    profile: o.ProfileIn = None,
    top_k: o.TopK = None,
    domain_weights: o.DomainWeights = None,
    protect: o.Protect = None,
    protect_super: o.ProtectSuper = False,
    experts: o.Experts = None,
    keep: o.Keep = None,
    drop: o.Drop = None,
    fit: o.Fit = None,
    tp: o.TensorParallel = 1,
    drop_mtp: o.DropMtp = False,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    as_json: o.Json = False,
) -> None:
    """Choose the experts to keep, and write them down.

    Equally many are kept in every layer, and in every group where the router has groups.

    Example:
      expertcut plan MODEL --profile DIR --strategy reap --experts 64 -o half.json
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.planning import Choice, build_plan, outcome
    from expertcut.cli.tables import facts
    from expertcut.model import read_geometry

    out = output(ctx, as_json)
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    choice = Choice(
        profile,
        strategy,
        experts,
        keep,
        drop,
        fit,
        tp,
        top_k,
        domain_weights,
        tuple(protect or ()),
        protect_super,
        seed,
        drop_mtp,
    )
    made = build_plan(checkpoint, geometry, choice, out.command)
    made.save(out_file)
    provenance: dict[str, Any] = made.provenance
    note = provenance["budget"]["note"]
    supers = {prefix: ids for prefix, ids in provenance["super_experts"].items() if ids}
    result = outcome(checkpoint, geometry, made)
    document = {
        "plan": str(out_file), "model": checkpoint.name, "strategy": strategy, "note": note, "super_experts": supers,
        **result.members,
    }  # fmt: skip
    rows: list[tuple[str, object]] = [("plan", out_file), ("strategy", strategy)]
    rows += [("budget", note)] * bool(note) + [("super experts kept", sum(map(len, supers.values())))] * protect_super
    out.finish(
        document, facts(rows + result.rows), "", result.lint, "", f"next: expertcut prune {model} OUT --plan {out_file}"
    )
