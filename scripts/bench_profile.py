"""What profiling costs: beside the bare forward passes, streamed beside resident, and (--peer) beside llm-compressor.

Runs that are compared take turns, on the same tokens, the checkpoint warm in the page cache. Time is wall time; memory
is sampled every 10 ms over a process and its children: anonymous is what the kernel counts as such, resident adds
mapped files. Prints medians and ratios; exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import bench_model
import numpy as np
from bench_watch import ROOT, Run, watch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

BENCH = ROOT / ".bench"
MODEL, TOKENS, PROFILE, OURS, THEIRS = (
    BENCH / n for n in ("model", "profile-tokens.npy", "profile", "half", "half-peer")
)
PEER = ROOT / ".venv-llmcompressor/bin/python"
KEEP = bench_model.CONFIG["num_experts"] // 2
FIRST = "model.layers.0.mlp.experts"
MB = 1e6
Target = tuple[str, float, str, float]
"""What, value, "<=" or ">=", limit."""


def child(part: str, *arguments: str | Path) -> Run:
    return watch(
        BENCH / f"bench-{part}.log", sys.executable, ROOT / "scripts/bench_child.py", part, MODEL, TOKENS, *arguments
    )


def forward(dtype: str, rounds: int, table: Table) -> list[Target]:
    """The profiling pass beside the bare forward pass, all weights in memory."""
    found = child("compare", dtype, str(rounds)).told
    for name, what in (("bare", "bare forward pass"), ("profile", "profiling pass")):
        table.add_row(f"{what}, {dtype}", f"{statistics.median(found[name]):.1f}", f"{min(found[name]):.1f}", "", "")
    ratio = statistics.median(p / b for p, b in zip(found["profile"], found["bare"], strict=True))
    cpu = statistics.median(p / b for p, b in zip(found["profile_cpu"], found["bare_cpu"], strict=True))
    return [
        (f"profiling / bare forward passes, {dtype}", ratio, "<=", 1.08),
        (f"the same, processor time, {dtype}", cpu, "<=", 1.08),
    ]


def streaming(dtype: str, rounds: int, table: Table) -> list[Target]:
    """`profile_model` streamed and resident, loading included."""
    sizes = child("base", dtype).told
    runs = take_turns(
        rounds, streamed=lambda: profiled(dtype, "streamed"), resident=lambda: profiled(dtype, "resident")
    )
    for name, some in runs.items():
        add(table, f"profile, {name}, {dtype}", some, [run.told["seconds"] for run in some])
    streamed, resident = runs["streamed"], runs["resident"]
    pairs = zip(streamed, resident, strict=True)
    layers = (max(run.anon for run in streamed) - sizes["anon"] - sizes["hidden"]) / sizes["layer"]
    return [
        (f"streamed peak, above base + hidden states, in layers, {dtype}", layers, "<=", 1.8),
        (
            f"streamed / resident time, {dtype}",
            statistics.median(seconds(s) / seconds(r) for s, r in pairs),
            "<=",
            1.15,
        ),
    ]


def seconds(run: Run) -> float:
    """Time that the run itself measured: without starting Python."""
    found: float = run.told["seconds"]
    return found


def profiled(dtype: str, kind: str) -> Run:
    shutil.rmtree(PROFILE, ignore_errors=True)
    return child("profile", dtype, kind, PROFILE)


def peer(dtype: str, rounds: int, table: Table) -> list[Target]:
    """Profile + plan + prune + verify beside load + calibrate + save, each as one whole process."""
    runs = take_turns(rounds, ours=lambda: ours(dtype), routed=lambda: theirs(dtype, "routed"))
    same = kept(OURS) == kept(THEIRS)
    runs["all"] = [theirs(dtype, "all")]
    names = {"ours": "expertcut, whole", "routed": "llm-compressor, routed only", "all": "llm-compressor, all experts"}
    for name, some in runs.items():
        add(table, f"{names[name]}, {dtype}", some, [run.seconds for run in some])
    pairs = list(zip(runs["ours"], runs["routed"], strict=True))
    targets = [
        (
            f"times faster than llm-compressor, {dtype}",
            statistics.median(t.seconds / o.seconds for o, t in pairs),
            ">=",
            3.0,
        ),
        (f"times less anonymous memory, {dtype}", statistics.median(t.anon / o.anon for o, t in pairs), ">=", 3.0),
        (f"times less resident memory, {dtype}", statistics.median(t.rss / o.rss for o, t in pairs), ">=", 3.0),
    ]
    if dtype == "float32":
        targets.append(("same experts kept in the first layer (1 = yes)", float(same), ">=", 1.0))
    return targets


def ours(dtype: str) -> Run:
    shutil.rmtree(OURS, ignore_errors=True)
    shutil.rmtree(f"{OURS}.profile", ignore_errors=True)
    return child("whole", dtype, str(KEEP), OURS)


def theirs(dtype: str, mode: str) -> Run:
    shutil.rmtree(THEIRS, ignore_errors=True)
    script = ROOT / "scripts/bench_peer.py"
    return watch(BENCH / "bench-peer.log", PEER, script, MODEL, TOKENS, THEIRS, str(KEEP), dtype, mode)


def kept(folder: Path) -> list[int]:
    """Ids of the experts that a checkpoint kept of the model's first layer, found by their weights."""
    known = {digest: expert for expert, digest in digests(MODEL, bench_model.CONFIG["num_experts"])}
    return [known[digest] for _, digest in digests(folder, KEEP)]


