"""The Hub of the tests does with the real client what the Hub does."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import READER, SIGNATURE, TOKEN, Hub, Kind

CLIENT = """
import json, sys
import huggingface_hub as h
api, found = h.HfApi(), []
for name, arguments in json.loads(sys.argv[1]):
    try:
        found.append(str(getattr(api, name)(**arguments)))
    except (h.errors.HfHubHTTPError, OSError, RuntimeError) as e:
        found.append(type(e).__name__)
print(json.dumps(found))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


Call = tuple[str, dict[str, Any]]


def client(hub: Hub, home: Path, *calls: Call, token: str | None = TOKEN) -> list[str]:
    """What methods of the client's HfApi return in a process of their own, or the name of the error."""
    command = [sys.executable, "-c", CLIENT, json.dumps(calls)]
    env = hub.environment(home, token)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two LFS files, one of several pieces, and two others, one of them in a folder."""
    (tmp_path / "out/code").mkdir(parents=True)
    (tmp_path / "out/model-1.safetensors").write_bytes(os.urandom(300_000))
    (tmp_path / "out/model-2.safetensors").write_bytes(os.urandom(1000))
    (tmp_path / "out/config.json").write_text('{"model_type": "é"}')
    (tmp_path / "out/code/modeling.py").write_text("x = 1\n")
    return tmp_path / "out"


def contents(root: Path) -> dict[str, bytes]:
    files = (p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def test_upload_then_download(hub: Hub, folder: Path, tmp_path: Path) -> None:
    upload = ("upload_folder", {"repo_id": "org/m", "folder_path": str(folder)})
    create = ("create_repo", {"repo_id": "org/m", "private": True, "exist_ok": True})
    branch = ("create_branch", {"repo_id": "org/m", "branch": "v1", "exist_ok": True})
    client(hub, tmp_path / "a", create, upload, branch, create, upload, branch)
    sent = contents(folder)
    found = hub.files("org/m")
    assert found.pop(".gitattributes") and found == sent
    assert hub.files("org/m", "v1").keys() == {*sent, ".gitattributes"}
    lfs = {hashlib.sha256(c).hexdigest(): len(c) for name, c in sent.items() if name.endswith(".safetensors")}
    assert hub.received() == lfs, "the second upload sends nothing again"
    assert hub.repositories["org/m"].private and len(hub.repositories["org/m"].commits) == 2
    copy = tmp_path / "copy"
    client(hub, tmp_path / "b", ("snapshot_download", {"repo_id": "org/m", "local_dir": str(copy)}))
    assert {n: c for n, c in contents(copy).items() if n != ".gitattributes"} == sent
    got = [r for r in hub.log if r.method == "GET" and r.path.startswith("/cdn/")]
    assert len(got) == 2 and all(r.sent in lfs.values() and r.status == 200 for r in got)
    stored = [r for r in hub.log if r.path.startswith("/cdn/")]
    assert not any(r.authorized for r in stored), "a token goes to no other host"
    assert all(r.authorized for r in hub.log if r not in stored)


def test_who_may_do_what(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add("org/open", folder)
    hub.add("org/closed", folder, private=True)
    hub.add("org/gated", folder, gated=True)
    everywhere = ("open", "closed", "gated")
    get: list[Call] = [
        ("hf_hub_download", {"repo_id": f"org/{name}", "filename": "config.json"}) for name in everywhere
    ]
    revision: Call = ("model_info", {"repo_id": "org/open", "revision": "v9"})
    missing = ("hf_hub_download", {"repo_id": "org/open", "filename": "absent"})
    create = ("create_repo", {"repo_id": "org/new"})
    other = ("create_repo", {"repo_id": "stranger/new"})
    found = client(hub, tmp_path / "a", *get, revision, missing, create, token=None)
    assert found[0].endswith("config.json")
    wrong = ["RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "RemoteEntryNotFoundError"]
    assert found[1:5] == wrong and found[5].endswith("Error")
    found = client(hub, tmp_path / "b", *get, create, ("whoami", {}), token=READER)
    assert found[1].endswith("config.json") and found[2:4] == ["GatedRepoError", "HfHubHTTPError"]
    assert "tester" in found[4]
    assert client(hub, tmp_path / "c", other, ("model_info", {"repo_id": "org/open"}))[0] == "HfHubHTTPError"
    assert client(hub, tmp_path / "d", revision, token="hf_invalid") == ["HfHubHTTPError"]


def test_metadata_of_files(hub: Hub, folder: Path, tmp_path: Path) -> None:
    commit = hub.add("org/m", folder)
    names = ["model-2.safetensors", "config.json", "absent"]
    calls: list[Call] = [
        ("model_info", {"repo_id": "org/m", "files_metadata": True}),
        ("get_paths_info", {"repo_id": "org/m", "paths": names, "revision": commit[:8]}),
        ("get_hf_file_metadata", {"url": f"{hub.url}/org/m/resolve/main/{names[0]}"}),
    ]
    info, paths, metadata = client(hub, tmp_path / "a", *calls)
    sha256 = hashlib.sha256((folder / names[0]).read_bytes()).hexdigest()
    raw = (folder / "config.json").read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
    for found in (info, paths):
        assert sha256 in found and oid in found and "size=1000" in found
    assert "absent" not in paths and commit in info
    assert sha256 in metadata and commit in metadata and "size=1000" in metadata and SIGNATURE in metadata


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(url, headers={key.replace("_", "-"): value for key, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_ranges(name: str, hub: Hub, folder: Path) -> None:
    hub.add("org/m", folder)
    url, raw = f"{hub.url}/org/m/resolve/main/{name}", (folder / name).read_bytes()
    status, body, headers = get(url, Range="bytes=3-9")
    assert (status, body, headers["Content-Range"]) == (206, raw[3:10], f"bytes 3-9/{len(raw)}")
    assert get(url, Range="bytes=5-")[:2] == (206, raw[5:]) and get(url, Range="bytes=-4")[:2] == (206, raw[-4:])
    assert get(url, Range=f"bytes={len(raw)}-")[0] == 416
    assert get(url, Range="bytes=0-1", If_Range=headers["ETag"])[:2] == (206, raw[:2])
    assert get(url, Range="bytes=0-1", If_Range='"other"')[:2] == (200, raw)
    assert get(url, Range="bytes=0-1", If_Match='"other"')[0] == 412
    hub.fault(rf"GET /(cdn/|org/m/.*{name})", "ignore range")
    if name == "config.json":
        assert get(url, Range="bytes=0-1")[:2] == (200, raw)
        hub.fault("GET /org", "etag")
        assert get(url)[2]["ETag"] != headers["ETag"]


def test_faults(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add("org/m", folder)
    url, raw = f"{hub.url}/org/m/resolve/main/model-1.safetensors", (folder / "model-1.safetensors").read_bytes()
    hub.fault("GET /cdn/", status=429, headers={"Retry-After": "0"}, times=2)
    assert [get(url)[0] for _ in range(3)] == [429, 429, 200]
    kinds: tuple[Kind, ...] = ("reset", "close")
    for kind in kinds:
        hub.fault("GET /cdn/", kind, after=100_000)
        with pytest.raises((OSError, http.client.HTTPException), match=r"reset|IncompleteRead|100000"):
            get(url)
        assert hub.log[-1].sent == 100_000
    hub.fault("GET /cdn/", "close", after=100_000)
    found = client(hub, tmp_path / "a", ("hf_hub_download", {"repo_id": "org/m", "filename": "model-1.safetensors"}))
    assert Path(found[0]).read_bytes() == raw
    assert [r.sent for r in hub.log if r.path.startswith("/cdn/")][-2:] == [100_000, len(raw)]
