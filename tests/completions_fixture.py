"""Servers of `completions_server` for tests, gone when the test is over: a pytest plugin."""

import threading
from collections.abc import Callable, Iterator

import pytest
from completions_server import Server


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers that follow a script."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(*script: str) -> Server:
        server = Server()
        server.script = list(script) or ["good"]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
