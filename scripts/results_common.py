"""What the scripts behind docs/results.md share: models, texts, and how a model is named without its place on disk."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from expertcut.calibrate.data import CalibrationSet, load_calibration
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import ProfileOptions, profile_model
from expertcut.calibrate.tokenizer import Tokenizer, load_tokenizer
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import Plan
from expertcut.measure.quality import WhatIf
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry, read_geometry

BUILT_IN = Path(__file__).resolve().parents[1] / "expertcut" / "_demo_model"
SHIPPED = ("prose", "documentation", "german", "french", "python")
SEEDS = (0, 1, 2)
OPTIONS = ProfileOptions(device="auto", dtype="float32", micro_tokens=4096)


def silent(*args: object) -> None:
    """No progress: these runs are short."""


@dataclass(frozen=True)
class Subject:
    """A trained model and the text to measure it with."""

    folder: Path
    checkpoint: Checkpoint
    geometry: Geometry
    tokenizer: Tokenizer
    calibration: list[Path | str]
    heldout: list[Path | str]
    seq_len: int

    def text(self, sources: list[Path | str], tokens: int, seed: int) -> CalibrationSet:
        return load_calibration(
            sources, self.tokenizer, tokens=tokens, seq_len=self.seq_len, seed=seed, model_dir=self.folder
        )

    def profile(self, data: CalibrationSet, out: Path) -> Profile:
        options = replace(OPTIONS, moments=True)
        return profile_model(
            self.checkpoint, self.geometry, data, out, options, tokenizer=self.tokenizer.fingerprint, notify=silent,
            advance=silent,
        )  # fmt: skip

    def whatif(self, data: CalibrationSet, plans: dict[str, Plan]) -> WhatIf:
        return evaluate(self.checkpoint, self.geometry, data, plans, OPTIONS, notify=say, advance=silent)

    @property
    def title(self) -> str:
        """Architecture, sizes, and the start of a hash of the config and all weights."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in self.checkpoint.shards:
            digest.update((self.folder / shard).read_bytes())
        g = self.geometry
        groups = f" in {g.n_group} groups" if g.n_group > 1 else ""
        what = "built-in model, " if self.folder == BUILT_IN else ""
        return (
            f"{what}{g.family.model_type}, {self.checkpoint.nbytes / 2e6:.1f} M parameters, {len(g.trunk)} MoE layers "
            f"of {g.num_experts} experts{groups}, top-{g.top_k} (sha256 {digest.hexdigest()[:12]})"
        )


def arguments(what: str, tokens: int, heldout_tokens: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="checkpoints; default: the built-in one")
    parser.add_argument("--calibration", nargs="+", type=Path, default=None, metavar="FILE")
    parser.add_argument("--heldout", nargs="+", type=Path, default=None, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=tokens, help="calibration tokens of each seed")
    parser.add_argument("--heldout-tokens", type=int, default=heldout_tokens)
    parser.add_argument("--seq-len", type=int, default=256)
    return parser


def subjects(given: argparse.Namespace, scratch: Path) -> list[Subject]:
    recipes = {}
    for part in ("calibration", "heldout"):
        recipe = scratch / f"{part}.yaml"
        sources = [f"  - {{kind: builtin, domain: {domain}, part: {part}}}\n" for domain in SHIPPED]
        recipe.write_text(f"description: The shipped text.\nsources:\n{''.join(sources)}")
        recipes[part] = getattr(given, part) or [recipe]
    found = []
    for folder in given.models or [BUILT_IN]:
        checkpoint = open_checkpoint(folder)
        found.append(
            Subject(folder.resolve(), checkpoint, read_geometry(checkpoint), load_tokenizer(folder),
                    recipes["calibration"], recipes["heldout"], given.seq_len)
        )  # fmt: skip
    return found


def pooled(runs: list[WhatIf]) -> WhatIf:
    """Runs of several seeds over the same text as one: every sequence's sums are the means over the seeds."""
    means = {name: np.mean([getattr(run, name) for run in runs], axis=0)
             for name in ("nll", "kl", "agreement", "acceptance")}  # fmt: skip
    return replace(runs[0], **means)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def out(*lines: str) -> None:
    Console(width=1000, highlight=False, emoji=False, markup=False).print(*lines, sep="\n")


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(columns: list[str], rows: list[list[object]]) -> str:
    return "\n".join([row(*columns), row(*["---"] * len(columns)), *(row(*cells) for cells in rows)])
