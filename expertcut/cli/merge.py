"""`expertcut merge`: profiles of parts become the profile of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertcut.cli.common import output
from expertcut.cli.options import Json


def merge(
    ctx: typer.Context,
    profiles: Annotated[
        list[Path], typer.Argument(metavar="PROFILE PROFILE...", help="Two or more.", show_default=False)
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the sum goes.", show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace a profile that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Add up profiles of one model over different text. Exact, in any order.

    Example:
      expertcut merge code.profile chat.profile -o both.profile
    """
    from functools import reduce

    from expertcut.calibrate import profile
    from expertcut.cli.tables import facts, table
    from expertcut.errors import UsageError

    out = output(ctx, as_json)
    if len(profiles) < 2:
        raise UsageError("found 1 profile to merge, expected two or more", "expertcut merge A B -o C")
    profile.refuse_existing(out_dir, force)
    merged = reduce(profile.merge, map(profile.Profile.load, profiles))
    merged.save(out_dir)
    counts = merged.meta.tokens()
    document = {
        "profile": str(out_dir), "model": merged.meta.source, "tokens": sum(counts.values()), "domains": counts,
        "digest": merged.digest(),
    }  # fmt: skip
    domains = table(("domain", ">tokens"), [(name, f"{count:,}") for name, count in counts.items()])
    out.finish(document, facts([("profile", out_dir)]), "", domains)
