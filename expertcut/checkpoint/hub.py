"""A model on the Hugging Face Hub → a local snapshot with exactly the files that count, or all of them but the weights.

Everything but weights comes first; it holds the index, which names the shards to fetch from the same commit, whole or
later by byte ranges. Error messages are our own throughout: the client's can carry tokens and signed addresses.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertcut.checkpoint.companions import WEIGHT_SUFFIXES
from expertcut.checkpoint.hub_errors import client_errors, explain
from expertcut.checkpoint.local import SINGLE, find_index, read_index
from expertcut.checkpoint.remote import HubFiles
from expertcut.errors import HubError

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
_NO_WEIGHTS = [".*", "*/.*", *(f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES))]


def is_hub_name(name: str) -> bool:
    """True if `name` has the form ORG/NAME."""
    return _NAME.fullmatch(name) is not None


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch what is missing of a model and return its snapshot directory in the Hub's cache.

    Raises:
        HubError: not found, gated, unknown revision, unreachable, or nowhere to store it; or no safetensors weights.
        CheckpointError: its index is malformed.
    """
    root = _snapshot(repo, revision, ignore=_NO_WEIGHTS)
    weights = _weights(root)
    commit = root.name  # so that both requests see the same state of the repository
    _snapshot(repo, commit, allow=[re.sub(r"([*?[])", r"[\1]", name) for name in weights])
    if weights == [SINGLE] and not (root / SINGLE).exists():
        raise _no_weights(repo)
    return root


def open_files(repo: str, revision: str | None = None) -> tuple[Path, HubFiles | None]:
    """Fetch all but the weights of a model; return its snapshot directory, and the weights on the Hub at that commit.

    The latter are None if the directory holds them already.

    Raises:
        HubError, CheckpointError: see `download`; or a file that is not what its sha256 says.
    """
    root = _snapshot(repo, revision, ignore=_NO_WEIGHTS)
    _check_sums(repo, root)
    weights = _weights(root)
    if all((root / name).is_file() for name in weights):
        return root, None
    files = HubFiles(repo, root.name)
    if weights == [SINGLE] and not files.has(SINGLE):
        raise _no_weights(repo)
    return root, files


def _weights(root: Path) -> list[str]:
    index = find_index(root)
    return sorted(set(read_index(index).values())) if index else [SINGLE]


def _no_weights(repo: str) -> HubError:
    return HubError(
        f"{repo} has no safetensors weights on the Hub, expected {SINGLE} or an index",
        f"pickle weights can be converted: hf download {repo} --local-dir DIR, then expertcut inspect DIR says how",
    )


def _check_sums(repo: str, root: Path) -> None:
    """Compare files of a snapshot with their sha256, which the cache calls their contents by (as the Hub's ETag does).

    Files that Git itself keeps have another kind of name.
    """
    for path in root.rglob("*"):
        blob = path.resolve()
        if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob.name) and not path.name.endswith(".safetensors"):
            with blob.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != blob.name:
                raise HubError(
                    f"{repo}: {path.relative_to(root)}: sha256 is {found}, the Hub says {blob.name}",
                    f"remove the damaged file and run the same command: rm {blob}",
                )


def _snapshot(
    repo: str, revision: str | None, *, allow: list[str] | None = None, ignore: list[str] | None = None
) -> Path:
    import huggingface_hub

    try:
        with _silent():
            return Path(
                huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
            )
    except client_errors() as error:
        raise explain(error, repo, revision) from None


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the client's warnings to itself: those about repetitions carry signed addresses."""
    import logging as levels

    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
