"""Checkpoints made byte by byte: what is written here can be as wrong as a test wants it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertcut.checkpoint import DTYPE_BITS

Tensor = tuple[str, Sequence[int], bytes]


def raw_file(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of exactly this header and data; `length` overrides what the first 8 bytes claim."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def tensor_file(tensors: Mapping[str, Tensor]) -> bytes:
    """A well-formed file holding tensors given as (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = entry(dtype, shape, len(data), len(data) + len(raw))
        data += raw
    return raw_file(header, data)


def filled(dtype: str, *shape: int, byte: int = 1) -> Tensor:
    count = DTYPE_BITS[dtype]
    for size in shape:
        count *= size
    return dtype, shape, bytes([byte]) * (count // 8)


def single(root: Path, tensors: Mapping[str, Tensor] | None = None, config: Any = None) -> Path:
    """A directory with config.json and model.safetensors."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({"model_type": "toy"} if config is None else config))
    (root / "model.safetensors").write_bytes(tensor_file({"a": filled("F32", 2)} if tensors is None else tensors))
    return root


def indexed(
    root: Path, shards: Mapping[str, Mapping[str, Tensor]], weight_map: Mapping[str, Any] | None = None
) -> Path:
    """A directory with config.json, shards and an index, by default the true one."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text('{"model_type": "toy"}')
    for shard, tensors in shards.items():
        (root / shard).parent.mkdir(parents=True, exist_ok=True)
        (root / shard).write_bytes(tensor_file(tensors))
    if weight_map is None:
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def two_shards(root: Path, weight_map: Mapping[str, Any] | None = None) -> Path:
    shards = {
        "model-00001-of-00002.safetensors": {"a": filled("F32", 2), "b": filled("BF16", 3, 2)},
        "model-00002-of-00002.safetensors": {"c": filled("I8", 5)},
    }
    return indexed(root, shards, weight_map)
