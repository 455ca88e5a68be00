"""Calibration and held-out text for the commands that run a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertcut.cli.common import Output
from expertcut.cli.options import Forward

if TYPE_CHECKING:
    from expertcut.calibrate.data import CalibrationSet
    from expertcut.calibrate.tokenizer import Tokenizer
    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.limits import Limit
    from expertcut.choose.plan import Plan
    from expertcut.model import Geometry

SEQ_LEN = 2048
HELD_BACK = 4
"""Without held-out text, every so manieth sequence of the calibration text is held back to judge a fit on."""


def read_text(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, sources: Sequence[str], *,
    tokens: int | None, seq_len: int | None, seed: int = 0, packed: bool = True, device: str = "auto",
    dtype: str = "auto",
) -> tuple[CalibrationSet, Tokenizer]:  # fmt: skip
    """Read and tokenise text with the checkpoint's own tokenizer; prints warnings.

    Device and dtype are checked first, because text can take long.
    """
    from expertcut.calibrate.data import load_calibration
    from expertcut.calibrate.run import resolve_dtype
    from expertcut.calibrate.tokenizer import load_tokenizer
    from expertcut.calibrate.transfer import resolve_device
    from expertcut.model.summary import max_positions

    resolve_dtype(dtype, resolve_device(device), checkpoint)
    limit = max_positions(checkpoint, geometry)
    if seq_len is None:
        seq_len = min(SEQ_LEN, limit or SEQ_LEN)
        if seq_len < SEQ_LEN:
            out.note(f"sequences of {seq_len} tokens, the model's limit")
    with out.busy("reading text"):
        tokenizer = load_tokenizer(checkpoint.path)
        data = load_calibration(
            sources, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed, packed=packed, model_dir=checkpoint.path,
            device=device, dtype=None if dtype == "auto" else dtype,
        )  # fmt: skip
    for warning in data.warnings:
        out.warn(warning)
    return data, tokenizer


def refuse_seen(out: Output, text: CalibrationSet, tokenizer: Tokenizer, plans: Mapping[str, Plan]) -> None:
    """Refuse held-out text that a plan was calibrated on; prints warnings of what is shared in part."""
    from expertcut.measure.heldout import check_unseen

    for warning in check_unseen(text, tokenizer.fingerprint, plans):
        out.warn(warning)


@dataclass(frozen=True)
class Texts:
    """What something is fitted on, and what it and limits are judged on."""

    fit_on: CalibrationSet | None
    judge_on: CalibrationSet
    facts: dict[str, Any]
    """For the plan's provenance: sketches of both, so that later measurements know them."""


def read_texts(
    out: Output, checkpoint: Checkpoint, geometry: Geometry, plan: Plan, forward: Forward, *,
    fit: Sequence[str] | None, judge: Sequence[str] | None, tokens: int | None, seq_len: int | None, seed: int,
    what: str = "gain", limits: Sequence[Limit] = (),
) -> Texts:  # fmt: skip
    """Read what to fit `what` on and what to judge on, at least one of them; refuses text that a plan has seen."""
    from expertcut.calibrate.overlap import check_overlap
    from expertcut.errors import DataError
    from expertcut.measure.gate import check_limits
    from expertcut.measure.heldout import sequences, sketch_of

    def read(sources: Sequence[str]) -> tuple[CalibrationSet, Tokenizer]:
        return read_text(
            out, checkpoint, geometry, sources, tokens=tokens, seq_len=seq_len, seed=seed, device=forward.device,
            dtype=forward.dtype,
        )  # fmt: skip

    fit_on, facts = None, {}
    if fit:
        fit_on, tokenizer = read(fit)
    if judge:
        judge_on, tokenizer = read(judge)
        refuse_seen(out, judge_on, tokenizer, {"the profile": plan})
    else:
        assert fit_on is not None
        out.note(f"no --data: every {HELD_BACK}th sequence of the calibration text is held back to judge the {what} on")
        fit_on, judge_on = fit_on.parted(HELD_BACK)
        if unjudged := sorted({s.domain for s in fit_on.sequences} - {s.domain for s in judge_on.sequences}):
            few = (
                f"only one sequence of {', '.join(unjudged)}: none is held back, and nothing tells how the {what} does"
            )
            out.warn(f"{few} there; a shorter --seq-len or more text helps")
        if not judge_on.sequences:
            raise DataError(
                f"too little text: nothing is left to judge the {what} on", "more text, a shorter --seq-len, or --data"
            )
    check_limits(limits, sequences(judge_on))
    facts["judged_text"] = str(sketch_of(judge_on, tokenizer.fingerprint).thinned())
    if fit_on is not None:
        sketch = sketch_of(fit_on, tokenizer.fingerprint)
        for warning in check_overlap(judge_on, tokenizer.fingerprint, {"--calibration": sketch}):
            out.warn(warning)
        facts[f"{what}_text"] = str(sketch.thinned())
    return Texts(fit_on, judge_on, facts)
