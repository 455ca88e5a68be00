"""A Hub on the loopback interface for the real client: repositories of commits, LFS, faults on demand, a log.

with Hub() as hub:
    hub.add("org/model", folder)                    # or {"config.json": b"{}"}; returns the commit
    hub.fault(r"GET /cdn/", status=503, times=2)    # see `Hub.fault`
    run(…, env=hub.environment(home))
    hub.log[-1].path, hub.files("org/model")
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretsecretsecretsecretsecret"
"""May write to every repository of `Hub.namespaces`."""
READER = "hf_readerreaderreaderreaderreader"
"""May read all repositories, and write to none."""
SIGNATURE = "X-Amz-Signature=5167e4sealed"
"""Stands in every address of the store behind the Hub, and must not show in any message."""

_LFS = (".safetensors", ".bin", ".pt", ".gguf", ".npz", ".gz", ".zip")
_PIECE = 1 << 16
Kind = Literal["status", "reset", "close", "ignore range", "etag", "stall"]


@dataclasses.dataclass(frozen=True)
class Blob:
    """The content of one file; of a file on disk only what is asked for is read."""

    content: bytes | Path
    lfs: bool

    @classmethod
    def of(cls, name: str, content: bytes | Path) -> Blob:
        """As the Hub decides: LFS by name, by size, or because it is no text."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        blob = cls(content, False)
        return cls(content, name.endswith(_LFS) or size > 10_000_000 or b"\0" in blob.read(0, min(512, size)))

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:stop]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def all(self) -> bytes:
        return self.read(0, self.size)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, self.size, 1 << 20):
            digest.update(self.read(start, min(start + (1 << 20), self.size)))
        return digest.hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of the blob; for LFS of its pointer."""
        return hashlib.sha1(b"blob %d\0" % len(raw := self._pointer() if self.lfs else self.all()) + raw).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def _pointer(self) -> bytes:
        lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {self.size}\n"
        return "\n".join(lines).encode()


@dataclasses.dataclass
class Repository:
    """Commits (each the whole tree by path), newest last, and what branches and tags point to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, Blob], message: str) -> str:
        seed = f"{len(self.commits)} {branch} {message} {sorted(tree)}"
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or (at least 7 digits of) a commit names."""
        if revision in self.branches:
            return self.branches[revision]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if len(found) == 1 else None


@dataclasses.dataclass
class Request:
    """What was asked and what became of it: bytes of bodies, without heads."""

    method: str
    path: str
    query: str
    range: str | None
    authorized: bool
    headers: dict[str, str]
    received: int = 0
    sent: int = 0
    status: int = 0


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches `pattern`."""

    pattern: str
    kind: Kind
    times: int
    after: int
    status: int
    headers: dict[str, str]


