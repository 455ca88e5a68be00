"""What a checkpoint is once opened: the raw config and where every tensor's bytes lie. Headers only, no data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertcut.checkpoint.remote import HubFiles

# Bits per element of every safetensors dtype code (sub-byte types are packed).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype, shape and place of one tensor."""

    name: str
    dtype: str
    """safetensors code, e.g. `BF16`, `F8_E4M3`, `I32`."""
    shape: tuple[int, ...]
    shard: str
    """File name relative to the checkpoint's directory."""
    start: int
    """Absolute byte offset of the first byte in the shard."""
    end: int
    """Absolute byte offset behind the last byte."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Checkpoint:
    """An opened, validated checkpoint directory."""

    name: str
    """What the user called it: a path or a Hub repo id."""
    path: Path
    """Local directory; without the shards if those are remote."""
    config: dict[str, Any]
    """`config.json` as parsed JSON, in the file's key order. Never changed in place."""
    tensors: dict[str, TensorInfo]
    """By name; shards in sorted file-name order, within a shard by offset."""
    shards: dict[str, int]
    """Shard file name → file size in bytes, sorted by name."""
    indexed: bool
    """True if there is a `model.safetensors.index.json`."""
    companions: tuple[str, ...]
    """Every other file (tokenizer, licence, code …), relative names, sorted; without config, index and weights."""
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By shard: what its header says about itself, such as `{"format": "pt"}`."""
    remote: HubFiles | None = field(default=None, compare=False)
    """Where the shards are, if not in the directory: on the Hub, to be read by byte ranges."""

    @property
    def public_name(self) -> str:
        """What files call it: its Hub name, or its directory's name without the path on this machine."""
        return valid_text(self.path.resolve().name if os.path.isdir(self.name) else self.name)

    @property
    def commit(self) -> str | None:
        """The commit that a Hub model is of; None for a directory of one's own."""
        name = self.path.name  # of a snapshot in the Hub's cache
        return name if re.fullmatch(r"[0-9a-f]{40}", name) and not os.path.isdir(self.name) else None

    @property
    def nbytes(self) -> int:
        """Sum of all tensors' bytes."""
        return sum(t.nbytes for t in self.tensors.values())


def valid_text(argument: str) -> str:
    """Return a command-line argument as valid Unicode: bytes that are not UTF-8 arrive as lone surrogates."""
    return argument.encode("utf-8", "backslashreplace").decode()
