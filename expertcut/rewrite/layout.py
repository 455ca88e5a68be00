"""Headers, geometry and plan in; every byte of the new shards accounted for. Nothing is written, and of the tensors
nothing read but the routers of layers that route by token id.

Invariant: kept experts are renumbered 0..E'-1, and each output tensor is a list of byte ranges of its source tensor.
Where neighbours in an output shard were neighbours in a source shard, their ranges join into one long copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from expertcut.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo, build_header, load_json, read_array
from expertcut.checkpoint.local import INDEX, SINGLE
from expertcut.choose.plan import Plan, dropped_tensors, kept_by_block, numbers, validate
from expertcut.errors import CheckpointError, UsageError
from expertcut.model import Edit, ExpertTensor, Geometry, Remapped, Sliced
from expertcut.model.hashing import StandIns, stand_ins
from expertcut.model.uneven import marked
from expertcut.rewrite.config import config_bytes, differences, edit_config
from expertcut.rewrite.deltas import new_tensors
from expertcut.rewrite.fitness import unfit_shards
from expertcut.rewrite.gain import config_gain, folded
from expertcut.rewrite.quantization import COMPANIONS, quantization_edits, rewrite_document

MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of tensor data per shard unless asked otherwise; what transformers calls 5GB."""
SHORT_RUN = 16 * 1024
"""Bytes; a sliced tensor whose kept runs are shorter on average is gathered in memory, not copied range by range."""
RECORD = "expertcut.json"
"""The file that says how a checkpoint was made; the source's own is not carried over."""

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Gather:
    """The kept parts of a tensor seen as `slabs` pieces of `stride` bytes: the byte runs [begin, end) of every slab."""

    slabs: int
    stride: int
    runs: Runs

    @property
    def short(self) -> bool:
        """True if the runs are too short for copies of their own."""
        return sum(end - begin for begin, end in self.runs) < SHORT_RUN * len(self.runs)


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of the new checkpoint, and where its bytes come from."""

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    nbytes: int
    gather: Gather | None = None
    """None: all bytes of the source tensor."""
    remap: StandIns | None = None
    """For a table of expert ids: who takes over from whom."""
    factor: float | None = None
    """What every value is multiplied by."""
    replaced: bool = False
    """True if `source` lies in the plan's file of new values, not in the checkpoint; its `shard` is a whole path."""

    @property
    def unchanged(self) -> bool:
        """True if it is its source tensor, whole and under the same name."""
        same = (self.name, self.shape) == (self.source.name, self.source.shape) and not self.replaced
        return same and self.gather is None and self.remap is None and self.factor is None

    @property
    def in_memory(self) -> bool:
        """True if the tensor passes through memory instead of being copied by the kernel."""
        through = self.remap is not None or self.factor is not None
        return through or (self.gather is not None and self.gather.short)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of the source shard, as (offset, bytes), in order."""
        if self.gather is None:
            yield self.source.start, self.source.nbytes
            return
        for slab in range(self.gather.slabs):
            base = self.source.start + slab * self.gather.stride
            for begin, end in self.gather.runs:
                yield base + begin, end - begin


@dataclass(frozen=True, slots=True)
class Move:
    """One copy: `nbytes` bytes at `offset` of the source shard."""

    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class OutShard:
    """One file to write: its header, then its tensors back to back."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]
    whole: Move | None = None
    """A shard of the source that is taken over as it is, header and all; None: written from its parts."""

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.whole.nbytes if self.whole else len(self.header) + sum(t.nbytes for t in self.tensors)

    def steps(self) -> Iterator[Move | OutTensor]:
        """What to append after the header: copies, as long as they can be, and tensors to gather in memory."""
        if self.whole:
            yield self.whole
            return
        last: Move | None = None
        for tensor in self.tensors:
            if tensor.in_memory:
                if last:
                    yield last
                last = None
                yield tensor
                continue
            for offset, nbytes in tensor.ranges():
                if last and last.shard == tensor.source.shard and last.offset + last.nbytes == offset:
                    last = Move(last.shard, last.offset, last.nbytes + nbytes)
                    continue
                if last:
                    yield last
                last = Move(tensor.source.shard, offset, nbytes)
        if last:
            yield last


