"""Byte ranges of shards in, a new shard out, its bytes safe on disk. Only gathered tensors are looked at.

Speed: blocks are claimed up front, copies are as long as the ranges allow, and write-back runs beside them in one other
thread, so that the final sync has little left to do. Memory: one 256 KiB buffer, and one piece of a gathered tensor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from expertcut.errors import CheckpointError
from expertcut.model.hashing import remap, table_of_ids
from expertcut.rewrite.files import Folder, write_all
from expertcut.rewrite.gain import rescaled
from expertcut.rewrite.kernel import UNSUPPORTED, reserve
from expertcut.rewrite.layout import Move, OutShard, OutTensor

STEP = 16 * 2**20
"""Bytes per call into the kernel: how often progress is told and write-back is set off."""
BUFFER = 256 * 2**10
"""Bytes; stays in a core's cache, larger ones are slower."""
PIECE = 8 * 2**20
"""Bytes of a gathered tensor held at a time, unless one slab is larger."""

TRIALS = 8
"""Copies that are timed, by turns kernel and buffer; the best of each counts."""
TRIAL_BYTES = 2**20
"""Shorter copies are not timed."""

Advance = Callable[[int], None]


class Copier:
    """Copies byte ranges from file to file, by the kernel or through a buffer, whichever proves faster.

    `copy_file_range` shares blocks or copies on the server where the file system can; elsewhere the kernel copies page
    by page, and large writes can be a third faster. So the first long copies take turns and are timed.
    """

    def __init__(self, *, kernel: bool = True) -> None:
        self.kernel = kernel and hasattr(os, "copy_file_range")
        """True if the kernel copies."""
        self._trials: list[float] = []
        self._buffer: memoryview | None = None

    def copy(self, source: int, offset: int, target: int, at: int, nbytes: int) -> int:
        """Copy up to `nbytes` bytes from `offset` of one file to `at` of another; return how many, 0 at the end."""
        if not self.kernel or len(self._trials) == TRIALS or nbytes < TRIAL_BYTES:
            return self._copy(self.kernel, source, offset, target, at, nbytes)
        started = time.perf_counter()
        copied = self._copy(len(self._trials) % 2 == 0, source, offset, target, at, nbytes)
        self._trials.append((time.perf_counter() - started) / max(copied, 1))
        if len(self._trials) == TRIALS and min(self._trials[1::2]) < min(self._trials[::2]):
            self.kernel = False
        return copied

    def _copy(self, kernel: bool, source: int, offset: int, target: int, at: int, nbytes: int) -> int:
        if kernel:
            try:
                copied = os.copy_file_range(source, target, nbytes, offset, at)
            except OSError as error:
                if error.errno not in UNSUPPORTED | {errno.EXDEV}:
                    raise
                self.kernel = False
            else:
                if copied:
                    return copied  # 0 is not trusted: some file systems say so in the middle of a file
        return self._through_buffer(source, offset, target, at, nbytes)

    def _through_buffer(self, source: int, offset: int, target: int, at: int, nbytes: int) -> int:
        self._buffer = self._buffer or memoryview(bytearray(BUFFER))
        done = 0
        while done < nbytes:
            got = os.preadv(source, [self._buffer[: min(nbytes - done, BUFFER)]], offset + done)
            if not got:
                break
            write_all(target, self._buffer[:got], at + done)
            done += got
        return done


