"""Strict JSON, from bytes to Python: UTF-8 only, no duplicate keys; every error names the file.

NaN and Infinity pass, because transformers writes them into configs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expertcut.errors import CheckpointError

_SHOWN = 200


class _DuplicateKeyError(ValueError):
    pass


def shown(text: object) -> str:
    """Foreign text (a tensor's name, a key) made fit for a one-line message: printable, at most 200 characters."""
    line = str(text)
    if len(line) > _SHOWN:
        line = line[:_SHOWN] + "…"
    return line if line and line.isprintable() else ascii(line)


def parse_json(raw: bytes, where: str) -> Any:
    """Parse one JSON document; `where` is the file that errors name.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, or an object that names a key twice.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{where}: duplicate JSON key {error}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: invalid UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: invalid JSON: {error}") from None


def load_json(path: Path) -> Any:
    """Read and parse a JSON file.

    Raises:
        CheckpointError: the file cannot be read, or see `parse_json`.
    """
    return parse_json(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """All bytes of a small file.

    Raises:
        CheckpointError: the file is absent or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(shown(twice))
    return found
