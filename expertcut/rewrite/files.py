"""Files under a directory, opened for reading when they are asked for, one at a time; and writing at a position."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from expertcut.errors import CheckpointError


class Folder:
    """A directory whose files are read in turn; asking for another one closes the last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._name = ""
        self._file = -1

    def open(self, name: str) -> int:
        """Return the descriptor of a file, valid until another one is asked for.

        Raises:
            CheckpointError: it cannot be opened.
        """
        if name != self._name:
            self.close()
            path = self.root / name
            try:
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
            self._name = name
        return self._file

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._file >= 0:
            os.close(self._file)
        self._name, self._file = "", -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_all(file: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at a position of an open file."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, at)
        at, rest = at + written, rest[written:]
