"""Files on disk or on the Hub → headers. Validated when opened; no tensor data is read, no torch imported."""

from __future__ import annotations

import os
from pathlib import Path

from expertcut.checkpoint import hub
from expertcut.checkpoint.data import read_array, read_bytes, read_elements
from expertcut.checkpoint.header import build_header, read_header
from expertcut.checkpoint.jsonio import load_json, shown
from expertcut.checkpoint.local import open_directory
from expertcut.checkpoint.types import DTYPE_BITS, Checkpoint, TensorInfo
from expertcut.errors import CheckpointError, UsageError

__all__ = [
    "DTYPE_BITS",
    "Checkpoint",
    "TensorInfo",
    "build_header",
    "load_json",
    "open_checkpoint",
    "read_array",
    "read_bytes",
    "read_elements",
    "read_header",
]


def open_checkpoint(name: str | Path, revision: str | None = None, *, download: bool = True) -> Checkpoint:
    """Open a checkpoint: a local directory, or a Hub name ORG/NAME at a revision.

    With `download` the latter is fetched to the Hub's cache first; otherwise all but its shards is, of which headers
    are read now and tensors when they are asked for, by byte ranges.

    Raises:
        CheckpointError: nothing of that name, or a checkpoint that is incomplete, malformed or contradictory.
        HubError: the Hub does not have it, does not give it, or cannot be reached.
        UsageError: a revision together with a local directory.
    """
    text = str(name)
    if os.path.isdir(text):
        if revision is not None:
            raise UsageError(f"{text} is a local directory, which has no revision {shown(revision)}")
        return open_directory(Path(name), text)
    if os.path.lexists(text):
        raise CheckpointError(f"{shown(text)}: not a directory", "name the directory that holds config.json")
    if isinstance(name, str) and hub.is_hub_name(name):
        if download:
            return open_directory(hub.download(name, revision), name)
        root, remote = hub.open_files(name, revision)
        return open_directory(root, name, remote)
    raise CheckpointError(
        f"{shown(text)}: no such directory, and not a Hub name of the form ORG/NAME", "check the path's spelling"
    )
