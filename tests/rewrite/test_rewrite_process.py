"""The whole process: no torch, little memory that does not grow with the data, and huge layouts at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_names import golden
from rewrite_models import half, large, opened, plan_for

from expertcut.choose import LayerPlan, Plan, Source
from expertcut.model import Fingerprint, read_geometry
from expertcut.rewrite import plan_layout

WORK = """
import json, sys
from expertcut.checkpoint import open_checkpoint
from expertcut.choose.plan import Plan
from expertcut.model import read_geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure
ckpt = open_checkpoint(sys.argv[1])
prune(ckpt, read_geometry(ckpt), Plan.load(sys.argv[2]), sys.argv[3])
require(verify_structure(sys.argv[3], ckpt) + verify_bytes(sys.argv[3], ckpt))
modules = sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"modules": modules, "peak": int(peak) / 1000}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")
def test_no_torch_and_little_memory(repo: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(large().write(tmp_path / "in"))
    peaks = {}
    for name, plan in (("one", plan_for(ckpt, geometry, [(3,)] * 2, top_k=1)), ("half", half(ckpt, geometry))):
        plan.save(tmp_path / f"{name}.json")
        command = [sys.executable, "-c", WORK, str(ckpt.path), str(tmp_path / f"{name}.json"), str(tmp_path / name)]
        env = os.environ | {"PYTHONPATH": str(repo)}
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        told = json.loads(run.stdout)
        assert told["modules"] == []
        peaks[name] = told["peak"]
    assert max(peaks.values()) < 100  # MB; the source alone has 90
    assert peaks["half"] < peaks["one"] + 5


def test_the_layout_of_a_model_of_ninety_thousand_tensors() -> None:
    ckpt = golden("deepseek-v3").checkpoint()
    assert len(ckpt.tensors) > 90_000
    geometry = read_geometry(ckpt)
    kept = tuple(range(0, 256, 2))
    layers = {block.prefix: LayerPlan(layer=block.layer, kept=kept) for block in geometry.trunk}
    plan = Plan(source=Source(name="x", fingerprint=Fingerprint(geometry="", sketch={})), layers=layers)
    started = time.process_time()
    layout = plan_layout(ckpt, geometry, plan)
    assert time.process_time() - started < 3
    assert (layout.experts, layout.top_k) == (128, 8)
    experts = sum(expert.nbytes for expert in ckpt.tensors.values() if ".mlp.experts." in expert.name)
    routers = sum(t.nbytes for t in ckpt.tensors.values() if ".mlp.gate." in t.name)
    assert layout.nbytes == ckpt.nbytes - (experts + routers) // 2
    assert all(shard.nbytes - len(shard.header) <= 5 * 10**9 for shard in layout.shards)
    assert layout.in_memory < routers  # nothing else has short rows
    assert sum(1 for shard in layout.shards for _ in shard.steps()) < 60_000
