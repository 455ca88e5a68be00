"""`expertcut inspect`: what a checkpoint is, from its headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from expertcut.cli.common import output
from expertcut.cli.options import Json, Model, Revision

if TYPE_CHECKING:
    from expertcut.model.summary import Summary


def inspect(ctx: typer.Context, model: Model, revision: Revision = None, as_json: Json = False) -> None:
    """Show what a checkpoint is, and what runtimes make of it. Reads headers only.

    Example:
      expertcut inspect Qwen/Qwen3-30B-A3B
    """
    from dataclasses import asdict

    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.tables import facts, fit_table, heading, lint_table, records
    from expertcut.model import read_geometry
    from expertcut.model.summary import summarise
    from expertcut.runtimes.lint import RANKS, fits, lint, lint_subject

    out = output(ctx, as_json)
    checkpoint = open_checkpoint(model, revision, download=False)
    geometry = read_geometry(checkpoint)
    summary = summarise(checkpoint, geometry)
    subject = lint_subject(geometry, checkpoint.config)
    findings, fitting = lint(subject), fits(subject)
    document = {
        "model": checkpoint.name, **asdict(summary), "lint": records(findings), "fits": records(fitting)
    }  # fmt: skip
    out.finish(
        document, heading(checkpoint.name), facts(_rows(summary)), "", lint_table(findings), "", fit_table(fitting), "",
        f"TP, EP: tensor- and expert-parallel sizes for {_range(summary.layer_experts)} experts, up to {RANKS} ranks",
    )  # fmt: skip


def _rows(s: Summary) -> list[tuple[str, object]]:
    from expertcut.cli.tables import ranges, size
    from expertcut.model.summary import by_layer

    groups = f"{s.n_group}, of which a token uses {s.topk_group}" if s.n_group > 1 else "none"
    return [
        ("family", s.family),
        ("decoder layers", s.layers),
        ("with routed experts", ranges(s.moe_layers)),
        ("multi-token prediction", ranges(s.mtp_layers) or "none"),
        ("experts per layer", by_layer(s.layer_experts)),
        ("top-k", by_layer(s.layer_top_k)),
        ("groups", groups),
        ("gate weights", f"{s.scoring}, {'' if s.renormalise else 'not '}renormalised"),
        ("hidden size", s.hidden),
        ("expert width", s.expert_width),
        ("positions", s.positions or "not stated"),
        ("weights", size(s.nbytes)),
        ("routed experts", f"{size(s.nbytes_experts)}, {s.nbytes_experts / (s.nbytes or 1):.1%} of the weights"),
        ("one expert, all layers", size(s.nbytes_per_expert)),
        ("parameters", _count(s.parameters)),
        ("activated per token", _count(s.activated)),
        ("dtypes", ", ".join(f"{dtype} {nbytes / (s.nbytes or 1):.1%}" for dtype, nbytes in s.dtypes.items())),
        ("shards", s.shards),
        ("geometry", s.geometry),
    ]


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "not told by the headers of quantised weights"
    unit, factor = ("billion", 1e9) if parameters >= 1e9 else ("million", 1e6)
    return f"{parameters / factor:,.2f} {unit}"
