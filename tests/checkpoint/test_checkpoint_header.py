"""Headers: read and written as the safetensors library does, and every malformed one refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import entry, raw_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from expertcut.checkpoint import DTYPE_BITS, build_header, read_header
from expertcut.errors import CheckpointError

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1", "BOOL": "?"}

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3)
arrays = st.tuples(st.sampled_from(sorted(NUMPY)), shapes).map(lambda pair: np.ones(pair[1], NUMPY[pair[0]]))
metadata = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), st.just("x"), max_size=3)


def refusal(path: Path, content: bytes) -> str:
    """The one line with which `content` is refused."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


@MANY
@given(tensors=st.dictionaries(names, arrays, max_size=6), about=metadata)
def test_reads_what_the_library_writes(tmp_path: Path, tensors: dict[str, Any], about: dict[str, str]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, about or None)  # no tensors and {} make the library write broken JSON
    found, found_about = read_header(path)
    assert found_about == about
    assert {t.name for t in found} == set(tensors)
    content = path.read_bytes()
    for t in found:
        assert t.shape == tensors[t.name].shape
        assert np.dtype(NUMPY[t.dtype]) == tensors[t.name].dtype
        assert content[t.start : t.end] == tensors[t.name].tobytes()
        assert t.shard == "model.safetensors"
    assert [t.start for t in found] == sorted(t.start for t in found)


@MANY
@given(tensors=st.dictionaries(names, arrays, max_size=6), about=metadata)
def test_library_reads_what_is_built(tmp_path: Path, tensors: dict[str, Any], about: dict[str, str]) -> None:
    codes = {np.dtype(form): code for code, form in NUMPY.items()}
    header = build_header(((n, codes[a.dtype], a.shape, a.nbytes) for n, a in tensors.items()), about)
    assert len(header) % 8 == 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"".join(a.tobytes() for a in tensors.values()))
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype
    with safe_open(path, "np") as file:
        assert (file.metadata() or {}) == about


@MANY
@given(data=st.data())
def test_round_trip_of_every_dtype(tmp_path: Path, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.sampled_from(sorted(DTYPE_BITS)), max_size=8))
    entries = [(f"t{i}", code, (2, 4 * i), i * DTYPE_BITS[code]) for i, code in enumerate(codes)]
    path = tmp_path / "x.safetensors"
    path.write_bytes(build_header(entries, {}) + bytes(sum(e[3] for e in entries)))
    tensors, about = read_header(path, "folder/x.safetensors")
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in tensors] == entries
    assert {t.shard for t in tensors} <= {"folder/x.safetensors"} and about == {}


@settings(parent=MANY, max_examples=400)
@given(data=st.data())
def test_corruption_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    good = build_header([("a", "F32", (2, 3), 24), ("b", "F4", (3, 2), 3), ("é", "I64", (), 8)], {"format": "pt"})
    content = bytearray(good + bytes(35))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.one_of(st.sampled_from(b'"{}[]:,0123456789\\'), st.integers(0, 255)))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        tensors, _ = read_header(path)
    except CheckpointError as error:
        assert "\n" not in error.message
    else:
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert sum(t.nbytes for t in tensors) == path.stat().st_size - 8 - length


