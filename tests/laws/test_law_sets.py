"""Two sets of experts under one count, Ernie-VL's for text and for images, with the Hub's config and transformers'."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from law_models import Model
from reference import profile
from tiny_models import Tensors, read_tensors, silent, tokens
from tiny_types import tiny_type

from expertcut.calibrate.legacy import modern
from expertcut.calibrate.profile import Profile
from expertcut.choose import Plan, make_plan
from expertcut.choose.plan import kept_by_block
from expertcut.cli import run
from expertcut.errors import ConfigConflictError, PlanError, UnknownTensorError, UsageError
from expertcut.measure.numeric import verify_numeric
from expertcut.model import check_fingerprint, geometry_hash, read_geometry
from expertcut.model.summary import nbytes_with, summarise
from expertcut.rewrite import prune, require, verify_bytes, verify_structure
from expertcut.rewrite.config import edit_config
from expertcut.rewrite.quantization import quantization_edits

E = 8
DATA = tokens((9, 14, 11), seed=8)
PREFIX = "model.layers.1.mlp"
HUB: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_moe_vl",
    "torch_dtype": "float32", "hidden_size": 32, "intermediate_size": 40, "vocab_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "freq_allocation": 2, "use_bias": False, "tie_word_embeddings": True, "moe_capacity": [16, 16, 16], "moe_k": 2,
    "moe_num_experts": [8, 8], "moe_intermediate_size": [24, 12], "moe_num_shared_experts": 2, "moe_layer_interval": 1,
    "moe_layer_start_index": [1, 1], "moe_layer_end_index": [29, 28], "vision_config": {"depth": 2, "embed_dim": 32},
}  # fmt: skip
"""The keys of baidu/ERNIE-4.5-VL-28B-A3B-PT, made small: text at the top, a list where text and images differ."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_type("ernie4_5_vl_moe", tmp_path_factory))


