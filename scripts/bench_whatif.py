"""What a candidate costs in a what-if pass: eight plans in one pass beside eight passes, each with its base.

Every run is a process of its own; the two kinds take turns, on the same tokens, the checkpoint warm in the page cache.
Both must give the same figures. Times are of the evaluation alone, wall and processor; memory is sampled as in
`bench_profile`. Prints medians and ratios; exits 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import bench_model
import numpy as np
from bench_profile import BENCH, MB, MODEL, machine, take_turns
from bench_watch import ROOT, Run, watch
from rich.console import Console
from rich.table import Table

TOKENS = BENCH / "whatif-tokens.npy"
SEQ_LEN = 256
RATIO = 0.65
"""Wanted: time of one pass over that of eight."""


def child(kind: str, dtype: str) -> Run:
    log = BENCH / f"bench-whatif-{kind}.log"
    return watch(log, sys.executable, ROOT / "scripts/bench_child.py", "whatif", MODEL, TOKENS, dtype, kind)


def compare(dtype: str, rounds: int, table: Table) -> tuple[float, float]:
    """Ratios of wall and processor time."""
    runs = take_turns(rounds, together=lambda: child("together", dtype), apart=lambda: child("apart", dtype))
    figures = [run.told["losses"] for some in runs.values() for run in some]
    if any(found != figures[0] for found in figures):
        sys.exit(f"the figures differ: {figures}")
    for kind, what in (("together", "eight plans, one pass"), ("apart", "eight plans, eight passes")):
        some = runs[kind]
        wall, cpu = (statistics.median(run.told[time] for run in some) for time in ("wall", "cpu"))
        anon = max(run.anon for run in some) / MB
        table.add_row(f"{what}, {dtype}", f"{wall:.1f}", f"{cpu:.1f}", f"{anon:.0f}")
    pairs = list(zip(runs["together"], runs["apart"], strict=True))
    wall, cpu = (statistics.median(t.told[time] / a.told[time] for t, a in pairs) for time in ("wall", "cpu"))
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_whatif", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    options = parser.parse_args()
    bench_model.build(MODEL)
    shape = (options.tokens // SEQ_LEN, SEQ_LEN)
    np.save(TOKENS, np.random.default_rng(0).integers(0, bench_model.CONFIG["vocab_size"], shape))
    table = Table(title=f"{options.tokens} tokens in sequences of {SEQ_LEN}, {options.repeat} rounds")
    for column in ("run", "median wall s", "median processor s", "anonymous MB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    ratios = {dtype: compare(dtype, options.repeat, table) for dtype in options.dtype}
    console = Console()
    console.print(machine(), table, sep="\n", highlight=False)
    for dtype, (wall, cpu) in ratios.items():
        line = f"{wall:8.2f}  one pass / eight passes, {dtype}; {cpu:.2f} of processor time (target <= {RATIO})"
        console.print(line + ("  MISSED" if min(wall, cpu) > RATIO else ""), highlight=False)
    sys.exit(any(min(ratio) > RATIO for ratio in ratios.values()))


if __name__ == "__main__":
    main()
