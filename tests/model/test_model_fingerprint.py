"""Fingerprints: the same for every storage format of a model, different for any other model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import read_tensors, tiny_model, write_shards, write_tiny

from expertcut.checkpoint import open_checkpoint
from expertcut.errors import PlanError
from expertcut.model import Fingerprint, check_fingerprint, fingerprint, read_geometry

SKETCH = (0.295485, -0.054529, 1.012651, 0.373509, 0.579759, -0.763501, 1.166191, -0.822361)
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe"]


def of(folder: Path) -> Fingerprint:
    checkpoint = open_checkpoint(folder)
    return fingerprint(checkpoint, read_geometry(checkpoint))


def check(expected: Fingerprint, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    check_fingerprint(expected, checkpoint, read_geometry(checkpoint))


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(name, tmp_path_factory)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return tmp_path


def test_the_sketch_of_a_router_never_changes(tmp_path: Path) -> None:
    """Plans and profiles hold these numbers; they were computed by one product of matrices."""
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 24, "moe_intermediate_size": 4,
        "num_experts": 6, "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    router = torch.arange(6 * 24, dtype=torch.float32).mul(0.7).sin().reshape(6, 24)
    experts = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": torch.zeros(4, 24) for e in range(6)}
    write_shards(tmp_path, {"model.layers.0.mlp.gate.weight": router, **experts})
    assert of(tmp_path).sketch["model.layers.0.mlp"] == pytest.approx(SKETCH, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recast_sibling_is_the_same_model(folder: Path, copy: Path, dtype: torch.dtype) -> None:
    write_shards(copy, {n: t.to(dtype) for n, t in read_tensors(folder).items()}, 10**9)
    check(of(folder), copy)


def test_rounding_to_bfloat16_stays_within_the_tolerance(folder: Path, copy: Path) -> None:
    random = torch.Generator().manual_seed(3)
    fine = {n: t.float() * (1 + 0.3 * torch.rand(t.shape, generator=random)) for n, t in read_tensors(folder).items()}
    write_shards(copy, fine)
    original = of(copy)
    write_shards(copy, {n: t.bfloat16() for n, t in fine.items()})
    rounded = of(copy)
    distance = max(np.abs(np.subtract(original.sketch[p], rounded.sketch[p])).max() for p in original.sketch)
    assert 0 < distance < 0.005
    check(original, copy)


def test_another_seed_is_another_model(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="another model"):
        check(of(folder), write_tiny(tmp_path / "other", name, seed=1))


def test_permuted_experts_are_another_model(folder: Path, copy: Path) -> None:
    """The same function, but ids mean other experts: a plan would keep the wrong ones."""
    tensors = read_tensors(folder)
    block = read_geometry(open_checkpoint(folder)).trunk[-1]
    tensors[block.router] = tensors[block.router].roll(1, dims=0)
    write_shards(copy, tensors)
    with pytest.raises(PlanError, match=block.prefix.replace(".", r"\.")):
        check(of(folder), copy)


def test_two_experts_swapped_are_noticed(folder: Path, copy: Path) -> None:
    tensors = read_tensors(folder)
    block = read_geometry(open_checkpoint(folder)).trunk[0]
    rows = tensors[block.router].clone()
    rows[[0, 1]] = rows[[1, 0]]
    tensors[block.router] = rows
    write_shards(copy, tensors)
    with pytest.raises(PlanError, match="differs"):
        check(of(folder), copy)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_another_top_k_is_another_geometry(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="another geometry"):
        check(of(folder), write_tiny(tmp_path / "other", name, num_experts_per_tok=2))


def test_damaged_fingerprint(folder: Path) -> None:
    found = of(folder)
    short = found.model_copy(update={"sketch": {p: v[:5] for p, v in found.sketch.items()}})
    with pytest.raises(PlanError, match="damaged"):
        check(short, folder)
    fewer = found.model_copy(update={"sketch": dict(list(found.sketch.items())[:-1])})
    with pytest.raises(PlanError, match="damaged"):
        check(fewer, folder)


def test_not_a_number_is_no_match(folder: Path) -> None:
    found = of(folder)
    nan = found.model_copy(update={"sketch": {p: (float("nan"),) * 8 for p in found.sketch}})
    with pytest.raises(PlanError, match="differs"):
        check(nan, folder)