@dataclass(frozen=True)
class Layout:
    """Everything that a rewrite will write, but for `expertcut.json`."""

    shards: tuple[OutShard, ...]
    index: bytes | None
    """Contents of `model.safetensors.index.json`; None for a single shard, which needs none."""
    config: dict[str, Any]
    """The edited `config.json`."""
    edits: tuple[Edit, ...]
    companions: Mapping[str, int]
    """Files copied as they are, with their bytes."""
    documents: Mapping[str, bytes]
    """Contents of companions that name single experts, rewritten like the config."""
    experts: int
    top_k: int
    wanting: str | None
    """What is wanting for the source's shards to be taken over as they are; None: they are."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for shard in self.shards for t in shard.tensors)

    @property
    def in_memory(self) -> int:
        """Bytes of tensors that pass through memory; the kernel copies the others."""
        return sum(t.nbytes for shard in self.shards for t in shard.tensors if t.in_memory)

    @property
    def files(self) -> dict[str, int]:
        """Names and bytes of shards, index and companions."""
        shards = {shard.name: shard.nbytes for shard in self.shards}
        documents = {name: len(data) for name, data in self.documents.items()}
        return shards | ({INDEX: len(self.index)} if self.index else {}) | dict(self.companions) | documents


def plan_layout(ckpt: Checkpoint, geometry: Geometry, plan: Plan, max_shard_size: int | None = None) -> Layout:
    """Lay out the checkpoint that `plan` leaves.

    `max_shard_size` is bytes of tensor data per file; None: the source's shards if the plan changes no tensor and they
    are as runtimes expect them, else `MAX_SHARD_SIZE`.

    Raises:
        PlanError: the plan cannot be carried out on this geometry, or its new values are not to be had.
        CheckpointError: a tensor cannot be cut at byte borders, a companion is gone, or the quantization config names
            single experts in a way that cannot be rewritten exactly.
        UsageError: `max_shard_size` is not positive.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"--max-shard-size {max_shard_size}: expected a positive number of bytes")
    validate(plan, geometry)
    kept, edits = kept_by_block(plan, geometry), config_edits(ckpt, geometry, plan)
    top_k = numbers(plan, geometry).top_k
    factors, replaced = folded(ckpt, geometry, plan), new_tensors(ckpt, geometry, plan)
    tensors = [
        _new_values(tensor, new) if (new := replaced.get(tensor.source.name)) else tensor
        for tensor in out_tensors(ckpt, geometry, kept, top_k, dropped_tensors(plan, geometry), factors)
    ]
    wanting = _wanting(ckpt, tensors, max_shard_size)
    shards = _packed(tensors, max_shard_size or MAX_SHARD_SIZE) if wanting else _whole_shards(ckpt, tensors)
    documents = rewritten_companions(ckpt, geometry, plan)
    companions = {name: size for name, size in _companions(ckpt).items() if name not in documents}
    return Layout(
        shards, _index(shards), edit_config(ckpt.config, edits), edits, companions, documents, plan.experts,
        plan.top_k(geometry), wanting,
    )  # fmt: skip


def config_edits(ckpt: Checkpoint, geometry: Geometry, plan: Plan) -> tuple[Edit, ...]:
    """Return every value of `config.json` that a plan changes.

    Raises:
        ConfigConflictError: an entry of the quantization config cannot be rewritten exactly.
    """
    owned = geometry.config_edits(ckpt.config, plan.experts, plan.top_k(geometry))
    owned += config_gain(ckpt.config, geometry, plan)
    found = numbers(plan, geometry)
    marks = list(differences(ckpt.config, marked(ckpt.config, found))) if found.uneven else []
    announced = geometry.mtp_edits(ckpt.config) if plan.mtp == "drop" else []
    kept, dropped = kept_by_block(plan, geometry), dropped_tensors(plan, geometry)
    return (*owned, *announced, *marks, *quantization_edits(ckpt.config, geometry, kept, dropped))


