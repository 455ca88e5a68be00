"""Single tensors: raw bytes, and arrays equal to what torch makes of the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import Tensor, filled, single

from expertcut.checkpoint import open_checkpoint, read_array, read_bytes
from expertcut.errors import CheckpointError

EVERY_BYTE, EVERY_PAIR = bytes(range(256)), np.arange(2**16, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    ("dtype", "kind", "raw"),
    [
        ("F16", "float16", EVERY_PAIR), ("BF16", "bfloat16", EVERY_PAIR), ("F8_E4M3", "float8_e4m3fn", EVERY_BYTE),
        ("F8_E5M2", "float8_e5m2", EVERY_BYTE), ("F8_E8M0", "float8_e8m0fnu", EVERY_BYTE),
    ],
)  # fmt: skip
def test_every_code_widens_as_in_torch(dtype: str, kind: str, raw: bytes, tmp_path: Path) -> None:
    import torch

    expected = torch.frombuffer(bytearray(raw), dtype=getattr(torch, kind)).float().numpy()
    shape = (2, len(expected) // 2)
    array = read_array(open_checkpoint(single(tmp_path, {"w": (dtype, shape, raw)})), "w")
    assert array.dtype == np.float32 and array.shape == shape
    np.testing.assert_array_equal(array.ravel(), expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(array.ravel())[numbers], np.signbit(expected)[numbers])


def test_native_types_scalars_and_empty(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "table": ("I64", (2, 1), np.array([-1, 2**40]).astype("<i8").tobytes()),
        "f": ("F32", (), np.float32(0.1).tobytes()), "none": ("BF16", (0, 4), b""), "flag": ("BOOL", (2,), b"\0\1"),
    }  # fmt: skip
    ckpt = open_checkpoint(single(tmp_path, tensors))
    assert read_array(ckpt, "table").tolist() == [[-1], [2**40]]
    assert read_array(ckpt, "f") == np.float32(0.1) and read_array(ckpt, "f").shape == ()
    assert read_array(ckpt, "none").shape == (0, 4)
    assert read_array(ckpt, "flag").tolist() == [False, True]
    assert {name: read_bytes(ckpt, name) for name in tensors} == {name: raw for name, (_, _, raw) in tensors.items()}


def test_refusals(tmp_path: Path) -> None:
    ckpt = open_checkpoint(single(tmp_path, {"packed": filled("F4", 4), "w": filled("F32", 4)}))
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor packed: dtype F4 has no numpy form"):
        read_array(ckpt, "packed")
    with pytest.raises(CheckpointError, match="no tensor gone"):
        read_bytes(ckpt, "gone")
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="tensor w: 15 bytes left, expected 16"):
        read_array(ckpt, "w")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_bytes(ckpt, "w")
