"""`expertcut eval`: what held-out text and tasks say of a model, and of plans before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.common import Output, output
from expertcut.cli.options import AS_IT_COMES, Forward, Json, Model, Revision, Seed, SeqLen, Tokens
from expertcut.cli.tasks import NO_TASKS, TaskOptions, prepare, solve
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.model import Geometry


def evaluate(
    ctx: typer.Context,
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="TEXT", show_default=False,
            help="Held-out text, not used for calibration: a .txt, .jsonl or .parquet file or a recipe. Repeatable.",
        ),
    ] = None,
    plans: Annotated[
        list[Path] | None,
        typer.Option("--plan", metavar="FILE", help="A plan to try. Repeatable, in one pass.", show_default=False),
    ] = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    revision: Revision = None,
    tasks: TaskOptions = NO_TASKS,
    forward: Forward = AS_IT_COMES,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what plans would do to a model, before anything is written; or how a written one does beside its source.

    By text: loss, divergence and agreement, per domain. By tasks of lm-eval: accuracy and the like, per task. Both with
    intervals, on the same text and documents for every model, in one pass for any number of plans.

    Example:
      expertcut eval MODEL --plan half.json --data heldout.jsonl
      expertcut eval MODEL --plan half.json --tasks expertcut_arithmetic
      expertcut eval OUT --source MODEL --tasks gsm8k --engine transformers --limit 200
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.cli import scored
    from expertcut.model import check_fingerprint, read_geometry

    out = output(ctx, as_json)
    if not data and not tasks.tasks:
        raise UsageError("found neither --data nor --tasks", "--data FILE for text, --tasks NAME for tasks of lm-eval")
    if not data and (tokens, seq_len) != (None, None):
        raise UsageError("--tokens and --seq-len have an effect with --data only")
    chosen = {str(path): Plan.load(path) for path in plans or ()}
    checkpoint = open_checkpoint(model, revision)
    geometry = read_geometry(checkpoint)
    for plan in chosen.values():
        check_fingerprint(plan.source.fingerprint, checkpoint, geometry)
    suite = prepare(tasks, chosen, forward, with_text=bool(data))
    document: dict[str, Any] = {"model": checkpoint.name}
    parts: list[RenderableType] = []
    if data:
        found = _by_text(out, checkpoint, geometry, chosen, data, tokens, seq_len, seed, forward)
        document |= found[0]
        parts += found[1]
    if suite is not None:
        runs = solve(out, checkpoint, geometry, suite, tasks, chosen, forward)
        document["tasks"] = scored.record(runs, tasks.limit)
        parts += ["", *scored.shown(runs)] if parts else scored.shown(runs)
    out.finish(document, *parts)


def _by_text(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plans: dict[str, Plan], data: list[str],
    tokens: int | None, seq_len: int | None, seed: int, forward: Forward,
) -> tuple[dict[str, Any], list[RenderableType]]:  # fmt: skip
    """What held-out text says: members of the JSON document, and what is shown."""
    from expertcut.calibrate.run import ProfileOptions
    from expertcut.cli import whatif
    from expertcut.cli.text import read_text, refuse_seen
    from expertcut.measure.whatif import evaluate as compare
    from expertcut.rewrite.layout import RECORD
    from expertcut.rewrite.record import Record

    text, tokenizer = read_text(
        out, checkpoint, geometry, data, tokens=tokens, seq_len=seq_len, seed=seed, device=forward.device,
        dtype=forward.dtype,
    )  # fmt: skip
    made_by = {checkpoint.name: Record.load(checkpoint.path).plan} if (checkpoint.path / RECORD).exists() else {}
    refuse_seen(out, text, tokenizer, made_by | plans)
    options = ProfileOptions(**vars(forward))
    work = text.tokens * (1 + len(plans))
    with out.progress("evaluating", lambda speed: f"{speed:,.0f} tokens·layers/s", work) as advance:
        found = compare(checkpoint, geometry, text, plans, options, notify=out.note, advance=advance)
    members = {"tokens": text.tokens, "seq_len": text.seq_len, "data": text.fingerprint, **whatif.record(found)}
    verdicts = ["", *whatif.verdicts(found)] if plans else []
    return members, [whatif.table(found), "", whatif.LEGEND, *verdicts]
