"""Throughput in vLLM over expert counts and top-k: `expertcut prune`, then `expertcut bench`, then Markdown.

The benchmarks' model (64 experts, top-8, 1.7 GB) and prunings of it, each with three top-k put on it by vLLM. Weights
and prompts are random, so that tokens spread over the experts about evenly. Prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import bench_model
from bench_profile import BENCH, MODEL
from bench_watch import ROOT

from expertcut.measure.bench import Bench, Row, load_bench

EXPERTS, TOP_K, CLIENTS = (64, 48, 32), (8, 6, 4), (1, 8, 32)
OUT = BENCH / "serving"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # idle servers beside the busy one are bound to the same cores otherwise
    "VLLM_MLA_DISABLE": "1",  # on a CPU, latent attention knows the widths of released models only
}


def expertcut(*arguments: object) -> None:
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    env = threads | ENVIRONMENT | os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "expertcut", *map(str, arguments)]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except (
            KeyboardInterrupt
        ):  # which it gets as well: `subprocess.run` would kill it before it has ended its servers
            code = process.wait()
    if code:
        sys.exit(code)


def checkpoints() -> list[Path]:
    """The model and its prunings; any choice of experts will do, as they are random."""
    bench_model.build(MODEL)
    made = [MODEL]
    for experts in EXPERTS[1:]:
        made.append(BENCH / f"{MODEL.name}-{experts}")
        if not made[-1].exists():
            expertcut("prune", MODEL, made[-1], "--strategy", "random", "--experts", experts)
    return made


def markdown(found: Bench) -> str:
    machine = found.machine
    assert machine is not None
    settings = ", ".join(f"{name}={value}" for name, value in machine.settings.items())
    head = f"{found.engine}; {machine.cores} cores of {machine.cpu}, {machine.memory / 2**30:.0f} GiB; {settings}."
    first = found.rows[0]
    lengths = f"{first.input_len} tokens in, {first.output_len} out."
    columns = "".join(f" tokens/s, {n} at a time | ratio |" for n in CLIENTS)
    lines = [head, lengths, "", f"| experts | top-k |{columns} memory, GB |", f"|{'---|' * (3 + 2 * len(CLIENTS))}"]
    for name in dict.fromkeys(row.variant for row in found.rows):
        rows = {row.concurrency: row for row in found.rows if row.variant == name}
        some = rows[CLIENTS[0]]
        cells = "".join(f" {rows[n].tokens_per_s:.1f} | {ratio(rows[n])} |" for n in CLIENTS)
        memory = max(row.memory or 0 for row in rows.values()) / 1e9
        lines.append(f"| {some.experts} | {some.top_k} |{cells} {memory:.1f} |")
    return "\n".join(lines)


def ratio(row: Row) -> str:
    if row.ratio is None or row.ratio_low is None or row.ratio_high is None:
        return "1" if row.ratio is None else f"{row.ratio:.2f}"
    return f"{row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_serving", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=3, help="servers that are up at a time, 4.5 GB each")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    options = parser.parse_args()
    expertcut(
        "bench", *checkpoints(), "--top-k", ",".join(map(str, TOP_K)), "--concurrency", ",".join(map(str, CLIENTS)),
        "--input-len", options.input_len, "--output-len", options.output_len, "--rounds", options.rounds,
        "--at-once", options.at_once, "--python", ROOT / ".venv-vllm/bin/python",
        "--engine-args", "--dtype bfloat16 --enforce-eager", "-o", OUT,
    )  # fmt: skip
    print(markdown(load_bench(OUT)))


if __name__ == "__main__":
    main()
