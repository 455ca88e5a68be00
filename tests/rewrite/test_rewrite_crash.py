"""Law 5: killed at any point, the destination is whole or untouched, and the same command ends in the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rewrite_models import deepseek, digest, half, large, listing, opened, plan_for

from expertcut.choose import Plan
from expertcut.errors import DestinationError
from expertcut.rewrite import prune
from expertcut.rewrite.journal import open_journal

pytest_plugins = ("sharing",)

HERE = Path(__file__).parent
PARTIAL = ".out.expertcut-partial"
PRUNE = """
import sys
from rewrite_models import opened
from expertcut.choose import Plan
from expertcut.rewrite import prune
prune(*opened(sys.argv[1]), Plan.load(sys.argv[2]), sys.argv[3], max_shard_size=3_000_000)
"""


def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    env = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=env, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, "ended before it began"
        time.sleep(0.0005)


def killed_at_every_call(
    source: Path, plan: Plan, memory: Path, how: str, old: Path | None = None, way: str = "exchange"
) -> list[str]:
    """Kill a run at each of its calls and resume it; what the destination was after each kill."""
    plan.save(memory / "plan.json")
    (memory / "work").mkdir()
    arguments = [source, memory / "plan.json", memory / "work", old or "-", way, how]
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "crash_driver.py"), *map(str, arguments)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert all(rest == ["new", 0, ["out"]] for _, *rest in seen), run.stderr
    states = [killed for killed, *_ in seen]
    allowed = {"new", "old" if old else "absent"} | ({"absent"} if way == "rename" else set())
    assert set(states) <= allowed
    assert states == sorted(states, key=["old", "absent", "new"].index)  # once new, always new
    assert states.count("absent") <= 1 or not old
    return states


@pytest.mark.parametrize("old, way", [(False, "exchange"), (True, "exchange"), (True, "rename")])
def test_killed_at_every_call_and_resumed(old: bool, way: str, memory: Path) -> None:
    ckpt, geometry = opened(deepseek().write(memory / "in"))
    if old:
        prune(ckpt, geometry, plan_for(ckpt, geometry, [range(8)] * 2), memory / "old")
    states = killed_at_every_call(
        ckpt.path, half(ckpt, geometry), memory, "parts", memory / "old" if old else None, way
    )  # fmt: skip
    assert len(states) > 80


@pytest.mark.parametrize("how", ["whole", "link"])
@pytest.mark.parametrize("old, way", [(False, "exchange"), (True, "exchange"), (True, "rename")])
def test_killed_at_every_call_where_shards_are_taken_whole(how: str, old: bool, way: str, memory: Path) -> None:
    """What is replaced shares its shards with the source, too."""
    ckpt, geometry = opened(deepseek().write(memory / "in", fit=True))
    lower = [plan_for(ckpt, geometry, [range(8)] * 2, top_k=k) for k in (1, 2)]
    if old:
        prune(ckpt, geometry, lower[0], memory / "old", link=True)
    states = killed_at_every_call(ckpt.path, lower[1], memory, how, memory / "old" if old else None, way)
    assert len(states) > 40


def test_killed_at_every_call_where_shards_are_cloned(sharing_disk: Path) -> None:
    ckpt, geometry = opened(deepseek().write(sharing_disk / "in", fit=True))
    plan = plan_for(ckpt, geometry, [range(8)] * 2, top_k=1)
    assert prune(ckpt, geometry, plan, sharing_disk / "out").taken == "cloned"
    assert len(killed_at_every_call(ckpt.path, plan, sharing_disk, "whole")) > 40


def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    ckpt, geometry = opened(large().write(tmp_path / "in"))
    plan = half(ckpt, geometry)
    plan.save(tmp_path / "plan.json")
    arguments = (tmp_path / "in", tmp_path / "plan.json", tmp_path / "out")
    process = start(PRUNE, *arguments)
    wait_for(tmp_path / PARTIAL, process)
    begun = time.perf_counter()
    assert process.wait() == 0
    duration = time.perf_counter() - begun
    whole = digest(tmp_path / "out")
    assert len(whole) > 10
    moments = random.Random(0)
    midway = 0
    for number in range(20):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        process = start(PRUNE, *arguments[:2], out)
        wait_for(out.parent / PARTIAL, process)
        time.sleep(moments.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        process.wait()
        midway += not out.exists()
        assert not out.exists() or digest(out) == whole
        if (out.parent / PARTIAL).exists():
            prune(ckpt, geometry, plan, out, max_shard_size=3_000_000)
        assert digest(out) == whole
        assert listing(out.parent) == ["out"]
        shutil.rmtree(out)
    assert midway, "no kill came before the end"


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    ckpt, geometry = opened(deepseek().write(tmp_path / "in"))
    plan = half(ckpt, geometry)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(ckpt, geometry, plan, tmp_path / "out", max_shard_size=700, progress=interrupt)
    assert listing(tmp_path) == [PARTIAL, "in"]
    with open_journal(tmp_path / PARTIAL) as journal:
        finished = dict(journal.finished)
    made = tmp_path / PARTIAL / "checkpoint"
    first = {name: (made / name).stat().st_mtime_ns for name in finished}
    told: list[tuple[int, int]] = []
    result = prune(
        ckpt, geometry, plan, tmp_path / "out", max_shard_size=700, progress=lambda *numbers: told.append(numbers)
    )
    assert finished
    assert result.resumed
    assert first == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    total = told[-1][1]
    assert told[0] == (sum(finished.values()), total)
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert result.nbytes_written == total - told[0][0]
    prune(ckpt, geometry, plan, tmp_path / "fresh", max_shard_size=700)
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def interrupted(tmp_path: Path) -> Path:
    """A source, and an unfinished run beside it."""
    ckpt, geometry = opened(deepseek().write(tmp_path / "in"))

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out", max_shard_size=700, progress=interrupt)
    return tmp_path / "in"


@pytest.mark.parametrize("other", ["plan", "source", "shard size"])
def test_another_run_does_not_go_on_with_it(other: str, tmp_path: Path) -> None:
    source = interrupted(tmp_path)
    if other == "source":
        os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))
    ckpt, geometry = opened(source)
    plan = half(ckpt, geometry)
    if other == "plan":
        plan = plan_for(ckpt, geometry, [(0, 1, 4, 5)] * 2, top_k=2)
    before = digest(tmp_path)
    with pytest.raises(DestinationError, match=f"another {other}$") as caught:
        prune(ckpt, geometry, plan, tmp_path / "out", max_shard_size=800 if other == "shard size" else 700)
    assert f"rm -r {tmp_path / PARTIAL}" in str(caught.value.hint)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[1]\n", b"\xff\n", b'{"schema": "expertcut.journal/2"}\n'])
def test_a_damaged_journal_is_refused(damage: bytes, tmp_path: Path) -> None:
    ckpt, geometry = opened(interrupted(tmp_path))
    (tmp_path / PARTIAL / "journal.jsonl").write_bytes(damage)
    with pytest.raises(DestinationError, match="damaged|holds files but no journal") as caught:
        prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out", max_shard_size=700)
    assert "rm -r" in str(caught.value.hint)
    assert (tmp_path / PARTIAL / "checkpoint").exists()


def test_a_torn_journal_line_counts_for_nothing(tmp_path: Path) -> None:
    ckpt, geometry = opened(interrupted(tmp_path))
    with (tmp_path / PARTIAL / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"shard": "model-0000')
    assert prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out", max_shard_size=700).resumed
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "fresh", max_shard_size=700)
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_two_runs_at_once(tmp_path: Path) -> None:
    ckpt, geometry = opened(large().write(tmp_path / "in"))
    plan = half(ckpt, geometry)
    plan.save(tmp_path / "plan.json")
    process = start(PRUNE, tmp_path / "in", tmp_path / "plan.json", tmp_path / "out")
    wait_for(tmp_path / PARTIAL / "checkpoint", process)
    process.send_signal(signal.SIGSTOP)
    try:
        assert not (tmp_path / "out").exists()
        with pytest.raises(DestinationError, match="another run is writing there"):
            prune(ckpt, geometry, plan, tmp_path / "out", max_shard_size=3_000_000)
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    prune(ckpt, geometry, plan, tmp_path / "alone", max_shard_size=3_000_000)
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")
