"""`expertcut demo`: the whole path on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.common import output
from expertcut.cli.options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.measure.demo import DemoResult


def demo(
    ctx: typer.Context,
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the files go; an earlier demo's are replaced.")
    ] = Path("expertcut-demo"),
    as_json: Json = False,
) -> None:
    """Run the whole path on the built-in model in under a minute.

    Profile, plan, prune, verify, and the held-out loss before and after.

    Example:
      expertcut demo --out /tmp/demo
    """
    out = output(ctx, as_json)
    with out.busy("running the whole path on the built-in model"):
        from expertcut.cli.tables import checks_table, records
        from expertcut.measure.demo import run_demo
        from expertcut.rewrite import require

        result = run_demo(out_dir, out.note)
    require(result.checks)
    document = {
        "folder": str(result.folder), "model": str(result.model), "pruned": str(result.pruned),
        "pruned_by": result.pruned_by, "pruned_nll": result.pruned_nll, "calibration_tokens": result.calibration_tokens,
        "heldout_tokens": result.heldout_tokens, "seeds": result.seeds, "seconds": result.seconds,
        "results": records(result.rows), "ok": result.ok, "checks": records(result.checks),
    }  # fmt: skip
    out.finish(document, checks_table(result.checks), "", *result_parts(result))


def result_parts(result: DemoResult) -> list[RenderableType]:
    """Build the table of losses, and say where the files are."""
    from expertcut.cli.tables import facts, size, table

    base = result.rows[0]
    rows = []
    for row in result.rows:
        seeds = f" ± {row.deviation:.4f}" if row.deviation is not None else ""
        change = "" if row is base else f"{row.nll - base.nll:+.4f}"
        name = f"{row.name}, mean of {result.seeds} seeds" if row.deviation is not None else row.name
        rows.append((name, size(row.nbytes), row.experts, f"{row.nll:.4f}{seeds}", change))
    made = table(("kept by", ">weights", ">experts", ">held-out loss", ">change"), rows)
    legend = (
        f"held-out loss: nats per predicted token, over {result.heldout_tokens:,} tokens that calibration did not see"
    )
    places = [
        ("files", result.folder), ("pruned model", f"{result.pruned}, by {result.pruned_by}"), ("source", result.model),
        ("time", f"{result.seconds:.1f} s, calibrated on {result.calibration_tokens:,} tokens"),
    ]  # fmt: skip
    return [made, "", legend, "", facts(places)]
