"""Opening a directory: what is found in a good one, and the one-line refusal of every bad one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import filled, indexed, raw_file, single, two_shards

from expertcut.checkpoint import build_header, load_json, open_checkpoint, read_array, read_bytes
from expertcut.errors import CheckpointError, UsageError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def refused(name: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert "\n" not in caught.value.message
    return caught.value


def test_single_file(tmp_path: Path) -> None:
    root = single(tmp_path / "m", {"b": filled("F32", 2), "a": filled("U8", 3)}, {"z": 1, "a": float("nan")})
    ckpt = open_checkpoint(root)
    assert (ckpt.name, ckpt.path, ckpt.indexed) == (str(root), root, False)
    assert list(ckpt.config) == ["z", "a"] and np.isnan(ckpt.config["a"])
    assert list(ckpt.tensors) == ["b", "a"] and ckpt.nbytes == 11
    assert ckpt.shards == {"model.safetensors": (root / "model.safetensors").stat().st_size}


def test_index(tmp_path: Path) -> None:
    ckpt = open_checkpoint(str(two_shards(tmp_path)))
    assert ckpt.indexed and list(ckpt.shards) == [FIRST, SECOND] and list(ckpt.tensors) == ["a", "b", "c"]
    assert [t.shard for t in ckpt.tensors.values()] == [FIRST, FIRST, SECOND]


def test_index_of_another_name_and_shard_in_a_folder(tmp_path: Path) -> None:
    root = indexed(tmp_path, {"part/one.safetensors": {"a": filled("F32", 1)}, "two.safetensors": {"b": filled("U8")}})
    (root / INDEX).rename(root / "other.safetensors.index.json")
    ckpt = open_checkpoint(root)
    assert list(ckpt.tensors) == ["a", "b"] and ckpt.indexed
    assert read_bytes(ckpt, "a") == b"\1\1\1\1"
    (root / "third.safetensors.index.json").write_text("{}")
    assert "several indexes (other.safetensors.index.json, third" in refused(root).message


def test_companions(tmp_path: Path) -> None:
    root = two_shards(tmp_path)
    kept = ["LICENSE", "chat_template.jinja", "code/modeling.py", "original/config.json", "tokenizer.model"]
    left = [
        "consolidated.safetensors", "original/model.safetensors", "original/consolidated.00.pth", "metal/model.bin",
        "x.GGUF", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "flax_model.msgpack", "optimizer.pt",
        "pytorch_model.bin.index.json", "consolidated.safetensors.index.json", ".gitattributes", ".cache/huggingface/x",
        ".git/config", "code/__pycache__/modeling.pyc",
    ]  # fmt: skip
    for name in kept + left:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not safetensors at all")
    ckpt = open_checkpoint(root)
    assert list(ckpt.companions) == kept
    assert list(ckpt.shards) == [FIRST, SECOND]


def test_hub_cache_links_are_followed_and_others_refused(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    repo = cache / "models--org--name"
    root = two_shards(repo / "snapshots" / ("0" * 40))
    (root / "tokenizer.json").write_text("{}")
    (root / "LICENSE").write_text("free")
    for number, path in enumerate(sorted(root.iterdir())):
        blob = (cache if number % 2 else repo) / "blobs" / str(number)  # of the repo, or shared by the whole cache
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, root))
    assert open_checkpoint(root).companions == ("LICENSE", "tokenizer.json")
    alias = tmp_path / "alias"
    alias.symlink_to(root)
    assert open_checkpoint(alias).companions == ("LICENSE", "tokenizer.json")
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(root, copy, symlinks=False)
    assert open_checkpoint(copy).companions == ("LICENSE", "tokenizer.json")
    (tmp_path / "secret").write_text("token")
    (copy / "vocab.txt").symlink_to(tmp_path / "secret")
    assert "vocab.txt: a link out of the checkpoint" in refused(copy).message


def test_links_that_cannot_be_companions(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    (root / "real.txt").write_text("x")
    (root / "inside.txt").symlink_to("real.txt")
    assert open_checkpoint(root).companions == ("inside.txt", "real.txt")
    for target, expected in (("gone", "a broken link"), ("bad", "a broken link"), (".", "a link to a folder")):
        (root / "bad").symlink_to(target)
        assert f"bad: {expected}" in refused(root).message
        (root / "bad").unlink()
    os.mkfifo(root / "pipe")
    assert "pipe: not a regular file" in refused(root).message


def test_weights_behind_links_open(tmp_path: Path) -> None:
    root = two_shards(tmp_path / "m")
    (root / FIRST).rename(tmp_path / "annexed")
    (root / FIRST).symlink_to(tmp_path / "annexed")
    assert len(open_checkpoint(root).tensors) == 3


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", "./x.safetensors", "a//x.safetensors",
     "..\\x.safetensors", "C:x.safetensors", "x\0.safetensors", "\ud800/x.safetensors", "out/x.safetensors"],
)  # fmt: skip
def test_shard_path_leaving_the_directory(shard: str, tmp_path: Path) -> None:
    root = two_shards(tmp_path / "m", {"a": FIRST, "b": FIRST, "c": shard})
    (tmp_path / "x.safetensors").write_bytes((root / SECOND).read_bytes())  # it would even open
    (root / "out").symlink_to(tmp_path)
    error = refused(root)
    assert f"{INDEX}: tensor c lies in" in error.message and "outside the directory" in error.message


def _index(content: str) -> Callable[[Path], object]:
    return lambda root: (root / INDEX).write_text(content)


def _both(root: Path) -> None:
    shutil.copy(root / SECOND, root / "model.safetensors")


def _remap(**weight_map: str) -> Callable[[Path], object]:
    true = {"a": FIRST, "b": FIRST, "c": SECOND}
    return _index(json.dumps({"weight_map": {k: v for k, v in {**true, **weight_map}.items() if v}}))


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _duplicate(root: Path) -> None:
    (root / SECOND).write_bytes((root / FIRST).read_bytes())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (lambda root: (root / "config.json").unlink(), "no config.json"),
    "config-list": (lambda root: (root / "config.json").write_text("[]"), "config.json: a JSON list, expected an obj"),
    "config-empty": (lambda root: (root / "config.json").write_text(""), "config.json: invalid JSON"),
    "config-utf8": (lambda root: (root / "config.json").write_bytes(b'{"a": "\xe9"}'), "config.json: invalid UTF-8"),
    "config-twice": (
        lambda root: (root / "config.json").write_text('{"q": {"k": 1, "j": 2, "k": 1}}'),
        "config.json: duplicate JSON key k",
    ),
    "config-folder": (
        lambda root: _folder(root / "config.json"),
        "config.json: cannot be read: Is a directory",
    ),
    "index-json": (_index("{"), f"{INDEX}: invalid JSON"),
    "index-list": (_index("[]"), f"{INDEX}: no weight_map"),
    "index-none": (_index('{"metadata": {}}'), f"{INDEX}: no weight_map"),
    "index-empty": (_index('{"weight_map": {}}'), f"{INDEX}: no weight_map"),
    "index-number": (_index('{"weight_map": {"a": 1}}'), "tensor a lies in 1, expected a .safetensors file"),
    "index-pickle": (_remap(c="pytorch_model.bin"), "tensor c lies in pytorch_model.bin, expected a .safetensors"),
    "index-twice": (_index('{"weight_map": {"a": "x", "a": "x"}}'), f"{INDEX}: duplicate JSON key a"),
    "absent-tensor": (_remap(d=SECOND), f"{INDEX}: tensor d is not in {SECOND}"),
    "absent-file": (_remap(d="model-3.safetensors"), f"{INDEX}: names model-3.safetensors, which does not exist"),
    "too-long-a-file-name": (_remap(d="m" * 300 + ".safetensors"), "cannot be read: File name too long"),
    "unnamed-tensor": (_remap(b=""), f"{INDEX}: does not name tensor b of {FIRST}"),
    "misplaced-tensor": (_remap(b=SECOND), f"{INDEX}: tensor b placed in {SECOND}, found in {FIRST}"),
    "duplicate-tensor": (_duplicate, f"{SECOND}: tensor a is in {FIRST} as well"),
    "shards-without-index": (lambda root: (root / INDEX).unlink(), f"2 safetensors files ({FIRST}, …) but neither"),
    "two-sets": (_both, "model.safetensors: a second set of weights beside"),
    "zero-byte-shard": (lambda root: (root / SECOND).write_bytes(b""), f"{SECOND}: empty file"),
    "truncated-shard": (lambda root: _shorten(root / FIRST), f"{FIRST}: truncated in tensor b"),
    "shard-folder": (lambda root: _folder(root / SECOND), f"{SECOND}: not a regular file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory(case: str, tmp_path: Path) -> None:
    root = two_shards(tmp_path)
    spoil, expected = BROKEN[case]
    spoil(root)
    message = refused(root).message
    assert expected in message and str(root) in message


def test_no_tensors(tmp_path: Path) -> None:
    assert "model.safetensors: holds no tensors" in refused(single(tmp_path, {})).message


def test_no_weights(tmp_path: Path) -> None:
    root = single(tmp_path)
    (root / "model.safetensors").rename(root / "model.gguf")
    (root / "training_args.bin").write_bytes(b"")
    assert "no weights, expected model.safetensors or" in refused(root).message


def test_names_that_are_no_directory(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    assert "no such directory, and not a Hub name" in refused(tmp_path / "gone").message
    for name in ("gone", "a/b/c", "../a", "./a", "", "a b/c", "x" * 5000, "nul\0/b", "org/na me\n"):
        assert "no such directory, and not a Hub name" in refused(name).message
    assert "not a directory" in refused(root / "config.json").message
    with pytest.raises(UsageError, match="no revision main"):
        open_checkpoint(root, "main")


def test_pickle_is_refused_and_the_command_converts_it(tmp_path: Path) -> None:
    import torch

    root = single(tmp_path / "it's here")
    (root / "model.safetensors").unlink()
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    torch.save({"a": weight, "tied": weight}, root / "pytorch_model-00001-of-00002.bin")
    torch.save({"turned": weight.T}, root / "pytorch_model-00002-of-00002.bin")
    (root / "training_args.bin").write_bytes(b"not for reading")
    error = refused(root)
    assert "pytorch_model-00001-of-00002.bin: pickle weights" in error.message and error.hint
    command = error.hint.removeprefix("if you trust them, convert them: python ")
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True, timeout=120)
    ckpt = open_checkpoint(root)
    assert read_array(ckpt, "a").tolist() == [[0, 1, 2], [3, 4, 5]] == read_array(ckpt, "tied").tolist()
    assert read_array(ckpt, "turned").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_load_json_allows_nan_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [NaN, -Infinity]}')
    assert str(load_json(tmp_path / "x.json")) == "{'a': [nan, -inf]}"
    with pytest.raises(CheckpointError, match="gone.json: cannot be read: No such file"):
        load_json(tmp_path / "gone.json")


def test_opening_a_huge_checkpoint_is_quick(tmp_path: Path) -> None:
    """650 GB of holes: 163 shards, 90,000 tensors. Half a second; the limit leaves room for a busy machine."""
    (tmp_path / "config.json").write_text("{}")
    weight_map: dict[str, str] = {}
    for shard in range(163):
        names = [f"model.layers.{shard}.mlp.experts.{i}.down_proj.weight" for i in range(552)]
        header = build_header(((name, "F8_E4M3", (2048, 3500), 2048 * 3500) for name in names), {"format": "pt"})
        path = tmp_path / f"model-{shard:05}.safetensors"
        path.write_bytes(header)
        os.truncate(path, len(header) + 552 * 2048 * 3500)
        weight_map |= dict.fromkeys(names, path.name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    begin = time.perf_counter()
    ckpt = open_checkpoint(tmp_path)
    assert time.perf_counter() - begin < 5
    assert len(ckpt.tensors) == 163 * 552 and ckpt.nbytes > 640e9


def test_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, expertcut.checkpoint; print(*{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_spoiled_files_start_out_good(tmp_path: Path) -> None:
    """The helper that spoils files writes good ones too, or the refusals above would prove nothing."""
    from safetensors.numpy import load_file

    root = two_shards(tmp_path)
    assert set(load_file(root / SECOND)) == {"c"}
    assert raw_file(b"{}") == b"\2\0\0\0\0\0\0\0{}"
