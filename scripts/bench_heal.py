"""What healing costs: fitting new values for a plan that halves the experts, beside profiling on the same tokens.

Runs take turns, each a process of its own, the checkpoint warm in the page cache. Time is wall time from an open
checkpoint to the file, loading included; memory is sampled as in `bench_profile`. Prints medians and the ratio of
times; exits 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import bench_model
import numpy as np
from bench_profile import BENCH, KEEP, MODEL, TOKENS, add, child, machine, profiled, seconds, take_turns
from bench_watch import Run
from rich.console import Console
from rich.table import Table

RATIO = 3.0
"""Wanted: time of healing over that of profiling, at most."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_heal", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    options = parser.parse_args()
    bench_model.build(MODEL)
    shape = (options.tokens // options.seq_len, options.seq_len)
    np.save(TOKENS, np.random.default_rng(0).integers(0, bench_model.CONFIG["vocab_size"], shape))
    table = Table(title=f"{options.tokens} tokens in sequences of {options.seq_len}, {options.repeat} rounds")
    for column in ("run", "median s", "least s", "anonymous MB", "resident MB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    ratios = {}
    for dtype in options.dtype:

        def healed(dtype: str = dtype) -> Run:
            return child("heal", dtype, str(KEEP), BENCH / "healed.deltas.safetensors")

        runs = take_turns(options.repeat, profile=lambda dtype=dtype: profiled(dtype, "streamed"), heal=healed)
        for name, some in runs.items():
            add(table, f"{name}, {dtype}", some, [seconds(run) for run in some])
        pairs = zip(runs["heal"], runs["profile"], strict=True)
        ratios[dtype] = statistics.median(seconds(h) / seconds(p) for h, p in pairs)
    console = Console()
    console.print(machine(), table, sep="\n", highlight=False)
    for dtype, ratio in ratios.items():
        missed = "  MISSED" if ratio > RATIO else ""
        console.print(f"{ratio:8.2f}  heal / profile, {dtype} (target <= {RATIO}){missed}", highlight=False)
    sys.exit(any(ratio > RATIO for ratio in ratios.values()))


if __name__ == "__main__":
    main()
