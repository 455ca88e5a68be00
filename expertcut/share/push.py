"""A parcel in, a repository on the Hub that holds it out, through the Hub's own client: its token, endpoint, retries.

What the repository holds already, by its hashes, is not sent again, which is how an interrupted push resumes. Error
messages are our own throughout, and the client's own log is kept silent: both can carry signed addresses.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertcut.checkpoint.hub_errors import client_errors
from expertcut.choose.budget import format_size
from expertcut.errors import HubError
from expertcut.rewrite.verify import CARD
from expertcut.share.parcel import Parcel, groups

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_NBYTES = 20_000_000_000
"""Weights per commit: what a push that was interrupted has for certain."""
_OWN = {".gitattributes"}
"""What the Hub itself puts into a repository."""
_AGAIN = "run the same command again: it goes on with what is missing"
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Pushed:
    """What a push did; the bytes of what it sent, and of what was there."""

    url: str
    commit: str
    sent: dict[str, int]
    held: dict[str, int]


@dataclass(frozen=True)
class Target:
    """Where a parcel goes."""

    repo: str
    revision: str | None
    """A branch, created if it is missing; None: main."""
    private: bool
    force: bool
    """Remove what another model left there."""


def push(parcel: Parcel, target: Target, notify: Notify = lambda message: None) -> Pushed:
    """Send what the repository lacks of a parcel: weights, companions, then what makes it a model, and the card.

    Raises:
        HubError: refused, unreachable, or the repository holds another model and `force` is not given.
    """
    from huggingface_hub import HfApi

    with _explained(target.repo):
        api = HfApi()
        commit, there = _prepared(api, target)
        sizes, contents = parcel.sizes(), parcel.contents()
        held = {name: sizes[name] for name, content in contents.items() if _holds(there.get(name), content)}
        stale = sorted(name for name in there if name not in held and name not in _OWN)
        if stale and stale != [CARD]:
            _clear(api, target, stale)
        missing = {name: sizes[name] for name in parcel.first if name not in held}
        batches = groups(missing, COMMIT_NBYTES)
        for number, names in enumerate(batches, 1):
            notify(f"sending {len(names)} files, {format_size(sum(map(sizes.__getitem__, names)))}, {number} of "
                   f"{len(batches)} parts")  # fmt: skip
            _send(api, parcel.folder, target, names, f"Add weights and tokenizer, {number} of {len(batches)}")
        last = {name: content for name, content in parcel.last.items() if name not in held}
        if last:
            commit = _close(api, target, last)
        elif batches:
            commit = str(api.repo_info(target.repo, revision=target.revision).sha)
        sent = {**missing, **{name: sizes[name] for name in last}}
        return Pushed(f"{api.endpoint}/{target.repo}", commit, sent, held)


def _prepared(api: HfApi, target: Target) -> tuple[str, dict[str, Any]]:
    """The branch's commit and files, after making the repository and the branch as needed."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        about = api.repo_info(target.repo)
    except RepositoryNotFoundError:
        api.create_repo(target.repo, private=True if target.private else None, exist_ok=True)
        about = api.repo_info(target.repo)
    if target.private and not about.private:
        raise HubError(
            f"{target.repo} exists and is public, found --private", "make it private on its page, or name another"
        )
    try:
        commit = str(api.repo_info(target.repo, revision=target.revision).sha)
    except RevisionNotFoundError:
        assert target.revision is not None
        api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        commit = str(api.repo_info(target.repo, revision=target.revision).sha)
    tree = api.list_repo_tree(target.repo, recursive=True, revision=commit)
    return commit, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _holds(entry: Any, content: Path | bytes) -> bool:
    """True if a file of the repository has this content; only what has its size is read."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if entry is None or entry.size != size:
        return False
    lfs = entry.lfs is not None
    digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size)
    for piece in _pieces(content):
        digest.update(piece)
    return bool(digest.hexdigest() == (entry.lfs.sha256 if lfs else entry.blob_id))


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _clear(api: HfApi, target: Target, stale: list[str]) -> None:
    """Remove what is not of this model, its config and index with it, before anything is sent."""
    from huggingface_hub import CommitOperationDelete

    if not target.force:
        raise HubError(
            f"{target.repo} holds files that are not of this checkpoint: {', '.join(stale[:5])}"
            + (f" and {len(stale) - 5} more" if len(stale) > 5 else ""),
            "name another repository, or replace them with --force; the repository's history keeps them",
        )
    gone = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]
    api.create_commit(target.repo, gone, commit_message="Remove what another model left", revision=target.revision)


def _send(api: HfApi, folder: Path, target: Target, names: list[str], message: str) -> None:
    exact = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    api.upload_folder(
        repo_id=target.repo, folder_path=folder, allow_patterns=exact, revision=target.revision, commit_message=message
    )


def _close(api: HfApi, target: Target, files: Mapping[str, Path | bytes]) -> str:
    """Send in one commit what makes the files before it a model."""
    from huggingface_hub import CommitOperationAdd

    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    found = api.create_commit(
        target.repo, added, commit_message="Add config, record, plan and card", revision=target.revision
    )
    return str(found.oid)


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Silence the client's log, and turn what it raises into one line of ours. Raises: HubError."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    raised: tuple[type[Exception], ...] = (*client_errors(), RuntimeError)  # the last: an upload that failed
    level = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    except raised as error:
        raise _explain(error, repo) from None
    finally:
        set_verbosity(level)


def _explain(error: BaseException, repo: str) -> HubError:
    from huggingface_hub import errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    refused = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    if refused is not None:
        return _refused(refused, repo)
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo} is no name that the Hub allows", "letters, digits, - _ and . only: ORG/NAME")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"{repo} cannot be pushed: HF_HUB_OFFLINE is set", "unset it where there is a network")
    if str(error).startswith("Invalid metadata in README.md"):
        return HubError(f"{repo}: the Hub does not accept the card's metadata", "look at it: --dry-run --card FILE")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return HubError(f"{error.filename}: cannot be read: {error.strerror}", _AGAIN)
    return HubError(f"{repo}: the way to the Hub broke ({type(chain[-1]).__name__})", _AGAIN)


def _refused(error: Any, repo: str) -> HubError:
    status: int = getattr(error.response, "status_code", 0)
    owner = repo.partition("/")[0]
    told = {
        401: ("the Hub knows no token, or not this one", "log in with one that may write: hf auth login"),
        403: ("the Hub refuses", f"use a token that may write to {owner}: hf auth login; or make room, if it is full"),
        404: ("the Hub has no such repository for this token", f"use a token that may write to {owner}: hf auth login"),
        409: ("something else is being done to it", f"wait until it is over, then {_AGAIN}"),
        412: ("it has changed meanwhile", _AGAIN),
        429: ("the Hub asks to slow down", f"wait some minutes, then {_AGAIN}"),
    }  # fmt: skip
    what, hint = told.get(status, ("the Hub is in trouble" if status >= 500 else "the Hub does not take it", _AGAIN))
    return HubError(f"{repo}: {what} (status {status})", hint)
