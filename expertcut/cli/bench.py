"""`expertcut bench`: what checkpoints, and lower top-k, are worth on a real engine under load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.common import Output, draw, output
from expertcut.cli.loading import LOG, USUAL_ENGINE, USUAL_LOAD, EngineOptions, LoadOptions, Prepared, prepare
from expertcut.cli.options import Json, Seed

if TYPE_CHECKING:
    from rich.table import Table

    from expertcut.measure.bench import Bench, Row

LEGEND = (
    "tokens/s: written, median over rounds; ratio: to the first variant in the same rounds, 95 % interval; "
    "TTFT, TPOT: time to the first and per further token, median (95th percentile); memory: of the engine, its peak"
)
BUSY_CLIENT = 0.5
"""Of a core: a client that uses more may be what limits the figures."""


def bench(
    ctx: typer.Context,
    models: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="Checkpoints; ratios are to the first.", show_default=False)
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="Where the figures go.", show_default=False)
    ],
    top_k: Annotated[
        str | None,
        typer.Option(
            "--top-k", metavar="K,…", show_default=False,
            help="Serve each DIR with these top-k, the first one as the base, without writing anything.",
        ),
    ] = None,
    load: LoadOptions = USUAL_LOAD,
    engine: EngineOptions = USUAL_ENGINE,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure throughput, time to the first and to every further token, and memory under load, on a real engine.

    Variants, each DIR with each top-k, take turns in every round; ratios are of the same rounds, with intervals. OUT
    gets bench.json, after every figure, bench.csv and, with matplotlib, bench.png; and vllm.log.

    Example:
      expertcut bench MODEL OUT --python .venv-vllm/bin/python --concurrency 1,8,32,128 -o load
      expertcut bench MODEL --top-k 8,6,4 --engine-args '--dtype bfloat16' -o load
      expertcut bench OUT --engine http://localhost:8000/v1 -o load
    """
    from expertcut.measure.bench import save_csv
    from expertcut.measure.bench_plot import save_plot

    out = output(ctx, as_json)
    prepared = prepare(models, top_k, load, engine, seed, out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / LOG).unlink(missing_ok=True)
    found = _measure(out, prepared, load.rounds, out_dir)
    save_csv(out_dir / "bench.csv", found.rows)
    title = f"{found.rows[0].model} in {found.engine}"
    draw(out, out_dir / "bench.png", lambda path: save_plot(path, found.rows, title))
    for warning in _warnings(found.rows):
        out.warn(warning)
    out.finish(
        {"out": str(out_dir), **found.model_dump(mode="json", by_alias=True)}, _table(found.rows), "", LEGEND, "",
        f"written: {out_dir}",
    )  # fmt: skip


def _measure(out: Output, prepared: Prepared, rounds: int, out_dir: Path) -> Bench:
    """Measure, writing after every figure; what there is stays if it is cut short."""
    from expertcut.measure.bench import FILE, Bench, Sample, summarise
    from expertcut.measure.rounds import take_turns

    samples: list[Sample] = []

    def save(complete: bool = False) -> Bench:
        bench = Bench(complete=complete, command=out.command, rows=summarise(samples), **prepared.facts)
        bench.save(out_dir / FILE)
        return bench

    def record(sample: Sample) -> None:
        samples.append(sample)
        save()

    variants = [entry.variant for entry in prepared.entries]
    try:
        with out.quiet(), out.progress("measuring", lambda speed: f"{60 * speed:.1f} runs/min") as advance:
            take_turns(
                variants, prepared.loads, rounds, prepared.start, prepared.prompts, record,
                at_once=prepared.at_once, advance=advance,
            )  # fmt: skip
        return save(complete=True)
    except BaseException:
        if samples:
            out.note(f"kept: {len(samples)} runs in {out_dir / FILE}, marked as incomplete")
        raise


def _warnings(rows: Sequence[Row]) -> list[str]:
    found = []
    if any(row.counted for row in rows):
        found.append("the server does not say how many tokens it wrote: pieces of its streams were counted")
    busiest = max(row.client_share for row in rows)
    if busiest > BUSY_CLIENT:
        found.append(f"the client used {busiest:.0%} of a core and may have limited the figures: see docs/bench.md")
    return found


def _table(rows: Sequence[Row]) -> Table:
    from expertcut.choose.budget import format_size
    from expertcut.cli.tables import table

    def ratio(row: Row) -> str:
        if row.ratio is None:
            return "–"
        between = f" [{row.ratio_low:.3f}, {row.ratio_high:.3f}]" if row.ratio_low is not None else ""
        return f"{row.ratio:.3f}{between}"

    def ms(value: float | None, tail: float | None) -> str:
        return "–" if value is None or tail is None else f"{1e3 * value:.1f} ({1e3 * tail:.1f})"

    columns = ("variant", ">clients", ">in", ">out", ">tokens/s", ">ratio", ">TTFT, ms", ">TPOT, ms", ">memory")
    made = [
        (r.variant, r.concurrency, r.input_len, r.output_len, f"{r.tokens_per_s:.1f}", ratio(r), ms(r.ttft, r.ttft_p95),
         ms(r.tpot, r.tpot_p95), "–" if r.memory is None else format_size(r.memory))
        for r in rows
    ]  # fmt: skip
    return table(columns, made)
