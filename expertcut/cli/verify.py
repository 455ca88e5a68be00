"""`expertcut verify`: is a written checkpoint what its source and plan say?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertcut.cli.common import Output, output
from expertcut.cli.options import RUN, Device, Json, Revision, Seed
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.checkpoint import Checkpoint
    from expertcut.rewrite import Check

FAILED = 5
SEQ_LEN = 256


def verify(
    ctx: typer.Context,
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT", help="A checkpoint that expertcut wrote.", show_default=False)
    ],
    source: Annotated[
        str | None, typer.Option("--source", metavar="MODEL", help="What it was made from: compare plan and bytes.")
    ] = None,
    numeric: Annotated[
        bool,
        typer.Option("--numeric", help="Run both in float32: the logits must equal the source's under the plan."),
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration", metavar="TEXT", rich_help_panel=RUN, show_default=False,
            help="Text for --numeric: a recipe or a file. Repeatable. Default: builtin.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Tokens for --numeric.", rich_help_panel=RUN)
    ] = 512,
    seed: Seed = 0,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Check a written checkpoint, and compare it with its source.

    Without --source the structure; with it also the plan, the config and every byte. Exit code 5 if a check fails.

    Example:
      expertcut verify OUT --source MODEL --numeric
    """
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.tables import checks_table, records
    from expertcut.rewrite import verify_bytes, verify_structure

    out = output(ctx, as_json)
    if source is None and (numeric or revision is not None):
        raise UsageError("--numeric and --revision need the source", f"expertcut verify {out_dir} --source MODEL")
    with out.busy("checking structure and bytes"):
        original = open_checkpoint(source, revision) if source is not None else None
        checks = verify_structure(out_dir, original)
        if original is not None:
            checks += verify_bytes(out_dir, original)
    ok = all(check.ok for check in checks)
    if numeric and original is not None and ok:
        checks += _numeric(out, out_dir, original, calibration or ["builtin"], tokens, seed, device)
        ok = all(check.ok for check in checks)
    skipped = " (not run: --numeric)" if numeric and original is not None and not ok else ""
    out.finish({"ok": ok, "checks": records(checks)}, checks_table(checks), "", f"{'ok' if ok else 'FAILED'}{skipped}")
    if not ok:
        raise typer.Exit(FAILED)


def _numeric(
    out: Output, out_dir: Path, source: Checkpoint, texts: list[str], tokens: int, seed: int, device: str
) -> list[Check]:
    from expertcut.checkpoint import open_checkpoint
    from expertcut.cli.text import read_text
    from expertcut.measure.numeric import verify_numeric
    from expertcut.model import read_geometry
    from expertcut.model.summary import max_positions
    from expertcut.rewrite.record import Record

    geometry = read_geometry(source)
    data, _ = read_text(
        out, source, geometry, texts, tokens=tokens, seed=seed, device=device,
        seq_len=min(SEQ_LEN, max_positions(source, geometry) or SEQ_LEN),
    )  # fmt: skip
    with out.progress("comparing logits", lambda speed: f"{speed:.2f} layers/s") as advance:
        return verify_numeric(
            open_checkpoint(out_dir), source, Record.load(out_dir).plan, data, device=device, notify=out.note,
            advance=advance,
        )  # fmt: skip
