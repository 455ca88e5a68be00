"""`expertcut sweep`: the trade-off curve over expert counts, top-k and strategies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output, draw, numbers, output
from expertcut.cli.options import (
    AS_IT_COMES,
    SERVICE,
    UNSERVED,
    Forward,
    Json,
    Model,
    Revision,
    Seed,
    SeqLen,
    Service,
    Shards,
    Tokens,
)
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from expertcut.choose.topk import MeanTopK
    from expertcut.measure.sweep import Point


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
    mean_top_k: Annotated[
        str | None,
        typer.Option("--mean-top-k", metavar="K,…", show_default=False,
                     help="Top-k on average over the layers, each by what it loses (needs --profile, --per-layer)."),
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option("--per-layer/--uniform", help="Let layers differ: served by expertcut's plug-ins only."),
    ] = False,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME,…", help="Strategies of `expertcut plan`; random is a control.")
    ] = "gated-norm-sum,random",
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="DIR", help="Profile of the model.", show_default=False)
    ] = None,
    service: Service = UNSERVED,
    tp: Shards = None,
    bench: Annotated[
        Path | None,
        typer.Option("--bench", metavar="FILE", rich_help_panel=SERVICE, show_default=False,
                     help="In place of --hardware: measured rows of this model, such as bench.json."),
    ] = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    revision: Revision = None,
    forward: Forward = AS_IT_COMES,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what every plan of a grid costs on held-out text; nothing is written but the curve.

    DIR gets sweep.csv, sweep.json and, with matplotlib, sweep.png. With --concurrency every point gets a throughput,
    predicted for --hardware or measured in --bench, points that nothing beats are marked, and pareto.png shows them.

    Example:
      expertcut sweep MODEL --profile DIR --experts 96,64,48 --top-k 8,6 --data heldout.jsonl -o curve
      expertcut sweep MODEL --profile DIR --top-k 8,7,6 --data heldout.jsonl --concurrency 32 --hardware h200x8 -o curve
    """
    from expertcut.calibrate.profile import Profile
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.service import check_speeds, speeds_of
    from expertcut.cli.text import read_text, refuse_seen
    from expertcut.measure.sweep import grid, points
    from expertcut.model import read_geometry
    from expertcut.model.summary import nbytes_with

    out = output(ctx, as_json)
    counts, tops = numbers("--experts", experts), numbers("--top-k", top_k)
    means = _means(mean_top_k, per_layer, profile)
    if not counts and not tops and not means:
        raise UsageError("found neither --experts nor --top-k", "for example --experts 96,64,48 --top-k 8,6")
    check_speeds(service, tp, bench)
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    known = Profile.load(profile) if profile is not None else None
    plans = grid(
        checkpoint, geometry, strategy.split(","), counts or [geometry.num_experts],
        [*tops, *means] or [geometry.top_k], profile=known, seed=seed, notify=out.note,
    )  # fmt: skip
    if any(cell.per_layer for cell in plans):
        out.note("layers of some plans differ: only expertcut's plug-ins serve those, see docs/runtimes.md")
    speeds = speeds_of(out, checkpoint, geometry, plans, known, service, tp, bench)

    from expertcut.calibrate.run import ProfileOptions
    from expertcut.measure.pareto import rated
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
    if speeds is not None:
        document["service"] = speeds.facts
        curve = list(rated(curve, [speeds.by_cell.get(cell) for cell in plans]))
    _save(out, out_dir, document, curve)


def _means(text: str | None, per_layer: bool, profile: Path | None) -> list[MeanTopK]:
    from expertcut.choose.topk import MeanTopK

    if text is None:
        if per_layer:
            raise UsageError("--per-layer has an effect with --mean-top-k only")
        return []
    if not per_layer:
        raise UsageError(
            "--mean-top-k makes layers differ, which only expertcut's plug-ins serve", "say so with --per-layer"
        )
    if profile is None:
        raise UsageError("--mean-top-k needs --profile", "expertcut profile MODEL -o PROFILE")
    try:
        return [MeanTopK(float(part)) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--mean-top-k {text}: expected numbers between commas", "--mean-top-k 7,6.5") from None


def _save(out: Output, out_dir: Path, facts: dict[str, Any], curve: Sequence[Point]) -> None:
    import json
    from dataclasses import asdict

    from expertcut.measure.pareto import Rated, save_front
    from expertcut.measure.sweep import save_csv, save_plot

    document = facts | {"points": [asdict(point) for point in curve]}
    out_dir.mkdir(parents=True, exist_ok=True)
    save_csv(out_dir / "sweep.csv", curve)
    (out_dir / "sweep.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    title = f"{facts['model']}: what fewer experts cost"
    draw(out, out_dir / "sweep.png", lambda path: save_plot(path, curve, title))
    fast = [point for point in curve if isinstance(point, Rated)]
    if fast:
        where = f"{facts['model']}: what speed costs, concurrency {facts['service']['concurrency']}"
        draw(out, out_dir / "pareto.png", lambda path: save_front(path, fast, where))
    out.finish({"out": str(out_dir), **document}, _table(curve), "", f"written: {out_dir}")


def _table(curve: Sequence[Point]) -> Table:
    from expertcut.choose import format_size
    from expertcut.cli.tables import table
    from expertcut.measure.intervals import Estimate
    from expertcut.measure.pareto import Rated

    columns = ["strategy", ">experts", ">top-k", ">weights", ">change of the loss", ">KL", ">top-1", ">accepted"]
    rows = []
    for p in curve:
        cells = [p.strategy, p.experts, f"{p.top_k:g}{' on average' if p.per_layer else ''}", format_size(p.nbytes),
                 Estimate(p.change, p.change_low, p.change_high).shown, f"{p.kl:.4f}", f"{p.agreement:.1%}",
                 f"{p.acceptance:.1%}"]  # fmt: skip
        if isinstance(p, Rated):
            cells += ["–", "–"] if p.gain is None else [f"{p.tokens_per_second:,.4g}", f"{p.gain:+.1%}"]
            cells.append("front" if p.front else "")
        rows.append(cells)
    return table(columns + [">tokens/s", ">gain", ""] * isinstance(curve[0], Rated), rows)
