"""`plan --sequential` and `--strategy naee`: experts are chosen while calibration text runs through the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expertcut.cli.common import Output
from expertcut.cli.options import Choice, Forward, Measured
from expertcut.cli.planning import AUTO
from expertcut.errors import UsageError

if TYPE_CHECKING:
    from expertcut.calibrate.profile import Profile
    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.make import Request, Walk
    from expertcut.choose.plan import LayerPlan
    from expertcut.model import Geometry

NAEE = "naee"
"""The strategy that replays layers."""


def walks(choice: Choice, measured: Measured) -> bool:
    """Return whether the model runs while experts are chosen."""
    return measured.sequential or choice.strategy == NAEE


def check_walk(choice: Choice, measured: Measured) -> None:
    """Check that the options go together, before anything is opened.

    Raises:
        UsageError: they do not.
    """
    if measured.sequential and choice.strategy in (None, AUTO):
        raise UsageError("--sequential needs one --strategy that looks at data", "for example --strategy reap")
    if walks(choice, measured) and not measured.calibration:
        option = "--sequential" if measured.sequential else f"--strategy {NAEE}"
        raise UsageError(f"{option} needs --calibration", "for example --calibration general")


def walk_with(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, choice: Choice, measured: Measured, forward: Forward
) -> Walk:  # fmt: skip
    """Return what reads the text, once all other options are checked, and chooses while it runs."""

    def run(request: Request) -> tuple[dict[str, LayerPlan], Profile]:
        from expertcut.calibrate.run import ProfileOptions
        from expertcut.cli.text import read_text
        from expertcut.measure.walk import walk

        text, tokenizer = read_text(
            out, checkpoint, geometry, measured.calibration or [], tokens=measured.tokens, seq_len=measured.seq_len,
            seed=choice.seed, device=forward.device, dtype=forward.dtype,
        )  # fmt: skip
        with out.progress("choosing layer by layer", lambda speed: f"{speed:.2f} layers/s") as advance:
            return walk(
                request, text, ProfileOptions(**vars(forward)), sequential=measured.sequential,
                tokenizer=tokenizer.fingerprint, notify=out.note, advance=advance,
            )  # fmt: skip

    return run
