"""Runs a process to its end and watches the memory of it and its children."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PERIOD = 0.01
"""Seconds between two looks."""


@dataclass(frozen=True)
class Run:
    """One process, from start to end."""

    seconds: float
    anon: int
    """Peak of anonymous memory, bytes."""
    rss: int
    """Peak of resident memory, mapped files included, bytes."""
    told: dict[str, Any]
    """The last line that it printed, JSON."""


def watch(log: Path, *command: str | Path) -> Run:
    """Run a process; its standard error and output go to `log`. Exits if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as out:
        started = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=environment)
        anon = rss = 0
        while process.poll() is None:
            memory = [resident(pid) for pid in tree(process.pid)]
            anon, rss = max(anon, sum(a for a, _ in memory)), max(rss, sum(r for _, r in memory))
            time.sleep(PERIOD)
        seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed with {process.returncode}; its output is in {log}")
    return Run(seconds, anon, rss, json.loads(log.read_text().splitlines()[-1]))


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(one for children in lists for child in children for one in tree(int(child)))]


def resident(pid: int | str = "self") -> tuple[int, int]:
    """Anonymous and all resident bytes of a process, 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return tuple(int(sizes.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
