"""The client under load, against a real server on the loopback interface that can be told to misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest
from completions_server import FAULTS, MODEL, Server

from expertcut.errors import RuntimeLintError, UsageError
from expertcut.measure import load
from expertcut.measure.completions import Reply
from expertcut.measure.load import Target, run_load, served_name

pytest_plugins = ("completions_fixture",)

Serve = Callable[..., Server]
PROMPTS = [[7] * 5, [8] * 6, [9] * 7]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without a pause."""
    monkeypatch.setattr(load, "BACKOFF", (0, 0))


def target(server: Server, timeout: float = 20) -> Target:
    return Target(server.url, MODEL, timeout)


@pytest.mark.parametrize("clients", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["good", "closes"])
def test_every_prompt_is_answered_once_and_timed(clients: int, kind: str, serve: Serve) -> None:
    server = serve(kind)
    replies = run_load(target(server), PROMPTS, 4, clients)
    assert sorted(reply.prompt for reply in replies) == [5, 6, 7]
    assert all(reply.tokens == 4 and not reply.counted for reply in replies)
    assert all(reply.ttft > 0 and reply.sent < reply.first <= reply.last for reply in replies)
    assert sorted(request["prompt"] for request in server.asked) == PROMPTS
    for request in server.asked:
        assert (request["max_tokens"], request["min_tokens"], request["ignore_eos"]) == (4, 4, True)


def test_times_per_token() -> None:
    assert (Reply(1.0, 1.5, 3.5, 10, 5).ttft, Reply(1.0, 1.5, 3.5, 10, 5).tpot) == (0.5, 0.5)
    assert Reply(1.0, 1.5, 1.5, 10, 1).tpot is None


def test_as_many_requests_are_open_as_there_are_clients(serve: Serve) -> None:
    """A server that answers none until so many have come answers all: they are open together."""
    server = serve("good")
    barrier, next_kind = threading.Barrier(3), server.next

    def meet() -> str:
        barrier.wait(timeout=20)
        return next_kind()

    server.next = meet  # type: ignore[method-assign]
    assert len(run_load(target(server), PROMPTS * 2, 2, 3)) == 6


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("clients", [1, 3])
def test_what_is_wrong_is_said_at_once_and_nobody_waits_for_it(kind: str, clients: int, serve: Serve) -> None:
    server = serve(kind)
    with pytest.raises(RuntimeLintError) as caught:
        run_load(target(server, 0.3 if kind == "stall" else 20), PROMPTS, 4, clients)
    assert server.url in caught.value.message and caught.value.hint
    assert FAULTS[kind] in caught.value.message
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_one_fault_ends_the_others(serve: Serve) -> None:
    server = serve("stall", "error", "stall")
    with pytest.raises(RuntimeLintError, match="answered 500"):
        run_load(target(server, 600), PROMPTS, 4, 3)


def test_a_busy_server_gets_the_whole_run_again(serve: Serve) -> None:
    server = serve("good", "busy", "good")
    replies = run_load(target(server), PROMPTS, 4, 1)
    assert len(replies) == 3 and len(server.asked) == 2 + 3
    assert [request["prompt"] for request in server.asked] == [*PROMPTS[:2], *PROMPTS]


def test_a_server_that_stays_busy_is_given_up(serve: Serve) -> None:
    server = serve("busy")
    with pytest.raises(RuntimeLintError, match="answered 429 Too Many Requests, 3 times, with 2 clients"):
        run_load(target(server), PROMPTS, 4, 2)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RuntimeLintError, match="cannot connect: Connection refused, 3 times"):
        run_load(Target(f"http://127.0.0.1:{port}/v1", MODEL), PROMPTS, 4, 2)


def test_pieces_stand_for_tokens_where_a_server_does_not_count(serve: Serve) -> None:
    replies = run_load(target(serve("uncounted")), PROMPTS, 4, 1)
    assert [(reply.prompt, reply.tokens, reply.counted) for reply in replies] == [
        (5, 4, True),
        (6, 4, True),
        (7, 4, True),
    ]


def test_a_run_that_drips_on_is_ended(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the connections do: the run as a whole has a limit."""
    monkeypatch.setattr(load, "GRACE", 0.2)
    server = serve()
    monkeypatch.setattr(load._Line, "ask", lambda self, prompt, length: server.over.wait(20))
    monkeypatch.setattr(load._Line, "hang_up", lambda self: server.over.set())
    with pytest.raises(RuntimeLintError, match="3 of 3 clients still wait after 0 s"):
        run_load(target(server, 0.1), PROMPTS, 4, 3)


def test_the_key_goes_along_and_is_not_shown(serve: Serve) -> None:
    server = serve()
    secret = Target(server.url, MODEL, key="sk-very-secret")
    run_load(secret, PROMPTS, 2, 1)
    assert server.keys == ["Bearer sk-very-secret"] * 3
    assert "secret" not in repr(secret)


def test_served_names(serve: Serve) -> None:
    server = serve()
    assert served_name(Target(server.url, "anything")) == MODEL
    server.models = ["a", "b"]
    assert served_name(Target(server.url, "b")) == "b"
    with pytest.raises(UsageError, match="serves a, b, but no c"):
        served_name(Target(server.url, "c"))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost/v1", "http:///v1", "http://me:key@localhost/v1"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="expected a URL"):
        served_name(Target(url, MODEL))
