"""Shards that are taken over whole uncopied: the source's file under a second name, or one that shares its blocks.

Which they are, the layout decides. Invariant: no file of the source is opened for writing.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future
from pathlib import Path

from expertcut.checkpoint import Checkpoint
from expertcut.errors import CheckpointError, DestinationError
from expertcut.rewrite.copy import WriteBack, create_file
from expertcut.rewrite.files import Folder
from expertcut.rewrite.kernel import UNSUPPORTED, can_clone, clone
from expertcut.rewrite.layout import Move, source_status

_COPY = "leave out --link"


def clonable(ckpt: Checkpoint, folder: Path) -> bool:
    """Whether files in `folder` can share the blocks of the shards; tried, without a trace, on one of each device."""
    if ckpt.remote:
        return False
    devices = {source_status(ckpt.path / shard).st_dev: ckpt.path / shard for shard in ckpt.shards}
    return all(can_clone(path, folder) for path in devices.values())


def check_devices(ckpt: Checkpoint, folder: Path) -> None:
    """Compare where the shards and `folder` are, by the numbers of their devices.

    Raises:
        DestinationError: not on one, so that links will fail (but for layered file systems, which number at will).
    """
    for shard in ckpt.shards:
        if source_status(ckpt.path / shard).st_dev != folder.stat().st_dev:
            raise _elsewhere(ckpt.path / shard)


def link_shard(root: Path, whole: Move, path: Path) -> None:
    """Give a file under `root`, or the one that it is a link to, the name `path`, too; its bytes are safe on disk then.

    Raises:
        CheckpointError: it cannot be read, or has changed since it was opened.
        DestinationError: the file system, or the system's rules, do not allow it.
    """
    path.unlink(missing_ok=True)
    with Folder(root) as sources:
        source = _opened(sources, whole)
        try:
            os.link(os.path.realpath(root / whole.shard), path)
        except OSError as error:
            raise _unlinkable(root / whole.shard, error) from error
        if not os.path.samestat(os.fstat(source), path.stat()):
            raise _changed(root / whole.shard, "another file")
        os.fsync(source)


def clone_shard(root: Path, whole: Move, path: Path, back: WriteBack) -> Future[None] | None:
    """Make a file that shares all blocks of one under `root`; None where the file system cannot.

    The result is there once the file is safe on disk.

    Raises:
        CheckpointError: the source's file cannot be read, or has changed since it was opened.
        OSError: the destination does not take it.
    """
    with Folder(root) as sources:
        source = _opened(sources, whole)
        file = create_file(path)
        try:
            cloned = clone(source, file)
        except BaseException:
            back.drop(file)
            raise
    if cloned:
        return back.finish(file)
    os.close(file)
    return None


def _opened(sources: Folder, whole: Move) -> int:
    source = sources.open(whole.shard)
    size = os.fstat(source).st_size
    if size != whole.nbytes:
        raise _changed(sources.root / whole.shard, f"{size} bytes, {whole.nbytes} expected")
    return source


def _changed(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {found}; it has changed since it was opened", "restore the source and run the same command again"
    )


def _unlinkable(path: Path, error: OSError) -> OSError | DestinationError:
    """What the system says about a link as one line, unless it has nothing to do with links."""
    if error.errno == errno.EXDEV:
        return _elsewhere(path)
    foreign = path.stat().st_uid != os.geteuid() and not os.access(path, os.R_OK | os.W_OK)
    if error.errno == errno.EPERM and foreign:
        return DestinationError(
            f"{path}: cannot be linked: it belongs to another user, and you may not write to it",
            f"{_COPY}, or run as its owner",
        )
    if error.errno in UNSUPPORTED | {errno.EMLINK}:
        return DestinationError(f"{path}: cannot be linked: {error.strerror}", _COPY)
    return error


def _elsewhere(path: Path) -> DestinationError:
    return DestinationError(
        f"{path}: cannot be linked: it is on another file system than the destination",
        f"{_COPY}, or name a directory on its file system",
    )
