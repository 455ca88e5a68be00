"""Calibration and held-out text for the commands that run a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from expertcut.cli.common import Output

if TYPE_CHECKING:
    from expertcut.calibrate.data import CalibrationSet
    from expertcut.calibrate.tokenizer import Tokenizer
    from expertcut.checkpoint import Checkpoint
    from expertcut.choose.plan import Plan
    from expertcut.model import Geometry

SEQ_LEN = 2048


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
