"""Files of a model on the Hub, read by byte ranges: a name, an offset and a length in, exactly those bytes out.

Everything is read at one commit. An answer counts only if it is of the range that was asked for, of a file of the size
and ETag that it had before; one that breaks off is taken up where it broke. Requests go through the client's own
session, so that token, HF_ENDPOINT, proxies and offline mode hold. Signed addresses and tokens stay in here.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from expertcut.checkpoint.hub_errors import client_errors, explain, refused
from expertcut.errors import HubError

CONNECTIONS = 8
"""Requests at a time."""
BLOCK = 16 * 2**20
"""Bytes that one request asks for at most, so that long ranges are fetched in parallel."""
KEPT = 64 * 2**20
"""Bytes of single tensors that are kept to be read again: routers, mostly."""
RETRIES = 8
"""Failures in a row, without a byte between them, after which a request is given up."""
WAIT, LONGEST = 0.25, 8.0
"""Seconds before the first repetition, and before any: the wait doubles."""
PATIENCE = 300.0
"""Seconds that a server may ask to wait: the Hub counts requests over five minutes."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file's bytes are to be had for now, and what is known of it."""

    url: str
    headers: Mapping[str, str]
    size: int
    etag: str


class MissingFileError(HubError):
    """A file that is not there at a commit."""


