"""`expertcut sweep`: the trade-off curve over expert counts, top-k and strategies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output, draw, numbers, output
from expertcut.cli.options import AS_IT_COMES, Forward, Json, Model, Revision, Seed, SeqLen, Tokens, flat
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from expertcut.measure.sweep import Point


@flat
def sweep(
    ctx: typer.Context,
    model: Model,
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the curve goes.", show_default=False)
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="TEXT", show_default=False,
            help="Held-out text: a .txt, .jsonl or .parquet file or a recipe. Repeatable.",
        ),
    ],
    experts: Annotated[
        str | None, typer.Option("--experts", metavar="N,…", help="Experts to keep. Default: all.", show_default=False)
    ] = None,
    top_k: Annotated[
        str | None, typer.Option("--top-k", metavar="K,…", help="Top-k. Default: unchanged.", show_default=False)
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME,…", help="Strategies of `expertcut plan`; random is a control.")
    ] = "gated-norm-sum,random",
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="DIR", help="Profile of the model.", show_default=False)
    ] = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    revision: Revision = None,
    forward: Forward = AS_IT_COMES,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what every plan of a grid costs on held-out text; nothing is written but the curve.

    DIR gets sweep.csv, sweep.json and, with matplotlib, sweep.png.

    Example:
      expertcut sweep MODEL --profile DIR --experts 96,64,48 --top-k 8,6 --data heldout.jsonl -o curve
    """
    from expertcut.calibrate.profile import Profile
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.text import read_text, refuse_seen
    from expertcut.measure.sweep import grid, points
    from expertcut.model import read_geometry
    from expertcut.model.summary import nbytes_with

    out = output(ctx, as_json)
    counts, tops = numbers("--experts", experts), numbers("--top-k", top_k)
    if not counts and not tops:
        raise UsageError("found neither --experts nor --top-k", "for example --experts 96,64,48 --top-k 8,6")
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    plans = grid(
        checkpoint, geometry, strategy.split(","), counts or [geometry.num_experts], tops or [geometry.top_k],
        profile=Profile.load(profile) if profile is not None else None, seed=seed, notify=out.note,
    )  # fmt: skip

    from expertcut.calibrate.run import ProfileOptions
    from expertcut.measure.search import judge_with

    text, tokenizer = read_text(
        out, checkpoint, geometry, data, tokens=tokens, seq_len=seq_len, seed=seed, device=forward.device,
        dtype=forward.dtype,
    )  # fmt: skip
    named = {str(cell): plan for cell, plan in plans.items()}
    refuse_seen(out, text, tokenizer, named)
    options = ProfileOptions(**vars(forward))
    with out.progress("sweeping", lambda speed: f"{speed:.2f} layers/s") as advance:
        found = judge_with(checkpoint, geometry, text, options, notify=out.note, advance=advance)(named)
    sizes = {cell.experts: nbytes_with(checkpoint, geometry, cell.experts) for cell in plans}
    curve = points(found, list(plans), sizes)
    document = {"model": checkpoint.public_name, "nbytes": checkpoint.nbytes, "tokens": text.tokens,
                "data": text.fingerprint, "seed": seed, "base": found.mean("nll", "base")}  # fmt: skip
    _save(out, out_dir, document, curve)


def _save(out: Output, out_dir: Path, facts: dict[str, Any], curve: list[Point]) -> None:
    import json
    from dataclasses import asdict

    from expertcut.measure.sweep import save_csv, save_plot

    document = facts | {"points": [asdict(point) for point in curve]}
    out_dir.mkdir(parents=True, exist_ok=True)
    save_csv(out_dir / "sweep.csv", curve)
    (out_dir / "sweep.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    title = f"{facts['model']}: what fewer experts cost"
    draw(out, out_dir / "sweep.png", lambda path: save_plot(path, curve, title))
    out.finish({"out": str(out_dir), **document}, _table(curve), "", f"written: {out_dir}")


def _table(curve: list[Point]) -> Table:
    from expertcut.choose import format_size
    from expertcut.cli.tables import table
    from expertcut.cli.whatif import between
    from expertcut.measure.intervals import Estimate

    rows = [
        (p.strategy, p.experts, p.top_k, format_size(p.nbytes),
         between(Estimate(p.change, p.change_low, p.change_high)), f"{p.kl:.4f}", f"{p.agreement:.1%}",
         f"{p.acceptance:.1%}")
        for p in curve
    ]  # fmt: skip
    columns = ("strategy", ">experts", ">top-k", ">weights", ">change of the loss", ">KL", ">top-1", ">accepted")
    return table(columns, rows)