def rewritten_companions(ckpt: Checkpoint, geometry: Geometry, plan: Plan) -> dict[str, bytes]:
    """Return the companions that repeat the quantization config and name single modules, as they must become.

    Raises:
        CheckpointError: such a file is no valid JSON, or an entry cannot be rewritten exactly.
    """
    found = {}
    kept, dropped = kept_by_block(plan, geometry), dropped_tensors(plan, geometry)
    for name in set(COMPANIONS) & set(ckpt.companions):
        old = load_json(ckpt.path / name)
        new = rewrite_document(old, name, geometry, kept, dropped)
        if json.dumps(new) != json.dumps(old):
            found[name] = config_bytes(new)
    return found


def out_tensors(
    ckpt: Checkpoint, geometry: Geometry, kept: Mapping[str, Sequence[int]], top_k: Mapping[int, int],
    dropped: Collection[str] = (), factors: Mapping[str, float] = MappingProxyType({}),
) -> Iterator[OutTensor]:  # fmt: skip
    """Yield the tensors of the new checkpoint in source order; `kept` holds the kept ids of every block.

    `top_k` is the new one of every MoE layer; `dropped` names tensors that go altogether, `factors` those whose values
    are multiplied.

    Raises:
        CheckpointError: a tensor cannot be cut at byte borders, or a table of expert ids is none.
    """
    tail = range(geometry.num_experts, geometry.num_experts + geometry.tail)
    on_disk = {prefix: geometry.ids_on_disk(block, kept) for prefix, block in geometry.blocks.items()}
    renumber = {prefix: {old: new for new, old in enumerate((*ids, *tail))} for prefix, ids in on_disk.items()}
    for name, role in geometry.roles.items():
        source = ckpt.tensors[name]
        if name in dropped:
            continue
        if isinstance(role, ExpertTensor):
            new = renumber[role.block].get(role.expert)
            if new is not None:
                prefix, factor = geometry.blocks[role.block].expert_prefix, factors.get(name)
                yield OutTensor(f"{prefix}{new}.{role.part}", source, source.shape, source.nbytes, factor=factor)
        elif isinstance(role, Sliced):
            ids = on_disk[role.block] if role.sets > 1 else (*kept[role.block], *tail[: role.tail])
            yield replace(_sliced(source, role, ids), factor=factors.get(name))
        elif isinstance(role, Remapped):
            block = geometry.blocks[role.block]
            if len(kept[role.block]) == block.experts and source.shape[-1] <= top_k[block.layer]:
                yield OutTensor(name, source, source.shape, source.nbytes)
                continue
            yield _remapped(source, stand_ins(read_array(ckpt, block.router), kept[role.block]), top_k[block.layer])
        else:
            yield OutTensor(name, source, source.shape, source.nbytes)


def _wanting(ckpt: Checkpoint, tensors: Iterable[OutTensor], max_shard_size: int | None) -> str | None:
    """What is wanting for the source's shards to be taken over as they are; None: nothing is."""
    if max_shard_size is not None:
        return "shards of the source's size, without --max-shard-size"
    unchanged = {tensor.name for tensor in tensors if tensor.unchanged}
    changed = [name for name in ckpt.tensors if name not in unchanged]
    if changed:
        return f"a plan that changes no tensor: {len(changed)} of {len(ckpt.tensors)} change or go, as {changed[0]}"
    unfit = next(unfit_shards(ckpt), None)
    return unfit and f"shards that can stay as they are: {unfit}"


