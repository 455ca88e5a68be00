"""Laws 1 to 4 for every quantised format: scales, zero points, packed shapes follow their expert. And plans travel."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_models import Model
from quantised_models import FORMATS, every_format, quantised_pair
from safetensors.torch import save_file
from tiny_models import NAMES, Tensors, read_tensors, silent, tiny_model, tokens, write_shards, write_tiny

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan
from expertcut.choose.plan import kept_by_block
from expertcut.errors import ConfigConflictError, PlanError, UnknownTensorError
from expertcut.measure.numeric import verify_numeric
from expertcut.model import check_fingerprint, read_geometry
from expertcut.rewrite import plan_layout, prune, require, verify_bytes, verify_structure
from expertcut.rewrite.config import edit_config
from expertcut.rewrite.quantization import quantization_edits

DATA = tokens((30, 30), seed=11)


@pytest.fixture(params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_pair(request.param, tmp_path_factory)[0]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same dtype, shape and bytes."""
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    return alike and one.equal(other)


def left_of(tensors: Tensors, plan: Plan) -> Tensors:
    """What a plan leaves, told by names alone: experts renumbered, routers and stacked experts by rows."""
    kept = {entry.layer: list(entry.kept) for entry in plan.layers.values()}
    left: Tensors = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"(.*layers\.(\d+)\.mlp\.)(experts|gate|router)\.(?:(\d+)\.)?(.*)", name)
        ids = kept.get(int(place[2]), kept[max(kept)]) if place else []
        if place and place[4]:
            if int(place[4]) in ids:
                left[f"{place[1]}experts.{ids.index(int(place[4]))}.{place[5]}"] = tensor
        else:
            left[name] = tensor[torch.tensor(ids)] if place and ids else tensor
    return left


def check(model: Model, plan: Plan, out: Path, max_shard_size: int) -> None:
    prune(model.checkpoint, model.geometry, plan, out, max_shard_size=max_shard_size)
    expected, found = left_of(read_tensors(model.folder), plan), read_tensors(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same(found[name], expected[name])] == []
    require(verify_structure(out, model.checkpoint) + verify_bytes(out, model.checkpoint))


def test_law_1_the_identity_plan_keeps_every_byte(folder: Path, tmp_path: Path) -> None:
    model = Model(folder)
    check(model, model.plan(range(model.geometry.num_experts)), tmp_path / "out", 20_000)
    assert json.loads((tmp_path / "out/config.json").read_text()) == model.checkpoint.config


def test_law_2_kept_experts_keep_their_bytes(folder: Path, tmp_path: Path) -> None:
    model = Model(folder)
    check(model, model.random_plan(1), tmp_path / "out", 20_000)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == model.checkpoint.config["quantization_config"]


