"""`expertcut eval`: held-out loss of a model, and of plans before anything is written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import output
from expertcut.cli.options import AS_IT_COMES, Forward, Json, Model, Revision, Seed, SeqLen, Tokens, flat

if TYPE_CHECKING:
    from rich.table import Table

    from expertcut.measure.loss import Loss, ModelLoss


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
    """Measure the held-out loss of a model, and of plans for it.

    Per domain, on text that was not used for calibration; nothing is written.

    Example:
      expertcut eval MODEL --plan half.json --data heldout.jsonl
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.cli.text import read_text
    from expertcut.model import check_fingerprint, read_geometry

    out = output(ctx, as_json)
    chosen = {str(path): Plan.load(path) for path in plans or ()}
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    for plan in chosen.values():
        check_fingerprint(plan.source.fingerprint, checkpoint, geometry)

    from expertcut.calibrate.run import ProfileOptions
    from expertcut.measure import loss

    text, _ = read_text(
        out, checkpoint, geometry, data, tokens=tokens, seq_len=seq_len, seed=seed, device=forward.device,
        dtype=forward.dtype,
    )  # fmt: skip
    options = ProfileOptions(**vars(forward))
    work = text.tokens * (1 + len(chosen))
    with out.progress("evaluating", lambda speed: f"{speed:,.0f} tokens·layers/s", work) as advance:
        losses = loss.evaluate(checkpoint, geometry, text, chosen, options, notify=out.note, advance=advance)
    document = {"model": checkpoint.name, "tokens": text.tokens, "seq_len": text.seq_len, "data": text.fingerprint,
                "results": [_record(found, losses[0]) for found in losses]}  # fmt: skip
    out.finish(document, _table(losses), "", "loss: nats per predicted token")


def _record(found: ModelLoss, base: ModelLoss) -> dict[str, Any]:
    def members(loss: Loss, before: Loss) -> dict[str, float]:
        return {**asdict(loss), "perplexity": loss.perplexity, "change": loss.nll - before.nll}

    domains = {name: members(loss, base.domains[name]) for name, loss in found.domains.items()}
    return {"name": found.name, "overall": members(found.overall, base.overall), "domains": domains}


def _table(losses: list[ModelLoss]) -> Table:
    from expertcut.cli.tables import table

    base = losses[0]
    made = table(("model", "domain", ">tokens", ">loss", ">perplexity", ">change"), ())
    for found in losses:
        pairs = [(name, loss, base.domains[name]) for name, loss in found.domains.items()]
        for name, loss, before in [*pairs, ("all", found.overall, base.overall)]:
            change = "" if found is base else f"{loss.nll - before.nll:+.4f}"
            cells = (found.name, name, f"{loss.tokens:,}", f"{loss.nll:.4f}", f"{loss.perplexity:.2f}", change)
            made.add_row(*cells, end_section=name == "all")
    return made
