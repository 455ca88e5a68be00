"""Text in, a file out that is replaced at once or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from expertcut.errors import DestinationError


def replace_text(path: Path, text: str, what: str) -> None:
    """Write a file; `what` it is for, in an error's words.

    Raises:
        DestinationError: it cannot be written.
    """
    if os.path.isdir(path):  # of a name that is too long `Path.is_dir` raises
        raise DestinationError(f"{path}: is a directory, expected a file name for the {what}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
