"""Checkpoint and plan in, pruned checkpoint out; memory does not grow with the data.

Order: everything is validated and laid out, then shards, config, companions, record and index are written and synced in
a hidden sibling, then that directory gets its name. A killed run is resumed by the same command to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import expertcut
from expertcut.checkpoint import Checkpoint
from expertcut.checkpoint.local import INDEX
from expertcut.choose.plan import Plan
from expertcut.errors import DestinationError, UsageError
from expertcut.model import Geometry, check_fingerprint
from expertcut.rewrite.config import config_bytes
from expertcut.rewrite.copy import Advance, Copier, WriteBack, copy_file, write_file, write_new, write_shard
from expertcut.rewrite.deltas import check_new
from expertcut.rewrite.destination import (
    allocated,
    check_replaceable,
    check_space,
    destination_errors,
    discard,
    existing_parent,
    partial_folder,
    publish,
    resolve_destination,
    sync_folder,
)
from expertcut.rewrite.fetch import check_whole, fetch_parts
from expertcut.rewrite.journal import Journal, open_journal
from expertcut.rewrite.layout import RECORD, Layout, OutShard, plan_layout, source_status
from expertcut.rewrite.record import Record, Size
from expertcut.rewrite.whole import check_devices, clonable, clone_shard, link_shard

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, of the shards."""


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What `prune` did; sizes are bytes of tensor data."""

    out: Path
    nbytes_before: int
    nbytes_after: int
    experts_before: int
    experts_after: int
    top_k_before: int
    top_k_after: int
    shards: int
    resumed: bool
    """True if an unfinished run was found and carried on."""
    nbytes_written: int
    """Bytes of the shards that this run wrote; links and clones are none."""
    taken: str | None
    """How whole shards were taken over: linked, cloned, or copied if only one was; None where none was."""
    seconds: float
    """Wall time of writing them, sync to disk included."""


def prune(
    ckpt: Checkpoint,
    geometry: Geometry,
    plan: Plan,
    out: str | Path,
    *,
    max_shard_size: int | None = None,
    force: bool = False,
    link: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Write the checkpoint that `plan` leaves of `ckpt` to the directory `out`.

    `max_shard_size` is bytes of tensor data per file; None: see `plan_layout`. `force` replaces a checkpoint that
    expertcut wrote, in one step. `link` makes shards hard links to the source's, so that both checkpoints share bytes.

    Raises:
        UsageError: `link`, but the source's shards cannot stay as they are.
        PlanError: the plan is for another model, cannot be carried out, or its new values are not those that it names.
        CheckpointError: the source cannot be laid out, or changes while it is read.
        HubError: the source is on the Hub, which does not give it.
        DestinationError: `out` exists, is too small, is being written to, holds an unfinished run of another kind, or
            cannot be linked to.
    """
    job = prepare(ckpt, geometry, plan, out, max_shard_size, link)
    if plan.deltas:
        replaced = (t.source for shard in job.layout.shards for t in shard.tensors if t.replaced)
        check_new(replaced, plan.deltas.tensors)
    identity = {
        "source": _source_identity(ckpt),
        "plan": hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
        "shard size": str(max_shard_size),
        "use of --link": str(link),
        "version of expertcut": expertcut.__version__,
    }
    with destination_errors(job.target, job.needed):
        resumed, shards = job.run(identity, force, progress or (lambda done, total: None))
    layout = job.layout
    return PruneResult(
        job.target, ckpt.nbytes, layout.nbytes, geometry.num_experts, layout.experts, geometry.top_k, layout.top_k,
        len(layout.shards), resumed, shards.nbytes, shards.taken, shards.seconds,
    )  # fmt: skip


