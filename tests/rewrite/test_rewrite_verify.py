"""Every check finds what it is there for, and names file and tensor."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rewrite_models import deepseek, gpt_oss, half, opened, plan_for, qwen3, qwen3_vl

from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.errors import VerifyError
from expertcut.rewrite import Check, prune, require, verify_bytes, verify_structure


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Checkpoint]:
    """A pruned checkpoint of several shards, and its source."""
    ckpt, geometry = opened(deepseek().write(tmp_path / "in"))
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out", max_shard_size=2000)
    return tmp_path / "out", ckpt


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.ok}


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_bytes(out: Path, tensor: str, at: int = 0) -> str:
    """Flip a bit; return the shard's name."""
    info = open_checkpoint(out).tensors[tensor]
    data = bytearray((out / info.shard).read_bytes())
    data[info.start + at] ^= 1
    (out / info.shard).write_bytes(data)
    return info.shard


def test_a_good_checkpoint_passes_with_and_without_its_source(pair: tuple[Path, Checkpoint]) -> None:
    out, source = pair
    for checks in (
        verify_structure(out),
        verify_structure(open_checkpoint(out), source),
        verify_bytes(str(out), source),
    ):
        assert not failed(checks)
        require(checks)
    names = [check.name for check in verify_structure(out, source) + verify_bytes(out, source)]
    assert names == [
        "opens", "files", "experts", "routing", "record", "plan", "tensors", "config", "tensor bytes", "companions",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tensor, at",
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", 119),
        ("model.layers.2.mlp.gate.weight", 30),
        ("model.layers.3.mlp.gate.e_score_correction_bias", 15),
        ("model.layers.3.eh_proj.weight", 0),
        ("model.embed_tokens.weight", 5),
    ],
)
def test_a_flipped_bit_is_found(tensor: str, at: int, pair: tuple[Path, Checkpoint]) -> None:
    out, source = pair
    shard = edit_bytes(out, tensor, at)
    assert not failed(verify_structure(out, source))
    assert failed(verify_bytes(out, source)) == {"tensor bytes": f"{out / shard}: tensor {tensor} differs from " + (
        "model.layers.1.mlp.experts.7.up_proj.weight" if "experts" in tensor else tensor
    )}  # fmt: skip


