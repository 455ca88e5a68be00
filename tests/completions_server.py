"""A server of OpenAI's completions protocol on the loopback interface, which can be told to misbehave."""

import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "_demo_model"
FAULTS = {
    "stall": "no further answer within",
    "reset": "the connection broke",
    "error": 'answered 500 Internal Server Error (application/json), expected 200 and a text/event-stream: {"error"',
    "whole": "answered 200 OK (application/json), expected 200 and a text/event-stream",
    "garbage": "found <html>garbage, expected an event",
    "bad json": 'found {"choices": [, expected an event with choices',
    "no choices": 'found {"error": "out of memory"}, expected an event with choices',
    "nested": "found [[[[",
    "silent": "an answer of 0 tokens, expected",
    "short": "an answer of 1 tokens (finish_reason length), expected",
    "stops": "an answer of 1 tokens (finish_reason stop), expected",
    "truncated": "the stream ended without [DONE]",
    "no http": "the connection broke: '*no http*",
}
"""What a server may do to a request, and what must be said of it."""


class Server(ThreadingHTTPServer):
    """Answers requests by `script`, one entry for each and the last one for all others."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.script: list[str] = ["good"]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = [MODEL]
        self.over, self.stalled = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next(self) -> str:
        with self.lock:
            return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on what is broken."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal."""

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        kind = self.server.next()
        self.close_connection = kind != "good"
        if kind == "busy":
            self.answer(429, {"error": "slow down"}, {"Retry-After": "0"})
        elif kind == "error":
            self.answer(500, {"error": "no kernel"})
        elif kind == "whole":
            self.answer(200, {"choices": [{"text": "a"}]})
        elif kind == "no http":
            self.wfile.write(b"*no http*\r\n\r\n")
        else:
            self.stream(kind, len(body["prompt"]), body["max_tokens"])

    def answer(self, status: int, document: object, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(raw)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def stream(self, kind: str, prompt: int, wanted: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        if kind == "closes":
            self.send_header("Connection", "close")
        self.end_headers()
        tokens = {"silent": 0, "short": 1, "stops": 1}.get(kind, wanted)
        for number in range(tokens):
            ends = number == tokens - 1
            reason = ("stop" if kind == "stops" else "length") if ends else None
            self.event(json.dumps({"choices": [{"index": 0, "text": "a", "finish_reason": reason}]}))
            if number == 0:
                self.misbehave(kind)
        if kind not in ("stops", "uncounted", "silent"):
            self.event(json.dumps({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}}))
        if kind != "truncated":
            self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def misbehave(self, kind: str) -> None:
        if kind == "stall":
            self.server.stalled.set()
            self.server.over.wait()
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
            raise ConnectionResetError
        elif kind == "garbage":
            self.chunk(b"<html>garbage\n")
        elif kind == "bad json":
            self.event('{"choices": [')
        elif kind == "no choices":
            self.event('{"error": "out of memory"}')
        elif kind == "nested":
            self.event("[" * 100_000)

    def event(self, data: str) -> None:
        self.chunk(f": a comment\ndata: {data}\n\n".encode())

    def chunk(self, raw: bytes) -> None:
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
