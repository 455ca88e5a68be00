"""`expertcut profile`: one calibration pass over a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.common import Output, output
from expertcut.cli.options import POOLED, Json, Model, Recorded, Revision, Seed, SeqLen
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.calibrate.data import CalibrationSet
    from expertcut.calibrate.profile import Profile


def profile(
    ctx: typer.Context,
    model: Model,
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the profile goes.", show_default=False)
    ],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration", metavar="TEXT", show_default=False,
            help="A recipe (general, code, math, multilingual, chat, builtin, self, or a .yaml file), or a .txt, "
            ".jsonl or .parquet file. Repeatable. Default: general.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens in all.")] = 131072,
    seq_len: SeqLen = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="One document per sequence instead of packed ones; padding never counts.")
    ] = False,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a profile that is there.")] = False,
    stream_from_hub: Annotated[
        bool,
        typer.Option("--stream-from-hub", help="Read a model of the Hub layer by layer; never store it."),
    ] = False,
    revision: Revision = None,
    forward: Recorded = POOLED,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run text through a model and add up what its experts do.

    One decoder layer is in memory at a time. If it is interrupted, the same command resumes at the last finished layer.

    Example:
      expertcut profile MODEL --calibration mine.jsonl --tokens 65536 -o DIR
    """
    import time

    from expertcut.calibrate.profile import refuse_existing
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.text import read_text
    from expertcut.model import read_geometry

    out = output(ctx, as_json)
    if stream_from_hub and "self" in (calibration or []):
        raise UsageError("--calibration self runs the whole model, which --stream-from-hub does not store")
    refuse_existing(out_dir, force)
    checkpoint = open_checkpoint(model, revision, download=not stream_from_hub)
    geometry = read_geometry(checkpoint)

    from expertcut.calibrate.run import ProfileOptions, profile_model

    data, tokenizer = read_text(
        out, checkpoint, geometry, calibration or ["general"], tokens=tokens, seq_len=seq_len, seed=seed,
        packed=not padded, device=forward.device, dtype=forward.dtype,
    )  # fmt: skip
    out_dir.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is better known now
    options = ProfileOptions(**vars(forward))
    out.resumable, started = not forward.resident, time.monotonic()
    with out.progress("profiling", lambda speed: f"{speed:,.0f} tokens·layers/s", data.tokens) as advance:
        made = profile_model(
            checkpoint, geometry, data, out_dir, options, tokenizer=tokenizer.fingerprint, notify=out.note,
            advance=advance,
        )  # fmt: skip
    _report(out, out_dir, made, data, time.monotonic() - started)


def _report(out: Output, out_dir: Path, made: Profile, data: CalibrationSet, seconds: float) -> None:
    from expertcut.cli.tables import facts, table

    meta, counts = made.meta, data.tokens_by_domain
    document = {
        "profile": str(out_dir), "model": meta.source, "tokens": data.tokens, "domains": counts,
        "seq_len": data.seq_len, "packed": data.packed, "seed": data.seed, "layers": len(made.prefixes),
        "experts": meta.experts, "top_k": meta.top_k, "dtype": meta.dtype, "digest": made.digest(), "seconds": seconds,
    }  # fmt: skip
    rows = [("profile", out_dir), ("MoE layers", len(made.prefixes)), ("forward pass", meta.dtype),
            ("tokens", f"{data.tokens:,} in sequences of {data.seq_len}"), ("time", f"{seconds:.1f} s")]  # fmt: skip
    domains = table(("domain", ">tokens"), [(name, f"{count:,}") for name, count in counts.items()])
    out.finish(document, facts(rows), "", domains, "", f"next: expertcut show {out_dir}")