def test_many_findings_are_counted(pair: tuple[Path, Checkpoint]) -> None:
    out, source = pair
    for expert in range(4):
        for part in ("up", "down"):
            edit_bytes(out, f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight")
    detail = failed(verify_bytes(out, source))["tensor bytes"]
    assert detail.endswith("(and 3 more)")
    assert detail.count("differs") == 5
    with pytest.raises(VerifyError, match=r"tensor bytes: .* \(and 3 more\)"):
        require(verify_bytes(out, source))


def test_experts_in_another_order_are_found(tmp_path: Path) -> None:
    for model in (qwen3_vl(), gpt_oss(), qwen3()):
        root = tmp_path / str(model.config["model_type"])
        ckpt, geometry = opened(model.write(root / "in"))
        prune(ckpt, geometry, plan_for(ckpt, geometry, [(0, 2, 5, 7)] * 2), root / "out")
        prune(ckpt, geometry, plan_for(ckpt, geometry, [(0, 3, 5, 7)] * 2), root / "other")
        for name in ("model.safetensors",):
            (root / "out" / name).write_bytes((root / "other" / name).read_bytes())
        assert not failed(verify_structure(root / "out", ckpt))
        assert "tensor bytes" in failed(verify_bytes(root / "out", ckpt))


Damage = Callable[[Path], object]


def first(out: Path) -> Path:
    return sorted(out.glob("*.safetensors"))[0]


def rewrite_header(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = first(out)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rename_embedding(out: Path) -> None:
    old = "model.embed_tokens.weight"
    rewrite_header(out, lambda header: header.update(other=header.pop(old)))
    edit_json(out / "model.safetensors.index.json", lambda index: index["weight_map"].update(other=first(out).name))
    edit_json(out / "model.safetensors.index.json", lambda index: index["weight_map"].pop(old))


DAMAGES: dict[str, tuple[str, str, Damage]] = {
    "a stale shard": ("files", r"model-00009-of-00009\.safetensors: stale", lambda out: (
        (out / "model-00009-of-00009.safetensors").write_bytes(b"")
    )),
    "pickle weights": ("files", r"pytorch_model\.bin: stale", lambda out: (out / "pytorch_model.bin").write_bytes(b"")),
    "a stale index": ("files", r"consolidated\.safetensors\.index\.json: stale", lambda out: (
        (out / "consolidated.safetensors.index.json").write_text("{}")
    )),
    "an unfinished run": ("files", r"\.out\.expertcut-partial: left by an unfinished run", lambda out: (
        (out.parent / ".out.expertcut-partial").mkdir()
    )),
    "a wrong total": ("files", r"total_size is 7, expected \d+", lambda out: (
        edit_json(out / "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=7))
    )),
    "no format": ("files", r'00001-of-\d+\.safetensors: header metadata lacks "format": "pt"', lambda out: (
        rewrite_header(out, lambda header: header.pop("__metadata__"))
    )),
    "unaligned": ("files", r"is not aligned to its (BF16|F32) elements", lambda out: (
        rewrite_header(out, lambda header: header["__metadata__"].update(pad="x" * (1 + len(json.dumps(header)) % 2)))
    )),
    "a missing shard": ("opens", r"model-0000\d-of-\d+\.safetensors", lambda out: (
        next(iter(out.glob("model-00002*"))).unlink()
    )),
    "a truncated shard": ("opens", r"model-00002-of-\d+\.safetensors: .* 900 bytes", lambda out: (
        os.truncate(next(iter(out.glob("model-00002*"))), 900)
    )),
    "no config": ("opens", "no config.json", lambda out: (out / "config.json").unlink()),
    "too many experts in the config": ("experts", r"expected .*\b8\b|found 4 of 8 experts", lambda out: (
        edit_json(out / "config.json", lambda config: config.update(n_routed_experts=8))
    )),
    "aliases that disagree": ("experts", "n_routed_experts=4 but num_experts=8", lambda out: (
        edit_json(out / "config.json", lambda config: config.update(num_experts=8))
    )),
    "a top-k out of reach": ("routing", "top-3, but a token can reach only 2 of 4", lambda out: (
        edit_json(out / "config.json", lambda config: config.update(num_experts_per_tok=3))
    )),
    "too small groups": ("routing", "1 experts per group, but the router ranks groups by their 2 best", lambda out: (
        edit_json(out / "config.json", lambda config: config.update(n_group=4, topk_group=2))
    )),
    "no record": ("record", r"expertcut\.json: cannot be read", lambda out: (out / "expertcut.json").unlink()),
    "another schema": ("record", "schema", lambda out: (
        edit_json(out / "expertcut.json", lambda record: record.update(schema="expertcut.checkpoint/9"))
    )),
    "another size": ("record", "nbytes is 1, the checkpoint has", lambda out: (
        edit_json(out / "expertcut.json", lambda record: record["after"].update(nbytes=1))
    )),
    "another plan": ("record", r"plan keeps 3 experts in model\.layers\.1\.mlp, found 4", lambda out: (
        edit_json(out / "expertcut.json", lambda record: record["plan"]["layers"]["model.layers.1.mlp"]["kept"].pop())
    )),
    "a plan for another model": ("plan", "another model", lambda out: (
        edit_json(out / "expertcut.json", lambda record: record["plan"]["source"]["fingerprint"]["sketch"].update(
            {"model.layers.1.mlp": [9.0] * 8}
        ))
    )),
    "another quantisation": ("config", r"quantization_config\.quant_method is 'int4', expected 'fp8'", lambda out: (
        edit_json(out / "config.json", lambda config: config["quantization_config"].update(quant_method="int4"))
    )),
    "a lost key": ("config", r"first_k_dense_replace is '\(absent\)', expected 1", lambda out: (
        edit_json(out / "config.json", lambda config: config.pop("first_k_dense_replace"))
    )),
    "a changed type": ("config", "norm_topk_prob is 1, expected True", lambda out: (
        edit_json(out / "config.json", lambda config: config.update(norm_topk_prob=1))
    )),
    "a new key": ("config", r"extra is None, expected '\(absent\)'", lambda out: (
        edit_json(out / "config.json", lambda config: config.update(extra=None))
    )),
    "a renamed tensor": ("tensors", r"no tensor model\.embed_tokens\.weight .*; .*tensor other should not be there",
        rename_embedding),
    "another dtype": ("tensors", r"embed_tokens\.weight is F16 \[16, 10\], expected BF16 \[16, 10\]", lambda out: (
        rewrite_header(out, lambda header: header["model.embed_tokens.weight"].update(dtype="F16"))
    )),
    "a changed companion": ("companions", r"tokenizer\.json: differs from the source", lambda out: (
        (out / "tokenizer.json").write_bytes(b"[]")
    )),
    "a lost companion": ("companions", r"LICENSE: missing", lambda out: (out / "LICENSE").unlink()),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name: str, pair: tuple[Path, Checkpoint]) -> None:
    check, pattern, damage = DAMAGES[name]
    out, source = pair
    damage(out)
    found = failed(verify_structure(out, source) + verify_bytes(out, source))
    assert check in found
    assert re.search(pattern, found[check]), found[check]
    with pytest.raises(VerifyError, match=check):
        require(verify_structure(out, source) + verify_bytes(out, source))


def test_a_prediction_layer_of_another_width_is_found(tmp_path: Path) -> None:
    model = deepseek()
    ckpt, geometry = opened(model.write(tmp_path / "in", shards=1))
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out", max_shard_size=10**9)
    rewrite_header(tmp_path / "out", lambda header: header["model.layers.3.mlp.gate.weight"].update(shape=[2, 20]))
    detail = failed(verify_structure(tmp_path / "out"))["experts"]
    assert "model.layers.3.mlp.gate.weight: shape [2, 20]" in detail
