"""The safetensors header: bytes in front of the data → the place of every tensor, and back.

A header that passes describes the whole file: tensors lie back to back, from the first data byte to the last, each
exactly as long as its dtype and shape say. Reading touches no tensor data.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.checkpoint.jsonio import parse_json, shown
from expertcut.checkpoint.types import DTYPE_BITS, TensorInfo
from expertcut.errors import CheckpointError

if TYPE_CHECKING:
    from expertcut.checkpoint.remote import HubFiles

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
MAX_RANK = 64
"""Dimensions; the limit of numpy and torch."""

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LIMIT = 2**63
_LFS = b"version https://git-lfs"
_AGAIN = "fetch the file again: hf download ORG/NAME FILE --local-dir DIR"


def read_header(path: Path, shard: str | None = None) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors of one file in the order of their bytes, and the header's metadata.

    `shard` is the name the tensors carry, by default the file's own.

    Raises:
        CheckpointError: the file is unreadable, truncated, or its header contradicts itself or the file's length.
    """
    raw, size = _header_bytes(path)
    return parse_header(raw, size, shard or path.name, str(path))


def read_remote_header(files: HubFiles, shard: str, stop: threading.Event) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors of one file on the Hub, like `read_header`; fetches the header and nothing else, unless `stop` is set.

    Raises:
        CheckpointError: see `read_header`.
        HubError: the Hub does not give it.
    """
    where, size = f"{files.repo}/{shard}", files.size(shard)
    head = bytes(files.read(shard, 0, min(8, size), stop))
    raw = bytes(files.read(shard, 8, _checked_length(head, size, where), stop))
    return parse_header(raw, size, shard, where)


def parse_header(raw: bytes, size: int, shard: str, where: str) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors and metadata by the JSON part of a header, and the size of the whole file; `where` is for errors.

    Raises:
        CheckpointError: the header contradicts itself or the file's size.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: header starts with {raw[:1]!r}, expected b'{{'")
    document = parse_json(raw, where)
    metadata = _checked_metadata(document.pop(_METADATA, {}), where)
    _check_names(document, where)
    base = 8 + len(raw)
    tensors = [_tensor(name, entry, shard, base, where) for name, entry in document.items()]
    tensors.sort(key=attrgetter("start", "end"))
    _check_cover(tensors, base, size, where)
    return tensors, metadata


def build_header(entries: Iterable[tuple[str, str, Iterable[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a header for tensors (name, dtype, shape, bytes) laid out back to back in the given order.

    Padded with spaces, so that the data behind it starts at a multiple of 8 bytes.
    """
    document: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, nbytes in entries:
        span = [position, position + nbytes]
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        position += nbytes
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON part of the header, and the size of the whole file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            head = file.read(len(_LFS))
            length = _checked_length(head, status.st_size, path)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) != length:
        raise CheckpointError(f"{path}: truncated while it was read", _AGAIN)
    return raw, status.st_size


def _checked_length(head: bytes, size: int, path: Path | str) -> int:
    if size == 0:
        raise CheckpointError(f"{path}: empty file (0 bytes)", _AGAIN)
    if head == _LFS:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights", "run in its directory: git lfs pull")
    if size < 8:
        raise CheckpointError(f"{path}: truncated: {size} bytes, a header needs at least 8", _AGAIN)
    length = int.from_bytes(head[:8], "little")
    if length > size - 8:
        raise CheckpointError(f"{path}: header of {length} bytes runs past the end of a file of {size} bytes", _AGAIN)
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: header of {length} bytes, at most {MAX_HEADER} expected")
    return length


def _checked_metadata(metadata: Any, where: str) -> dict[str, str]:
    if type(metadata) is not dict:
        raise CheckpointError(f"{where}: {_METADATA} is not an object of strings")
    for key, value in metadata.items():
        if type(value) is not str:
            raise CheckpointError(f"{where}: {_METADATA} entry {shown(key)} is {shown(value)}, expected a string")
    return metadata


def _check_names(document: dict[str, Any], where: str) -> None:
    try:
        "".join(document).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 40) : error.start + 1]
        raise CheckpointError(f"{where}: tensor name near {shown(near)} is not valid Unicode") from None


def _tensor(name: str, entry: Any, shard: str, base: int, where: str) -> TensorInfo:
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _wrong(where, name, f"entry is {shown(entry)}, expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise _wrong(where, name, f"unknown dtype {shown(dtype)}")
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise _wrong(where, name, f"shape is {shown(shape)}, expected up to {MAX_RANK} sizes from 0 to 2^63-1")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(where, name, f"data_offsets are {shown(offsets)}, expected [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    if prod(shape) * bits != (end - begin) * 8:
        raise _wrong(where, name, f"data_offsets span {end - begin} bytes, {dtype} {shape} needs {_need(shape, bits)}")
    return TensorInfo(name, dtype, tuple(shape), shard, base + begin, base + end)


def _sizes(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and 0 <= value < _LIMIT for value in values)


def _need(shape: list[int], bits: int) -> str:
    whole, rest = divmod(prod(shape) * bits, 8)
    return f"{whole} bytes and {rest} bits, not whole bytes" if rest else str(whole)


def _check_cover(tensors: list[TensorInfo], base: int, size: int, where: str) -> None:
    position, before = base, "the header"
    for tensor in tensors:
        if tensor.start != position:
            kind = "a gap before it" if tensor.start > position else "an overlap"
            found = f"data begins at byte {tensor.start}, expected {position} where {shown(before)} ends"
            raise _wrong(where, tensor.name, f"{found} ({kind})")
        position, before = tensor.end, tensor.name
    if position > size:
        last = next(t.name for t in tensors if t.end > size)
        raise CheckpointError(
            f"{where}: truncated in tensor {shown(last)}: {size} bytes, {position} expected by the header", _AGAIN
        )
    if position < size:
        raise CheckpointError(f"{where}: {size - position} bytes behind the last tensor belong to no tensor")


def _wrong(where: str, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: tensor {shown(name)}: {what}")
