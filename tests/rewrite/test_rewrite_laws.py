"""Laws 1, 2 and 4 over layouts: survivors keep their bytes, are renumbered and sliced; nothing unknown is passed on."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rewrite_models import MODELS, Model, deepseek, digest, half, kept_of, listing, opened, plan_for, qwen3

from expertcut.checkpoint import Checkpoint, open_checkpoint, read_bytes, read_header
from expertcut.errors import CheckpointError, PlanError, UnknownTensorError
from expertcut.rewrite import prune, require, verify_bytes, verify_structure

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def contents(ckpt: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.dtype, t.shape, read_bytes(ckpt, name)) for name, t in ckpt.tensors.items()}


@every_model
@pytest.mark.parametrize("limit", [1, 700, 10**9], ids=["one tensor a shard", "several shards", "one shard"])
def test_survivors_keep_their_bytes(make: Callable[[], Model], limit: int, tmp_path: Path) -> None:
    model = make()
    ckpt, geometry = opened(model.write(tmp_path / "in"))
    plan = half(ckpt, geometry)
    result = prune(ckpt, geometry, plan, tmp_path / "out", max_shard_size=limit)
    out = open_checkpoint(tmp_path / "out")
    assert contents(out) == model.pruned(kept_of(plan, geometry))
    assert result.nbytes_after == out.nbytes < ckpt.nbytes == result.nbytes_before
    assert (result.experts_before, result.experts_after, result.shards) == (8, 4, len(out.shards))
    assert listing(tmp_path) == ["in", "out"]
    require(verify_structure(out, ckpt) + verify_bytes(out, ckpt))


@every_model
def test_the_identity_plan_changes_no_tensor(make: Callable[[], Model], tmp_path: Path) -> None:
    model = make()
    ckpt, geometry = opened(model.write(tmp_path / "in"))
    plan = plan_for(ckpt, geometry, [range(8)] * len(geometry.trunk))
    prune(ckpt, geometry, plan, tmp_path / "out", max_shard_size=700)
    out = open_checkpoint(tmp_path / "out")
    assert contents(out) == contents(ckpt)
    assert out.config == ckpt.config
    require(verify_structure(out, ckpt) + verify_bytes(out, ckpt))


@every_model
def test_shards_are_what_runtimes_expect(make: Callable[[], Model], tmp_path: Path) -> None:
    ckpt, geometry = opened(make().write(tmp_path / "in"))
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out", max_shard_size=900)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    total = 0
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors, metadata = read_header(shard)
        assert metadata == {"format": "pt"}
        data = sum(t.nbytes for t in tensors)
        assert data <= 900 or len(tensors) == 1
        total += data
        found |= {t.name: shard.name for t in tensors}
        widths = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
        assert all(t.start % widths[t.dtype] == 0 for t in tensors)
    count = len(set(found.values()))
    assert set(found.values()) == {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    assert index == {"metadata": {"total_size": total}, "weight_map": found}


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    ckpt, geometry = opened(qwen3().write(tmp_path / "in"))
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out")
    names = ["LICENSE", "config.json", "expertcut.json", "model.safetensors", "tokenizer.json"]
    assert listing(tmp_path / "out") == names


def test_only_owned_config_keys_change_and_keep_their_place(tmp_path: Path) -> None:
    ckpt, geometry = opened(qwen3().write(tmp_path / "in"))
    prune(ckpt, geometry, plan_for(ckpt, geometry, [(0, 1, 2), (5, 6, 7)], top_k=1), tmp_path / "out")
    text = (tmp_path / "out/config.json").read_text()
    expected = ckpt.config | {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 1}
    assert text == json.dumps(expected, indent=2) + "\n"  # the order of keys is the source's
    assert ckpt.config["num_experts"] == 8


def test_the_prediction_layer_follows_the_last_layer_or_its_own_entry(tmp_path: Path) -> None:
    model = deepseek()
    ckpt, geometry = opened(model.write(tmp_path / "in"))
    plan = plan_for(ckpt, geometry, [(0, 1, 4, 5), (2, 3, 6, 7)], top_k=2)
    own = plan.model_copy(update={"layers": plan.layers | {
        "model.layers.3.mlp": plan.layers["model.layers.2.mlp"].model_copy(update={"layer": 3, "kept": (0, 3, 4, 7)})
    }})  # fmt: skip
    for number, chosen in enumerate((plan, own)):
        prune(ckpt, geometry, chosen, tmp_path / f"out{number}")
        expected = model.pruned(kept_of(chosen, geometry))
        assert contents(open_checkpoint(tmp_path / f"out{number}")) == expected


def test_a_planted_expert_sized_tensor_stops_the_run(tmp_path: Path) -> None:
    model = qwen3()
    model.add("model.layers.0.mlp.expert_scale", "F32", 8)
    model.write(tmp_path / "in")
    with pytest.raises(UnknownTensorError, match=r"model\.layers\.0\.mlp\.expert_scale"):
        opened(tmp_path / "in")
    assert listing(tmp_path) == ["in"]


def test_companions_come_along_with_normal_permissions(tmp_path: Path) -> None:
    files = {"tokenizer.json": b"x" * 300_000, "code/deep/model.py": b"pass\n", "empty.txt": b""}
    files["expertcut.json"] = b"{}"
    ckpt, geometry = opened(qwen3().write(tmp_path / "in", companions=files))
    (tmp_path / "in/empty.txt").chmod(0o400)
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out")
    for name in ("tokenizer.json", "code/deep/model.py", "empty.txt"):
        assert (tmp_path / "out" / name).read_bytes() == files[name]
    assert (tmp_path / "out/expertcut.json").read_bytes() != b"{}"
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_the_links_of_a_hub_snapshot_become_files(tmp_path: Path) -> None:
    blobs = qwen3().write(tmp_path / "models--x/blobs")
    snapshot = tmp_path / "models--x/snapshots/main"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    ckpt, geometry = opened(snapshot)
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out", max_shard_size=900)
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "out").iterdir())
    require(verify_structure(tmp_path / "out", ckpt) + verify_bytes(tmp_path / "out", ckpt))


def test_the_record_holds_no_place_and_no_time(tmp_path: Path) -> None:
    model = qwen3()
    for folder in ("a", "b"):
        ckpt, geometry = opened(model.write(tmp_path / folder / "in"))
        prune(ckpt, geometry, half(ckpt, geometry), tmp_path / folder / "out", max_shard_size=900)
    assert digest(tmp_path / "a/out") == digest(tmp_path / "b/out")
    record = json.loads((tmp_path / "a/out/expertcut.json").read_text())
    assert record["schema"] == "expertcut.checkpoint/1"
    assert record["source"] == "in"
    assert (record["before"]["experts"], record["after"]["experts"]) == (8, 4)
    assert str(tmp_path) not in json.dumps(record)


def test_a_pruned_checkpoint_can_be_pruned_again(tmp_path: Path) -> None:
    model = deepseek()
    ckpt, geometry = opened(model.write(tmp_path / "in"))
    once = plan_for(ckpt, geometry, [range(8)] * 2)
    prune(ckpt, geometry, once, tmp_path / "once", max_shard_size=900)
    again, geometry = opened(tmp_path / "once")
    plan = half(again, geometry)
    prune(again, geometry, plan, tmp_path / "twice")
    assert contents(open_checkpoint(tmp_path / "twice")) == model.pruned(kept_of(plan, geometry))


def test_a_plan_for_another_model_stops_the_run(tmp_path: Path) -> None:
    plan = half(*opened(qwen3(seed=1).write(tmp_path / "other")))
    ckpt, geometry = opened(qwen3(seed=0).write(tmp_path / "in"))
    with pytest.raises(PlanError, match="another model"):
        prune(ckpt, geometry, plan, tmp_path / "out")
    with pytest.raises(PlanError, match="layer 2: experts is 2"):
        prune(ckpt, geometry, plan_for(ckpt, geometry, [(0, 1, 2), (0, 1)]), tmp_path / "out")
    assert listing(tmp_path) == ["in", "other"]


def test_an_unpublishable_source_change_is_named(tmp_path: Path) -> None:
    ckpt, geometry = opened(qwen3().write(tmp_path / "in"))
    plan = half(ckpt, geometry)
    shard = tmp_path / "in/model-00003-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: ends at byte \d+, 10 more expected"):
        prune(ckpt, geometry, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
