"""Held-out text and what it is to judge in; refusals and warnings out, before anything runs. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from expertcut.calibrate.overlap import Sketch, check_overlap
from expertcut.choose.plan import Plan
from expertcut.errors import PlanError

if TYPE_CHECKING:
    from expertcut.calibrate.data import CalibrationSet


def check_unseen(text: CalibrationSet, tokenizer: str, plans: Mapping[str, Plan]) -> list[str]:
    """Check that no plan was calibrated on a held-out text; `tokenizer` is the fingerprint of the text's tokenizer.

    Returns warnings. Plans that were made without a profile have nothing to check.

    Raises:
        DataError: the text, or a domain of it, is a plan's calibration text.
        PlanError: a plan's record of its text is damaged.
    """
    known = {name: _sketch(name, plan) for name, plan in plans.items() if plan.provenance.get("profile") is not None}
    return check_overlap(text, tokenizer, known)


def sequences(text: CalibrationSet) -> dict[str, int]:
    """Return the number of sequences by domain that predict a token."""
    return Counter(s.domain for s in text.sequences if len(s.ids) > 1)


def _sketch(name: str, plan: Plan) -> Sketch | None:
    text = plan.provenance.get("calibration_text")
    if text is None:
        return None
    try:
        return Sketch.parse(str(text))
    except ValueError as error:
        raise PlanError(f"{name}: $.provenance.calibration_text is damaged", "make the plan again") from error
