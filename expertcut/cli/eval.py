"""`expertcut eval`: what held-out text says of a model, and of plans before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertcut.cli.common import output
from expertcut.cli.options import AS_IT_COMES, Forward, Json, Model, Revision, Seed, SeqLen, Tokens, flat


@flat
def evaluate(
    ctx: typer.Context,
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="TEXT", show_default=False,
            help="Held-out text, not used for calibration: a .txt, .jsonl or .parquet file or a recipe. Repeatable.",
        ),
    ],
    plans: Annotated[
        list[Path] | None,
        typer.Option("--plan", metavar="FILE", help="A plan to try. Repeatable, in one pass.", show_default=False),
    ] = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    revision: Revision = None,
    forward: Forward = AS_IT_COMES,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what plans would do to a model, before anything is written.

    Loss, divergence and agreement on held-out text, per domain, with intervals; one pass for any number of plans.

    Example:
      expertcut eval MODEL --plan half.json --data heldout.jsonl
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.cli.text import read_text, refuse_seen
    from expertcut.model import check_fingerprint, read_geometry
    from expertcut.rewrite.layout import RECORD
    from expertcut.rewrite.record import Record

    out = output(ctx, as_json)
    chosen = {str(path): Plan.load(path) for path in plans or ()}
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    for plan in chosen.values():
        check_fingerprint(plan.source.fingerprint, checkpoint, geometry)

    from expertcut.calibrate.run import ProfileOptions
    from expertcut.cli import whatif
    from expertcut.measure.whatif import evaluate as compare

    text, tokenizer = read_text(
        out, checkpoint, geometry, data, tokens=tokens, seq_len=seq_len, seed=seed, device=forward.device,
        dtype=forward.dtype,
    )  # fmt: skip
    made_by = {model: Record.load(checkpoint.path).plan} if (checkpoint.path / RECORD).exists() else {}
    refuse_seen(out, text, tokenizer, made_by | chosen)
    options = ProfileOptions(**vars(forward))
    work = text.tokens * (1 + len(chosen))
    with out.progress("evaluating", lambda speed: f"{speed:,.0f} tokens·layers/s", work) as advance:
        found = compare(checkpoint, geometry, text, chosen, options, notify=out.note, advance=advance)
    document = {"model": checkpoint.name, "tokens": text.tokens, "seq_len": text.seq_len, "data": text.fingerprint,
                **whatif.record(found)}  # fmt: skip
    verdicts = ["", *whatif.verdicts(found)] if chosen else []
    out.finish(document, whatif.table(found), "", whatif.LEGEND, *verdicts)
