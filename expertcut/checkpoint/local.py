"""A directory → an opened Checkpoint: config, index, every shard's header and their agreement. No tensor data.

The shards are in the directory, or on the Hub.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from expertcut.checkpoint.companions import PICKLE_SUFFIXES, list_companions
from expertcut.checkpoint.header import read_header, read_remote_header
from expertcut.checkpoint.jsonio import load_json, shown
from expertcut.checkpoint.remote import HubFiles, in_parallel
from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Header = tuple[list[TensorInfo], dict[str, str]]

_FETCH = "fetch the whole model again: hf download ORG/NAME --local-dir DIR"
# Tensor by tensor, so that config and names stay as they are; clones part weights that share memory.
_CONVERT = (
    "import sys, pathlib, torch, safetensors.torch as s; d = pathlib.Path(sys.argv[1]); s.save_file({k: "
    "v.contiguous().clone() for f in sorted(d.glob(sys.argv[2])) for k, v in torch.load(f, map_location='cpu', "
    "weights_only=True).items()}, d / 'model.safetensors', {'format': 'pt'})"
)


def open_directory(root: Path, name: str, remote: HubFiles | None = None) -> Checkpoint:
    """Open and validate the checkpoint in the directory `root`; `name` is what the user called it.

    `remote` are its shards if they are not in the directory.

    Raises:
        CheckpointError: whatever is missing, malformed or contradictory, naming file and tensor.
        HubError: the Hub does not give a header.
    """
    try:
        return _open(root, name, remote)
    except OSError as error:
        raise CheckpointError(f"{shown(error.filename or root)}: cannot be read: {error.strerror}") from None


def _open(root: Path, name: str, remote: HubFiles | None) -> Checkpoint:
    config = _read_config(root)
    index = find_index(root)
    weight_map = read_index(index) if index else None
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, int] = {}
    metadata: dict[str, dict[str, str]] = {}
    single = _single_file(root) if weight_map is None and remote is None else SINGLE
    names = sorted(set(weight_map.values())) if weight_map else [single]
    for shard, (found, metadata[shard]) in zip(names, _headers(root, names, index, remote), strict=True):
        _add(tensors, found, root)
        shards[shard] = remote.size(shard) if remote else (root / shard).stat().st_size
    if index and weight_map is not None:
        _check_index(index, weight_map, tensors)
    if not tensors:
        raise CheckpointError(f"{root / next(iter(shards))}: holds no tensors")
    return Checkpoint(name, root, config, tensors, shards, index is not None, list_companions(root), metadata, remote)


def _headers(root: Path, names: list[str], index: Path | None, remote: HubFiles | None) -> Iterator[Header]:
    if remote is None:
        return (read_header(_shard_path(root, name, index), name) for name in names)
    return in_parallel(partial(read_remote_header, remote, name) for name in names)


def find_index(root: Path) -> Path | None:
    """The index that says which shards count, or None where a single `model.safetensors` does.

    Raises:
        CheckpointError: several indexes, none of them named `model.safetensors.index.json`.
    """
    if (root / INDEX).exists() or (root / SINGLE).exists():
        return root / INDEX if (root / INDEX).exists() else None
    others = sorted(root.glob("*.safetensors.index.json"))
    if len(others) > 1:
        names = ", ".join(shown(path.name) for path in others)
        raise CheckpointError(f"{root}: several indexes ({names}), expected {INDEX}")
    return others[0] if others else None


def read_index(path: Path) -> dict[str, str]:
    """Tensor name → shard name, relative to the index's directory and never outside it.

    Raises:
        CheckpointError: malformed, empty, or with a shard path that leaves the directory.
    """
    index = load_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map, expected an object of tensor names and their files")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {shown(tensor)} lies in {shown(shard)}, expected a .safetensors file"
            )
    for shard in set(weight_map.values()):
        if not _stays_inside(path.parent, shard):
            tensor = next(t for t, s in weight_map.items() if s == shard)
            raise CheckpointError(f"{path}: tensor {shown(tensor)} lies in {shown(shard)}, outside the directory")
    if path.name == INDEX and (path.parent / SINGLE).exists() and SINGLE not in weight_map.values():
        found = f"{path.parent / SINGLE}: a second set of weights beside {INDEX}, which does not name it"
        raise CheckpointError(found, "remove the one that is stale; runtimes differ in which they load")
    return weight_map


def _stays_inside(root: Path, shard: str) -> bool:
    """The file itself may be a link (the Hub's cache, DVC and git-annex keep weights behind links), its folder not."""
    path = PurePosixPath(shard)
    plain = str(path) == shard and ".." not in path.parts and not path.is_absolute() and shard.isprintable()
    if not plain or "\\" in shard or PureWindowsPath(shard).drive:
        return False
    return Path(os.path.realpath((root / shard).parent)).is_relative_to(os.path.realpath(root))


def _read_config(root: Path) -> dict[str, Any]:
    path = root / "config.json"
    if not path.exists():
        raise CheckpointError(f"{root}: no config.json, not a checkpoint in Hugging Face layout", _FETCH)
    config = load_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a JSON {type(config).__name__}, expected an object")
    return config


def _single_file(root: Path) -> str:
    if (root / SINGLE).exists():
        return SINGLE
    loose = sorted(path.name for path in root.glob("*.safetensors"))
    if loose:
        found = f"{root}: {len(loose)} safetensors files ({shown(loose[0])}, …) but neither {SINGLE} nor {INDEX}"
        raise CheckpointError(found, f"fetch the index as well: hf download ORG/NAME {INDEX} --local-dir DIR")
    pickles = sorted(p for p in root.iterdir() if p.suffix in PICKLE_SUFFIXES and p.name != "training_args.bin")
    if pickles:
        raise _pickle_refused(root, pickles)
    raise CheckpointError(f"{root}: no weights, expected {SINGLE} or {INDEX}", _FETCH)


def _pickle_refused(root: Path, pickles: list[Path]) -> CheckpointError:
    standard = any(path.name.startswith("pytorch_model") for path in pickles)
    pattern = "pytorch_model*.bin" if standard else f"*{pickles[0].suffix}"
    command = f'python -c "{_CONVERT}" {shlex.quote(str(root))} {shlex.quote(pattern)}'
    found = f"{shown(pickles[0])}: pickle weights can run code and are not read, expected safetensors"
    return CheckpointError(found, f"if you trust them, convert them: {command}")


def _shard_path(root: Path, shard: str, index: Path | None) -> Path:
    path = root / shard
    if index and not path.exists():
        raise CheckpointError(f"{index}: names {shown(shard)}, which does not exist", _FETCH)
    return path


def _add(tensors: dict[str, TensorInfo], found: list[TensorInfo], root: Path) -> None:
    for tensor in found:
        if tensor.name in tensors:
            other = shown(tensors[tensor.name].shard)
            raise CheckpointError(f"{root / tensor.shard}: tensor {shown(tensor.name)} is in {other} as well")
        tensors[tensor.name] = tensor


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: tensor {shown(name)} is not in {shown(shard)}, nor in any other shard")
        if tensors[name].shard != shard:
            there = shown(tensors[name].shard)
            raise CheckpointError(f"{index}: tensor {shown(name)} placed in {shown(shard)}, found in {there}")
    if len(weight_map) != len(tensors):
        name = next(name for name in tensors if name not in weight_map)
        raise CheckpointError(f"{index}: does not name tensor {shown(name)} of {shown(tensors[name].shard)}")
