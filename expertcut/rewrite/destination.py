"""Where a rewrite goes: what may be replaced, whether it fits, and the rename that makes it appear in one step.

Invariant: the destination is absent, or what it was, or the complete new checkpoint. Work happens in a hidden sibling
`.NAME.expertcut-partial`; what is removed is that sibling and a directory that it was exchanged for, nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from expertcut.checkpoint import Checkpoint
from expertcut.choose.budget import format_size
from expertcut.errors import DestinationError
from expertcut.rewrite.journal import NAME
from expertcut.rewrite.kernel import exchange, rename_new
from expertcut.rewrite.layout import RECORD

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota reached", errno.EFBIG: "file size limit reached"}


def partial_folder(out: Path) -> Path:
    """Return the hidden sibling in which the new checkpoint for `out` is made."""
    return out.parent / f".{out.name}.expertcut-partial"


def resolve_destination(ckpt: Checkpoint, out: Path) -> Path:
    """Return the absolute destination; its last part may be a link, which is not followed.

    Raises:
        DestinationError: it is the source, lies in the source, or holds the source.
    """
    plain = Path(os.path.abspath(out))
    target = plain.parent.resolve() / plain.name
    source, real = ckpt.path.resolve(), target.resolve()
    if not target.name or real == source:
        raise DestinationError(f"{out}: is the source itself", "name a new directory")
    if real.is_relative_to(source):
        raise DestinationError(f"{out}: lies inside the source {ckpt.path}", "name a directory elsewhere")
    if source.is_relative_to(real):
        raise DestinationError(f"{out}: the source {ckpt.path} lies inside it", "name a directory elsewhere")
    return target


def check_replaceable(target: Path, force: bool) -> None:
    """Allow a destination that is absent, or with `force` a directory that expertcut wrote.

    Raises:
        DestinationError: anything else is there.
    """
    if not os.path.lexists(target):
        return
    ours = target.is_dir() and not target.is_symlink() and (target / RECORD).is_file()
    if not ours:
        what = "exists" if not force else f"exists and is not a checkpoint that expertcut wrote (no {RECORD})"
        raise DestinationError(f"{target}: {what}", "name a new directory, or remove this one yourself")
    if not force:
        raise DestinationError(f"{target}: exists", "name a new directory, or replace it with --force")


def existing_parent(target: Path) -> Path:
    """Return the folder of the destination, or what is there of the way to it."""
    return next(folder for folder in target.parents if folder.exists())


def check_space(target: Path, needed: int, held: int) -> None:
    """Compare the bytes to write with the free space, counting in the bytes of them that an unfinished run holds.

    Raises:
        DestinationError: too little.
    """
    folder = existing_parent(target)
    free = shutil.disk_usage(folder).free + held
    if needed > free:
        raise DestinationError(
            f"{folder}: {format_size(needed)} needed, {format_size(free)} free",
            f"free {format_size(needed - free)} or name a directory on another disk",
        )


def allocated(files: Iterable[Path]) -> int:
    """Return the bytes of disk that files hold, as far as they are there."""
    return sum(file.lstat().st_blocks * 512 for file in files if os.path.lexists(file))


def publish(made: Path, target: Path, force: bool) -> None:
    """Give a finished directory its name in one step; with `force` the old one ends up in its place.

    Raises:
        DestinationError: the destination came into being meanwhile.
    """
    check_replaceable(target, force)
    if not os.path.lexists(target):
        try:
            rename_new(made, target)
        except FileExistsError:
            raise DestinationError(f"{target}: exists since just now", "name a new directory") from None
    elif not exchange(made, target):
        target.rename(made.parent / "replaced")
        made.rename(target)
    sync_folder(target.parent)


def discard(partial: Path) -> None:
    """Remove the hidden sibling, its journal last, so that what is left of a killed removal is still known."""
    for entry in partial.iterdir():
        if entry.name != NAME:
            shutil.rmtree(entry)
    (partial / NAME).unlink()
    with contextlib.suppress(OSError):  # another run may have come in; its files are not ours
        partial.rmdir()
    sync_folder(partial.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder safe on disk."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def destination_errors(target: Path, needed: int) -> Iterator[None]:
    """Turn what the system says about the destination into one line.

    Raises:
        DestinationError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        what = _FULL.get(error.errno or 0)
        if what:
            raise DestinationError(
                f"{target}: {what}; the checkpoint needs {format_size(needed)} in all",
                "make room and run the same command again, which goes on where this one stopped, or discard it: "
                f"rm -r {shlex.quote(str(partial_folder(target)))}",
            ) from error
        raise DestinationError(f"{error.filename or target}: cannot be written: {error.strerror}") from error
