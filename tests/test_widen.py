"""scripts/widen: wider experts, the same function, and nothing else changed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import load, logits
from tiny_models import read_tensors, tiny_model

from expertcut.checkpoint import open_checkpoint
from expertcut.errors import CheckpointError, DestinationError, UsageError
from expertcut.model import read_geometry

FACTOR, SHARD = 5, 60_000
WIDENED = ("qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_5_moe-unfused")
IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def script(repo: Path) -> Any:
    spec = importlib.util.spec_from_file_location("widen", repo / "scripts" / "widen.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def widened(script: Any, source: Path, out: Path) -> Path:
    checkpoint = open_checkpoint(source)
    script.widen(checkpoint, read_geometry(checkpoint), out, FACTOR, SHARD)
    return out


@pytest.mark.parametrize("name", WIDENED)
def test_a_twin_computes_what_its_model_does(
    name: str, script: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tiny_model(name, tmp_path_factory)
    twin = widened(script, source, tmp_path / "twin")
    expected = logits(load(source), IDS)
    torch.testing.assert_close(logits(load(twin), IDS), expected, rtol=0, atol=1e-5 * float(expected.std()))


@pytest.mark.parametrize("name", WIDENED)
def test_a_twin_differs_by_zeros_and_one_number(
    name: str, script: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tiny_model(name, tmp_path_factory)
    twin = widened(script, source, tmp_path / "twin")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, twin))
    scope = before.get("text_config", before)
    width = scope["moe_intermediate_size"]
    scope["moe_intermediate_size"] = FACTOR * width
    assert after == before and list(after) == list(before)
    tensors, found = read_tensors(source), read_tensors(twin)
    assert list(found) == list(tensors) and len(list(twin.glob("*.safetensors"))) > 1
    for tensor_name, tensor in tensors.items():
        wide = found[tensor_name]
        grown = ".experts." in tensor_name or ".shared_experts." in tensor_name
        assert wide.numel() == tensor.numel() * (FACTOR if grown else 1), tensor_name
        kept = wide[tuple(map(slice, tensor.shape))]
        assert torch.equal(kept, tensor) and torch.count_nonzero(wide) == torch.count_nonzero(tensor), tensor_name
    assert (twin / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    assert read_geometry(open_checkpoint(twin)).expert_width == FACTOR * width


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "olmoe", "qwen3_5_moe"])
def test_experts_of_another_kind_are_refused(
    name: str, script: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(CheckpointError):
        widened(script, tiny_model(name, tmp_path_factory), tmp_path / "twin")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_and_one_is_no_factor(script: Any, demo_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DestinationError):
        widened(script, demo_model, tmp_path)
    checkpoint = open_checkpoint(demo_model)
    with pytest.raises(UsageError):
        script.widen(checkpoint, read_geometry(checkpoint), tmp_path / "twin", 1)
    assert list(tmp_path.iterdir()) == []


def test_the_script_says_what_share_of_the_work_is_the_experts(repo: Path, demo_model: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, repo / "scripts/widen.py", demo_model, tmp_path / "twin"]
    run = subprocess.run([*command, "--factor", "2"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.splitlines()
    # 4 layers of 4 experts of 3 matrices 96 × 64; beside them routers, attention, norms and the tied head.
    routed, rest = 4 * 4 * 3 * 96 * 64, 4096 * 96 + 4 * (96 * 32 + 2 * 96 * 128 + 2 * 96 * 64)
    for line, times in ((before, 1), (after, 2)):
        share = float(line.split("routed experts are ")[1].split("%")[0]) / 100
        assert share == pytest.approx(times * routed / (times * routed + rest), abs=0.01)
