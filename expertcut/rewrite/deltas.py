"""New values of tensors: a safetensors file beside the plan that names them, each by its name in the source.

A tensor holds the values of the kept experts only, in the source's dtype, so that its bytes are those of the new
checkpoint: the rewriter copies them, and what runs a plan in memory reads the same. The plan holds a sha256 of each.
Invariant: a file is there whole or not at all, and no bytes other than those that the plan was measured with are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

import expertcut
from expertcut.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo, build_header
from expertcut.checkpoint.header import read_header
from expertcut.choose.plan import Deltas, Plan, deltas_of, dropped_tensors, kept_by_block
from expertcut.errors import CheckpointError, DestinationError, PlanError
from expertcut.model import ExpertTensor, Geometry, Sliced
from expertcut.rewrite.files import write_all

SCHEMA = "expertcut.deltas/1"
PIECE = 8 * 2**20
"""Bytes that are compared at a time."""
_AGAIN = "run the `heal` that made the plan again"


def new_shape(ckpt: Checkpoint, geometry: Geometry, plan: Plan, name: str) -> tuple[int, ...]:
    """Return the shape that a tensor of the source has under a plan, new values included.

    Raises:
        PlanError: the model has no such tensor, or the plan drops it.
    """
    role = geometry.roles.get(name)
    if role is None or name in dropped_tensors(plan, geometry):
        raise PlanError(f"the plan has new values for {name}, which the model lacks or the plan drops", _AGAIN)
    shape, kept = ckpt.tensors[name].shape, kept_by_block(plan, geometry)
    if isinstance(role, Sliced):
        if role.sets > 1:
            raise PlanError(f"{name}: two sets of experts in one tensor, which can get no new values")
        count = len(kept[role.block]) * role.unit + role.tail
        return (*shape[: role.axis], count, *shape[role.axis + 1 :])
    if isinstance(role, ExpertTensor) and role.expert not in geometry.ids_on_disk(geometry.blocks[role.block], kept):
        raise PlanError(f"the plan has new values for {name}, an expert that it drops", _AGAIN)
    return shape


def new_tensors(ckpt: Checkpoint, geometry: Geometry, plan: Plan) -> dict[str, TensorInfo]:
    """Return where the new values of tensors lie, by the source's names; `shard` is the file's whole path.

    Raises:
        PlanError: the file is missing or damaged, or does not hold what the plan says.
    """
    if plan.deltas is None:
        return {}
    path = plan.deltas_path
    if not os.path.isfile(path):  # of a name that is too long `Path.is_file` raises
        raise PlanError(f"{path}: no such file; the plan keeps new values of tensors in it", "put it beside the plan")
    try:
        tensors, metadata = read_header(path, str(path))
    except CheckpointError as error:
        raise PlanError(error.message, _AGAIN) from error
    if metadata.get("schema") != SCHEMA:
        raise PlanError(f"{path}: schema is {metadata.get('schema')!r}, expected {SCHEMA!r}", _AGAIN)
    found = {tensor.name: tensor for tensor in tensors}
    known = {name for block in geometry.trunk for name in deltas_of(plan, block)}
    for name in plan.deltas.tensors:
        if name not in known:
            raise PlanError(f"the plan has new values for {name}, which is in no MoE layer", _AGAIN)
        shape = new_shape(ckpt, geometry, plan, name)
        dtype, tensor = ckpt.tensors[name].dtype, found.get(name)
        if tensor is None:
            raise PlanError(f"{path}: holds no {name}, for which the plan has new values", _AGAIN)
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise PlanError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}", _AGAIN
            )
    return {name: found[name] for name in plan.deltas.tensors}


def check_path(path: Path) -> None:
    """Check that what has the name of a file of new values, if anything, is one and may be replaced.

    Raises:
        DestinationError: it is something else, such as a model's weights.
    """
    if not os.path.lexists(path):
        return
    try:
        schema = read_header(path)[1].get("schema")
    except CheckpointError as error:
        raise DestinationError(f"{path}: is in the way: {error.message}", "choose another name") from error
    if schema != SCHEMA:
        raise DestinationError(f"{path}: is there, and no file of new values of a plan", "choose another name")


def read_new(info: TensorInfo, digest: str) -> npt.NDArray[np.uint8]:
    """Return the bytes of a tensor's new values, (N,) uint8, after comparing them with the plan's sha256.

    Raises:
        PlanError: the file cannot be read, or they are others.
    """
    try:
        with open(info.shard, "rb") as file:
            raw = np.fromfile(file, np.uint8, info.nbytes, offset=info.start)
    except OSError as error:
        raise _unreadable(info, error) from error
    _compare(info, hashlib.sha256(raw.data).hexdigest(), digest)
    return raw


def check_new(tensors: Iterable[TensorInfo], digests: Mapping[str, str]) -> None:
    """Compare new values with the plan's sha256, piece by piece, for those that copy them straight from the file.

    Raises:
        PlanError: the file cannot be read, or they are others.
    """
    for info in tensors:
        digest = hashlib.sha256()
        try:
            with open(info.shard, "rb") as file:
                file.seek(info.start)
                for done in range(0, info.nbytes, PIECE):
                    digest.update(file.read(min(PIECE, info.nbytes - done)))
        except OSError as error:
            raise _unreadable(info, error) from error
        _compare(info, digest.hexdigest(), digests[info.name])


def _unreadable(info: TensorInfo, error: OSError) -> PlanError:
    return PlanError(f"{info.shard}: cannot be read: {error.strerror}", _AGAIN)


def _compare(info: TensorInfo, found: str, expected: str) -> None:
    if found != expected:
        raise PlanError(f"{info.shard}: {info.name} does not have the sha256 that the plan gives", _AGAIN)


class DeltaFile:
    """Writes a file of new values, tensor after tensor; use as a context manager.

    What leaves the block before `finish` leaves no file.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        """`tensors` are name, dtype and shape of all that will be added, in that order.

        Raises:
            DestinationError: the file cannot be written, or what is there is no file of new values.
        """
        check_path(path)
        self.path = path
        self.digests: dict[str, str] = {}
        """sha256 of every tensor added so far."""
        entries = [(name, dtype, shape, prod(shape) * DTYPE_BITS[dtype] // 8) for name, dtype, shape in tensors]
        header = build_header(entries, {"schema": SCHEMA, "tool": f"expertcut {expertcut.__version__}"})
        self._left = {name: nbytes for name, _, _, nbytes in entries}
        self._at = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._append(header)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def add(self, name: str, values: npt.NDArray[np.uint8]) -> None:
        """Append a tensor's bytes, (N,) uint8.

        Raises:
            DestinationError: the file cannot be written.
        """
        expected = next(iter(self._left))
        assert (name, values.nbytes) == (expected, self._left.pop(expected)), f"{name} where {expected} was announced"
        self._append(values.data)
        self.digests[name] = hashlib.sha256(values.data).hexdigest()

    def finish(self) -> Deltas:
        """Give the file its name, once its bytes are safe on disk; returns what the plan says of it.

        Raises:
            DestinationError: the file cannot be written.
        """
        assert not self._left, f"{next(iter(self._left))} was announced and not added"
        try:
            os.fsync(self._file)
            self._temporary.replace(self.path)
        except OSError as error:
            raise self._failed(error) from error
        return Deltas(file=self.path.name, tensors=self.digests)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _append(self, data: bytes | memoryview) -> None:
        try:
            write_all(self._file, data, self._at)
        except OSError as error:
            raise self._failed(error) from error
        self._at += len(data)

    def _failed(self, error: OSError) -> DestinationError:
        return DestinationError(f"{self.path}: cannot be written: {error.strerror}")


def copied(source: Mapping[str, TensorInfo], path: Path, names: Iterable[str], digests: Mapping[str, str]) -> Deltas:
    """Write a file of some of the tensors of another, and return what the plan says of it.

    Raises:
        PlanError: the other file is not what it was.
        DestinationError: the file cannot be written.
    """
    chosen = [source[name] for name in names]
    with DeltaFile(path, ((t.name, t.dtype, t.shape) for t in chosen)) as file:
        for tensor in chosen:
            file.add(tensor.name, read_new(tensor, digests[tensor.name]))
        return file.finish()
