"""Tensors of a model on the Hub, in memory while they are needed: what is asked for ahead is fetched in the background.

Invariant: held are the bytes of what was asked for and not released. The executor asks for one decoder layer ahead and
releases it once it is loaded, so that they are never more than one layer's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from expertcut.checkpoint.remote import CONNECTIONS, HubFiles, blocks
from expertcut.checkpoint.types import TensorInfo


@dataclass(frozen=True)
class _Run:
    """Neighbouring tensors' bytes, and the requests that bring them."""

    start: int
    raw: bytearray
    requests: list[Future[None]]


class Fetched:
    """Bytes of tensors, fetched by ranges."""

    def __init__(self, files: HubFiles) -> None:
        self._files = files
        self._held: dict[str, _Run] = {}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(CONNECTIONS)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(len(run.raw) for run in {id(run): run for run in self._held.values()}.values())

    def begin(self, infos: Iterable[TensorInfo]) -> None:
        """Start to fetch tensors that are not held; neighbours in one piece."""
        wanted = sorted((i for i in infos if i.name not in self._held and i.nbytes), key=lambda i: (i.shard, i.start))
        group: list[TensorInfo] = []
        for info in wanted:
            if group and (info.shard, info.start) != (group[-1].shard, group[-1].end):
                self._fetch(group)
                group = []
            group.append(info)
        if group:
            self._fetch(group)

    def bytes_of(self, info: TensorInfo) -> memoryview:
        """Return a tensor's bytes; of one that is not held yet, they go away with the caller's.

        Raises:
            HubError: the Hub does not give them.
        """
        held = info.name in self._held
        self.begin([info])
        run = self._held[info.name]
        for request in run.requests:
            request.result()
        if not held:
            self.release([info])
        return memoryview(run.raw)[info.start - run.start :][: info.nbytes]

    def release(self, infos: Iterable[TensorInfo]) -> None:
        """Let go of tensors; views on them stay good."""
        for info in infos:
            self._held.pop(info.name, None)

    def close(self) -> None:
        """End what is under way."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()

    def _fetch(self, group: list[TensorInfo]) -> None:
        shard, start, end = group[0].shard, group[0].start, group[-1].end
        raw = bytearray(end - start)
        run = _Run(start, raw, [])
        for offset, nbytes in blocks(start, end):
            run.requests.append(
                self._pool.submit(self._fill, shard, offset, memoryview(raw)[offset - start :][:nbytes])
            )
        self._held |= dict.fromkeys((info.name for info in group), run)

    def _fill(self, shard: str, offset: int, target: memoryview) -> None:
        done = 0
        for chunk in self._files.stream(shard, offset, len(target), self._stop):
            target[done : done + len(chunk)] = chunk
            done += len(chunk)
