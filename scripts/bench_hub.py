"""What pruning straight from the Hub transfers: half the experts of a model of 1.7 GB, from the tests' Hub on loopback.

Counted are the bytes of weights that the Hub sent, headers of shards included. The result is compared with a local
prune by the same plan, shard by shard. Prints the bytes; exits 1 if the target is missed or a shard differs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_model
from bench_rewrite import BENCH, MB, MODEL, ROOT
from rich.console import Console

from expertcut.checkpoint import open_checkpoint

sys.path.insert(0, str(ROOT / "tests"))
from hub_server import Hub  # noqa: E402

OVER = 1.01
"""Wanted: bytes sent, but for headers, over the bytes that survive, at most."""
NAME = "org/model"
OUT = BENCH / "hub"


def main() -> None:
    bench_model.build(MODEL)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    plan, command = OUT / "plan.json", [sys.executable, "-m", "expertcut"]
    subprocess.run([*command, "plan", MODEL, "--strategy", "random", "--keep", "0.5", "-o", plan, "--json"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    with tempfile.TemporaryDirectory() as home, Hub() as hub:
        hub.add(NAME, MODEL)
        for source, out, env in ((str(MODEL), "local", None), (NAME, "remote", hub.environment(Path(home)))):
            subprocess.run([*command, "prune", source, OUT / out, "--plan", plan, "--json"], check=True, env=env,
                           stdout=subprocess.DEVNULL)  # fmt: skip
        sent = sum(request.sent for request in hub.log if request.path.startswith("/cdn/"))
    source, made = open_checkpoint(MODEL), open_checkpoint(OUT / "remote")
    headers = sum(source.shards.values()) - source.nbytes
    same = all((OUT / "remote" / s).read_bytes() == (OUT / "local" / s).read_bytes() for s in made.shards)
    ratio = (sent - headers) / made.nbytes
    console = Console(highlight=False)
    for what, nbytes in (("stored", source.nbytes), ("surviving", made.nbytes), ("headers", headers), ("sent", sent)):
        console.print(f"{nbytes / MB:10.2f} MB  {what}")
    missed = "  MISSED" if ratio > OVER else ""
    console.print(f"{ratio:10.4f}     (sent − headers) / surviving (target <= {OVER}){missed}")
    console.print(
        f"{len(made.shards)} shards, {'as pruned locally, byte for byte' if same else 'DIFFERENT from a local prune'}"
    )
    shutil.rmtree(OUT)
    sys.exit(not same or ratio > OVER)


if __name__ == "__main__":
    main()
