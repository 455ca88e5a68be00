"""One request of OpenAI's completions protocol, and the stream of events that answers it, as one timed reply.

Lines and the times when they came in, a `Reply` out. Nothing is sent or waited for here. Invariant: a reply is as
long as was asked, as far as the server says how long it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expertcut.checkpoint.jsonio import shown

SHOWN = 300
"""Bytes of what a server says that errors repeat, at most."""


class ShortError(Exception):
    """An answer of another length than was asked."""


@dataclass(frozen=True)
class Reply:
    """One request, answered in full. Times are seconds of one clock."""

    sent: float
    first: float
    """When the first token came."""
    last: float
    prompt: int
    """Tokens of the prompt."""
    tokens: int
    counted: bool = False
    """True: the server does not say how many tokens it wrote; pieces of the stream were counted."""

    @property
    def ttft(self) -> float:
        """Time to the first token, seconds."""
        return self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time per further token, seconds; None if there is no further one."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


def excerpt(raw: bytes) -> str:
    """Return the beginning of what a server says, fit for a one-line message."""
    return shown(" ".join(raw[:SHOWN].decode("utf-8", "replace").split()))


def request(model: str, prompt: Sequence[int], output_len: int) -> dict[str, Any]:
    """Return the request for exactly so many tokens.

    They are drawn from the model's own distribution: greedy ones soon repeat themselves, and repeated tokens keep going
    to the same experts.
    """
    return {
        "model": model, "prompt": list(prompt), "max_tokens": output_len, "min_tokens": output_len, "ignore_eos": True,
        "temperature": 1.0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


class Stream:
    """What has come of one answer."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.pieces, self.texts = wanted, 0, 0
        self.first = self.last = 0.0
        self.usage: tuple[int, int] | None = None
        """Tokens of the prompt and of the answer, if the server says."""
        self.reason: str | None = None
        self.ended = False

    def __str__(self) -> str:
        return f"{self.pieces} pieces of {self.wanted} tokens had come"

    def take(self, line: bytes, now: float) -> None:
        """Take one line; raises ValueError for what no such server sends."""
        name, colon, value = line.strip().partition(b":")
        if name != b"data" or not colon:
            if name and name not in (b"event", b"id", b"retry"):
                raise ValueError(f"found {excerpt(line)}, expected an event")
            return
        if value.strip() == b"[DONE]":
            self.ended = True
            return
        try:
            event = json.loads(value)
            choices, usage = event["choices"], event.get("usage")
            for choice in choices:
                self.texts += bool(choice.get("text"))
                self.reason = choice.get("finish_reason") or self.reason
            if usage is not None:
                self.usage = (int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"found {excerpt(value)}, expected an event with choices") from None
        if choices:
            self.pieces += 1
            self.first, self.last = self.first or now, now

    def reply(self, sent: float, prompt: int) -> Reply:
        """Return the finished answer to a prompt of so many tokens.

        Raises:
            ShortError: it is not as long as was asked.
        """
        prompt, tokens = self.usage or (prompt, self.texts)
        if not self.pieces or not tokens or (tokens != self.wanted if self.usage else self.reason == "stop"):
            reason = f" (finish_reason {shown(self.reason)})" if self.reason else ""
            raise ShortError(f"an answer of {tokens} tokens{reason}, expected {self.wanted}")
        return Reply(sent, self.first, self.last, prompt, tokens, counted=self.usage is None)
