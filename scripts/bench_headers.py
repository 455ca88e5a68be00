"""What the largest published checkpoints ask of a laptop: sparse files of their real size, with their real headers.

For each, from the command line: make a plan from the routers; dry-run it; do both in one command; write a lower top-k
with all shards linked. Then a real `prune` of gpt-oss-20b, structure and bytes checked. All runs are child processes;
time is wall time, memory the child's peak resident set. Prints one row a run; exits 1 if a target is missed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from bench_rewrite import BENCH, MB, ROOT, child, python
from rich.console import Console
from rich.table import Table

MODELS = ("deepseek-v3", "kimi-k2", "qwen3-235b")
SECONDS = 10.0
"""For opening, planning and laying out."""
PEAK = 600.0
"""MB."""
CHOICE = ("--strategy", "router-norm", "--keep", "0.5")
SPARSE = BENCH / "headers"
BUILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sparse
from golden_names import golden
from expertcut.checkpoint import open_checkpoint
ckpt = open_checkpoint(str(sparse.write(golden(sys.argv[2]), Path(sys.argv[3]))))
print(json.dumps([len(ckpt.tensors), len(ckpt.shards), ckpt.nbytes]))
"""


def build(name: str) -> list[int]:
    """Make one checkpoint; its tensors, shards and bytes."""
    shutil.rmtree(SPARSE / name, ignore_errors=True)
    _, _, told = python(BUILD, ROOT / "tests", name, SPARSE / name)
    found: list[int] = json.loads(told)
    return found


def expertcut(*arguments: str | Path) -> tuple[float, float, int]:
    """Run a command: wall seconds, peak MB, bytes of the tensors that are left."""
    seconds, peak, told = child(sys.executable, "-m", "expertcut", *map(str, arguments), "--json")
    return seconds, peak / MB, json.loads(told)["nbytes"]["after"]


def runs(name: str) -> dict[str, tuple[float, float, int]]:
    """What planning one model takes."""
    source, plan, out = SPARSE / name, SPARSE / f"{name}.json", SPARSE / "out"
    found = {
        "plan": expertcut("plan", source, *CHOICE, "-o", plan),
        "dry run": expertcut("prune", source, out, "--plan", plan, "--dry-run"),
        "both": expertcut("prune", source, out, *CHOICE, "--dry-run"),
        "top-k, linked": expertcut("prune", source, out, "--top-k", "4", "--link", "--no-verify"),
    }
    shutil.rmtree(out)
    return found


def main() -> None:
    SPARSE.mkdir(parents=True, exist_ok=True)
    table = Table()
    for column in ("model", "tensors", "shards", "GB", "GB left", "run", "wall s", "peak MB"):
        table.add_column(column, justify="left" if column in ("model", "run") else "right")
    missed = []
    for name in (*MODELS, "gpt-oss-20b"):
        tensors, shards, nbytes = build(name)
        real = name not in MODELS
        found = {"prune": expertcut("prune", SPARSE / name, SPARSE / "out", *CHOICE)} if real else runs(name)
        for what, (seconds, peak, left) in found.items():
            sizes = (f"{tensors:,}", str(shards), f"{nbytes / 1e9:.1f}", f"{left / 1e9:.1f}")
            table.add_row(name, *sizes, what, f"{seconds:.1f}", f"{peak:.0f}")
            if peak > PEAK or seconds > SECONDS and not real:
                missed.append(f"{name}, {what}: {seconds:.1f} s, {peak:.0f} MB; wanted {SECONDS:g} s, {PEAK:g} MB")
    shutil.rmtree(SPARSE)
    console = Console()
    console.print(table)
    for line in missed:
        console.print(f"MISSED  {line}", highlight=False)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