@pytest.fixture(scope="module")
def hub(saved: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(saved.folder, folder)
    (folder / "config.json").write_text(json.dumps(HUB, indent=2) + "\n")
    return Model(folder)


@pytest.fixture(scope="module")
def profiled(hub: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    profile(hub.folder, DATA, folder)
    return folder


@pytest.fixture(scope="module")
def observed(profiled: Path) -> Profile:
    return Profile.load(profiled)


def left_of(tensors: Tensors, plan: Plan) -> Tensors:
    """What a plan leaves, told by names alone: one list of experts, text's first, and both sets' routers by columns."""
    left: Tensors = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"(model\.layers\.[12]\.mlp)\.(experts\.(\d+)\.|gate\.|moe_statics\.)(.*)", name)
        if not place:
            left[name] = tensor
            continue
        sets = [list(plan.layers[key].kept) for key in (place[1], f"{place[1]}.vision_moe")]
        numbers = sets[0] + [E + e for e in sets[1]]
        if place[3]:
            if int(place[3]) in numbers:
                left[f"{place[1]}.experts.{numbers.index(int(place[3]))}.{place[4]}"] = tensor
        elif place[4].startswith("weight"):
            left[name] = tensor[:, sets[place[4] == "weight_1"]]
        else:
            left[name] = torch.stack([row[ids] for row, ids in zip(tensor, sets, strict=True)])
    return left


@pytest.mark.parametrize("size", [5_000, 10**9])
@pytest.mark.parametrize("experts", [3, 5, 8])
def test_laws_1_and_2_every_byte_and_every_name(experts: int, size: int, hub: Model, tmp_path: Path) -> None:
    plan = make_plan(hub.checkpoint, hub.geometry, strategy="random", experts=experts, seed=experts)
    assert experts == E or plan.layers[PREFIX].kept != plan.layers[f"{PREFIX}.vision_moe"].kept
    prune(hub.checkpoint, hub.geometry, plan, tmp_path / "out", max_shard_size=size)
    expected, found = left_of(read_tensors(hub.folder), plan), read_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []
    require(verify_structure(tmp_path / "out", hub.checkpoint) + verify_bytes(tmp_path / "out", hub.checkpoint))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == HUB | {"moe_num_experts": [experts, experts]}


def test_law_3_in_the_layout_of_the_hub(hub: Model, tmp_path: Path) -> None:
    """The numbers that transformers reads from `text_config` come from the top."""
    plan = hub.random_plan(seed=4, top_k=1)
    prune(hub.checkpoint, hub.geometry, plan, tmp_path / "out")
    written = Model(tmp_path / "out")
    require(verify_numeric(written.checkpoint, hub.checkpoint, plan, DATA, device="cpu", notify=silent, advance=silent))


def test_a_changed_byte_of_either_row_is_found(hub: Model, tmp_path: Path) -> None:
    prune(hub.checkpoint, hub.geometry, hub.random_plan(), tmp_path / "out")
    name = f"{PREFIX}.moe_statics.e_score_correction_bias"
    tensor = Model(tmp_path / "out").checkpoint.tensors[name]
    for place in (tensor.start, tensor.end - 1):
        with (tmp_path / "out" / tensor.shard).open("r+b") as file:
            file.seek(place)
            old = file.read(1)[0]
            file.seek(place)
            file.write(bytes([old ^ 1]))
        failed = [c for c in verify_bytes(tmp_path / "out", hub.checkpoint) if not c.ok]
        assert len(failed) == 1 and name in failed[0].detail
        with (tmp_path / "out" / tensor.shard).open("r+b") as file:
            file.seek(place)
            file.write(bytes([old]))


def test_law_4_and_what_does_not_fit_together(hub: Model) -> None:
    tensors = hub.checkpoint.tensors
    bias = f"{PREFIX}.moe_statics.e_score_correction_bias"

    def stopped(error: type[Exception], match: str, **changed: Sequence[int] | None) -> None:
        names = {key.replace("__", "."): shape for key, shape in changed.items()}
        found = dict(tensors)
        for name, shape in names.items():
            old = found.pop(f"{PREFIX}.{name}", tensors[bias])
            if shape is not None:
                found[f"{PREFIX}.{name}"] = replace(old, name=f"{PREFIX}.{name}", shape=tuple(shape))
        with pytest.raises(error, match=match):
            read_geometry(replace(hub.checkpoint, tensors=found))

    stopped(UnknownTensorError, r"mlp.gate.weight_2: shape \[8, 3\] has an axis as long", gate__weight_2=(8, 3))
    stopped(ConfigConflictError, "gate.weight_1 is missing: .* one router only", gate__weight_1=None)
    stopped(
        ConfigConflictError, r"gate.weight_1: shape \[32, 6\], expected .* 8 experts on axis 1", gate__weight_1=(32, 6)
    )
    stopped(
        ConfigConflictError, r"bias: shape \[1, 8\], expected \[2, 8\]", moe_statics__e_score_correction_bias=(1, 8)
    )
    stopped(
        ConfigConflictError, r"experts.15.up_proj.weight is missing: found 15 of 16", experts__15__up_proj__weight=None
    )
    stopped(ConfigConflictError, "expert 16, but the config counts 8", experts__16__up_proj__weight=(12, 32))


def test_law_6_a_profile_is_the_same_in_either_layout_and_knows_text_only(
    hub: Model, saved: Model, observed: Profile, tmp_path: Path
) -> None:
    assert geometry_hash(hub.geometry) == geometry_hash(saved.geometry)
    check_fingerprint(observed.meta.fingerprint, saved.checkpoint, saved.geometry)
    assert observed.prefixes == ["model.layers.1.mlp", "model.layers.2.mlp"]
    other = profile(saved.folder, DATA, tmp_path / "profile")
    for name, values in other.arrays.items():
        np.testing.assert_array_equal(observed.arrays[name], values, err_msg=name)


def test_text_ranks_its_experts_and_the_router_those_for_images(hub: Model, observed: Profile) -> None:
    plan = make_plan(hub.checkpoint, hub.geometry, strategy="frequency", experts=3, profile=observed)
    assert "chosen by router-norm: no profile knows them" in str(plan.provenance["budget"])
    tensors = read_tensors(hub.folder)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp"
        busiest = np.argsort(-observed.layer(prefix).count, kind="stable")[:3]
        longest = tensors[f"{prefix}.gate.weight_1"].double().norm(dim=0).topk(3).indices
        assert plan.layers[prefix].kept == tuple(sorted(busiest.tolist()))
        assert plan.layers[f"{prefix}.vision_moe"].kept == tuple(sorted(longest.tolist()))
    norms = make_plan(hub.checkpoint, hub.geometry, strategy="router-norm", experts=3)
    assert norms.layers[f"{PREFIX}.vision_moe"] == plan.layers[f"{PREFIX}.vision_moe"]
    longest = tensors[f"{PREFIX}.gate.weight"].double().norm(dim=0).topk(3).indices
    assert norms.layers[PREFIX].kept == tuple(sorted(longest.tolist()))
    assert "router-norm" not in str(norms.provenance["budget"])


def test_what_users_are_told(hub: Model, profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    options = ["--profile", str(profiled), "--strategy", "reap", "--experts", "3", "-o", str(plan)]
    assert run(["plan", str(hub.folder), *options]) == 0
    assert "those that text does not use are chosen by router-norm: no profile knows them" in capsys.readouterr().out
    assert run(["show", "-v", str(plan)]) == 0
    shown = capsys.readouterr().out
    assert all(f"{layer} {name} " in shown for layer in (1, 2) for name in ("mlp", "vision_moe"))
    assert re.search(r"layers +1-2\s", shown)


def test_sizes_count_both_sets_and_a_token_of_text_uses_the_first(hub: Model, tmp_path: Path) -> None:
    facts = summarise(hub.checkpoint, hub.geometry)
    text, images, rows = 3 * 32 * 24, 3 * 32 * 12, 2 * (32 + 1)
    assert (facts.experts, facts.expert_width) == (8, 24)
    assert facts.nbytes_per_expert == 2 * 4 * (text + images + rows)
    assert facts.parameters is not None
    assert facts.activated == facts.parameters - 2 * (6 * (text + rows) + 8 * images)
    prune(hub.checkpoint, hub.geometry, hub.random_plan(), tmp_path / "out")
    assert Model(tmp_path / "out").checkpoint.nbytes == nbytes_with(hub.checkpoint, hub.geometry, hub.fewer)


@pytest.mark.parametrize(
    ("changed", "layers", "shared"),
    [({}, "dss", 2), ({"moe_layer_start_index": 2, "moe_num_shared_experts": None}, "dds", 0),
     ({"moe_layer_end_index": [1, 1]}, "dsd", 2), ({"moe_layer_interval": 2}, "dsd", 2)],
)  # fmt: skip
def test_published_configs_become_transformers(changed: dict[str, Any], layers: str, shared: int) -> None:
    """The largest one has a number where the others have lists, and leaves out what is 0."""
    text = modern(HUB | changed)["text_config"]
    assert "".join(kind[0] for kind in text["mlp_layer_types"]) == layers
    assert (text["moe_num_experts"], text["moe_num_shared_experts"]) == (8, shared)
    published = HUB | {"hidden_size": 2560, "num_attention_heads": 20, "freq_allocation": 20}
    assert modern(published)["text_config"]["rope_parameters"]["mrope_section"] == [22, 22, 20]
    assert modern(modern(HUB)) == modern(HUB)


def test_experts_are_protected_by_their_numbers_on_disk(hub: Model) -> None:
    plan = make_plan(hub.checkpoint, hub.geometry, strategy="first", experts=3, protect=["15", "2:6,12"])
    kept = {prefix: entry.kept for prefix, entry in plan.layers.items()}
    assert kept == {
        "model.layers.1.mlp": (0, 1, 2), "model.layers.1.mlp.vision_moe": (0, 1, 7),
        "model.layers.2.mlp": (0, 1, 6), "model.layers.2.mlp.vision_moe": (0, 4, 7),
    }  # fmt: skip
    with pytest.raises(UsageError, match="expert 16, but ids end at 15"):
        make_plan(hub.checkpoint, hub.geometry, strategy="first", experts=3, protect=["16"])


def test_plans_name_both_sets_and_keep_equally_many(hub: Model, tmp_path: Path) -> None:
    """vLLM and transformers take one count for both."""
    plan = hub.random_plan()
    second = plan.layers[f"{PREFIX}.vision_moe"]
    one = plan.model_copy(update={"layers": {k: v for k, v in plan.layers.items() if v is not second}})
    more = second.model_copy(update={"kept": tuple(range(E))})
    unequal = plan.model_copy(update={"layers": plan.layers | {f"{PREFIX}.vision_moe": more}})
    for broken, match in (
        (one, "the plan lacks model.layers.1.mlp.vision_moe"),
        (unequal, "keeps 8 experts, expected 5"),
    ):
        with pytest.raises(PlanError, match=match):
            prune(hub.checkpoint, hub.geometry, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantisation_entries_follow_experts_of_both_sets(hub: Model) -> None:
    plan = hub.random_plan(seed=2)
    kept = kept_by_block(plan, hub.geometry)
    numbers = [*kept[PREFIX], *(E + e for e in kept[f"{PREFIX}.vision_moe"])]
    named = [f"{PREFIX}.experts.{e}.up_proj" for e in range(2 * E)]
    pattern = r"re:model\.layers\.1\.mlp\.experts\.(?:[89]|1\d)\.down_proj$"
    config = {"quantization_config": {"ignore": [*named, pattern]}}
    new = edit_config(config, quantization_edits(config, hub.geometry, kept))["quantization_config"]["ignore"]
    assert new[: len(numbers)] == [f"{PREFIX}.experts.{i}.up_proj" for i in range(len(numbers))]
    (rest,) = new[len(numbers) :]
    matched = [i for i in range(2 * E) if re.match(rest[3:], f"{PREFIX}.experts.{i}.down_proj")]
    assert matched == [i for i, old in enumerate(numbers) if old >= E]
