"""Kills a rewrite at every one of its system calls that change the disk, then resumes it. Run as a process of its own.

    python crash_driver.py SOURCE PLAN FOLDER OLD exchange|rename parts|whole|link

OLD is a checkpoint that is in place before and replaced with force, or `-`. Shards are written from parts, taken over
whole where the plan allows it, or linked. The children are forks that end without any clean-up at the N-th call, for
every N until one survives. Prints as JSON what was seen: for each N the destination right after the kill (`absent`,
`old`, `new`, `other`), and after the resumption (`new`, and nothing else in FOLDER). Fails if the source or
OLD, whose files are linked into place, changes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewrite_models import digest, opened

from expertcut.choose import Plan
from expertcut.rewrite import kernel, prune, whole

CALLS = (
    "fsync", "fdatasync", "mkdir", "unlink", "rmdir", "pwrite", "write", "rename", "ftruncate", "copy_file_range",
    "link",
)  # fmt: skip


def die_at(number: int) -> None:
    """End this process in place of its N-th call."""
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return call(*args, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    kernel._call = counted(kernel._call)
    setattr(whole, "clone", counted(kernel.clone))  # noqa: B010


def in_child(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # a fork must not go on as its parent
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    source, folder, old, way = Path(sys.argv[1]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]
    plan = Plan.load(sys.argv[2])
    if way == "rename":
        kernel._EXCHANGE = 1 << 30  # a flag that no system knows
    ways: dict[str, dict[str, Any]] = {"parts": {"max_shard_size": 1500}, "whole": {}, "link": {"link": True}}
    shards = ways[sys.argv[6]]
    ckpt, geometry = opened(source)
    untouched = digest(source)
    before = digest(Path(old)) if old != "-" else None
    out = folder / "out"

    def run() -> None:
        prune(ckpt, geometry, plan, out, **shards, force=before is not None)

    def state() -> str:
        if not out.exists():
            return "absent"
        found = digest(out)
        return "new" if found == after else "old" if found == before else "other"

    run_once = folder / "once"
    prune(ckpt, geometry, plan, run_once, **shards)
    after = digest(run_once)
    shutil.rmtree(run_once)
    seen = []
    for number in range(1, 10_000):
        shutil.rmtree(folder)
        folder.mkdir()
        if before is not None:
            shutil.copytree(old, out, copy_function=os.link)

        def crash(number: int = number) -> None:
            die_at(number)
            run()

        survived = in_child(crash) == 0
        killed = state()
        resumed = in_child(run) if killed != "new" or (folder / ".out.expertcut-partial").exists() else 0
        seen.append([killed, state(), resumed, sorted(path.name for path in folder.iterdir())])
        assert digest(source) == untouched and (before is None or digest(Path(old)) == before), number
        if survived:
            break
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
