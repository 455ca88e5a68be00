"""A written checkpoint in, the files to send out, in the order to send them; or the reason why none may be sent.

Weights and companions go first. What makes a repository a model (config, index, record) and the card go last, in one
commit, so that nobody takes half of one for a whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath

from expertcut.calibrate.profile import JSON as PROFILE
from expertcut.calibrate.profile import Profile
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.checkpoint.local import INDEX
from expertcut.errors import CheckpointError, DestinationError
from expertcut.rewrite import require, verify_bytes, verify_structure
from expertcut.rewrite.layout import RECORD
from expertcut.rewrite.record import Record
from expertcut.rewrite.verify import CARD

PLAN = "plan.json"
SECRETS = (
    ".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "id_rsa*", "id_ed25519*", "id_ecdsa*", ".netrc",
    "token", "*.token", "token.txt", "hf_token*", "*_token.txt", "*secret*", "credentials*", ".git-credentials",
    ".npmrc", ".pypirc", "stored_tokens",
)  # fmt: skip
"""Names, in lower case, of files that tend to hold secrets."""
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_SCANNED = 1 << 20
"""Bytes up to which a file's content is looked at for tokens: what people write by hand is smaller."""


@dataclass(frozen=True)
class Parcel:
    """What is sent, by name in the repository."""

    folder: Path
    first: tuple[str, ...]
    """Files of the folder that go first: weights, then companions."""
    last: dict[str, Path | bytes]
    """What goes last, together."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file, in the order of sending."""
        return {name: _size(content) for name, content in self.contents().items()}

    def contents(self) -> dict[str, Path | bytes]:
        """Return every file, in the order of sending."""
        return {**{name: self.folder / name for name in self.first}, **self.last}


def open_written(out: Path, source: Checkpoint | None) -> tuple[Checkpoint, Record]:
    """Open a checkpoint that expertcut wrote, and check it: its structure, and every byte where the source is given.

    Raises:
        CheckpointError: not a checkpoint that expertcut wrote, an unfinished one, or one with files that look secret.
        VerifyError: a check failed.
    """
    if out.absolute().name.endswith(".expertcut-partial"):
        raise CheckpointError(f"{out}: the temporary directory of an unfinished run", "finish it: run `prune` again")
    if not out.is_dir():
        raise CheckpointError(f"{out}: not a directory", "push what `expertcut prune MODEL OUT` wrote")
    if not (out / RECORD).is_file():
        raise CheckpointError(
            f"{out}: no {RECORD}, so that it is not a checkpoint that expertcut wrote",
            "other models are for `hf upload`",
        )
    _refuse_secrets(out)
    require(verify_structure(out, source))
    if source is not None:
        require(verify_bytes(out, source))
    return open_checkpoint(out), Record.load(out)


def pack(checkpoint: Checkpoint, record: Record, card: str, profile: Profile | None) -> Parcel:
    """Return what is sent of a checkpoint: all of it, with this card, its plan, and a profile's description.

    Raises:
        CheckpointError: one of the files to send holds an access token.
    """
    made: dict[str, Path | bytes] = {PLAN: record.plan.to_text().encode()}
    if profile is not None:
        made[PROFILE] = _described(profile)
    last: dict[str, Path | bytes] = {name: checkpoint.path / name for name in ("config.json", RECORD)}
    last |= {INDEX: checkpoint.path / INDEX} if checkpoint.indexed else {}
    last |= {**made, CARD: card.encode()}
    companions = tuple(name for name in checkpoint.companions if name not in last)
    parcel = Parcel(checkpoint.path, (*checkpoint.shards, *companions), last)
    for name, content in parcel.contents().items():
        if name not in checkpoint.shards and _size(content) <= _SCANNED and _TOKEN.search(_read(content)):
            raise CheckpointError(f"{name}: holds an access token of the Hub", "revoke it, and take it out of the file")
    return parcel


def save_card(path: Path, card: str) -> None:
    """Write a card to a file of its own. Raises: DestinationError."""
    try:
        path.write_text(card, encoding="utf-8")
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error


def _refuse_secrets(out: Path) -> None:
    found = sorted(
        Path(folder, name).relative_to(out).as_posix()
        for folder, _, names in os.walk(out)
        for name in names
        if any(fnmatch(name.lower(), pattern) for pattern in SECRETS)
    )
    if found:
        raise CheckpointError(
            f"{out}: files that look like secrets: {', '.join(found)}", "move them out of there first"
        )


def _described(profile: Profile) -> bytes:
    """A profile's JSON, in which paths that tell of this machine are cut to their last part."""
    document = profile.meta.model_dump(mode="json", by_alias=True)
    for data in document["data"]:
        data["sources"] = [{key: _public(value) for key, value in source.items()} for source in data["sources"]]
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _public(value: object) -> object:
    path = PurePath(value) if isinstance(value, str) else PurePath()
    return path.name if path.is_absolute() or ".." in path.parts or str(path).startswith("~") else value


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _read(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split files, in order, into groups of at most `limit` bytes; a larger file is a group of its own."""
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= size
    return found
