"""The files beside the weights that a checkpoint needs: tokenizer, chat template, generation config, licence, code.

Everything counts but weights of any format (they are the unpruned model), their indexes, the root config and hidden
files. What is listed will be copied and perhaps published, so a link may not lead to a file outside the checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from expertcut.checkpoint.jsonio import shown
from expertcut.errors import CheckpointError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {
    ".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".tflite", ".ot", ".distcp",
}  # fmt: skip


def list_companions(root: Path) -> tuple[str, ...]:
    """Companion files under `root`, relative with forward slashes, sorted.

    Raises:
        CheckpointError: a folder cannot be listed, or a link is broken, leads out of the checkpoint, or to a folder.
    """
    found: list[str] = []
    homes = _homes(root)
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not _ignored(name)]
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                _refuse(Path(folder, name), "a link to a folder")
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not _ignored(name) and not _is_weights(name) and relative != "config.json":
                _check_link(path, homes)
                found.append(relative)
    return tuple(sorted(found))


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _is_weights(name: str) -> bool:
    lower = name.lower()
    return os.path.splitext(lower)[1] in WEIGHT_SUFFIXES or lower.endswith(".index.json")


def _homes(root: Path) -> list[Path]:
    """Where a link may lead: the directory itself and, if it is a snapshot in the Hub's cache, that cache's blobs."""
    real = root.resolve()
    cached = real.parent.name == "snapshots"
    return [real, *(folder / "blobs" for folder in real.parents[1:3] if cached)]  # of the repo, of the whole cache


def _check_link(path: Path, homes: list[Path]) -> None:
    if path.is_symlink():
        target = Path(os.path.realpath(path))  # unlike resolve(), does not raise where links go round in a circle
        if not target.exists():
            _refuse(path, "a broken link")
        if not any(target.is_relative_to(home) for home in homes):
            _refuse(path, "a link out of the checkpoint")
    if not path.is_file():
        _refuse(path, "not a regular file")


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{shown(path)}: {what}", "replace it with the file itself, or remove it")


def _unreadable(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: cannot be listed: {error.strerror}") from None
