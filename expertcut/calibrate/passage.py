"""All micro-batches on their way through the layers, for one or more tracks (the base model, models under a plan).

When memory runs out, the micro-batch at hand is halved, and so is every later one that fails; nothing is counted twice,
because an observer's findings are committed only after the layer has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from expertcut.calibrate.batches import Batch
from expertcut.calibrate.executor import LayerStream, Prepared
from expertcut.calibrate.transfer import fetch, park, settle
from expertcut.errors import ExpertcutError

Notify = Callable[[str], None]
Advance = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""
Tracks = Callable[[int, nn.Module], Iterable[nn.Module]]
"""(layer number, the base's layer) → one layer per track."""


class Watcher(Protocol):
    """Notes what a layer does with a micro-batch, and counts it once the layer has run to its end."""

    domain_T: torch.Tensor | None
    """Domain of each token of the coming micro-batch, -1 for padding."""

    def commit(self) -> None:
        """Count what was noted."""

    def discard(self) -> None:
        """Forget it: the layer failed."""


class Passage:
    """Hidden states of every track and micro-batch."""

    def __init__(self, stream: LayerStream, batches: Sequence[Batch], tracks: int, notify: Notify) -> None:
        self.stream, self.notify = stream, notify
        self.prepared: list[Prepared] = []
        for batch in batches:
            self.prepared.append(stream.prepare(batch, self.prepared[-1] if self.prepared else None))
        self.hidden = [[park(p.hidden) for p in self.prepared] for _ in range(tracks)]
        self.carried: list[list[torch.Tensor | None]] = [[None] * len(self.prepared) for _ in range(tracks)]
        """What layers hand on to the next besides, in models where they do."""
        for prepared in self.prepared:
            prepared.hidden = prepared.hidden[:0]

    def branch(self, track: int) -> int:
        """Add a track that has come the same way as another; returns its number."""
        self.hidden.append(list(self.hidden[track]))
        self.carried.append(list(self.carried[track]))
        return len(self.hidden) - 1

    def drop(self) -> None:
        """Forget the last track."""
        del self.hidden[-1], self.carried[-1]

    def step(self, index: int, layer: nn.Module, track: int = 0, observer: Watcher | None = None) -> None:
        """Take every micro-batch of a track through one layer."""
        at = 0
        while at < len(self.prepared):
            at += self._guarded(index, layer, track, at, observer)

    def logits(self, track: int) -> Iterator[tuple[Batch, slice, torch.Tensor]]:
        """Yield (micro-batch, positions, logits) of a track that has passed all layers."""
        for prepared, waiting in zip(self.prepared, self.hidden[track], strict=True):
            hidden = fetch(waiting, self.stream.device)
            for where in self.stream.chunks(prepared.batch):
                yield prepared.batch, where, self.stream.logits(prepared.batch, hidden, where)

    def _run(self, index: int, layer: nn.Module, track: int, at: int, observer: Watcher | None) -> None:
        prepared = self.prepared[at]
        if observer is not None:
            observer.domain_T = prepared.batch.domain.flatten().to(self.stream.device)
        hidden = fetch(self.hidden[track][at], self.stream.device)
        waiting = self.carried[track][at]
        carried = None if waiting is None else fetch(waiting, self.stream.device)
        out, carried = self.stream.call(layer, hidden, prepared.calls[index], carried)
        if observer is not None:
            observer.commit()
        self.hidden[track][at] = park(out)
        self.carried[track][at] = None if carried is None else park(carried)

    def _guarded(self, index: int, layer: nn.Module, track: int, at: int, observer: Watcher | None) -> bool:
        """Run; False if memory ran out and the micro-batch was halved instead."""
        try:
            self._run(index, layer, track, at, observer)
            return True
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        if observer is not None:
            observer.discard()
        if self.stream.device.type == "cuda":
            torch.cuda.empty_cache()
        self._halve(at)
        return False

    def _halve(self, at: int) -> None:
        batch = self.prepared[at].batch
        if len(batch.rows) == 1:
            raise ExpertcutError(
                f"out of memory with a single sequence of {batch.ids.shape[1]} tokens", "pass a smaller --seq-len"
            )
        narrow = all(carried[at] is None for carried in self.carried)  # what is carried may point at padding
        halves = batch.halves(narrow)
        self.notify(f"out of memory: micro-batch of {len(batch.rows)} sequences halved")
        self.prepared[at : at + 1] = [self.stream.prepare(half) for half in halves]
        for prepared in self.prepared[at : at + 2]:
            prepared.hidden = prepared.hidden[:0]
        settle(self.stream.device)
        for hidden in self.hidden:
            hidden[at : at + 1] = _cut(hidden[at], halves)
        for carried in self.carried:
            whole = carried[at]
            carried[at : at + 1] = [None, None] if whole is None else _cut(whole, halves)


def _cut(whole: torch.Tensor, halves: tuple[Batch, Batch]) -> list[torch.Tensor]:
    """Split (B, S, …) as a micro-batch was."""
    rows, widths = len(halves[0].rows), [half.ids.shape[1] for half in halves]
    return [whole[:rows, : widths[0]].clone(), whole[rows:, : widths[1]].clone()]


def run_through(
    stream: LayerStream, batches: Sequence[Batch], count: int, tracks: Tracks, notify: Notify, advance: Advance
) -> Passage:  # fmt: skip
    """Take every micro-batch through all layers in `count` tracks; each layer is loaded once."""
    passage = Passage(stream, batches, count, notify)
    for index, layer in stream.layers():
        for track, module in enumerate(tracks(index, layer)):
            passage.step(index, module, track)
        advance(index + 1, len(stream))
    return passage


def out_of_memory(error: BaseException) -> bool:
    """True if torch says that memory ran out, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