def prepare(
    ckpt: Checkpoint, geometry: Geometry, plan: Plan, out: str | Path, max_shard_size: int | None, link: bool = False
) -> Job:
    """Validate and lay out everything; nothing is written.

    Raises:
        UsageError, PlanError, CheckpointError: see `prune`.
        DestinationError: `out` is the source, lies in it or holds it.
    """
    check_fingerprint(plan.source.fingerprint, ckpt, geometry)
    layout = plan_layout(ckpt, geometry, plan, max_shard_size)
    if link and ckpt.remote:
        raise UsageError("--link needs the shards on this machine", f"leave out --link, or: hf download {ckpt.name}")
    if link and layout.wanting:
        raise UsageError(f"--link needs {layout.wanting}", "leave out --link")
    target = resolve_destination(ckpt, Path(out))
    before = Size(nbytes=ckpt.nbytes, experts=geometry.num_experts, top_k=geometry.top_k)
    record = Record.of(ckpt, before, layout, plan).to_bytes()
    cloned = not (link or layout.wanting) and clonable(ckpt, existing_parent(target))
    taken = None if layout.wanting else "linked" if link else "cloned" if cloned else "copied"
    return Job(ckpt, layout, config_bytes(layout.config), record, target, taken)


@dataclass(frozen=True, slots=True)
class Shards:
    """What a run did for the shards; see `PruneResult`."""

    nbytes: int = 0
    taken: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """A rewrite that is ready to be run."""

    ckpt: Checkpoint
    layout: Layout
    config: bytes
    record: bytes
    target: Path
    taken: str | None
    """How whole shards will be taken over: linked, cloned, or copied; None: they are written from parts."""

    @property
    def files(self) -> dict[str, int]:
        """Name and bytes of every file of the new checkpoint."""
        return self.layout.files | {"config.json": len(self.config), RECORD: len(self.record)}

    @property
    def written(self) -> dict[str, int]:
        """Name and bytes of the files that take up disk: all but shards that share the source's bytes."""
        shared = {shard.name for shard in self.layout.shards if self.taken in ("linked", "cloned")}
        return {name: nbytes for name, nbytes in self.files.items() if name not in shared}

    @property
    def needed(self) -> int:
        """Bytes of disk that the checkpoint takes."""
        return sum(self.written.values())

    @property
    def partial(self) -> Path:
        """Where work is done: a hidden sibling of the destination."""
        return partial_folder(self.target)

    @property
    def made(self) -> Path:
        """The new checkpoint, until it is renamed."""
        return self.partial / "checkpoint"

    def check_room(self) -> None:
        """Check that the disk has room for it, counting in what an unfinished run holds.

        Raises:
            DestinationError: it has not.
        """
        check_space(self.target, self.needed, allocated(self.made / name for name in self.written))

    def check_links(self) -> None:
        """Check that shards to be linked are where the destination is, as far as that can be told without trying.

        Raises:
            DestinationError: they are not.
        """
        if self.taken == "linked":
            check_devices(self.ckpt, existing_parent(self.target))

    def run(self, identity: dict[str, str], force: bool, progress: Progress) -> tuple[bool, Shards]:
        """Write it; return whether a run was resumed, and what was done for the shards.

        Raises:
            CheckpointError, DestinationError: see `prune`.
            OSError: the destination cannot be written.
        """
        if self.partial.exists() and self._is_published(identity):
            return True, Shards()
        check_replaceable(self.target, force)
        self.check_room()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with open_journal(self.partial) as journal:
            resumed = journal.begin(identity)
            self.made.mkdir(exist_ok=True)
            shards = self._link_shards(progress) if self.taken == "linked" else self._write_shards(journal, progress)
            self._write_rest()
            journal.ready(self.made.stat().st_ino)
            publish(self.made, self.target, force)
            discard(self.partial)
        return resumed, shards

    def _is_published(self, identity: dict[str, str]) -> bool:
        """Remove what is left of a run killed after its rename, or before its first record; True if it was this run."""
        with open_journal(self.partial) as journal:
            renamed = self.target.is_dir() and self.target.stat().st_ino == journal.inode
            blank = journal.blank  # also if it was killed between removing the journal and its folder
            if renamed or blank:
                discard(self.partial)
            return renamed and journal.identity == identity or blank and self._is_recorded()

    def _is_recorded(self) -> bool:
        path = self.target / RECORD
        return path.is_file() and path.read_bytes() == self.record

    def _link_shards(self, progress: Progress) -> Shards:
        """Link all, also on resuming: it costs nothing. What cannot be linked leaves the place free for another run."""
        started, done, total = time.monotonic(), 0, sum(shard.nbytes for shard in self.layout.shards)
        try:
            for shard in self.layout.shards:
                progress(done, total)
                assert shard.whole
                link_shard(self.ckpt.path, shard.whole, self.made / shard.name)
                done += shard.nbytes
        except DestinationError:
            discard(self.partial)
            raise
        progress(done, total)
        return Shards(0, "linked", time.monotonic() - started)

    def _write_shards(self, journal: Journal, progress: Progress) -> Shards:
        started = time.monotonic()
        todo = [shard for shard in self.layout.shards if not self._is_done(shard, journal)]
        total = sum(shard.nbytes for shard in self.layout.shards)
        done = total - sum(shard.nbytes for shard in todo)
        cloned = written = 0
        progress(done, total)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        copier, pending = Copier(), list[tuple[OutShard, Future[None]]]()
        with WriteBack() as back:
            for shard in todo:
                path = self.made / shard.name
                here = shard.whole if self.ckpt.remote is None else None
                future = clone_shard(self.ckpt.path, here, path, back) if here else None
                if future:
                    cloned += shard.nbytes
                    advance(shard.nbytes)
                else:
                    advance(len(shard.header))
                    future = self._write_shard(shard, path, copier, back, advance)
                    written += shard.nbytes
                pending.append((shard, future))
                self._settle(pending, journal, keep=1)  # one shard reaches the disk while the next is written
            self._settle(pending, journal, keep=0)
        taken = None if self.taken is None else "copied" if written else "cloned" if cloned else None
        return Shards(written, taken, time.monotonic() - started)

    def _write_shard(
        self, shard: OutShard, path: Path, copier: Copier, back: WriteBack, advance: Advance
    ) -> Future[None]:
        files = self.ckpt.remote
        if files is None:
            return write_shard(self.ckpt.path, shard, path, copier, back, advance)
        future = write_new(shard, path, lambda file: fetch_parts(files, shard, file), back, advance)
        if shard.whole:
            check_whole(files, shard.whole, path)
        return future

    def _settle(self, pending: list[tuple[OutShard, Future[None]]], journal: Journal, keep: int) -> None:
        while len(pending) > keep:
            shard, future = pending.pop(0)
            future.result()
            sync_folder(self.made)
            journal.finish(shard.name, shard.nbytes)

    def _is_done(self, shard: OutShard, journal: Journal) -> bool:
        path, size = self.made / shard.name, shard.nbytes
        return journal.finished.get(shard.name) == size and path.is_file() and path.stat().st_size == size

    def _write_rest(self) -> None:
        """Small files, always written anew; the index is the last."""
        write_file(self.made / "config.json", self.config)
        for name, nbytes in self.layout.companions.items():
            (self.made / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(self.ckpt.path, name, nbytes, self.made / name)
        for name, data in self.layout.documents.items():
            write_file(self.made / name, data)
        write_file(self.made / RECORD, self.record)
        if self.layout.index:
            write_file(self.made / INDEX, self.layout.index)
        for folder, _, _ in os.walk(self.made):
            sync_folder(Path(folder))


def _source_identity(ckpt: Checkpoint) -> str:
    """Hash of config, every tensor's place, and every file's size and time of change (on the Hub: commit and ETag)."""
    digest = hashlib.sha256(json.dumps(ckpt.config, sort_keys=True).encode())
    if ckpt.remote:  # what came with the commit may have come again
        for name in ckpt.shards:
            digest.update(ckpt.remote.identity(name).encode())
    here = () if ckpt.remote else (*ckpt.shards, *ckpt.companions, "config.json")
    for name in here:
        status = source_status(ckpt.path / name)
        digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    for tensor in ckpt.tensors.values():
        digest.update(repr(tensor).encode())
    return digest.hexdigest()
