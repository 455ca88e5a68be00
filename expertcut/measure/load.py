"""Prompts and a server of OpenAI's completions protocol in; when every token came, or one clear error, out.

A closed loop: so many clients, each sending one request after the other, each over a connection that is open before
the clock runs. Invariant: figures are of runs in which every request was answered in full at the first try. A
server that is not up yet, or busy, makes the whole run start again, a few times, so that no waiting enters a figure.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from expertcut.checkpoint.jsonio import shown
from expertcut.errors import RuntimeLintError, UsageError
from expertcut.measure.completions import SHOWN, Reply, ShortError, Stream, excerpt, request

BACKOFF: tuple[float, ...] = (1, 2, 4, 8)
"""Seconds between the tries of a run."""
PATIENCE = 30.0
"""The longest that a server's own Retry-After is waited for, seconds."""
GRACE = 5.0
"""Seconds beyond what all requests of a client may take, after which a run is given up."""
LINE = 1 << 20
"""Bytes of the longest line that is read."""
BUSY = (429, 503)

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Target:
    """A model behind a server."""

    url: str
    """Such as http://localhost:8000/v1."""
    model: str
    """What the server calls it."""
    timeout: float = 600
    """Seconds that one request may take."""
    key: str | None = field(default=None, repr=False)


class _Busy(Exception):
    """The server cannot take a request now; `after` is how long it wants to be left alone, seconds."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


def api_key() -> str | None:
    """Return the key for servers that want one, from OPENAI_API_KEY."""
    return os.environ.get("OPENAI_API_KEY")


def run_load(target: Target, prompts: Prompts, output_len: int, clients: int) -> list[Reply]:
    """Let `clients` clients send the prompts, each its share in order, and have `output_len` tokens written for each.

    Raises:
        RuntimeLintError: the server cannot be reached or stays busy; an answer fails, stalls, or is not as asked.
    """
    for wanted in (*BACKOFF, None):
        try:
            return _run(target, prompts, output_len, clients)
        except _Busy as busy:
            if wanted is None:
                raise RuntimeLintError(
                    f"{target.url}: {busy}, {1 + len(BACKOFF)} times, with {clients} clients",
                    "start the server, or ask less of it: a lower --concurrency",
                ) from None
            time.sleep(wanted if busy.after is None else min(busy.after, PATIENCE))
    raise AssertionError


def served_name(target: Target) -> str:
    """Return what the server calls the model: that name, or the only one that it serves.

    Raises:
        RuntimeLintError: it does not answer.
        UsageError: it serves several models, none of that name.
    """
    line = _Line(target)
    try:
        line.open()
        names = line.models()
    except (_Busy, OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise RuntimeLintError(
            f"{target.url}/models: no list of models: {error}", "--engine takes a URL such as http://localhost:8000/v1"
        ) from error
    finally:
        line.close()
    if target.model not in names and len(names) != 1:
        raise UsageError(
            f"{target.url} serves {', '.join(names) or 'nothing'}, but no {target.model}", "name MODEL as it does"
        )
    return target.model if target.model in names else names[0]


def _run(target: Target, prompts: Prompts, output_len: int, clients: int) -> list[Reply]:
    shares = [prompts[start::clients] for start in range(clients) if prompts[start::clients]]
    lines = [_Line(target) for _ in shares]
    try:
        for line in lines:
            line.open()
        with ThreadPoolExecutor(len(lines)) as pool:
            try:
                futures = [
                    pool.submit(line.ask_all, share, output_len) for line, share in zip(lines, shares, strict=True)
                ]
                return _gather(target, futures, target.timeout * len(shares[0]) + GRACE)
            finally:
                for line in lines:
                    line.hang_up()  # wakes those that still wait, for the pool waits for them
    finally:
        for line in lines:
            line.close()


def _gather(target: Target, futures: Sequence[Future[list[Reply]]], seconds: float) -> list[Reply]:
    done, waiting = wait(futures, timeout=seconds, return_when=FIRST_EXCEPTION)
    errors = [error for future in done if (error := future.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, _Busy))
    if waiting:
        raise RuntimeLintError(
            f"{target.url}: {len(waiting)} of {len(futures)} clients still wait after {seconds:.0f} s",
            "see the server's log, or allow more: --timeout",
        )
    return [reply for future in futures for reply in future.result()]


class _Line:
    """One client's way to a server: a connection for each request, as servers may drop those that have served one."""

    def __init__(self, target: Target) -> None:
        parts = urlsplit(target.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise UsageError(
                f"{target.url}: expected a URL such as http://localhost:8000/v1", "a key goes into OPENAI_API_KEY"
            )
        self.target, self.path = target, parts.path.rstrip("/")
        self.headers = {"Content-Type": "application/json", "Connection": "close"}
        if target.key:
            self.headers["Authorization"] = f"Bearer {target.key}"
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(parts.hostname, parts.port, timeout=target.timeout)
        self.socket: socket.socket | None = None

    def open(self) -> None:
        """Connect; raises `_Busy` if nobody listens."""
        try:
            self.connection.connect()
        except ssl.SSLError as error:
            raise self.fault(f"no secure connection: {error}") from error
        except OSError as error:
            raise _Busy(f"cannot connect: {error.strerror or error}") from error
        self.socket = self.connection.sock

    def hang_up(self) -> None:
        """End whatever goes on, from any thread."""
        if self.socket is not None:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.connection.close()

    def fault(self, what: str, hint: str = "see the server's log") -> RuntimeLintError:
        return RuntimeLintError(f"{self.target.url}: {what}", hint)

    def models(self) -> list[str]:
        """Names of the models that are served."""
        self.connection.request("GET", f"{self.path}/models", headers=self.headers)
        response = self.connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status} {response.reason}")
        return [str(model["id"]) for model in json.loads(response.read(LINE))["data"]]

    def ask_all(self, prompts: Prompts, output_len: int) -> list[Reply]:
        return [self.ask(prompt, output_len) for prompt in prompts]

    def ask(self, prompt: Sequence[int], output_len: int) -> Reply:
        """Send one request and read its stream to the end."""
        body = json.dumps(request(self.target.model, prompt, output_len))
        stream = Stream(output_len)
        if self.connection.sock is None:
            self.open()
        sent = time.perf_counter()
        try:
            self.connection.request("POST", f"{self.path}/completions", body, self.headers)
            response = self.connection.getresponse()
            self.accept(response)
            for line in self.lines(response, sent + self.target.timeout):
                stream.take(line, time.perf_counter())
                if stream.ended:
                    break
            self.connection.close()
            return stream.reply(sent, len(prompt))
        except ShortError as error:
            raise self.fault(
                str(error),
                "the server must obey ignore_eos and min_tokens, as vLLM and SGLang do, and have room for as many",
            ) from None
        except TimeoutError:
            raise self.fault(
                f"no further answer within {self.target.timeout:g} s of a request: {stream}",
                "see the server's log, or allow more: --timeout",
            ) from None
        except ValueError as error:
            raise self.fault(f"{error}: {stream}") from None
        except (OSError, http.client.HTTPException) as error:
            raise self.fault(f"the connection broke: {shown(str(error) or type(error).__name__)}: {stream}") from None

    def accept(self, response: http.client.HTTPResponse) -> None:
        """Refuse what is no stream of events."""
        kind = response.headers.get_content_type()
        if response.status in BUSY:
            after = response.headers.get("Retry-After", "")
            raise _Busy(f"answered {response.status} {response.reason}", float(after) if after.isdecimal() else None)
        if response.status != 200 or kind != "text/event-stream":
            raise ValueError(
                f"answered {response.status} {response.reason} ({kind}), expected 200 and a text/event-stream: "
                f"{excerpt(response.read(SHOWN))}"
            )

    def lines(self, response: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
        """Lines as they come; each read waits until the deadline at most."""
        assert self.socket is not None
        while True:
            self.socket.settimeout(max(deadline - time.perf_counter(), 1e-3))
            line = response.readline(LINE)
            if not line:
                raise ValueError("the stream ended without [DONE]")
            yield line
