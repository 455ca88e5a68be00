"""What the Hub's client raises → one line of our own: the client's messages can carry tokens and signed addresses."""

from __future__ import annotations

from expertcut.errors import HubError


def client_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises: its own errors, those of the HTTP library below, which differs, and ValueErrors.

    The last are malformed names, tokens or addresses.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, HfHubHTTPError.__mro__[1])


def explain(error: Exception, repo: str, revision: str | None) -> HubError:
    """Say what went wrong with a repository at a revision, without a word of the client's."""
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
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return _unreachable(error, repo)
    if isinstance(error, errors.HfHubHTTPError):
        return refused(error, repo)
    if isinstance(error, OSError) and error.strerror:
        hint = "set HF_HOME to a place with room that you may write to"
        return HubError(f"{repo} cannot be stored in the Hub's cache: {error.strerror}", hint)
    hint = "check HF_TOKEN, HF_ENDPOINT and the proxy, then run the same command"
    return HubError(f"{repo}: talking to the Hub failed ({type(error).__name__})", hint)


def refused(error: Exception, repo: str) -> HubError:
    """Say which status the Hub answered with."""
    status: int = getattr(getattr(error, "response", None), "status_code", 0)
    hints = {401: "renew the access token: hf auth login", 403: "use an account that may read it: hf auth login"}
    return HubError(f"{repo}: the Hub answered {status}", hints.get(status, "wait a little, then run the same command"))


def _unreachable(error: Exception, repo: str) -> HubError:
    from huggingface_hub import constants, errors

    missing = f"{repo} is neither a local directory nor complete in the Hub's cache"
    if constants.HF_HUB_OFFLINE:
        hint = f"unset HF_HUB_OFFLINE, or first run where there is a network: hf download {repo}"
        return HubError(f"{missing}, and HF_HUB_OFFLINE is set", hint)
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return refused(error.__cause__, repo)
    return HubError(f"{missing}, and the Hub cannot be reached", "check the path, the network, the proxy, HF_ENDPOINT")