def digests(folder: Path, experts: int) -> Iterable[tuple[int, str]]:
    """Every expert of the first layer with a digest of its down projection in bfloat16."""
    import torch

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            for expert in range(experts):
                name = f"{FIRST}.{expert}.down_proj.weight"
                if name in names:
                    weight = opened.get_tensor(name).bfloat16().view(torch.int16).numpy()
                    yield expert, hashlib.sha256(weight.tobytes()).hexdigest()


def take_turns(rounds: int, **jobs: Callable[[], Run]) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name in sorted(jobs, reverse=number % 2 > 0):
            runs[name].append(jobs[name]())
    return {name: runs[name] for name in jobs}


def add(table: Table, what: str, runs: list[Run], times: list[float]) -> None:
    anon, rss = (max(getattr(run, kind) for run in runs) / MB for kind in ("anon", "rss"))
    table.add_row(what, f"{statistics.median(times):.1f}", f"{min(times):.1f}", f"{anon:.0f}", f"{rss:.0f}")


def machine() -> str:
    cpu = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    return f"{os.cpu_count()} cores of {cpu or platform.machine()}, {ram:.0f} GiB; {packages}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench_profile", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3, help="rounds of every comparison")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=("forward", "streaming", "peer"), help="leave the rest out")
    parser.add_argument("--peer", action="store_true", help="llm-compressor too, in an environment of its own")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bench_model.build(MODEL)
    shape = (options.tokens // options.seq_len, options.seq_len)
    np.save(TOKENS, np.random.default_rng(0).integers(0, bench_model.CONFIG["vocab_size"], shape))
    table = Table(title=f"{options.tokens} tokens in sequences of {options.seq_len}, {options.repeat} rounds")
    for column in ("run", "median s", "least s", "anonymous MB", "resident MB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    parts = {"forward": forward, "streaming": streaming} | ({"peer": peer} if options.peer else {})
    targets = [
        target
        for name, part in parts.items()
        if options.only is None or name in options.only
        for dtype in options.dtype
        for target in part(dtype, options.repeat, table)
    ]
    console = Console()
    console.print(machine(), table, sep="\n", highlight=False)
    missed = False
    for what, value, sign, limit in targets:
        met = value <= limit if sign == "<=" else value >= limit
        missed |= not met
        console.print(f"{value:8.2f}  {what} (target {sign} {limit}){'' if met else '  MISSED'}", highlight=False)
    sys.exit(missed)


if __name__ == "__main__":
    main()
