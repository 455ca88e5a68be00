"""Checkpoint tensors as torch views on the page cache, with read-ahead. Nothing is copied until the caller does.

Of a checkpoint whose shards are on the Hub, tensors are views on bytes in memory that were fetched by ranges.
Invariant: views are read-only by contract; the mapping is private to the process and never written.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch

from expertcut.calibrate.fetched import Fetched
from expertcut.checkpoint.types import Checkpoint, TensorInfo
from expertcut.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.uint8,
}  # fmt: skip


class TensorReader:
    """Memory-mapped access to a checkpoint's tensors, or by ranges from the Hub."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        """Tensors that are handed out as a plan leaves them: what it makes of their values, as they are stored."""
        self.fetched = Fetched(checkpoint.remote) if checkpoint.remote else None
        """What is held of tensors on the Hub; None: they are on this machine."""
        self._maps: dict[str, mmap.mmap] = {}
        self._ahead: threading.Thread | None = None

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self.checkpoint.tensors

    def stored(self, name: str) -> Iterable[str]:
        """Names of the checkpoint's tensors that a tensor is read from."""
        return [name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.checkpoint.tensors[name].shape

    def copy(self, name: str, out: torch.Tensor) -> None:
        """Write a tensor to `out`, in its dtype and on its device.

        Raises:
            CheckpointError: see `view`.
        """
        out.copy_(self.view(name))

    def view(self, name: str) -> torch.Tensor:
        """Return a CPU tensor over the file's bytes; 4-bit floats as bytes of two.

        Raises:
            CheckpointError: a dtype that torch has no plain type for.
            HubError: it is on the Hub, which does not give it.
        """
        info = self.checkpoint.tensors[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{info.shard}: {name}: dtype {info.dtype} cannot be computed with")
        dtype = DTYPES[info.dtype]
        shape = info.shape if info.dtype != "F4" else (*info.shape[:-1], info.shape[-1] // 2)
        if not info.nbytes:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            if self.fetched:
                flat = torch.frombuffer(self.fetched.bytes_of(info), dtype=torch.uint8)
            else:
                flat = torch.frombuffer(self._map(info.shard), dtype=torch.uint8, count=info.nbytes, offset=info.start)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()
        values = flat.view(dtype).view(shape)
        change = self.changes.get(name)
        return values if change is None else change(values)

    def begin(self, names: Iterable[str]) -> None:
        """Say that these tensors will all be read now: from the Hub, they come side by side then."""
        if self.fetched:
            self.fetched.begin(self._infos(names))

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the kernel to bring these tensors into the page cache, or fetch them from the Hub, in the background."""
        if self.fetched:
            self.fetched.begin(self._infos(names))
            return
        ranges = self._ranges(names)
        self._ahead = threading.Thread(target=self._advise, args=(ranges, mmap.MADV_WILLNEED), daemon=True)
        self._ahead.start()

    def release(self, names: Iterable[str]) -> None:
        """Unmap these tensors' pages from the process (they stay in the page cache); what was fetched goes."""
        if self.fetched:
            self.fetched.release(self._infos(names))
            return
        self._advise(self._ranges(names), mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Wait for read-ahead. Mappings go away with their last view."""
        if self._ahead is not None:
            self._ahead.join()
        if self.fetched:
            self.fetched.close()
        self._maps.clear()

    def _map(self, shard: str) -> mmap.mmap:
        if shard not in self._maps:
            with open(self.checkpoint.path / shard, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.checkpoint.shards[shard]:
                    raise CheckpointError(f"{shard}: {size} bytes, {self.checkpoint.shards[shard]} when it was opened")
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _infos(self, names: Iterable[str]) -> list[TensorInfo]:
        return [self.checkpoint.tensors[stored] for name in names for stored in self.stored(name)]

    def _ranges(self, names: Iterable[str]) -> list[tuple[mmap.mmap, int, int]]:
        """Page-aligned ranges of the tensors, neighbours merged: (map, start, length)."""
        infos = sorted(self._infos(names), key=lambda t: (t.shard, t.start))
        merged: list[tuple[str, int, int]] = []
        for info in infos:
            if merged and merged[-1][0] == info.shard and info.start <= merged[-1][2] + mmap.PAGESIZE:
                merged[-1] = (info.shard, merged[-1][1], info.end)
            elif info.nbytes:
                merged.append((info.shard, info.start // mmap.PAGESIZE * mmap.PAGESIZE, info.end))
        return [(self._map(shard), start, end - start) for shard, start, end in merged]

    @staticmethod
    def _advise(ranges: list[tuple[mmap.mmap, int, int]], advice: int) -> None:
        for mapping, start, length in ranges:
            mapping.madvise(advice, start, length)


def times(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Return each value times a factor, rounded to nearest in the dtype that it is stored in."""
    wide = values.double() * factor
    return wide.float().to(values.dtype) if values.dtype == torch.bfloat16 else wide.to(values.dtype)