class _Again(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, wait: float | None = None, moved: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the server asks for."""
        self.moved = moved
        """True if the address may have expired."""


class HubFiles:
    """The files of a repository at a commit."""

    def __init__(self, repo: str, commit: str) -> None:
        self.repo, self.commit = repo, commit
        self._places: dict[str, _Place] = {}
        self._etags: dict[str, str] = {}
        self._kept: dict[tuple[str, int, int], bytes] = {}

    def has(self, name: str) -> bool:
        """True if there is a file of that name.

        Raises:
            HubError: the Hub does not say.
        """
        try:
            self._place(name)
        except MissingFileError:
            return False
        return True

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            HubError: no such file at this commit, or the Hub does not give it.
        """
        return self._place(name).size

    def sha256(self, name: str) -> str | None:
        """Return the sha256 of a file, where the Hub knows it: of what is stored by Git LFS."""
        etag = self._place(name).etag
        return etag if _SHA256.fullmatch(etag) else None

    def identity(self, name: str) -> str:
        """Return what tells this state of a file from any other."""
        place = self._place(name)
        return f"{self.repo}@{self.commit}/{name} {place.size} {place.etag}"

    def read(self, name: str, offset: int, nbytes: int, stop: threading.Event | None = None) -> bytearray:
        """Return `nbytes` bytes of a file.

        Raises:
            HubError: see `stream`.
        """
        raw = bytearray()
        for chunk in self.stream(name, offset, nbytes, stop):
            raw += chunk
        return raw

    def recall(self, name: str, offset: int, nbytes: int) -> bytes:
        """Return bytes like `read`, and keep them for the next time while there is room.

        Raises:
            HubError: see `stream`.
        """
        key = (name, offset, nbytes)
        if key not in self._kept:
            raw = bytes(self.read(name, offset, nbytes))
            if sum(map(len, self._kept.values())) + nbytes > KEPT:
                return raw
            self._kept[key] = raw
        return self._kept[key]

    def stream(self, name: str, offset: int, nbytes: int, stop: threading.Event | None = None) -> Iterator[bytes]:
        """Yield `nbytes` bytes of a file, in pieces as they come; ends early once `stop` is set.

        Raises:
            HubError: the file has changed, the server does not know ranges, or it fails again and again.
        """
        stop, end, failures = stop or threading.Event(), offset + nbytes, 0
        while offset < end and not stop.is_set():
            try:
                for chunk in self._answer(name, offset, end):
                    offset, failures = offset + len(chunk), 0
                    yield chunk
                    if stop.is_set():
                        return
                if offset < end:
                    raise _Again("the answer ended early")
            except _Again as again:
                failures += 1
                self._wait(name, again, failures, stop)

    def _wait(self, name: str, again: _Again, failures: int, stop: threading.Event) -> None:
        """Wait before the next try, and look the address up anew where it may have expired.

        Raises:
            HubError: it has failed too often.
        """
        wait = min(LONGEST, WAIT * 2 ** (failures - 1)) if again.wait is None else again.wait
        if failures > RETRIES or wait > PATIENCE:
            raise HubError(
                f"{self.repo}: {name}: {again}, {failures} time{'s' if failures > 1 else ''} in a row",
                "run the same command again later; it goes on where this one stopped",
            ) from None
        stop.wait(wait)
        if again.moved:
            self._places.pop(name, None)

    def _answer(self, name: str, offset: int, end: int) -> Iterator[bytes]:
        """One request: yield the bytes that come of it.

        Raises:
            _Again: it failed, but another may not.
            HubError: another would fail as well.
        """
        from huggingface_hub import constants, get_session

        place = self._place(name, again=True)
        headers = {**place.headers, "Range": f"bytes={offset}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with get_session().stream(
                "GET", place.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                self._check(response, name, place, offset, end)
                left = end - offset
                for chunk in response.iter_raw():  # as they come: none are lost if the next do not
                    if len(chunk) > left:
                        raise HubError(f"{self.repo}: {name}: the server sent more bytes than it was asked for")
                    left -= len(chunk)
                    yield chunk
        except client_errors() as error:
            raise self._failed(error) from None

    def _check(self, response: Any, name: str, place: _Place, offset: int, end: int) -> None:
        """Look at an answer's head before any of its bytes count."""
        status: int = response.status_code
        if status in (408, 429) or status >= 500:
            raise _Again(f"the server answered {status}", _asked_to_wait(response))
        if status in (401, 403, 404, 410):
            raise _Again(f"the server answered {status}", moved=True)
        if status not in (200, 206, 416):
            raise HubError(f"{self.repo}: {name}: the server answered {status}, expected 206 (part of the file)")
        etag = _plain(response.headers.get("ETag"))
        other = _SHA256.fullmatch(etag) and _SHA256.fullmatch(place.etag) and etag != place.etag
        if status == 416 or other or (etag and self._etags.setdefault(name, etag) != etag):
            raise self._changed(name)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Again("the server sent the file compressed, so that byte ranges mean nothing")
        if status == 200:
            if (offset, end) != (0, place.size):
                raise _Again("the server ignored the byte range and sent the whole file")
            return
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != offset or not offset <= int(found[2]) < end:
            raise _Again(f"the server sent other bytes than {offset} to {end - 1}")
        if found[3] not in ("*", str(place.size)):
            raise self._changed(name)

    def _place(self, name: str, again: bool = False) -> _Place:
        """Look a file up, or recall where it is; with `again` a failure that may pass is the caller's to repeat."""
        failures = 0
        while name not in self._places:
            try:
                self._places[name] = self._look_up(name)
            except _Again as error:
                if again:
                    raise
                failures += 1
                self._wait(name, error, failures, threading.Event())
        return self._places[name]

    def _look_up(self, name: str) -> _Place:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        try:
            url = hf_hub_url(self.repo, name, revision=self.commit)
            found, headers = get_hf_file_metadata(url), build_hf_headers()
        except client_errors() as error:
            raise self._failed(error, name) from None
        if found.size is None or found.etag is None:
            raise HubError(f"{self.repo}: {name}: the Hub gives no size or no ETag", f"hf download {self.repo}")
        if found.commit_hash not in (None, self.commit):
            raise self._changed(name)
        if urlsplit(found.location).netloc != urlsplit(url).netloc:  # storage; the token is for the Hub alone
            headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
        place = _Place(found.location, headers, found.size, found.etag)
        if self._etags.setdefault(f"{name} on the Hub", f"{place.etag} {place.size}") != f"{place.etag} {place.size}":
            raise self._changed(name)
        return place

    def _failed(self, error: Exception, name: str = "") -> _Again | HubError:
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (408, 429) or status >= 500:
            return _Again(f"the Hub answered {status}", _asked_to_wait(error.response))  # type: ignore[attr-defined]
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError(
                f"{self.repo}: commit {self.commit} is no longer on the Hub", "run the command with its newest revision"
            )
        if isinstance(error, errors.EntryNotFoundError):
            return MissingFileError(f"{self.repo} has no file {name} at commit {self.commit}")
        if isinstance(error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled | ValueError):
            return refused(error, self.repo) if status == 401 else explain(error, self.repo, self.commit)
        return _Again(f"the connection failed ({type(error).__name__})")

    def _changed(self, name: str) -> HubError:
        return HubError(
            f"{self.repo}: {name} has changed at commit {self.commit[:12]} while it was read",
            "the bytes are not to be trusted: discard what was begun and run the command again",
        )


def in_parallel(jobs: Iterable[Callable[[threading.Event], _T]]) -> Iterator[_T]:
    """Run jobs, up to `CONNECTIONS` at a time and few ahead of the caller; yield what they return, in their order.

    Each is handed an event that is set when the others have failed or the caller has had enough.
    """
    stop, waiting = threading.Event(), deque[Future[_T]]()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job, stop))
                if len(waiting) == 2 * CONNECTIONS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def blocks(offset: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a byte range into pieces (offset, bytes) that one request each may ask for."""
    for start in range(offset, end, BLOCK):
        yield start, min(BLOCK, end - start)


def _asked_to_wait(response: Any) -> float | None:
    """Seconds that a server wants to be left alone, by the Hub's own header or the general one."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds) + 1
    text = response.headers.get("Retry-After", "").strip()
    return float(text) if text.isascii() and text.isdecimal() else None


def _plain(etag: str | None) -> str:
    return (etag or "").strip().removeprefix("W/").strip('"')