def _whole_shards(ckpt: Checkpoint, tensors: Iterable[OutTensor]) -> tuple[OutShard, ...]:
    """The source's own shards, in their order, under the usual names."""
    groups: dict[str, list[OutTensor]] = {name: [] for name in ckpt.shards}
    for tensor in tensors:
        groups[tensor.source.shard].append(tensor)
    return tuple(
        OutShard(_shard_name(i, len(groups)), b"", tuple(group), Move(name, 0, ckpt.shards[name]))
        for i, (name, group) in enumerate(groups.items())
    )


def _packed(tensors: Iterable[OutTensor], max_shard_size: int) -> tuple[OutShard, ...]:
    groups = list(pack(tensors, max_shard_size))
    return tuple(_shard(_shard_name(i, len(groups)), group) for i, group in enumerate(groups))


_Sized = TypeVar("_Sized", OutTensor, TensorInfo)


def pack(tensors: Iterable[_Sized], max_shard_size: int) -> Iterator[list[_Sized]]:
    """Fill shards in order, each up to `max_shard_size` bytes; a larger tensor gets a shard of its own."""
    group: list[_Sized] = []
    filled = 0
    for tensor in tensors:
        if group and filled + tensor.nbytes > max_shard_size:
            yield group
            group, filled = [], 0
        group.append(tensor)
        filled += tensor.nbytes
    yield group


def _sliced(source: TensorInfo, role: Sliced, kept: Sequence[int]) -> OutTensor:
    shape = list(source.shape)
    slabs = prod(shape[: role.axis]) // role.sets
    bits = role.unit * prod(shape[role.axis + 1 :]) * DTYPE_BITS[source.dtype]
    if bits % 8:
        raise CheckpointError(f"{source.shard}: tensor {source.name}: an expert's part is {bits} bits, not whole bytes")
    part = bits // 8
    shape[role.axis] = len(kept) * role.unit // role.sets
    runs = _runs(kept, part)
    stride = source.nbytes // slabs if slabs else 0
    whole = runs == ((0, stride),)
    gather = None if whole or not stride else Gather(slabs, stride, runs)
    return OutTensor(source.name, source, tuple(shape), slabs * len(kept) * part, gather)


def _new_values(tensor: OutTensor, new: TensorInfo) -> OutTensor:
    """The same tensor of the new checkpoint, its bytes taken from the plan's file of new values."""
    return OutTensor(tensor.name, new, tensor.shape, tensor.nbytes, replaced=True)


def _remapped(source: TensorInfo, who: StandIns, top_k: int) -> OutTensor:
    if len(source.shape) != 2 or source.dtype not in ("I32", "I64", "U32", "U64"):
        raise CheckpointError(
            f"{source.shard}: tensor {source.name} is {source.dtype} {list(source.shape)}, expected a table of integers"
        )
    shape = (source.shape[0], min(top_k, source.shape[1]))
    return OutTensor(source.name, source, shape, prod(shape) * DTYPE_BITS[source.dtype] // 8, remap=who)


def _runs(kept: Sequence[int], part: int) -> Runs:
    """Byte runs of the kept experts within a slab, `part` bytes each, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for expert in kept:
        begin = expert * part
        if runs and runs[-1][1] == begin:
            begin = runs.pop()[0]
        runs.append((begin, (expert + 1) * part))
    return tuple(runs)


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _shard(name: str, group: list[OutTensor]) -> OutShard:
    """Wide elements first, so that every tensor is aligned to its element size; otherwise in source order."""
    group.sort(key=lambda tensor: -(DTYPE_BITS[tensor.source.dtype] // 8))
    header = build_header(((t.name, t.source.dtype, t.shape, t.nbytes) for t in group), {"format": "pt"})
    return OutShard(name, header, tuple(group))


def _index(shards: Sequence[OutShard]) -> bytes | None:
    if len(shards) == 1:
        return None
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()


def _companions(ckpt: Checkpoint) -> dict[str, int]:
    return {name: source_status(ckpt.path / name).st_size for name in ckpt.companions if name != RECORD}


def source_status(path: Path) -> os.stat_result:
    """Size and times of a file of the source.

    Raises:
        CheckpointError: it is gone.
    """
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
