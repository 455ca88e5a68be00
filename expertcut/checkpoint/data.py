"""The bytes of single tensors, for the few that planning needs (routers, hash tables), or part by part. numpy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from expertcut.checkpoint.jsonio import shown
from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import CheckpointError

_NATIVE = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F64": "<f8", "F32": "<f4", "C64": "<c8",
}  # fmt: skip


def read_bytes(ckpt: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> bytes:
    """The raw bytes `start` to `stop` of one tensor (None: to its end), little-endian and row-major as in the shard.

    Raises:
        CheckpointError: no such tensor, or the shard cannot be read or has changed since it was opened.
        HubError: the shard is on the Hub, which does not give it.
    """
    info = _find(ckpt, name)
    path = ckpt.path / info.shard
    wanted = (info.nbytes if stop is None else stop) - start
    if ckpt.remote:
        return ckpt.remote.recall(info.shard, info.start + start, wanted)
    try:
        with path.open("rb") as file:
            file.seek(info.start + start)
            raw = file.read(wanted)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) != wanted:
        found = f"{len(raw)} bytes left, expected {wanted}; the file has changed since it was opened"
        raise CheckpointError(f"{path}: tensor {shown(name)}: {found}")
    return raw


def read_array(ckpt: Checkpoint, name: str) -> npt.NDArray[Any]:
    """One tensor in its own shape: float32 for F32, F16, BF16 and 8-bit floats (no scale applied), else its own type.

    Raises:
        CheckpointError: see `read_bytes`; or a dtype that numpy cannot hold (6-bit, 4-bit and FNUZ floats).
    """
    return read_elements(ckpt, name).reshape(_find(ckpt, name).shape)


def read_elements(ckpt: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """The elements `start` to `stop` of one tensor (None: to its end), row by row, in a type as `read_array` gives.

    Raises:
        CheckpointError: see `read_array`.
    """
    info = _find(ckpt, name)
    if info.dtype not in _NATIVE and info.dtype not in _WIDENED:
        raise CheckpointError(f"{ckpt.path / info.shard}: tensor {shown(name)}: dtype {info.dtype} has no numpy form")
    storage, widen = _WIDENED.get(info.dtype, (_NATIVE.get(info.dtype, ""), None))
    size = np.dtype(storage).itemsize
    stored = np.frombuffer(read_bytes(ckpt, name, start * size, None if stop is None else stop * size), storage)
    return widen(stored) if widen else stored


def _find(ckpt: Checkpoint, name: str) -> TensorInfo:
    if name not in ckpt.tensors:
        raise CheckpointError(f"{ckpt.path}: no tensor {shown(name)}")
    return ckpt.tensors[name]


def _bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _f16(values: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    return values.astype(np.float32)


def _f8_e5m2(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return _f16((bits.astype(np.uint16) << 8).view(np.float16))  # the upper half of a float16


def _f8_e4m3(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    significand = np.where(exponent == 0, mantissa, mantissa + 8)
    table: npt.NDArray[np.float32] = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - 10)
    table[code & 127 == 127] = np.nan  # the only special values: no infinities
    table[128:] *= -1
    return table[bits]


def _f8_e8m0(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    table = np.ldexp(1.0, np.arange(256) - 127)  # float64: the unused last power is beyond float32
    table[255] = np.nan
    return table.astype(np.float32)[bits]


_WIDENED: dict[str, tuple[str, Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]]] = {
    "BF16": ("<u2", _bf16), "F16": ("<f2", _f16), "F8_E4M3": ("u1", _f8_e4m3), "F8_E5M2": ("u1", _f8_e5m2),
    "F8_E8M0": ("u1", _f8_e8m0),
}  # fmt: skip
