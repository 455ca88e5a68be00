"""`expertcut report`: what was found about a model, as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertcut.cli.common import output
from expertcut.cli.options import Json


def report(
    ctx: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PROFILE|OUT|SWEEP…", show_default=False,
            help="A profile, a checkpoint that expertcut wrote, a plan, the folder of a sweep or of a benchmark; "
            "several of one model make one page.",
        ),
    ],
    out_file: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the page goes.", show_default=False)
    ],
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="NAME", show_default=False,
                     help="Criterion whose scores are shown. Default: the plan's, or reap."),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Draw one HTML page: routing, kept experts, trade-offs, speed, the plan, what runtimes make of it.

    The page holds all that it shows and loads nothing. Every figure has its numbers as a table, and can be saved.

    Example:
      expertcut report model.profile OUT curve -o report.html
    """
    from expertcut.checkpoint.textio import replace_text
    from expertcut.share.inputs import read_inputs
    from expertcut.share.report import build, render

    out = output(ctx, as_json)
    page = build(read_inputs(paths), by)
    text = render(page)
    replace_text(out_file, text, "page")
    figures = [figure.key for section in page.sections for figure in section.figures]
    document = {"out": str(out_file), "model": page.title, "sections": [section.key for section in page.sections],
                "figures": figures}  # fmt: skip
    out.finish(document, f"written: {out_file} ({len(figures)} figures, {len(text.encode()) / 1e6:.1f} MB)")