class Hub(ThreadingHTTPServer):
    """The server; serves from `with` on, and stops after it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.cdn = f"http://localhost:{self.server_address[1]}"
        """Where LFS files are: the same server by the name of another host, to which no token may go."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, Blob] = {}
        """LFS objects that have been sent, by their sha256."""
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.namespaces = {"org", "tester"}
        self.stalled, self.released = threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def add(
        self,
        name: str,
        files: Path | Mapping[str, bytes | Path],
        *,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit a folder, or contents by path, as the whole of a branch; returns the commit."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p for p in sorted(files.rglob("*")) if p.is_file()}
        tree = {path: Blob.of(path, content) for path, content in files.items()}
        with self.lock:
            self.objects |= {blob.sha256: blob for blob in tree.values() if blob.lfs}
            repository = self.repositories.setdefault(name, Repository())
            repository.private, repository.gated = private, gated
            return repository.commit(branch, tree, "add")

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repository by path."""
        repository = self.repositories[name]
        commit = repository.resolve(revision)
        assert commit is not None, f"no revision {revision}"
        return {path: blob.all() for path, blob in repository.commits[commit].items()}

    def fault(
        self,
        pattern: str,
        kind: Kind = "status",
        *,
        times: int = 1,
        after: int = 0,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Let something happen to the next `times` requests whose "METHOD /path" (no query) matches `pattern`.

        status        answer `status` with `headers`, for instance 429 and {"Retry-After": "0"}
        reset         reset the connection after `after` bytes of the body, sent or received
        close         end the connection properly after `after` bytes of an answer: a short read
        ignore range  answer 200 and the whole file
        etag          answer with another ETag, as if the file had changed
        stall         set `stalled` after `after` bytes of the body, sent or received, and wait for `released`;
                      then an answer goes on, and an upload is lost
        """
        self.faults.append(Fault(pattern, kind, times, after, status, dict(headers or {})))

    def take(self, line: str) -> Fault | None:
        """The first fault that still waits for such a request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def environment(self, home: Path, token: str | None = TOKEN, **settings: str) -> dict[str, str]:
        """The environment of a process that uses this Hub, with its cache in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        kept |= {"HF_HOME": str(home), "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**kept, **({"HF_TOKEN": token} if token else {}), **settings}

    def received(self) -> dict[str, int]:
        """How many bytes of each LFS object have come in, by sha256, over all uploads."""
        found: dict[str, int] = {}
        for request in list(self.log):
            if request.method == "PUT":
                oid = request.path.rsplit("/", 1)[-1]
                found[oid] = found.get(oid, 0) + request.received
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up; connections are reset on purpose."""


class Refusal(Exception):
    """An answer that is an error: its status, X-Error-Code, and X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message or code, **body}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {key: value for key, value in self.headers.items() if value}


class Handler(BaseHTTPRequestHandler):
    """The routes, each a method; an answer that is an error is raised."""

    server: Hub
    protocol_version = "HTTP/1.1"
    request: socket.socket
    current: Request
    fault: Fault | None

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal: `Hub.log` has it."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        known = "authorization" in headers
        path = unquote(parts.path)
        self.current = Request(self.command, path, parts.query, headers.get("range"), known, headers)
        self.server.log.append(self.current)
        self.fault = self.server.take(f"{self.command} {path}")
        try:
            self.body = self._receive()
            if self.fault and self.fault.kind == "status":
                self.answer(self.fault.status, b"{}", self.fault.headers)
                return
            with self.server.lock:
                prepared = self._route([unquote(part) for part in parts.path.strip("/").split("/")])
            prepared()
        except Refusal as refusal:
            self.answer(refusal.status, json.dumps(refusal.body).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    # -- bytes in and out, where faults strike

    def _receive(self) -> bytes:
        body = bytearray()
        for piece in self._pieces():
            room = self.fault.after - len(body) if self._strikes_received() and self.fault else None
            body += piece
            self.current.received += len(piece)
            if room is not None and len(piece) > room:
                self._strike()
        return bytes(body)

    def _strikes_received(self) -> bool:
        return self.command == "PUT" and self.fault is not None and self.fault.kind in ("reset", "stall")

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read1(min(_PIECE, left))
            if not piece:
                raise ConnectionResetError
            left -= len(piece)
            yield piece

    def _strike(self) -> None:
        assert self.fault
        if self.fault.kind == "stall":
            self.server.stalled.set()
            self.server.released.wait()
            if self.command == "PUT":
                raise ConnectionResetError
            return
        if self.fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()
        raise ConnectionResetError

    def answer(
        self, status: int, body: bytes | tuple[Blob, int, int], headers: Mapping[str, str] | None = None
    ) -> None:
        """Send `body`, or the part of a blob between two bytes."""
        blob, start, stop = body if isinstance(body, tuple) else (Blob(body, False), 0, len(body))
        self.current.status = status
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command != "HEAD":
            self._send(blob, start, stop)

    def _send(self, blob: Blob, start: int, stop: int) -> None:
        strikes = self.fault is not None and self.fault.kind in ("reset", "close", "stall") and self.command != "PUT"
        end = min(start + self.fault.after, stop) if strikes and self.fault else stop
        for first, last in ((start, end), (end, stop)):
            for at in range(first, last, _PIECE):
                piece = blob.read(at, min(at + _PIECE, last))
                self.wfile.write(piece)
                self.wfile.flush()
                self.current.sent += len(piece)
            if strikes and last == end:
                strikes = False
                self._strike()

    def document(self, document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
        """Prepare an answer in JSON."""
        return lambda: self.answer(status, json.dumps(document).encode(), headers)

    # -- who asks

    def _token(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if given not in (None, TOKEN, READER):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return given

    def _readable(self, name: str) -> Repository:
        repository, token = self.server.repositories.get(name), self._token()
        if repository is None or (repository.private and token is None):
            message = "Repository not found" if token else "Invalid username or password."
            raise Refusal(404 if token else 401, "RepoNotFound", message)
        return repository

    def _writable(self, name: str) -> None:
        token = self._token()
        if token is None:
            raise Refusal(401, message="Invalid username or password.")
        if token == READER or name.split("/")[0] not in self.server.namespaces:
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self._readable(name)
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # -- routes

    def _route(self, parts: list[str]) -> Any:
        if parts[:2] == ["api", "models"]:
            name, verb, rest = "/".join(parts[2:4]), parts[4] if parts[4:] else "", parts[5:]
            routes: dict[str, Any] = {"": self._info, "revision": self._info, "tree": self._tree}
            routes |= {"paths-info": self._paths, "preupload": self._preupload, "commit": self._commit}
            routes |= {"branch": self._branch, "refs": self._refs}
            if verb in routes:
                return routes[verb](name, *rest[:1], *(["/".join(rest[1:])] if rest[1:] else []))
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        if parts == ["api", "validate-yaml"]:
            return self.document({"errors": [], "warnings": []})
        if parts == ["api", "whoami-v2"]:
            return self._whoami()
        if parts[0] == "cdn":
            return self._stored(parts[1])
        if parts[2:3] == ["resolve"]:
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[1:2] and parts[1].endswith(".git"):
            return self._lfs(f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[-1])
        raise Refusal(404, message=f"no such route: {self.command} {self.path}")

    def _whoami(self) -> Any:
        if (token := self._token()) is None:
            raise Refusal(401, message="Invalid username or password.")
        role = "write" if token == TOKEN else "read"
        return self.document({"type": "user", "name": "tester", "auth": {"accessToken": {"role": role}}})

    def _info(self, name: str, revision: str = "main") -> Any:
        commit, tree = self._at(name, revision)
        blobs = "blobs" in parse_qs(self.current.query)
        siblings = [{"rfilename": path, **(_sibling(blob) if blobs else {})} for path, blob in sorted(tree.items())]
        repository = self.server.repositories[name]
        found = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
        gated: bool | str = "auto" if repository.gated else False
        return self.document({**found, "private": repository.private, "gated": gated, "disabled": False})

    def _tree(self, name: str, revision: str, under: str = "") -> Any:
        commit, tree = self._at(name, revision)
        recursive = parse_qs(self.current.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{under}/" if under else ""
        inside = {path: blob for path, blob in sorted(tree.items()) if path.startswith(prefix)}
        if under and not inside:
            raise Refusal(404, "EntryNotFound", f"{under} does not exist on {revision!r}")
        folders = {prefix + path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        listed = [_entry(path, b) for path, b in inside.items() if recursive or "/" not in path[len(prefix) :]]
        listed += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        return self.document(listed, headers={"X-Repo-Commit": commit})

    def _paths(self, name: str, revision: str) -> Any:
        _, tree = self._at(name, revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        return self.document([_entry(path, tree[path]) for path in asked if path in tree])

    def _resolve(self, name: str, revision: str, path: str) -> Any:
        repository = self._readable(name)
        if repository.gated and self._token() is None:
            raise Refusal(401, "GatedRepo", "Access to this model is restricted.")
        if repository.gated and self._token() == READER:
            raise Refusal(403, "GatedRepo", "Access to this model is restricted and you are not in its list.")
        commit, tree = self._at(name, revision)
        if (blob := tree.get(path)) is None:
            missing = Refusal(404, "EntryNotFound", "Entry not found")
            missing.headers["X-Repo-Commit"] = commit
            raise missing
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return self._content(blob, headers)
        etag = f'"{self._etag(blob)}"'
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(blob.size), "ETag": etag}
        headers["Location"] = f"{self.server.cdn}/cdn/{blob.sha256}?{SIGNATURE}"
        return lambda: self.answer(302, b"Found. Redirecting", headers)

    def _stored(self, oid: str) -> Any:
        if SIGNATURE not in self.current.query:
            raise Refusal(403, message="Access Denied")
        if self.command == "PUT":
            blob = Blob(self.body, True)
            if blob.sha256 != oid:
                raise Refusal(400, message="the content is not what its sha256 says")
            self.server.objects[oid] = blob
            return lambda: self.answer(200, b"", {"ETag": f'"{oid}"'})
        if oid not in self.server.objects:
            raise Refusal(404, message="NoSuchKey")
        return self._content(self.server.objects[oid], {"Accept-Ranges": "bytes"})

    def _etag(self, blob: Blob) -> str:
        changed = self.fault is not None and self.fault.kind == "etag"
        return hashlib.sha256(b"changed").hexdigest() if changed else blob.etag

    def _content(self, blob: Blob, headers: dict[str, str]) -> Any:
        """A whole file, or one range of it; If-Match and If-Range are heeded."""
        etag = f'"{self._etag(blob)}"'
        headers = {**headers, "ETag": etag, "Content-Type": "application/octet-stream"}
        if self.headers.get("If-Match", etag) not in (etag, "*"):
            raise Refusal(412, message="PreconditionFailed")
        ignored = self.fault is not None and self.fault.kind == "ignore range"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.current.range or "")
        if not asked or ignored or self.headers.get("If-Range", etag) != etag:
            return lambda: self.answer(200, (blob, 0, blob.size), headers)
        first, last = (int(text) if text else None for text in asked.groups())
        start = max(blob.size - (last or 0), 0) if first is None else first
        stop = blob.size if first is None or last is None else min(last + 1, blob.size)
        if start >= stop:
            refused = Refusal(416, message="Range Not Satisfiable")
            refused.headers["Content-Range"] = f"bytes */{blob.size}"
            raise refused
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
        return lambda: self.answer(206, (blob, start, stop), headers)

    # -- writing

    def _create(self, asked: dict[str, Any]) -> Any:
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        self._writable(name)
        if name in self.server.repositories:
            url = f"{self.server.url}/{name}"
            raise Refusal(409, message="You already created this model repo", url=url)
        repository = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS).encode()
        repository.commit("main", {".gitattributes": Blob(attributes, False)}, "initial commit")
        self.server.repositories[name] = repository
        return self.document({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _branch(self, name: str, branch: str) -> Any:
        self._writable(name)
        repository = self._readable(name)
        if branch in repository.branches:
            raise Refusal(409, message=f"Reference already exists: {branch}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        repository.branches[branch] = self._at(name, start)[0]
        return self.document({}, 201)

    def _refs(self, name: str) -> Any:
        found = self._readable(name).branches.items()
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in found]
        return self.document({"branches": branches, "converts": [], "tags": []})

    def _preupload(self, name: str, revision: str) -> Any:
        self._writable(name)
        _, tree = self._at(name, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            lfs = path.endswith(_LFS) or file["size"] > 10_000_000 or b"\0" in sample
            oid = {"oid": tree[path].etag} if path in tree else {}
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid})
        return self.document({"files": files})

    def _lfs(self, name: str, verb: str) -> Any:
        self._writable(name)
        self._readable(name)
        asked = json.loads(self.body)
        if verb == "verify":
            if asked["oid"] not in self.server.objects:
                raise Refusal(404, message="the object has not been uploaded")
            return self.document({})
        objects = [{"oid": o["oid"], "size": o["size"], **self._actions(name, o["oid"])} for o in asked["objects"]]
        return self.document({"transfer": "basic", "objects": objects})

    def _actions(self, name: str, oid: str) -> dict[str, Any]:
        if oid in self.server.objects:
            return {}
        upload = {"href": f"{self.server.cdn}/cdn/{oid}?{SIGNATURE}"}
        return {"actions": {"upload": upload, "verify": {"href": f"{self.server.url}/{name}.git/info/lfs/verify"}}}

    def _commit(self, name: str, branch: str) -> Any:
        self._writable(name)
        before, tree = self._at(name, branch)
        tree, message = dict(tree), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", before) != before:
                    raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, message=f"LFS pointer to a file that was not uploaded: {value['path']}")
                tree[value["path"]] = self.server.objects[value["oid"]]
            else:
                prefix = value["path"].rstrip("/") + "/" * (entry["key"] == "deletedFolder")
                kept = {
                    p: b for p, b in tree.items() if p != prefix and not (prefix[-1] == "/" and p.startswith(prefix))
                }
                if len(kept) == len(tree):
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                tree = kept
        sha = self.server.repositories[name].commit(branch, tree, message)
        url = f"{self.server.url}/{name}/commit/{sha}"
        return self.document({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _sibling(blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {}
    return {"size": blob.size, "blobId": blob.oid, **lfs}


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {}
    return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs}
