"""The byte mover, against slicing with numpy: any shapes, any experts, any shard borders, any way of copying."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_models import Truth, file_bytes, half, large, opened, qwen3

from expertcut.checkpoint import Checkpoint, TensorInfo, open_checkpoint, read_bytes, read_header
from expertcut.errors import CheckpointError
from expertcut.model import ExpertTensor, Geometry, MoeBlock, Role, Sliced, Whole, resolve_family
from expertcut.rewrite import prune, require, verify_bytes
from expertcut.rewrite.compare import Survivor, changed_tensors, survivors, wrong_tensors
from expertcut.rewrite.copy import TRIAL_BYTES, TRIALS, Copier, WriteBack, write_shard
from expertcut.rewrite.layout import SHORT_RUN, OutShard, _shard, out_tensors, pack

BLOCK = "model.layers.0.mlp"
TOP_K = {0: 1}


def geometry_of(roles: dict[str, Role], experts: int) -> Geometry:
    block = MoeBlock(BLOCK, 0, False, f"{BLOCK}.gate.weight", f"{BLOCK}.experts.", tuple(roles), experts, 1)
    family = resolve_family({"model_type": "qwen3_moe"})
    return Geometry(family, roles, {BLOCK: block}, experts, 1, 1, 1, 4, 4, 1, True)


@st.composite
def sources(draw: st.DrawFn) -> tuple[dict[str, Truth], dict[str, Role], int, list[int]]:
    """Tensors of all roles, axes and widths; runs of the sliced ones from a byte to more than the kernel's share."""
    experts = draw(st.integers(1, 6))
    kept = sorted(draw(st.sets(st.integers(0, experts - 1), min_size=1)))
    tensors: dict[str, Truth] = {}
    roles: dict[str, Role] = {}
    for number in range(draw(st.integers(1, 6))):
        dtype, width = draw(st.sampled_from([("U8", 1), ("BF16", 2), ("F32", 4), ("I64", 8)]))
        kind = draw(st.sampled_from(["whole", "expert", "sliced"]))
        unit, axis = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        shape = [draw(st.integers(0, 4)) for _ in range(3)]
        if draw(st.booleans()):
            shape[2] = SHORT_RUN // width + draw(st.integers(-1, 1))
        name, role = f"t{number}", Whole() if kind == "whole" else Sliced(BLOCK, axis, unit)
        if kind == "sliced":
            shape[axis] = experts * unit
        for expert in range(experts) if kind == "expert" else [None]:
            full = name if expert is None else f"{BLOCK}.experts.{expert}.t{number}"
            data = np.random.default_rng(len(tensors)).bytes(int(np.prod(shape)) * width)
            tensors[full] = Truth(dtype, tuple(shape), data)
            roles[full] = role if expert is None else ExpertTensor(BLOCK, expert, f"t{number}")
    return tensors, roles, experts, kept


def sliced(truth: Truth, role: Role, kept: list[int]) -> tuple[str, tuple[int, ...], bytes]:
    """What a tensor must become, by numpy."""
    if not isinstance(role, Sliced):
        return truth.dtype, truth.shape, truth.data
    width = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}[truth.dtype]
    array = np.frombuffer(truth.data, np.uint8).reshape(*truth.shape, width)
    rows = [e * role.unit + i for e in kept for i in range(role.unit)]
    array = array.take(rows, axis=role.axis)
    return truth.dtype, array.shape[:-1], array.tobytes()


@settings(max_examples=150)
@given(sources(), st.booleans(), st.integers(1, 300_000), st.randoms(use_true_random=False))
def test_any_layout_is_sliced_as_numpy_slices(
    tmp_path_factory: pytest.TempPathFactory,
    source: tuple[dict[str, Truth], dict[str, Role], int, list[int]],
    kernel: bool,
    limit: int,
    random: "object",
) -> None:
    tensors, roles, experts, kept = source
    root = tmp_path_factory.mktemp("in")
    border = random.randint(1, len(tensors))  # type: ignore[attr-defined]
    names = list(tensors)
    parts = {"a.safetensors": names[:border], "b.safetensors": names[border:]}
    infos: dict[str, TensorInfo] = {}
    for shard, part in parts.items():
        (root / shard).write_bytes(file_bytes({name: tensors[name] for name in part}))
        infos |= {info.name: info for info in read_header(root / shard)[0]}
    infos = {name: infos[name] for name in names}
    ckpt = Checkpoint("x", root, {}, infos, dict.fromkeys(parts, 0), True, ())
    geometry = geometry_of(roles, experts)
    expected = {}
    for name, truth in tensors.items():
        role = roles[name]
        if isinstance(role, ExpertTensor):
            if role.expert not in kept:
                continue
            name = f"{BLOCK}.experts.{kept.index(role.expert)}.{role.part}"
        expected[name] = sliced(truth, role, kept)
    groups = [_shard(f"{i}", g) for i, g in enumerate(pack(out_tensors(ckpt, geometry, {BLOCK: kept}, TOP_K), limit))]
    found, out = {}, {}
    with WriteBack() as back:
        for group in groups:
            write_shard(root, group, root / group.name, Copier(kernel=kernel), back, lambda nbytes: None).result()
            assert (root / group.name).stat().st_size == group.nbytes
            for info in read_header(root / group.name)[0]:
                out[info.name] = info
                found[info.name] = (info.dtype, info.shape, (root / group.name).read_bytes()[info.start : info.end])
    assert found == expected
    written = Checkpoint("y", root, {}, out, {}, True, ())
    wanted = list(survivors(ckpt, geometry, {BLOCK: kept}, TOP_K))
    assert not [*wrong_tensors(written, wanted), *changed_tensors(written, ckpt, wanted)]
    check_that_a_flipped_byte_is_found(written, ckpt, wanted, random)


