"""Held-out text and what it is to judge in; refusals and warnings out, before anything runs. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import JsonValue

from expertcut.calibrate.overlap import EVERY, NOTICED, Sketch, check_overlap, sequence_hashes
from expertcut.choose.plan import Plan
from expertcut.errors import PlanError

if TYPE_CHECKING:
    from expertcut.calibrate.data import CalibrationSet


def check_unseen(text: CalibrationSet, tokenizer: str, plans: Mapping[str, Plan]) -> list[str]:
    """Check that no plan was calibrated on a held-out text; `tokenizer` is the fingerprint of the text's tokenizer.

    Returns warnings, also of plans that were chosen by how they do on the text. Plans that were made without a profile
    have no calibration text.

    Raises:
        DataError: the text, or a domain of it, is a plan's calibration text.
        PlanError: a plan's record of its text is damaged.
    """
    warnings = []
    for name, plan in plans.items():
        known, facts = {}, plan.provenance
        if facts.get("profile") is not None:
            known[name] = _sketch(name, facts, "calibration_text")
        for what in ("gain", "healing"):
            if facts.get(f"{what}_text") is not None:
                known[f"{name}'s {what}"] = _sketch(name, facts, f"{what}_text")
        warnings += check_overlap(text, tokenizer, known)
        for judged in (_sketch(name, facts, key) for key in ("judged_text", "healing_judged_text")):
            if judged is None or judged.tokenizer != tokenizer:
                continue
            hits, count = judged.shared(s.ids for s in text.sequences)
            if hits > NOTICED * count:
                share = f"{hits / count:.0%} of this text"
                warnings.append(f"{name}: was chosen by how it does on {share}, which flatters it")
    return warnings


def sequences(text: CalibrationSet) -> dict[str, int]:
    """Return the number of sequences by domain that predict a token."""
    return Counter(s.domain for s in text.sequences if len(s.ids) > 1)


def sketch_of(text: CalibrationSet, tokenizer: str) -> Sketch:
    """Return a sketch of a text."""
    return Sketch(tokenizer, EVERY, sequence_hashes(s.ids for s in text.sequences))


def _sketch(name: str, provenance: Mapping[str, JsonValue], key: str) -> Sketch | None:
    text = provenance.get(key)
    if text is None:
        return None
    try:
        return Sketch.parse(str(text))
    except ValueError as error:
        raise PlanError(f"{name}: $.provenance.{key} is damaged", "make the plan again") from error
