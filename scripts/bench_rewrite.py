"""How fast and how small `prune` is: side by side with `cp` + sync, and with load + slice + save in transformers.

Halving the experts, and a lower top-k alone, which leaves all tensors as they are.

All runs are child processes, interleaved, source warm in the page cache, results synced to the same file system before
the clock stops. Time is wall time; memory is the child's peak resident set. Prints medians and ratios; exits 1 if a
target is missed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench"
MODEL, OUT, COPY = BENCH / "model", BENCH / "rewrite-out", BENCH / "rewrite-copy"
MB = 1e6

BUILD = "import sys; from pathlib import Path; import bench_model; bench_model.build(Path(sys.argv[1]))"
PLAN = """
import sys
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import make_plan
from expertcut.model import read_geometry
ckpt = open_checkpoint(sys.argv[1])
experts, top_k = int(sys.argv[2]), int(sys.argv[3])
make_plan(ckpt, read_geometry(ckpt), strategy="random", experts=experts, top_k=top_k).save(sys.argv[4])
"""
TRANSFORMERS = """
import json, os, sys, torch, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
plan = json.loads(Path(sys.argv[2]).read_text())["layers"]
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for name, layer in plan.items():
    block, kept = model.get_submodule(name), torch.tensor(layer["kept"])
    for module, part in (block.gate, "weight"), (block.experts, "gate_up_proj"), (block.experts, "down_proj"):
        setattr(module, part, torch.nn.Parameter(getattr(module, part).data[kept], requires_grad=False))
model.config.num_experts = len(kept)
model.save_pretrained(sys.argv[3])
for file in Path(sys.argv[3]).iterdir():
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
"""


def child(*command: str) -> tuple[float, float, str]:
    """Run a process to its end: wall seconds, peak resident bytes, standard output."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT / "scripts", env=environment())
    assert process.stdout
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[:3]} failed with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024, answer


def environment() -> dict[str, str]:
    """Byte code is cached, as in an installed package."""
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
    return os.environ | own


def python(code: str, *arguments: str | Path) -> tuple[float, float, str]:
    return child(sys.executable, "-c", code, *map(str, arguments))


def expertcut(plan: Path, *more: str, verify: bool = False) -> dict[str, float]:
    """The command as users run it, but for the verification afterwards, which `cp` has not either."""
    shutil.rmtree(OUT, ignore_errors=True)
    options = (*more, "--json") if verify else (*more, "--json", "--no-verify")
    arguments = ("prune", str(MODEL), str(OUT), "--plan", str(plan), *options)
    seconds, peak, answer = child(sys.executable, "-m", "expertcut", *arguments)
    told = json.loads(answer)
    return {"seconds": seconds, "moving": told["seconds"], "peak": peak, "nbytes": told["nbytes_written"]}


def imports_torch(plan: Path) -> bool:
    shutil.rmtree(OUT, ignore_errors=True)
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "expertcut",
        "prune",
        str(MODEL),
        str(OUT),
        "--plan",
        str(plan),
    ]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return any(line.split("|")[-1].strip() in ("torch", "transformers") for line in run.stderr.splitlines())


def cp(*, link: bool = False) -> dict[str, float]:
    """Copy the shards that `expertcut` has just written or taken over, or link to them, and sync the result."""
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir()
    how = "-l" if link else "--reflink=never"
    line = f'cp {how} "$0"/*.safetensors "$1" && sync "$1" "$1"/*.safetensors'
    seconds, peak, _ = child("sh", "-c", line, str(OUT), str(COPY))
    nbytes = 0 if link else sum(path.stat().st_size for path in COPY.iterdir())
    return {"seconds": seconds, "peak": peak, "nbytes": nbytes}


def transformers(plan: Path) -> dict[str, float]:
    shutil.rmtree(COPY, ignore_errors=True)
    seconds, peak, _ = python(TRANSFORMERS, MODEL, plan, COPY)
    return {"seconds": seconds, "peak": peak}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    plans = {experts: BENCH / f"rewrite-{experts}.json" for experts in (16, 32, 64)}
    lower = BENCH / "rewrite-top-4.json"
    for experts, plan in plans.items():
        python(PLAN, MODEL, str(experts), "8", plan)
    python(PLAN, MODEL, "64", "4", lower)
    jobs: dict[str, Callable[[], dict[str, float]]] = {
        "prune": lambda: expertcut(plans[32]),
        "cp": cp,
        "transformers": lambda: transformers(plans[32]),
        "prune, keep 1/4": lambda: expertcut(plans[16]),
        "prune, keep all": lambda: expertcut(plans[64], "--max-shard-size", "5GB"),
        "top-k only": lambda: expertcut(lower),
        "cp, top-k only": cp,
        "top-k only, linked": lambda: expertcut(lower, "--link"),
        "cp -l": lambda: cp(link=True),
        "top-k only, linked, verified": lambda: expertcut(lower, "--link", verify=True),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for number in range(rounds + 1):  # the first round warms the page cache
        for name, job in jobs.items():
            result = job()
            if number:
                found[name].append(result)
    if imports_torch(plans[32]):
        sys.exit("prune imported torch or transformers")
    for folder in (OUT, COPY):
        shutil.rmtree(folder)
    return {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    python(BUILD, MODEL)
    found = measure(rounds)
    table = Table(title=f"medians of {rounds} rounds")
    for column in ("run", "wall s", "moving s", "written MB", "peak MB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, run in found.items():
        moving = f"{run['moving']:.2f}" if "moving" in run else ""
        written = run.get("nbytes", found["prune"]["nbytes"])
        table.add_row(name, f"{run['seconds']:.2f}", moving, f"{written / MB:.0f}", f"{run['peak'] / MB:.0f}")
    ours, copy, theirs = found["prune"], found["cp"], found["transformers"]
    lower, all_of_it, linked = (found[name] for name in ("top-k only", "cp, top-k only", "top-k only, linked"))
    growth = (found["prune, keep all"]["peak"] - found["prune, keep 1/4"]["peak"]) / MB
    targets = [
        ("speed of cp + sync, while moving", copy["seconds"] / ours["moving"], ">=", 0.9),
        ("speed of cp + sync, whole process", copy["seconds"] / ours["seconds"], ">=", 0.5),
        ("times faster than transformers", theirs["seconds"] / ours["seconds"], ">=", 5.0),
        ("times less memory than transformers", theirs["peak"] / ours["peak"], ">=", 10.0),
        ("speed of cp + sync, top-k only, while moving", all_of_it["seconds"] / lower["moving"], ">=", 0.9),
        ("times faster than that, linked, while moving", all_of_it["seconds"] / linked["moving"], ">=", 10.0),
        ("times faster than that, linked, whole process", all_of_it["seconds"] / linked["seconds"], ">=", 1.0),
        ("peak MB", ours["peak"] / MB, "<=", 150.0),
        ("peak MB more for four times the experts", growth, "<=", 5.0),
    ]
    console = Console()
    console.print(table)
    missed = False
    for what, value, sign, target in targets:
        met = value >= target if sign == ">=" else value <= target
        missed |= not met
        console.print(f"{value:8.2f}  {what} (target {sign} {target}){'' if met else '  MISSED'}", highlight=False)
    sys.exit(missed)


if __name__ == "__main__":
    main()
