"""The gate of `prune`: a plan is judged on held-out text before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.cli.common import Output
from expertcut.cli.options import AS_IT_COMES, NO_GATE, Forward, Heldout
from expertcut.errors import GateError, UsageError

if TYPE_CHECKING:
    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.limits import Limit
    from expertcut.choose.plan import Plan
    from expertcut.measure.gate import Judgement
    from expertcut.model import Geometry


def parse_gate(heldout: Heldout, forward: Forward, heal: bool = False) -> list[Limit]:
    """Parse the limits; none if there is no gate, and then nothing else of it may be given, unless `heal` uses it."""
    from expertcut.choose.limits import parse_limit

    if not heldout.gate:
        unused = (replace(heldout, tokens=None, seq_len=None), AS_IT_COMES) if heal else (heldout, forward)
        if unused != (NO_GATE, AS_IT_COMES):
            raise UsageError("found options of a gate, but no --gate", "for example --gate 'nll<=1%' --data FILE")
        return []
    if not heldout.data:
        raise UsageError("--gate needs --data", "--data FILE: text that was not used for calibration")
    return [parse_limit(text) for text in heldout.gate]


def hold(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, name: str, limits: Sequence[Limit],
    heldout: Heldout, forward: Forward, *, profile: Path | None, seed: int,
) -> list[Judgement]:  # fmt: skip
    """Judge a plan by all limits.

    Raises:
        GateError: one does not hold.
    """
    from expertcut.calibrate.profile import Profile
    from expertcut.calibrate.run import ProfileOptions
    from expertcut.cli.text import read_text, refuse_seen
    from expertcut.measure.gate import check_limits, judge, suggest
    from expertcut.measure.heldout import sequences
    from expertcut.measure.whatif import evaluate

    text, tokenizer = read_text(
        out, checkpoint, geometry, heldout.data or (), tokens=heldout.tokens, seq_len=heldout.seq_len, seed=seed,
        device=forward.device, dtype=forward.dtype,
    )  # fmt: skip
    refuse_seen(out, text, tokenizer, {name: plan})
    check_limits(limits, sequences(text))
    options = ProfileOptions(**vars(forward))
    with out.progress("judging", lambda speed: f"{speed:,.0f} tokens·layers/s", 2 * text.tokens) as advance:
        found = evaluate(checkpoint, geometry, text, {name: plan}, options, notify=out.note, advance=advance)
    judged = judge(found, name, limits)
    failed = [str(judgement) for judgement in judged if not judgement.ok]
    if failed:
        source = Profile.load(profile) if profile is not None else None
        with out.progress("looking for a count that passes", lambda speed: f"{speed:.2f} layers/s") as advance:
            hint = suggest(
                checkpoint, geometry, plan, source, text, limits, options, notify=out.note, advance=advance
            )  # fmt: skip
        raise GateError(f"{name}: nothing is written, the gate fails: {'; '.join(failed)}", hint)
    return judged


def gate_record(judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Judgements as JSON objects."""
    return [
        {"limit": str(j.limit), "domain": j.domain, **asdict(j.found), "bound": j.bound, "ok": j.ok} for j in judged
    ]  # fmt: skip
