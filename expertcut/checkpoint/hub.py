"""A model on the Hugging Face Hub → a local snapshot with exactly the files that count.

Everything but weights comes first; it holds the index, which names the shards to fetch from the same commit. Error
messages are our own throughout: the client's can carry tokens and signed addresses.
"""

from __future__ import annotations

import re
from pathlib import Path

from expertcut.checkpoint.companions import WEIGHT_SUFFIXES
from expertcut.checkpoint.local import SINGLE, find_index, read_index
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
    index = find_index(root)
    weights = sorted(set(read_index(index).values())) if index else [SINGLE]
    commit = root.name  # so that both requests see the same state of the repository
    _snapshot(repo, commit, allow=[re.sub(r"([*?[])", r"[\1]", name) for name in weights])
    if not index and not (root / SINGLE).exists():
        raise HubError(
            f"{repo} has no safetensors weights on the Hub, expected {SINGLE} or an index",
            f"pickle weights can be converted: hf download {repo} --local-dir DIR, then expertcut inspect DIR says how",
        )
    return root


def _snapshot(
    repo: str, revision: str | None, *, allow: list[str] | None = None, ignore: list[str] | None = None
) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    # HTTPError of the HTTP library below, which differs between versions of the client.
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except (OSError, ValueError, transport) as error:  # ValueError: a malformed name, token or address
        raise _explain(error, repo, revision) from None


def _explain(error: Exception, repo: str, revision: str | None) -> HubError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repo} is gated on the Hub", "accept its terms on its page, then run: hf auth login")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return HubError(
            f"{repo} is neither a local directory nor a model on the Hub that you can see",
            "check the spelling; if it is private, run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision} on the Hub", "name one of its branches, tags or commits")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(error, repo)
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repo)
    if isinstance(error, OSError) and error.strerror:
        hint = "set HF_HOME to a place with room that you may write to"
        return HubError(f"{repo} cannot be stored in the Hub's cache: {error.strerror}", hint)
    hint = "check HF_TOKEN, HF_ENDPOINT and the proxy, then run the same command"
    return HubError(f"{repo}: talking to the Hub failed ({type(error).__name__})", hint)


def _unreachable(error: Exception, repo: str) -> HubError:
    from huggingface_hub import constants, errors

    missing = f"{repo} is neither a local directory nor complete in the Hub's cache"
    if constants.HF_HUB_OFFLINE:
        hint = f"unset HF_HUB_OFFLINE, or first run where there is a network: hf download {repo}"
        return HubError(f"{missing}, and HF_HUB_OFFLINE is set", hint)
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return _refused(error.__cause__, repo)
    return HubError(f"{missing}, and the Hub cannot be reached", "check the path, the network, the proxy, HF_ENDPOINT")


def _refused(error: Exception, repo: str) -> HubError:
    status: int = getattr(getattr(error, "response", None), "status_code", 0)
    hints = {401: "renew the access token: hf auth login", 403: "use an account that may read it: hf auth login"}
    return HubError(f"{repo}: the Hub answered {status}", hints.get(status, "wait a little, then run the same command"))
