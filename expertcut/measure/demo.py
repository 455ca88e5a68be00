"""The whole path on the built-in model: profile, plans, what-if losses, pruning, verification, the loss again.

Calibration text is sampled from the model and taken from the shipped text; the losses are measured on shipped text and
arithmetic that share nothing with it. One thread: the matrices are so small that threads only wait for each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from expertcut.calibrate.data import CalibrationSet, load_calibration
from expertcut.calibrate.passage import Notify
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import ProfileOptions, profile_model
from expertcut.calibrate.tokenizer import Tokenizer, load_tokenizer
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.errors import DestinationError
from expertcut.measure.numeric import verify_numeric
from expertcut.measure.whatif import BASE, evaluate
from expertcut.model import Geometry, read_geometry
from expertcut.rewrite import Check, prune, verify_bytes, verify_structure

SEQ_LEN = 256
"""Tokens of a sequence; the model was trained with as many."""
CALIBRATION_TOKENS = 28_000
"""Half of them sampled from the model, half shipped text."""
NUMERIC_TOKENS = 2048
SEEDS = 5
CALIBRATED = ("reap", "frequency")
"""The strategies that look at the profile; the better one's plan is carried out."""
MARK = ".expertcut-demo"
"""The file that says that a directory is the demo's own and may be written over."""
COMMAND = "expertcut demo"

_OPTIONS = ProfileOptions(device="cpu", resident=True)


@dataclass(frozen=True)
class DemoRow:
    """One line of the result."""

    name: str
    experts: int
    nbytes: int
    """Bytes of tensor data."""
    nll: float
    """Held-out loss, nats per predicted token; mean over seeds."""
    deviation: float | None
    """Standard deviation over seeds, None for a single plan."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it left its files."""

    folder: Path
    model: Path
    rows: tuple[DemoRow, ...]
    calibration_tokens: int
    heldout_tokens: int
    seeds: int
    pruned: Path
    """The checkpoint that was written."""
    pruned_by: str
    """The strategy that chose its experts."""
    pruned_nll: float
    """Held-out loss of that checkpoint, read from disk."""
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """True if every check passed."""
        return all(check.ok for check in self.checks)


def demo_model() -> Path:
    """Return the directory of the built-in model."""
    return Path(str(files("expertcut"))) / "_demo_model"


def run_demo(folder: Path, notify: Notify) -> DemoResult:
    """Run the whole path and leave profile, plans and the pruned checkpoint in `folder`; takes under a minute.

    `notify` is told what is being done. What an earlier demo left in `folder` is replaced.

    Raises:
        DestinationError: the folder exists, is not empty, and is not the demo's own.
    """
    started = time.monotonic()
    _claim(folder)
    with _single_thread():
        checkpoint = open_checkpoint(demo_model())
        geometry = read_geometry(checkpoint)
        tokenizer = load_tokenizer(checkpoint.path)
        notify("sampling text from the model, and reading the shipped text")
        calibration = _text(["self", "builtin"], tokenizer, CALIBRATION_TOKENS, checkpoint)
        heldout = _text(["builtin-heldout"], tokenizer, None, checkpoint)
        notify(f"profiling on {calibration.tokens:,} tokens")
        profile = profile_model(
            checkpoint, geometry, calibration, folder / "profile", _OPTIONS, tokenizer=tokenizer.fingerprint,
            notify=notify, advance=_silent,
        )  # fmt: skip
        notify(
            f"planning, then trying {len(CALIBRATED) + SEEDS} plans on {heldout.tokens:,} held-out tokens in one pass"
        )
        plans = _plans(checkpoint, geometry, profile, folder / "plans")
        found = evaluate(checkpoint, geometry, heldout, plans, _OPTIONS, notify=notify, advance=_silent)
        losses = {name: found.mean("nll", name) for name in found.names}
        best = min(CALIBRATED, key=lambda name: losses[name])
        notify(f"pruning by {best}, and checking structure, bytes and logits")
        pruned, numeric = folder / "pruned", _text(["builtin-heldout"], tokenizer, NUMERIC_TOKENS, checkpoint)
        prune(checkpoint, geometry, plans[best], pruned, force=True)
        checks = _verify(pruned, checkpoint, plans[best], numeric, notify)
        written = open_checkpoint(pruned)
        own = read_geometry(written)
        again = evaluate(written, own, heldout, {}, _OPTIONS, notify=notify, advance=_silent).mean("nll", BASE)
    checks.append(_same_loss(losses[best], again))
    rows = _rows(losses, checkpoint.nbytes, written.nbytes, geometry.num_experts, own.num_experts)
    return DemoResult(
        folder, checkpoint.path, rows, calibration.tokens, heldout.tokens, SEEDS, pruned, best, again,
        tuple(checks), time.monotonic() - started,
    )  # fmt: skip


def _claim(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise DestinationError(f"{folder}: exists and is not an earlier demo's", "name another directory with --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


@contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _text(sources: list[str], tokenizer: Tokenizer, tokens: int | None, model: Checkpoint) -> CalibrationSet:
    return load_calibration(sources, tokenizer, tokens=tokens, seq_len=SEQ_LEN, model_dir=model.path, device="cpu")


def _plans(checkpoint: Checkpoint, geometry: Geometry, profile: Profile, folder: Path) -> dict[str, Plan]:
    folder.mkdir(exist_ok=True)
    half = geometry.num_experts // 2
    plans = {
        name: make_plan(checkpoint, geometry, strategy=name, experts=half, profile=profile, command=COMMAND)
        for name in CALIBRATED
    }
    for seed in range(SEEDS):
        plans[f"random-{seed}"] = make_plan(
            checkpoint, geometry, strategy="random", experts=half, seed=seed, command=COMMAND
        )
    for name, plan in plans.items():
        plan.save(folder / f"{name}.json")
    return plans


def _verify(pruned: Path, source: Checkpoint, plan: Plan, text: CalibrationSet, notify: Notify) -> list[Check]:
    checks = [*verify_structure(pruned, source), *verify_bytes(pruned, source)]
    written = open_checkpoint(pruned)
    return checks + verify_numeric(written, source, plan, text, device="cpu", notify=notify, advance=_silent)


def _same_loss(planned: float, found: float) -> Check:
    detail = f"{found:.6f} nats per token" if found == planned else f"{found!r}, expected {planned!r}"
    return Check("loss of the written checkpoint equals its plan's", found == planned, detail)


def _rows(losses: dict[str, float], before: int, after: int, experts: int, kept: int) -> tuple[DemoRow, ...]:
    random = [nll for name, nll in losses.items() if name.startswith("random-")]
    return (
        DemoRow("unpruned", experts, before, losses[BASE], None),
        *(DemoRow(name, kept, after, losses[name], None) for name in CALIBRATED),
        DemoRow("random", kept, after, statistics.fmean(random), statistics.stdev(random)),
    )


def _silent(done: int, total: int) -> None:
    pass
