"""Two checkpoints and the kept experts in; what is missing, misshapen or changed out, one line each.

Works from the source's geometry alone, not from the layout that wrote the new checkpoint. Memory is bounded: long parts
are compared buffer by buffer, tensors of short parts in pieces.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from expertcut.checkpoint import Checkpoint, TensorInfo, read_array
from expertcut.errors import CheckpointError
from expertcut.model import ExpertTensor, Geometry, Remapped, Sliced
from expertcut.model.hashing import StandIns, remap, stand_ins, table_of_ids
from expertcut.rewrite.files import Folder
from expertcut.rewrite.gain import rescaled

BUFFER = 256 * 2**10
PIECE = 8 * 2**20
SHORT = 16 * 2**10
"""Bytes: an expert's part of a sliced tensor below that is compared in memory, many at a time."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Survivor:
    """A tensor that must be there, and what it must hold."""

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    kept: Sequence[int] | None = None
    """For a sliced tensor the kept rows, in units of an expert's; otherwise all bytes must be equal."""
    slabs: int = 1
    """How often such rows occur, one batch behind the other."""
    remap: StandIns | None = None
    """For a table of expert ids: who takes over from whom."""
    factor: float | None = None
    """What every value is multiplied by, where the plan has a gain."""
    digest: str | None = None
    """sha256 of what it must hold, where the plan has new values for it."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = prod(self.source.shape)
        return self.source.nbytes * prod(self.shape) // size if size else 0


def survivors(
    source: Checkpoint, geometry: Geometry, kept: Mapping[str, Sequence[int]], top_k: Mapping[int, int],
    dropped: Collection[str] = (), factors: Mapping[str, float] = MappingProxyType({}),
) -> Iterator[Survivor]:  # fmt: skip
    """Yield what the kept experts leave of the source, in source order; `top_k` is the new one of every MoE layer.

    `dropped` names tensors that go altogether, `factors` those whose values are multiplied.
    """
    tail = tuple(range(geometry.num_experts, geometry.num_experts + geometry.tail))
    on_disk = {prefix: geometry.ids_on_disk(block, kept) for prefix, block in geometry.blocks.items()}
    places = {prefix: {old: new for new, old in enumerate((*ids, *tail))} for prefix, ids in on_disk.items()}
    for name, role in geometry.roles.items():
        old = source.tensors[name]
        if name in dropped:
            continue
        if isinstance(role, ExpertTensor):
            place = places[role.block].get(role.expert)
            if place is not None:
                new = f"{geometry.blocks[role.block].expert_prefix}{place}.{role.part}"
                yield Survivor(new, old, old.shape, factor=factors.get(name))
        elif isinstance(role, Sliced):
            ids = on_disk[role.block] if role.sets > 1 else (*kept[role.block], *tail[: role.tail])
            before, behind = old.shape[: role.axis], old.shape[role.axis + 1 :]
            shape = (*before, len(ids) * role.unit // role.sets, *behind)
            yield Survivor(name, old, shape, ids, prod(before) // role.sets, factor=factors.get(name))
        elif isinstance(role, Remapped):
            block = geometry.blocks[role.block]
            if len(kept[role.block]) == block.experts and old.shape[-1] <= top_k[block.layer]:
                yield Survivor(name, old, old.shape)
                continue
            who = stand_ins(read_array(source, block.router), kept[role.block])
            yield Survivor(name, old, (old.shape[0], min(top_k[block.layer], *old.shape[1:])), remap=who)
        else:
            yield Survivor(name, old, old.shape)


def wrong_tensors(ckpt: Checkpoint, expected: Sequence[Survivor]) -> Iterator[str]:
    """Yield tensors that are missing, not of the source's dtype, misshapen, or too many."""
    for survivor in expected:
        found, old = ckpt.tensors.get(survivor.name), survivor.source
        if found is None:
            yield f"{ckpt.path}: no tensor {survivor.name} (from {old.name})"
        elif (found.dtype, found.shape) != (old.dtype, survivor.shape):
            yield (
                f"{ckpt.path / found.shard}: tensor {found.name} is {found.dtype} {list(found.shape)}, "
                f"expected {old.dtype} {list(survivor.shape)}"
            )
    names = {survivor.name for survivor in expected}
    for name, found in ckpt.tensors.items():
        if name not in names:
            yield f"{ckpt.path / found.shard}: tensor {name} should not be there"


def changed_tensors(ckpt: Checkpoint, source: Checkpoint, expected: Sequence[Survivor]) -> Iterator[str]:
    """Yield tensors whose bytes are not those of the source, or not those that the plan says; reads both once.

    Raises:
        CheckpointError: a file cannot be read or has become shorter.
    """
    with _Reader(source.path) as old, _Reader(ckpt.path) as new:
        for survivor in expected:
            found = ckpt.tensors.get(survivor.name)
            if found is None or found.nbytes != survivor.nbytes:
                yield f"{ckpt.path}: tensor {survivor.name} is missing or of another size"
            elif not _equal(survivor, found, old, new):
                other = survivor.source.name if survivor.digest is None else "the plan's new values"
                yield f"{ckpt.path / found.shard}: tensor {survivor.name} differs from {other}"