@pytest.mark.parametrize("name", NAMES)
def test_entries_for_every_expert_become_those_of_every_expert_left(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In every family: whole names as they are on disk, in prediction layers too."""
    model = Model(tiny_model(name, tmp_path_factory))
    plan = model.random_plan(2)

    def modules(names: Iterable[str]) -> list[str]:
        return sorted({name.rpartition(".")[0] for name in names if re.search(r"\.experts\.\d+\.", name)})

    config = {"quantization_config": {"ignore": modules(model.geometry.roles)}}
    edits = quantization_edits(config, model.geometry, kept_by_block(plan, model.geometry))
    shards = plan_layout(model.checkpoint, model.geometry, plan).shards
    left = [tensor.name for shard in shards for tensor in shard.tensors]
    assert sorted(edit_config(config, edits)["quantization_config"]["ignore"]) == modules(left)


@settings(max_examples=40)
@given(st.sampled_from(list(FORMATS)), st.integers(500, 60_000), st.integers(0, 999))
def test_law_2_wherever_shards_part(tmp_path_factory: pytest.TempPathFactory, name: str, size: int, seed: int) -> None:
    """Borders of shards may lie between a weight and its scales, before and after."""
    model = Model(quantised_pair(name, tmp_path_factory)[0])
    with TemporaryDirectory() as out:
        check(model, model.random_plan(seed), Path(out, "out"), size)


def test_law_3_pruned_computes_what_the_narrowed_source_does(folder: Path, tmp_path: Path) -> None:
    model = Model(folder)
    plan = model.random_plan(3)
    prune(model.checkpoint, model.geometry, plan, tmp_path / "out", max_shard_size=50_000)
    written = open_checkpoint(tmp_path / "out")
    require(verify_numeric(written, model.checkpoint, plan, DATA, device="cpu", notify=print, advance=silent))


@pytest.mark.parametrize("part", ["experts_scale", "experts.gate_up_proj_zero_points", "gate.weight_scale"])
def test_law_4_an_unknown_expert_sized_tensor_stops_the_run(part: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "in")
    block = Model(folder).geometry.trunk[-1].prefix
    name = f"{block}.{part}"
    experts = Model(folder).geometry.num_experts
    save_file({name: torch.ones(3, experts)}, tmp_path / "in/planted.safetensors", {"format": "pt"})
    index = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())
    index["weight_map"][name] = "planted.safetensors"
    (tmp_path / "in/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((UnknownTensorError, ConfigConflictError), match=re.escape(name)):
        read_geometry(open_checkpoint(tmp_path / "in"))


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plans_travel(name: str, dtype: torch.dtype, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """From the unquantised model to any of its quantised siblings and back, whatever its routers are stored in."""
    folder, twin = quantised_pair(name, tmp_path_factory)
    (tmp_path / "config.json").write_bytes((twin / "config.json").read_bytes())
    write_shards(tmp_path, {n: t.to(dtype) for n, t in read_tensors(twin).items()}, 10**9)
    plain, quantised = Model(tmp_path), Model(folder)
    assert "quantization_config" not in plain.checkpoint.config
    for source, target in ((plain, quantised), (quantised, plain)):
        plan = source.random_plan(5)
        check_fingerprint(plan.source.fingerprint, target.checkpoint, target.geometry)
    check(quantised, plain.random_plan(5), tmp_path / "out", 50_000)


def test_plans_of_strangers_do_not(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Same family, same sizes, other weights; or other sizes. The error says what was compared."""
    form = FORMATS["INT4"]
    quantised = Model(quantised_pair("INT4", tmp_path_factory)[0])
    for words, overrides, seed in (
        (("router model.layers.0.mlp.gate.weight", "8 numbers", "tolerance 0.02"), form.overrides, 1),
        (("experts of width 64", "top-3", "hidden size 32"), {"moe_intermediate_size": 32}, 0),
    ):
        stranger = Model(write_tiny(tmp_path / str(seed), form.model, seed, **overrides))
        with pytest.raises(PlanError) as caught:
            plan = stranger.random_plan()
            prune(quantised.checkpoint, quantised.geometry, plan, tmp_path / "out")
        assert all(word in caught.value.message for word in words), caught.value.message


POWERS_OF_TWO = {"MXFP8", "MXFP4", "MXFP4, stacked", "FP4 of DeepSeek"}
"""Formats whose scales can hold no gain."""


@every_format
def test_a_gain_goes_into_the_outermost_scales(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No code changes; what is read is the gain times what was; law 3 holds, dropped experts and rounding included."""
    folder, _ = quantised_pair(name, tmp_path_factory)
    model = Model(folder)
    plan = model.random_plan(3)
    first, *others = plan.layers
    for gain in (0.5, 0.8):
        layers = plan.layers | {first: plan.layers[first].model_copy(update={"gain": gain})}
        gained, out = plan.model_copy(update={"layers": layers}), tmp_path / str(gain)
        if name in POWERS_OF_TWO:
            with pytest.raises(PlanError, match="which holds no gain"):
                prune(model.checkpoint, model.geometry, gained, out)
            assert not out.exists()
            continue
        prune(model.checkpoint, model.geometry, gained, out, max_shard_size=50_000)
        require(verify_structure(out, model.checkpoint) + verify_bytes(out, model.checkpoint))
        written, expected = read_tensors(out), left_of(read_tensors(folder), plan)
        changed = [n for n in expected if not same(written[n], expected[n])]
        assert changed and all("scale" in n and "down_proj" in n and n.startswith(first) for n in changed)
        if gain == 0.5:
            assert all(same(written[n].float(), expected[n].float() * (2 if "global" in n else 0.5)) for n in changed)
        checks = verify_numeric(
            open_checkpoint(out), model.checkpoint, gained, DATA, device="cpu", notify=print, advance=silent
        )
        require(checks)
