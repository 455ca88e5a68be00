"""The log of an unfinished rewrite: what it makes, from what, and which shards are safe on disk. Also its lock.

One JSON object per line, appended and synced; a torn last line counts for nothing. First line: the identity, every part
of which must be the same for a run to be resumed. Then a line per finished shard, and one before the rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expertcut.errors import DestinationError

NAME = "journal.jsonl"
SCHEMA = "expertcut.journal/1"


class Journal:
    """An open, locked journal."""

    def __init__(self, folder: Path, file: int) -> None:
        self.folder = folder
        self.finished: dict[str, int] = {}
        """Shards that are safe on disk, with their bytes."""
        self.identity: dict[str, str] = {}
        self.inode: int | None = None
        """Inode of the finished directory, once it was about to be renamed."""
        self._file = file
        self._read()

    @property
    def blank(self) -> bool:
        """True if nothing has been recorded, nor made."""
        return not self.identity and not any(entry.name != NAME for entry in self.folder.iterdir())

    def begin(self, identity: Mapping[str, str]) -> bool:
        """Start, or go on if the journal is of the same identity; return True if it goes on.

        Raises:
            DestinationError: the journal is of another run.
        """
        if not self.identity:
            if not self.blank:
                raise DestinationError(f"{self.folder}: holds files but no journal of a run", self._discard())
            self._append({"schema": SCHEMA, **identity})
            self.identity = dict(identity)
            return False
        other = [key for key in self.identity | dict(identity) if self.identity.get(key) != identity.get(key)]
        if other:
            raise DestinationError(
                f"{self.folder}: holds an unfinished run with another {' and '.join(other)}",
                f"finish it with the command that began it, or {self._discard()}",
            )
        return True

    def finish(self, shard: str, nbytes: int) -> None:
        """Record a shard whose bytes are safe on disk."""
        self._append({"shard": shard, "nbytes": nbytes})
        self.finished[shard] = nbytes

    def ready(self, inode: int) -> None:
        """Record that the directory with this inode number is complete and will now be renamed."""
        self._append({"ready": inode})
        self.inode = inode

    def _discard(self) -> str:
        return f"discard it: rm -r {shlex.quote(str(self.folder))}"

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file)

    def _read(self) -> None:
        text = os.pread(self._file, os.fstat(self._file).st_size, 0)
        whole = text[: text.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            if records and records[0].pop("schema") != SCHEMA:
                raise ValueError
            self.identity = records[0] if records else {}
            for record in records[1:]:
                if "ready" in record:
                    self.inode = record["ready"]
                else:
                    self.finished[record["shard"]] = record["nbytes"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DestinationError(f"{self.folder / NAME}: damaged", self._discard()) from None


@contextlib.contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """Open the journal in `folder`, which is made if need be, and hold its lock.

    Raises:
        DestinationError: another process holds it, or it is damaged.
    """
    folder.mkdir(exist_ok=True)
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder) from None
        if os.fstat(file).st_nlink == 0:  # the other run has finished just now and removed it
            raise _busy(folder)
        yield Journal(folder, file)
    finally:
        os.close(file)


def _busy(folder: Path) -> DestinationError:
    return DestinationError(f"{folder}: another run is writing there", "wait until it has ended")