def changed_files(ckpt: Checkpoint, source: Checkpoint, names: Sequence[str]) -> Iterator[str]:
    """Yield companions whose bytes are not those of the source.

    Raises:
        CheckpointError: a file of the source cannot be read.
    """
    with _Reader(source.path) as old, _Reader(ckpt.path) as new:
        for name in names:
            path, size = ckpt.path / name, (source.path / name).stat().st_size
            same = path.is_file() and path.stat().st_size == size
            if not same or not _ranges_equal(old, name, 0, new, name, 0, size):
                yield f"{path}: {'differs from the source' if path.is_file() else 'missing'}"


def wrong_files(ckpt: Checkpoint, expected: Mapping[str, bytes]) -> Iterator[str]:
    """Yield companions that do not hold what they must."""
    for name, data in expected.items():
        path = ckpt.path / name
        if not path.is_file() or path.read_bytes() != data:
            yield f"{path}: {'is not what the plan makes of it' if path.is_file() else 'missing'}"


def _equal(survivor: Survivor, found: TensorInfo, old: _Reader, new: _Reader) -> bool:
    source = survivor.source
    if survivor.digest is not None:
        return _digest(found, new) == survivor.digest
    changes = survivor.remap is not None or survivor.factor is not None
    same_place = (source.start, source.nbytes) == (found.start, found.nbytes)
    if not changes and same_place and os.path.samestat(old.status(source.shard), new.status(found.shard)):
        return True  # one file under two names
    if survivor.remap is not None:
        before = table_of_ids(old.read(source.shard, source.start, source.nbytes).tobytes(), source)
        after = table_of_ids(new.read(found.shard, found.start, found.nbytes).tobytes(), found)
        return np.array_equal(remap(before, survivor.remap, survivor.shape[1]), after)
    if survivor.factor is not None:
        return _equals_rescaled(survivor, found, old, new)
    if survivor.kept is None or not found.nbytes:
        return _ranges_equal(old, source.shard, source.start, new, found.shard, found.start, found.nbytes)
    slabs, count = survivor.slabs, len(survivor.kept)
    part = found.nbytes // (slabs * count)
    experts = source.nbytes // (slabs * part)
    if part >= SHORT:
        return all(
            _ranges_equal(old, source.shard, before, new, found.shard, after, part)
            for before, after in _parts(survivor, found)
        )
    step = max(1, PIECE // (experts * part))
    for first in range(0, slabs, step):
        rows = min(step, slabs - first)
        before = old.read(source.shard, source.start + first * experts * part, rows * experts * part)
        after = new.read(found.shard, found.start + first * count * part, rows * count * part)
        chosen = before.reshape(rows, experts, part)[:, list(survivor.kept)]
        if not np.array_equal(chosen, after.reshape(rows, count, part)):
            return False
    return True


def _digest(found: TensorInfo, new: _Reader) -> str:
    digest = hashlib.sha256()
    for done in range(0, found.nbytes, BUFFER):
        digest.update(new.buffered(found.shard, found.start + done, min(BUFFER, found.nbytes - done)).data)
    return digest.hexdigest()


def _parts(survivor: Survivor, found: TensorInfo) -> Iterator[tuple[int, int]]:
    """Yield where each kept part begins in the source's shard and in the new one."""
    source, kept = survivor.source, survivor.kept
    if kept is None:
        yield source.start, found.start
        return
    part = found.nbytes // (survivor.slabs * len(kept))
    experts = source.nbytes // (survivor.slabs * part)
    for slab in range(survivor.slabs):
        for place, expert in enumerate(kept):
            yield source.start + (slab * experts + expert) * part, found.start + (slab * len(kept) + place) * part


def _equals_rescaled(survivor: Survivor, found: TensorInfo, old: _Reader, new: _Reader) -> bool:
    assert survivor.factor is not None
    places = list(_parts(survivor, found))
    part = found.nbytes // len(places)
    for before, after in places:
        for done in range(0, part, PIECE):
            size = min(PIECE, part - done)
            expected = rescaled(
                old.read(survivor.source.shard, before + done, size), survivor.source.dtype, survivor.factor
            )
            if not np.array_equal(expected, new.read(found.shard, after + done, size)):
                return False
    return True


def _ranges_equal(old: _Reader, name: str, start: int, new: _Reader, other: str, begin: int, nbytes: int) -> bool:
    for done in range(0, nbytes, BUFFER):
        size = min(BUFFER, nbytes - done)
        if not np.array_equal(old.buffered(name, start + done, size), new.buffered(other, begin + done, size)):
            return False
    return True


class _Reader(Folder):
    """Bytes of a checkpoint's files."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._buffer: Bytes = np.empty(BUFFER, np.uint8)

    def status(self, name: str) -> os.stat_result:
        """What the system says of a file."""
        return os.fstat(self.open(name))

    def buffered(self, name: str, offset: int, nbytes: int) -> Bytes:
        """At most BUFFER bytes, valid until the next call."""
        return self._fill(name, offset, self._buffer[:nbytes])

    def read(self, name: str, offset: int, nbytes: int) -> Bytes:
        return self._fill(name, offset, np.empty(nbytes, np.uint8))

    def _fill(self, name: str, offset: int, target: Bytes) -> Bytes:
        path, done, file = self.root / name, 0, self.open(name)
        try:
            while done < target.nbytes:
                got = os.preadv(file, [target[done:].data], offset + done)
                if not got:
                    raise CheckpointError(f"{path}: ends at byte {offset + done}; it has changed since it was opened")
                done += got
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        return target
