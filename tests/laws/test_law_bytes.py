"""Laws 1, 2, 4 and 7: what is kept keeps its bytes, what is unknown stops the run, groups stay equal."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from law_models import MODELS, Model, open_model
from safetensors.torch import save_file
from tiny_models import Tensors, read_tensors

from expertcut.checkpoint import load_json, open_checkpoint
from expertcut.choose import Plan, make_plan, validate
from expertcut.errors import PlanError, UnknownTensorError
from expertcut.model import read_geometry
from expertcut.rewrite import prune, verify_bytes, verify_structure

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Model:
    return open_model(request.param, tmp_path_factory, demo_model)


def write(model: Model, plan: Plan, out: Path, max_shard_size: int = 60_000) -> Path:
    size = max(max_shard_size, model.checkpoint.nbytes // 6)
    prune(model.checkpoint, model.geometry, plan, out, max_shard_size=size)
    return out


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same dtype, shape and bytes (not values: −0 is not 0, and not-a-number is itself)."""
    same = found.dtype == expected.dtype and found.shape == expected.shape
    return same and found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))


def sliced_by_hand(tensors: Tensors, kept: dict[int, tuple[int, ...]], last: int) -> Tensors:
    """The tensors that must be left, told by their names alone; `kept` by layer, `last` the trunk's last MoE layer."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        where = re.search(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(.*)", name)
        layer = int(where[1]) if where and not name.startswith("mtp.") else last
        ids = kept.get(layer, kept[last])
        numbered = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        if numbered:
            if int(numbered[2]) in ids:
                out[f"{numbered[1]}{ids.index(int(numbered[2]))}{numbered[3]}"] = tensor
        elif where and where[2].split(".")[0] in ("experts", "gate", "router"):
            out[name] = tensor[list(ids)]
        else:
            out[name] = tensor
    return out


def by_layer(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {entry.layer: entry.kept for entry in plan.layers.values()}


def test_law_1_identity_plan_keeps_every_byte(model: Model, tmp_path: Path) -> None:
    out = write(model, model.plan(range(model.geometry.num_experts)), tmp_path / "out")
    source, found = read_tensors(model.folder), read_tensors(out)
    assert set(found) == set(source)
    assert all(equal(found[name], source[name]) for name in source)
    assert load_json(out / "config.json") == model.checkpoint.config
    for name in model.checkpoint.companions:
        assert (out / name).read_bytes() == (model.folder / name).read_bytes()


@pytest.mark.parametrize("seed", [1, 2])
def test_law_2_kept_experts_keep_their_bytes(model: Model, seed: int, tmp_path: Path) -> None:
    plan = model.random_plan(seed)
    out = write(model, plan, tmp_path / "out")
    last = model.geometry.trunk[-1].layer
    expected, found = sliced_by_hand(read_tensors(model.folder), by_layer(plan), last), read_tensors(out)
    assert set(found) == set(expected)
    assert [name for name in expected if not equal(found[name], expected[name])] == []
    checks = [*verify_structure(out, model.checkpoint), *verify_bytes(out, model.checkpoint)]
    assert [check for check in checks if not check.ok] == []


def test_law_2_config_changes_where_it_must_and_nowhere_else(model: Model, tmp_path: Path) -> None:
    top_k = model.geometry.top_k - 1
    out = write(model, model.random_plan(1, top_k=top_k), tmp_path / "out")
    expected: Any = json.loads((model.folder / "config.json").read_text())
    scope = expected.get("text_config", expected)
    counts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in scope]
    chosen = [key for key in ("num_experts_per_tok", "experts_per_token") if key in scope]
    assert counts and chosen
    scope.update(dict.fromkeys(counts, model.fewer) | dict.fromkeys(chosen, top_k))
    found = json.loads((out / "config.json").read_text())
    assert json.dumps(found) == json.dumps(expected)  # the order of keys as well
    geometry = read_geometry(open_checkpoint(out))
    assert (geometry.num_experts, geometry.top_k) == (model.fewer, top_k)
    assert list(geometry.blocks) == list(model.geometry.blocks)


def test_law_4_unknown_expert_sized_tensor_stops_the_run(model: Model, tmp_path: Path) -> None:
    experts, block = model.geometry.num_experts, model.geometry.trunk[-1]
    folder = tmp_path / "model"
    shutil.copytree(model.folder, folder, copy_function=shutil.copyfile)
    index = load_json(folder / INDEX)
    for name, shape in ((f"{block.prefix}.mystery", (experts,)), (f"{block.prefix}.later.scale", (3, experts, 2))):
        save_file({name: torch.ones(shape)}, folder / "model-extra.safetensors", {"format": "pt"})
        weight_map = index["weight_map"] | {name: "model-extra.safetensors"}
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(UnknownTensorError) as caught:
            write(Model(folder), model.random_plan(), tmp_path / "out")
        assert name in caught.value.message and str(experts) in caught.value.message
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_law_7_grouped_routing_keeps_equal_numbers_per_group(model: Model, tmp_path: Path) -> None:
    geometry = model.geometry
    if geometry.n_group == 1:
        validate(model.plan(range(model.fewer)), geometry)  # any will do
        return
    size = geometry.num_experts // geometry.n_group
    for strategy in ("random", "router-norm", "odd", "even", "first", "last"):
        for seed in range(3 if strategy == "random" else 1):
            plan = make_plan(model.checkpoint, geometry, strategy=strategy, experts=model.fewer, seed=seed)
            for entry in plan.layers.values():
                numbers = [sum(e // size == group for e in entry.kept) for group in range(geometry.n_group)]
                assert numbers == [model.fewer // geometry.n_group] * geometry.n_group
    uneven = model.plan(range(model.fewer))
    with pytest.raises(PlanError, match="equal numbers in all"):
        write(model, uneven, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
