"""Byte ranges of shards on the Hub in, the bytes of a new shard out; of dropped experts nothing is fetched.

Neighbours are fetched in one piece, long ranges in blocks side by side. Only gaps that are shorter than what another
request would cost are fetched and thrown away. Memory: per connection a chunk of an answer, or one piece of a tensor
that is gathered from short runs; beside that a tensor whose values change.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from expertcut.checkpoint.remote import HubFiles, blocks, in_parallel
from expertcut.errors import CheckpointError, HubError
from expertcut.model.hashing import remap, table_of_ids
from expertcut.rewrite.files import Folder, write_all
from expertcut.rewrite.gain import rescaled
from expertcut.rewrite.layout import Move, OutShard, OutTensor

GAP = 1024
"""Bytes: about what the heads of a request and its answer take."""
PIECE = 8 * 2**20
"""Bytes, gaps included, that are gathered in memory at a time."""

Run = tuple[int, int, int]
"""Bytes to take over: where they begin in the source, how many, and where they go."""
Job = Callable[[threading.Event], int]
"""Writes a part of the shard, and returns how many bytes."""


@dataclass(frozen=True, slots=True)
class Span:
    """One range of a source shard, and the runs in it that are wanted."""

    shard: str
    offset: int
    end: int
    runs: list[Run]


def fetch_parts(files: HubFiles, shard: OutShard, file: int) -> Iterator[int]:
    """Write what follows the header of a new shard; yield the bytes of every part once they are written.

    Raises:
        HubError: the Hub does not give them, or a whole file is not what its sha256 says.
        OSError: the destination does not take it.
    """
    yield from in_parallel(_jobs(files, shard, file))


def check_whole(files: HubFiles, whole: Move, path: Path) -> None:
    """Compare a file that was fetched whole with the sha256 that the Hub gives, if it gives one.

    Raises:
        HubError: they differ.
    """
    expected = files.sha256(whole.shard)
    if expected is None:
        return
    with path.open("rb") as written:
        found = hashlib.file_digest(written, "sha256").hexdigest()
    if found != expected:
        raise HubError(
            f"{files.repo}: {whole.shard}: sha256 is {found}, the Hub says {expected}", "run the same command again"
        )


def spans(runs: Iterable[tuple[str, Run]]) -> Iterator[Span]:
    """Join runs, of a shard each, that lie next to each other or nearly so, into ranges to fetch in one piece."""
    last: Span | None = None
    for shard, (offset, nbytes, at) in runs:
        if last and last.shard == shard and 0 <= offset - last.end <= GAP:
            before, length, place = last.runs[-1]
            if offset == last.end and at == place + length:  # one run
                last = Span(shard, last.offset, offset + nbytes, [*last.runs[:-1], (before, length + nbytes, place)])
                continue
            if offset + nbytes - last.offset <= PIECE:
                last.runs.append((offset, nbytes, at))
                last = Span(shard, last.offset, offset + nbytes, last.runs)
                continue
        if last:
            yield last
        last = Span(shard, offset, offset + nbytes, [(offset, nbytes, at)])
    if last:
        yield last


def _jobs(files: HubFiles, shard: OutShard, file: int) -> Iterator[Job]:
    changed = list[tuple[OutTensor, int]]()
    for span in spans(_runs(shard, changed)):
        if len(span.runs) > 1:
            yield partial(_scatter, files, span, file)
            continue
        ((offset, nbytes, at),) = span.runs
        for start, size in blocks(offset, offset + nbytes):
            yield partial(_copy, files, span.shard, start, size, file, at + start - offset)
    for tensor, at in changed:
        if tensor.replaced:
            yield partial(_replace, tensor, file, at)
        else:
            yield partial(_remap if tensor.remap else _rescale, files, tensor, file, at)


def _runs(shard: OutShard, changed: list[tuple[OutTensor, int]]) -> Iterator[tuple[str, Run]]:
    """Yield what is taken over as it is; tensors whose values change are put in the list, with their places."""
    if shard.whole:
        yield shard.whole.shard, (shard.whole.offset, shard.whole.nbytes, 0)
        return
    at = len(shard.header)
    for tensor in shard.tensors:
        if tensor.remap is not None or tensor.factor is not None or tensor.replaced:
            changed.append((tensor, at))
            at += tensor.nbytes
            continue
        for offset, nbytes in tensor.ranges():
            if nbytes:
                yield tensor.source.shard, (offset, nbytes, at)
                at += nbytes


def _copy(files: HubFiles, shard: str, offset: int, nbytes: int, file: int, at: int, stop: threading.Event) -> int:
    done = 0
    for chunk in files.stream(shard, offset, nbytes, stop):
        write_all(file, chunk, at + done)
        done += len(chunk)
    return done


def _scatter(files: HubFiles, span: Span, file: int, stop: threading.Event) -> int:
    raw = memoryview(files.read(span.shard, span.offset, span.end - span.offset, stop))
    if stop.is_set():
        return 0
    begun: list[tuple[int, bytearray]] = []  # runs that are neighbours in the new shard are written in one piece
    for offset, nbytes, at in span.runs:
        part = raw[offset - span.offset :][:nbytes]
        if begun and begun[-1][0] + len(begun[-1][1]) == at:
            begun[-1][1].extend(part)
        else:
            begun.append((at, bytearray(part)))
    for at, joined in begun:
        write_all(file, memoryview(joined), at)
    return sum(nbytes for _, nbytes, _ in span.runs)


def _rescale(files: HubFiles, tensor: OutTensor, file: int, at: int, stop: threading.Event) -> int:
    assert tensor.factor is not None
    done = 0
    for offset, nbytes in tensor.ranges():
        for start in range(0, nbytes, PIECE):
            raw = files.read(tensor.source.shard, offset + start, min(PIECE, nbytes - start), stop)
            if stop.is_set():
                return done
            new = rescaled(np.frombuffer(raw, np.uint8), tensor.source.dtype, tensor.factor)
            write_all(file, new.data.cast("B"), at + done)
            done += new.nbytes
    return done


def _replace(tensor: OutTensor, file: int, at: int, stop: threading.Event) -> int:
    """Copy new values of a tensor from the file on this machine that holds them."""
    new, done = tensor.source, 0
    with Folder(Path()) as here:
        source = here.open(new.shard)
        while done < new.nbytes and not stop.is_set():
            raw = os.pread(source, min(PIECE, new.nbytes - done), new.start + done)
            if not raw:
                raise CheckpointError(f"{new.shard}: ends in {new.name}; it has changed since it was opened")
            write_all(file, raw, at + done)
            done += len(raw)
    return done


def _remap(files: HubFiles, tensor: OutTensor, file: int, at: int, stop: threading.Event) -> int:
    assert tensor.remap
    raw = files.read(tensor.source.shard, tensor.source.start, tensor.source.nbytes, stop)
    if stop.is_set():
        return 0
    new = np.ascontiguousarray(remap(table_of_ids(raw, tensor.source), tensor.remap, tensor.shape[1]))
    write_all(file, new.data.cast("B"), at)
    return new.nbytes