def check_that_a_flipped_byte_is_found(
    written: Checkpoint, ckpt: Checkpoint, wanted: list[Survivor], random: "object"
) -> None:
    filled = [info for info in written.tensors.values() if info.nbytes]
    if not filled:
        return
    info = random.choice(filled)  # type: ignore[attr-defined]
    path, at = written.path / info.shard, random.randrange(info.start, info.end)  # type: ignore[attr-defined]
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << random.randrange(8)  # type: ignore[attr-defined]
    path.write_bytes(data)
    findings = list(changed_tensors(written, ckpt, wanted))
    assert len(findings) == 1
    assert f"{path}: tensor {info.name} " in findings[0]


def test_kept_neighbours_are_one_copy(tmp_path: Path) -> None:
    ckpt, geometry = opened(qwen3().write(tmp_path / "in", shards=1))
    everything = {prefix: range(8) for prefix in geometry.blocks}
    [group] = pack((t for t in out_tensors(ckpt, geometry, everything, TOP_K) if t.source.dtype == "BF16"), 10**9)
    bf16 = [t for t in ckpt.tensors.values() if t.dtype == "BF16"]
    gaps = sum(a.end != b.start for a, b in zip(bf16, bf16[1:], strict=False))
    assert len(list(OutShard("x", b"", tuple(group)).steps())) == gaps + 1


def test_both_ways_are_tried_on_long_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("no copy_file_range here")
    data = np.random.default_rng(0).bytes((TRIALS + 2) * TRIAL_BYTES)
    (tmp_path / "a").write_bytes(data)
    calls = []
    real = os.copy_file_range

    def counted(*args: int) -> int:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(os, "copy_file_range", counted)
    copier = Copier()
    assert copied(copier, tmp_path, TRIAL_BYTES) == data
    assert len(calls) >= TRIALS // 2
    assert copier.kernel or len(calls) == TRIALS // 2


def copied(copier: Copier, folder: Path, step: int) -> bytes:
    """Copy the file `a` to `b`, `step` bytes per call, and return what arrived."""
    source, target = os.open(folder / "a", os.O_RDONLY), os.open(folder / "b", os.O_WRONLY | os.O_CREAT)
    size, done = os.fstat(source).st_size, 0
    while done < size:
        done += copier.copy(source, done, target, done, min(step, size - done))
    assert copier.copy(source, size, target, size, 1) == 0
    os.close(source)
    os.close(target)
    return (folder / "b").read_bytes()


@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_kernel_that_refuses_is_not_asked_again(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def refuse(*args: int) -> int:
        nonlocal calls
        calls += 1
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    data = np.random.default_rng(0).bytes(700_000)
    (tmp_path / "a").write_bytes(data)
    assert copied(Copier(), tmp_path, 300_000) == data
    assert calls == 1


def test_other_errors_of_the_kernel_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", broken, raising=False)
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(OSError, match="Input/output error"):
        copied(Copier(), tmp_path, 3)


@pytest.mark.parametrize("most", [0, 1000])
def test_short_copies_are_carried_on(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("no copy_file_range here")
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, i, j: real(a, b, min(n, most), i, j) if most else 0)
    ckpt, geometry = opened(qwen3(width=300).write(tmp_path / "in"))
    prune(ckpt, geometry, half(ckpt, geometry), tmp_path / "out")
    require(verify_bytes(tmp_path / "out", ckpt))


def test_from_one_file_system_to_another(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    ckpt, geometry = opened(large().write(tmp_path / "in"))
    out = shared / f"expertcut-test-{os.getpid()}"
    plan = half(ckpt, geometry)
    try:
        prune(ckpt, geometry, plan, out)
        require(verify_bytes(out, ckpt))
    finally:
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
        out.rmdir()


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_ends_early(kernel: bool, tmp_path: Path) -> None:
    ckpt, geometry = opened(qwen3().write(tmp_path / "in", shards=1))
    everything = {prefix: range(8) for prefix in geometry.blocks}
    [group] = pack(out_tensors(ckpt, geometry, everything, TOP_K), 10**9)
    os.truncate(tmp_path / "in/model.safetensors", 9000)
    with WriteBack() as back, pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte \d+, \d+ more"):
        write_shard(ckpt.path, _shard("x", group), tmp_path / "x", Copier(kernel=kernel), back, lambda n: None).result()


def test_large_tensors_arrive(tmp_path: Path) -> None:
    model = large()
    ckpt, geometry = opened(model.write(tmp_path / "in"))
    plan = half(ckpt, geometry)
    prune(ckpt, geometry, plan, tmp_path / "out", max_shard_size=20_000_000)
    out = open_checkpoint(tmp_path / "out")
    kept = {prefix: entry.kept for prefix, entry in plan.layers.items()}
    for name, (_, _, data) in model.pruned(kept).items():
        assert read_bytes(out, name) == data, name
