"""Hub names through the real client, against a small Hub of our own on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import single, two_shards

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secretsecretsecretsecretsecret"
PROBE = """
import json, sys
from expertcut.checkpoint import open_checkpoint
from expertcut.errors import ExpertcutError
try:
    c = open_checkpoint(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    print(json.dumps([c.name, c.path.name, list(c.tensors), list(c.companions)]))
except ExpertcutError as e:
    print(json.dumps({"type": type(e).__name__, "message": e.message, "hint": e.hint}))
"""


class _Hub(BaseHTTPRequestHandler):
    """/api/models/ORG/NAME/revision/REV and /tree/COMMIT, HEAD and GET of /ORG/NAME/resolve/COMMIT/FILE."""

    protocol_version = "HTTP/1.1"
    folder: Path
    served: list[str]

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif (self.folder / parts[1]).is_dir() and parts[1] != "gated":
            self._file(self.folder / parts[1], "/".join(parts[4:]))
        else:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})

    do_HEAD = do_GET

    def _api(self, repo: str, rest: list[str]) -> None:
        root = self.folder / repo.split("/")[1]
        if repo == "org/broken":
            self._answer(503, b"")
        elif repo == "org/expired":
            self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif not root.is_dir():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif rest[0] == "revision" and rest[1] not in ("main", COMMIT):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            self._answer(200, json.dumps({"id": repo, "sha": COMMIT}).encode())
        else:
            files = [p for p in root.rglob("*") if p.is_file()]
            self._answer(200, json.dumps([_listed(p, root) for p in files]).encode())

    def _file(self, root: Path, name: str) -> None:
        content = (root / name).read_bytes()
        if self.command == "GET":
            self.served.append(f"{root.name}/{name}")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _listed(path: Path, root: Path) -> dict[str, Any]:
    name, size = path.relative_to(root).as_posix(), path.stat().st_size
    return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A Hub with the models org/sharded, org/gated, org/pickled; org/broken and org/expired answer with errors."""
    folder = tmp_path / "repos"
    root = two_shards(folder / "sharded")
    for name in ("tokenizer.json", "LICENSE", "code/modeling_toy.py", ".gitattributes", "vocab.tiktoken"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(name))
    for name in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("stale")
    single(folder / "gated")
    single(folder / "pickled")
    (folder / "pickled/model.safetensors").rename(folder / "pickled/pytorch_model.bin")
    single(folder / "single")
    handler = type("Hub", (_Hub,), {"folder": folder, "served": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def served(hub: ThreadingHTTPServer) -> list[str]:
    found: list[str] = hub.RequestHandlerClass.served  # type: ignore[attr-defined]
    return sorted(found)


def probe(tmp_path: Path, endpoint: str, *arguments: str, **settings: str) -> Any:
    """What `open_checkpoint` returns or raises in a process of its own; the token must not show anywhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env = {**kept, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **settings}
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def address(hub: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def test_snapshot_has_what_counts_and_nothing_stale(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    companions = ["LICENSE", "code/modeling_toy.py", "tokenizer.json", "vocab.tiktoken"]
    expected = ["org/sharded", COMMIT, ["a", "b", "c"], companions]
    assert probe(tmp_path, address(hub), "org/sharded") == expected
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    wanted = [*companions, *shards, "config.json", "model.safetensors.index.json"]
    assert served(hub) == sorted(f"sharded/{name}" for name in wanted)
    assert probe(tmp_path, address(hub), "org/sharded", COMMIT) == expected
    assert len(served(hub)) == len(wanted)  # nothing fetched twice
    assert probe(tmp_path, address(hub), "org/sharded", HF_HUB_OFFLINE="1") == expected


def test_single_file_model(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert probe(tmp_path, address(hub), "org/single", "main") == ["org/single", COMMIT, ["a"], []]


@pytest.mark.parametrize(
    ("name", "revision", "message", "hint"),
    [
        ("org/absent", "main", "org/absent is neither a local directory nor a model on the Hub", "hf auth login"),
        ("org/a--b", "main", "org/a--b is neither a local directory nor a model on the Hub", "check the spelling"),
        ("org/gated", "main", "org/gated is gated on the Hub", "accept its terms"),
        ("org/sharded", "v9", "org/sharded has no revision v9", "branches, tags or commits"),
        ("org/expired", "main", "org/expired: the Hub answered 401", "renew the access token"),
        ("org/pickled", "main", "org/pickled has no safetensors weights on the Hub", "hf download org/pickled"),
    ],
)
def test_refusals(name: str, revision: str, message: str, hint: str, hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    found = probe(tmp_path, address(hub), name, revision)
    assert found["type"] == "HubError"
    assert message in found["message"] and "\n" not in found["message"]
    assert hint in found["hint"]


def test_server_in_trouble(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    found = probe(tmp_path, address(hub), "org/broken")
    assert (found["type"], found["message"]) == ("HubError", "org/broken: the Hub answered 503")


def test_unreachable_and_offline(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    found = probe(tmp_path, closed, "org/name")
    assert found["type"] == "HubError" and "the Hub cannot be reached" in found["message"]
    found = probe(tmp_path, closed, "org/name", HF_HUB_OFFLINE="1")
    assert found["type"] == "HubError" and "HF_HUB_OFFLINE is set" in found["message"]
    assert "hf download org/name" in found["hint"]


@pytest.mark.parametrize("flaw", ["\x0bx", "é"])
def test_malformed_token_stays_secret(flaw: str, hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    found = probe(tmp_path, address(hub), "org/single", HF_TOKEN=f"{TOKEN}{flaw}")
    assert found["type"] == "HubError" and "check HF_TOKEN" in found["hint"]


def test_cache_that_cannot_be_written(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = probe(tmp_path, address(hub), "org/single", HF_HOME=str(tmp_path / "file"))
    assert found["type"] == "HubError" and "cannot be stored in the Hub's cache: " in found["message"]
    assert "HF_HOME" in found["hint"]
