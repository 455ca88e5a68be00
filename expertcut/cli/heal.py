"""`expertcut heal`: win back what a plan loses, in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertcut.cli.common import output
from expertcut.cli.options import AS_IT_COMES, Forward, Json, Model, Revision, Seed, SeqLen


def heal(
    ctx: typer.Context,
    model: Model,
    plan: Annotated[Path, typer.Option("--plan", metavar="FILE", help="The plan to heal.", show_default=False)],
    calibration: Annotated[
        list[str],
        typer.Option(
            "--calibration", metavar="TEXT", show_default=False, help="Text to fit on: a recipe or a file. Repeatable."
        ),
    ],
    out_file: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", show_default=False,
            help="Where the healed plan goes; its new values lie beside it, in a .safetensors file of the same name.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="TEXT", show_default=False,
            help="Held-out text that decides what is kept. Default: a fourth of --calibration. Repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", help="Tokens of each. Default: all there are.")
    ] = None,
    seq_len: SeqLen = None,
    distil: Annotated[
        int,
        typer.Option(
            "--distil", metavar="STEPS", min=0,
            help="Then train the routers for so many steps (80 do); the whole model must fit in memory.",
        ),
    ] = 0,
    seed: Seed = 0,
    forward: Forward = AS_IT_COMES,
    revision: Revision = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Win back what a plan loses: refit the down projections that are left, in closed form, without training.

    Kept only as far as held-out text shows that it helps. Text of every domain that counts must be in it: docs/heal.md.

    Example:
      expertcut heal MODEL --plan half.json --calibration general --calibration self --tokens 131072 -o healed.json
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.cli.healing import deltas_file, heal_with
    from expertcut.cli.tables import facts, size
    from expertcut.cli.text import read_texts
    from expertcut.errors import UsageError
    from expertcut.measure.heal_fit import check_healable
    from expertcut.model import read_geometry

    out = output(ctx, as_json)
    deltas = deltas_file(out_file)
    if out_file.suffix == deltas.suffix:
        raise UsageError(f"--out {out_file}: is named like a file of tensors", "name a .json file for the plan")
    given = Plan.load(plan)
    checkpoint = open_checkpoint(model, revision, download=True)
    geometry = read_geometry(checkpoint)
    check_healable(checkpoint, geometry, given)
    texts = read_texts(
        out, checkpoint, geometry, given, forward, fit=calibration, judge=data, tokens=tokens, seq_len=seq_len,
        seed=seed, what="healing",
    )  # fmt: skip
    done = heal_with(out, checkpoint, geometry, given, texts, out_file, forward, distil)
    rows: list[tuple[str, object]] = [("plan", out_file)]
    if done.plan.deltas:
        rows.append(("new values", f"{deltas}, {len(done.plan.deltas.tensors)} tensors, {size(deltas.stat().st_size)}"))
    document = {"plan": str(out_file), "model": checkpoint.name, "deltas": str(deltas) if done.plan.deltas else None}
    again = f"next: expertcut prune {model} OUT --plan {out_file}"
    out.finish(document | done.members, facts(rows), *done.parts, "", again)