class WriteBack:
    """One thread that carries written pages to the disk while others are being written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._early: Future[None] | None = None

    def start(self, file: int) -> None:
        """Set off a sync of what the file holds so far, unless one is still under way."""
        if self._early and not self._early.done():
            return
        if self._early:
            self._early.result()  # a failed sync is reported once, so no result may be lost
        self._early = self._pool.submit(os.fdatasync, file)

    def finish(self, file: int) -> Future[None]:
        """Sync and close the file in the background; the result is there once its bytes are safe."""
        early, self._early = self._early, None
        return self._pool.submit(_sync_and_close, file, early)

    def drop(self, file: int) -> None:
        """Close a file that came to nothing."""
        self._early = None
        self._pool.submit(os.close, file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


def write_shard(
    root: Path, shard: OutShard, path: Path, copier: Copier, back: WriteBack, advance: Advance
) -> Future[None]:
    """Write one shard from the shards under `root`; the result is there once its bytes are safe on disk.

    `advance` is called with bytes just written.

    Raises:
        CheckpointError: a source shard ends early or cannot be opened.
        OSError: the destination does not take it.
    """
    return write_new(shard, path, lambda file: _append(root, shard, file, copier), back, advance)


def write_new(
    shard: OutShard, path: Path, append: Callable[[int], Iterator[int]], back: WriteBack, advance: Advance
) -> Future[None]:
    """Write one shard: its header, and what `append` writes behind it to the open file, yielding bytes just written.

    The result is there once the bytes are safe on disk.

    Raises:
        OSError: the destination does not take it; besides, what `append` raises.
    """
    file = create_file(path)
    try:
        reserve(file, shard.nbytes)
        write_all(file, shard.header, 0)
        at, unsynced = len(shard.header), 0
        for copied in append(file):
            at, unsynced = at + copied, unsynced + copied
            advance(copied)
            if unsynced >= STEP:
                back.start(file)
                unsynced = 0
        assert at == shard.nbytes
    except BaseException:
        back.drop(file)
        raise
    return back.finish(file)


def create_file(path: Path) -> int:
    """Open a new file for writing; what has its name is not overwritten but loses it, as it may be a link."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def copy_file(root: Path, name: str, nbytes: int, path: Path) -> None:
    """Copy a whole file of `nbytes` bytes, `name` under `root`, to `path`, and sync it.

    Raises:
        CheckpointError: it is shorter than that or cannot be opened.
        OSError: the destination does not take it.
    """
    with _Sources(root) as sources, _created(path) as file:
        for _ in _move(sources, Move(name, 0, nbytes), file, 0, Copier()):
            pass
        os.fsync(file)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and sync it."""
    with _created(path) as file:
        write_all(file, data, 0)
        os.fsync(file)


@contextlib.contextmanager
def _created(path: Path) -> Iterator[int]:
    file = create_file(path)
    try:
        yield file
    finally:
        os.close(file)


def _append(root: Path, shard: OutShard, file: int, copier: Copier) -> Iterator[int]:
    """Write what follows the header; yield the bytes of every piece."""
    at = len(shard.header)
    with _Sources(root) as sources:
        for step in shard.steps():
            if isinstance(step, Move):
                yield from _move(sources, step, file, at, copier)
            else:
                through = _rescale if step.factor is not None else _gather if step.gather else _remap
                yield from through(sources, step, file, at)
            at += step.nbytes


def _move(sources: _Sources, move: Move, file: int, at: int, copier: Copier) -> Iterator[int]:
    source, done = sources.open(move.shard), 0
    while done < move.nbytes:
        copied = copier.copy(source, move.offset + done, file, at + done, min(move.nbytes - done, STEP))
        if not copied:
            raise sources.ended(move.shard, move.offset + done, move.nbytes - done)
        done += copied
        yield copied


def _gather(sources: _Sources, tensor: OutTensor, file: int, at: int) -> Iterator[int]:
    """Read slabs of the source tensor, keep the runs, write them back to back."""
    assert tensor.gather
    slabs, stride = tensor.gather.slabs, tensor.gather.stride
    count = max(1, PIECE // stride)
    for first in range(0, slabs, count):
        offset, rows = tensor.source.start + first * stride, min(count, slabs - first)
        raw = sources.read(tensor.source.shard, offset, rows * stride)
        whole = np.frombuffer(raw, np.uint8).reshape(rows, stride)
        kept = np.concatenate([whole[:, begin:end] for begin, end in tensor.gather.runs], axis=1)
        write_all(file, kept.data.cast("B"), at)
        at += kept.nbytes
        yield kept.nbytes


def _rescale(sources: _Sources, tensor: OutTensor, file: int, at: int) -> Iterator[int]:
    """Read the kept parts of the source tensor, piece by piece, and write them multiplied."""
    assert tensor.factor is not None
    for offset, nbytes in tensor.ranges():
        for done in range(0, nbytes, PIECE):
            raw = sources.read(tensor.source.shard, offset + done, min(PIECE, nbytes - done))
            new = rescaled(np.frombuffer(raw, np.uint8), tensor.source.dtype, tensor.factor)
            write_all(file, new.data.cast("B"), at)
            at += new.nbytes
            yield new.nbytes


def _remap(sources: _Sources, tensor: OutTensor, file: int, at: int) -> Iterator[int]:
    """Read a table of expert ids, and write it with those of the new experts."""
    assert tensor.remap
    raw = sources.read(tensor.source.shard, tensor.source.start, tensor.source.nbytes)
    old = table_of_ids(raw, tensor.source)
    new = np.ascontiguousarray(remap(old, tensor.remap, tensor.shape[1]))
    write_all(file, new.data.cast("B"), at)
    yield new.nbytes


class _Sources(Folder):
    """The source's shards."""

    def read(self, shard: str, offset: int, nbytes: int) -> bytearray:
        source, raw, done = self.open(shard), bytearray(nbytes), 0
        while done < nbytes:
            got = os.preadv(source, [memoryview(raw)[done:]], offset + done)
            if not got:
                raise self.ended(shard, offset + done, nbytes - done)
            done += got
        return raw

    def ended(self, shard: str, offset: int, missing: int) -> CheckpointError:
        return CheckpointError(
            f"{self.root / shard}: ends at byte {offset}, {missing} more expected; it has changed since it was opened",
            "restore the source and run the same command again",
        )


def _sync_and_close(file: int, early: Future[None] | None) -> None:
    try:
        if early:
            early.result()
        os.fsync(file)
    finally:
        os.close(file)
