"""The machine that an engine runs on, and the memory of its processes: read from /proc and nvidia-smi."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from expertcut.measure.bench import Machine

SETTINGS = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "CUDA_VISIBLE_DEVICES")
PERIOD = 0.2
"""Seconds between two looks at the memory."""


def describe() -> Machine:
    """Describe this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return Machine(
        cpu=names[0] if names else platform.machine(), cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), gpus=tuple(name for name, _ in gpus()),
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
    )  # fmt: skip


def gpus() -> list[tuple[str, int]]:
    """Return name and used bytes of every GPU that nvidia-smi knows; none where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.used", "--format=csv,noheader,nounits"]
    run = subprocess.run(command, capture_output=True, text=True)
    rows = [line.rpartition(",") for line in run.stdout.splitlines()] if run.returncode == 0 else []
    return [(name.strip(), int(used) << 20) for name, _, used in rows if used.strip().isdecimal()]


def tree(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    try:
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has just ended
        return
    for child in (int(child) for children in lists for child in children):
        yield from tree(child)


def group_runs(group: int) -> bool:
    """Return whether a process group has a process that still runs; those that wait to be forgotten hold nothing."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # it has just ended
            continue
        if int(found) == group and state not in "ZX":
            return True
    return False


def held(pid: int) -> int:
    """Bytes that a process and its descendants hold for themselves: anonymous and shared memory, no mapped files."""
    total = 0
    for one in tree(pid):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return total


class Watch:
    """Looks at the memory of a process and its descendants while the block runs; `peak` is the most that was seen."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, held(self._pid))
            if self._over.wait(PERIOD):
                return
