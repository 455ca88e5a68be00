"""The command line on the largest published checkpoints, at full size: sparse files, true headers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sparse
from golden_names import golden

RUN = """
import sys
from expertcut.cli import run
code = run(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, *sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")
@pytest.mark.parametrize(
    ("name", "tensors", "shards"), [("deepseek-v3", 91991, 163), ("kimi-k2", 139644, 61), ("qwen3-235b", 36945, 118)]
)
def test_huge_checkpoints_are_planned_and_laid_out_in_little_memory(
    name: str, tensors: int, shards: int, repo: Path, tmp_path: Path
) -> None:
    source = sparse.write(golden(name), tmp_path / "in")
    assert len(list(source.glob("*.safetensors"))) == shards
    size = sum(path.stat().st_size for path in source.iterdir())
    assert size > 450e9 and sum(path.stat().st_blocks * 512 for path in source.iterdir()) < 100e6
    arguments = ("prune", source, tmp_path / "out", "--strategy", "router-norm", "--keep", "0.5", "--dry-run", "--json")
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(repo)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told, (peak, *imported) = json.loads(run.stdout), run.stderr.splitlines()[-1].split()
    assert imported == [] and int(peak) < 600_000  # kB
    experts = golden(name).expected.experts
    assert told["experts"] == {"before": experts, "after": experts // 2}
    assert told["nbytes"]["before"] == sum(map(sparse.nbytes, golden(name).expand()))
    assert 0.5 < told["nbytes"]["after"] / told["nbytes"]["before"] < 0.54
    assert [(edit["old"], edit["new"]) for edit in told["config"]] == [(experts, experts // 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    warned = [line for line in run.stderr.splitlines() if line.startswith("warning: ") and "GiB needed" in line]
    assert len(warned) == (told["bytes_to_write"] > shutil.disk_usage(tmp_path).free)