A = entry("F32", [2], 0, 8)
TOO_LONG = "9" * 5000
MALFORMED = {
    "empty": (b"", "empty file (0 bytes)"),
    "short": (b"1234567", "truncated: 7 bytes"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
    "length-beyond-file": (raw_file(b"{}", length=3), "header of 3 bytes runs past the end of a file of 10 bytes"),
    "length-negative-as-signed": (raw_file(b"{}", length=2**64 - 1), "runs past the end"),
    "no-brace": (raw_file(b" {}"), "starts with b' '"),
    "no-header": (raw_file(b""), "starts with b''"),
    "list": (raw_file(b"[]"), "starts with b'['"),
    "utf8": (raw_file(b'{"\xff": 1}'), "invalid UTF-8 at byte 2"),
    "utf16": (raw_file("{}".encode("utf-16-le")), "invalid JSON"),
    "bom": (raw_file(b"\xef\xbb\xbf{}"), "starts with"),
    "json": (raw_file(b'{"a": '), "invalid JSON"),
    "trailing": (raw_file(b"{}{}"), "invalid JSON: Extra data"),
    "nul-padding": (raw_file(b"{}\0\0"), "invalid JSON: Extra data"),
    "deep": (raw_file(b'{"a":' + b"[" * 200_000), "invalid JSON"),
    "long-number": (raw_file(f'{{"a":{TOO_LONG}}}'.encode()), "invalid JSON"),
    "surrogate": (raw_file(b'{"\\ud800": {}}'), "not valid Unicode"),
    "duplicate-tensor": (raw_file(b'{"tw": {}, "tw": {}}'), "duplicate JSON key tw"),
    "duplicate-field": (raw_file(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "duplicate JSON key dtype"),
    "metadata-list": (raw_file({"__metadata__": ["pt"]}), "__metadata__ is not an object"),
    "metadata-number": (raw_file({"__metadata__": {"format": 1}}), "format is 1, expected a string"),
    "entry-number": (raw_file({"a": 1}), "tensor a: entry is 1"),
    "entry-missing": (raw_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "tensor a: entry is"),
    "entry-extra": (raw_file({"a": {**A, "scale": 1}}, bytes(8)), "tensor a: entry is"),
    "dtype-unknown": (raw_file({"a": entry("F33", [2], 0, 8)}, bytes(8)), "tensor a: unknown dtype F33"),
    "dtype-list": (raw_file({"a": {**A, "dtype": ["F32"]}}, bytes(8)), "tensor a: unknown dtype"),
    "shape-number": (raw_file({"a": {**A, "shape": 2}}, bytes(8)), "tensor a: shape is 2"),
    "shape-negative": (raw_file({"a": entry("F32", [-1, -2], 0, 8)}, bytes(8)), "tensor a: shape is [-1, -2]"),
    "shape-float": (raw_file({"a": {**A, "shape": [2.0]}}, bytes(8)), "tensor a: shape is [2.0]"),
    "shape-bool": (raw_file({"a": {**A, "shape": [True, 2]}}, bytes(8)), "tensor a: shape is [True, 2]"),
    "shape-huge": (raw_file({"a": entry("F32", [0, 2**63], 0, 0)}), "tensor a: shape is [0, 9223372036854775808]"),
    "shape-overflow": (raw_file({"a": entry("U8", [2**32, 2**32], 0, 0)}), "U8 [4294967296, 4294967296] needs 1844"),
    "rank": (raw_file({"a": entry("U8", [1] * 65, 0, 1)}, b"1"), "tensor a: shape is"),
    "offsets-three": (raw_file({"a": {**A, "data_offsets": [0, 8, 8]}}, bytes(8)), "tensor a: data_offsets are"),
    "offsets-backward": (raw_file({"a": entry("F32", [2], 8, 0)}, bytes(8)), "tensor a: data_offsets are [8, 0]"),
    "offsets-negative": (raw_file({"a": entry("F32", [2], -8, 0)}, bytes(8)), "tensor a: data_offsets are [-8, 0]"),
    "offsets-huge": (raw_file({"a": entry("F32", [2], 2**80, 2**80 + 8)}, bytes(8)), "tensor a: data_offsets are"),
    "length-dtype": (raw_file({"a": entry("F64", [2], 0, 8)}, bytes(8)), "span 8 bytes, F64 [2] needs 16"),
    "length-shape": (raw_file({"a": entry("F32", [3], 0, 8)}, bytes(8)), "span 8 bytes, F32 [3] needs 12"),
    "length-sub-byte": (raw_file({"a": entry("F4", [4], 0, 4)}, bytes(4)), "span 4 bytes, F4 [4] needs 2"),
    "sub-byte-rest": (raw_file({"a": entry("F6_E2M3", [3], 0, 2)}, bytes(2)), "needs 2 bytes and 2 bits, not whole"),
    "gap-front": (raw_file({"a": entry("U8", [4], 4, 8)}, bytes(8)), "tensor a: data begins at byte"),
    "gap": (raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, bytes(5)), "where a ends (a gap"),
    "overlap": (raw_file({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}, bytes(7)), "a ends (an overlap)"),
    "same-bytes": (raw_file({"a": A, "b": A}, bytes(8)), "tensor b: data begins at byte"),
    "truncated": (raw_file({"a": A, "b": entry("U8", [4], 8, 12)}, bytes(11)), "truncated in tensor b:"),
    "surplus": (raw_file({"a": A}, bytes(9)), "1 bytes behind the last tensor belong to no tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(case: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[case]
    assert expected in refusal(tmp_path / "x.safetensors", content)


def test_header_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # sparse: takes no space
        file.write((100_000_001).to_bytes(8, "little") + b"{}")
        file.truncate(100_000_009)
    with pytest.raises(CheckpointError, match="header of 100000001 bytes, at most 100000000 expected"):
        read_header(path)


def test_foreign_text_stays_on_one_line(tmp_path: Path) -> None:
    message = refusal(tmp_path / "x.safetensors", raw_file({"a\nb\x1b[31m" + "x" * 999: 1}))
    assert "a\\nb\\x1b[31mxx" in message and len(message) < 600


def test_absent_or_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name, expected in (("gone", "cannot be read: No such file"), (".", "not a regular"), ("pipe", "not a regular")):
        with pytest.raises(CheckpointError, match=expected):
            read_header(tmp_path / name)


def test_zero_sized_and_scalar_tensors_in_any_order(tmp_path: Path) -> None:
    header = {"z": entry("U8", [1], 8, 9), "e": entry("F32", [0, 7], 8, 8), "a": entry("F32", [2], 0, 8)}
    header["s"] = entry("F16", [], 9, 11)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(json.dumps(header).encode() + b"  ", bytes(11)))
    assert [(t.name, t.nbytes) for t in read_header(path)[0]] == [("a", 8), ("e", 0), ("z", 1), ("s", 2)]


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = build_header([("a", "U8", (2**42,), 2**42)], {})
    path.write_bytes(header)
    os.truncate(path, len(header) + 2**42)  # 4 TiB of hole
    (tensor,), _ = read_header(path)
    assert (tensor.start, tensor.nbytes) == (len(header), 2**42)
