"""A checkpoint to a Hub and back: the same bytes, nothing sent twice, and nothing sent that should not be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import READER, SIGNATURE, TOKEN, Hub
from huggingface_hub import ModelCard

from expertcut.cli import run
from expertcut.share.parcel import groups

pytest_plugins = ("command_line",)
SMALL = "import expertcut.share.push as p; p.COMMIT_NBYTES = 1; from expertcut.cli import main; main()"
"""Every file of weights in a commit of its own."""
PULL = "import huggingface_hub as h, sys; h.snapshot_download('org/half', revision=sys.argv[1], local_dir=sys.argv[2])"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def shards(demo_model: Path, planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with half of its experts, in several shards. Read only."""
    out = tmp_path_factory.mktemp("push") / "out"
    args = ("prune", demo_model, out, "--plan", planned, "--max-shard-size", "1MB")
    assert run([str(arg) for arg in args]) == 0
    return out


def started(hub: Hub, home: Path, out: Path, *args: object, **env: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SMALL, "push", out, "org/half", *args]
    return subprocess.Popen(
        [str(part) for part in command], env=hub.environment(home, **env), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def push(hub: Hub, home: Path, out: Path, *args: object, **env: Any) -> tuple[int, str, str]:
    """Push in a process of its own; neither tokens nor signed addresses may show."""
    process = started(hub, home, out, *args, **env)
    printed, said = process.communicate(timeout=120)
    assert not any(secret in printed + said for secret in (TOKEN, READER, SIGNATURE)), said
    return process.returncode, printed, said


def contents(root: Path) -> dict[str, bytes]:
    files = (p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts and p.name != ".gitattributes")
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def lfs(out: Path) -> dict[str, int]:
    return {hashlib.sha256(c := p.read_bytes()).hexdigest(): len(c) for p in out.glob("*.safetensors")}


def test_what_comes_back_is_what_was_pushed(
    hub: Hub, shards: Path, profiled: Path, demo_model: Path, tmp_path: Path
) -> None:
    args = ("--source", demo_model, "--profile", profiled, "--private", "--json", "--card", tmp_path / "card.md")
    code, printed, said = push(hub, tmp_path / "a", shards, *args)
    assert code == 0, said
    document = json.loads(printed)
    assert hub.repositories["org/half"].private and document["held"] == {}
    messages = hub.repositories["org/half"].messages
    count = len(lfs(shards))
    assert count > 2 and len(messages) >= count + 2 and messages[-1] == "Add config, record, plan and card"
    tree = list(hub.repositories["org/half"].commits.values())
    index = {"config.json", "model.safetensors.index.json", "README.md", "expertcut.json"}
    assert not any(index & set(files) for files in tree[:-1]), "no half of it looks like a model"
    subprocess.run(
        [sys.executable, "-c", PULL, "main", tmp_path / "back"], env=hub.environment(tmp_path / "b"), check=True
    )
    back = contents(tmp_path / "back")
    expected = contents(shards)
    made = {name: back.pop(name) for name in ("README.md", "plan.json", "profile.json")}
    expected.pop("README.md")
    assert back == expected and made["README.md"] == (tmp_path / "card.md").read_bytes()
    assert run(["verify", str(tmp_path / "back"), "--source", str(demo_model)]) == 0
    assert ModelCard.load(tmp_path / "back/README.md").data.license == "apache-2.0"
    assert TOKEN.encode() not in b"".join(hub.files("org/half").values())
    code, printed, said = push(hub, tmp_path / "a", shards, *args)
    again = json.loads(printed)
    assert code == 0 and again["sent"] == {} and again["commit"] == document["commit"]
    assert hub.received() == lfs(shards), "every byte of weights was sent once"


def test_a_killed_push_resumes(hub: Hub, shards: Path, tmp_path: Path) -> None:
    sizes = lfs(shards)
    second = hashlib.sha256(sorted(shards.glob("*.safetensors"))[1].read_bytes()).hexdigest()
    hub.fault(f"PUT /cdn/{second}", "stall", after=100_000)
    process = started(hub, tmp_path / "a", shards)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.released.set()
    assert "config.json" not in hub.files("org/half")
    code, printed, said = push(hub, tmp_path / "a", shards, "--json")
    assert code == 0, said
    document = json.loads(printed)
    assert list(document["held"]) == [sorted(p.name for p in shards.glob("*.safetensors"))[0]]
    whole = {oid: sum(r.received == sizes[oid] for r in hub.log if r.path == f"/cdn/{oid}") for oid in sizes}
    assert set(whole.values()) == {1}, "no file was sent whole twice"
    received = hub.received()
    assert {oid for oid in sizes if received[oid] != sizes[oid]} == {second}


def test_a_reset_connection_is_tried_again(hub: Hub, shards: Path, tmp_path: Path) -> None:
    hub.fault("PUT /cdn/", "reset", after=50_000)
    code, _, said = push(hub, tmp_path / "a", shards)
    assert code == 0, said
    assert {name: c for name, c in hub.files("org/half").items() if name.endswith(".safetensors")} == {
        name: c for name, c in contents(shards).items() if name.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("GET /api/models", 401, "the Hub knows no token, or not this one"),
        ("POST /api/repos/create", 403, "may write to org"),
        ("POST /api/models/org/half/commit", 409, "something else is being done"),
        ("GET /api/models", 429, "the Hub asks to slow down"),
        ("GET /api/models", 503, "the Hub is in trouble (status 503)"),
    ],
)
def test_what_the_hub_refuses(pattern: str, status: int, message: str, hub: Hub, shards: Path, tmp_path: Path) -> None:
    headers = {"X-Error-Message": "Invalid credentials in Authorization header"} if status == 401 else {}
    hub.fault(pattern, status=status, headers=headers)
    code, printed, said = push(hub, tmp_path / "a", shards)
    assert (code, printed) == (6, "") and message in said and "org/half" in said
    assert code == 6 and push(hub, tmp_path / "a", shards)[0] == 0, "the same command then goes on"


def test_tokens_that_may_not_write(hub: Hub, shards: Path, tmp_path: Path) -> None:
    for token, message in ((READER, "may write to org"), (None, "hf auth login"), (f"{TOKEN}é", "the way to the Hub")):
        code, printed, said = push(hub, tmp_path / "a", shards, token=token)
        assert (code, printed) == (6, "") and message in said
    assert not hub.repositories


def test_branches_and_other_models(hub: Hub, shards: Path, tmp_path: Path) -> None:
    other = {"config.json": b"{}", "old.safetensors": b"x", "model-00001-of-00009.safetensors": b"y"}
    hub.add("org/half", other)
    code, _, said = push(hub, tmp_path / "a", shards, "--revision", "v1")
    assert code == 6 and "old.safetensors" in said and "--force" in said and hub.files("org/half", "v1") == other
    code, _, said = push(hub, tmp_path / "a", shards, "--private")
    assert code == 6 and "is public" in said
    assert push(hub, tmp_path / "a", shards, "--revision", "v1", "--force")[0] == 0
    found = hub.files("org/half", "v1")
    assert found.keys() == {*contents(shards), "plan.json"} and hub.files("org/half") == other


def test_what_is_not_sent(hub: Hub, shards: Path, demo_model: Path, tmp_path: Path) -> None:
    def refused(out: Path, code: int, message: str, *args: object) -> None:
        found, printed, said = push(hub, tmp_path / "home", out, *args)
        assert (found, printed) == (code, "") and message in said, said

    refused(demo_model, 3, "no expertcut.json")
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    os.rename(out, tmp_path / ".out.expertcut-partial")
    refused(tmp_path / ".out.expertcut-partial", 3, "unfinished run")
    os.rename(tmp_path / ".out.expertcut-partial", out)
    (out / "sub").mkdir()
    for name in (".env", "sub/server.pem", "hf_token"):
        (out / name).write_text("x")
    refused(out, 3, ".env, hf_token, sub/server.pem")
    for name in (".env", "sub/server.pem", "hf_token"):
        (out / name).unlink()
    (out / "notes.txt").write_text(f"export HF_TOKEN={TOKEN}")
    refused(out, 3, "notes.txt: holds an access token")
    (out / "notes.txt").unlink()
    shard = next(out.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    refused(out, 5, "tensor bytes", "--source", demo_model)
    shard.unlink()
    refused(out, 5, "opens")
    assert not hub.log


def test_a_dry_run_asks_nothing(hub: Hub, shards: Path, tmp_path: Path) -> None:
    code, printed, _ = push(hub, tmp_path / "a", shards, "--dry-run", "--json", "--card", tmp_path / "card.md")
    document = json.loads(printed)
    assert code == 0 and not hub.log
    assert document["card"] == (tmp_path / "card.md").read_text()
    assert list(document["files"])[-1] == "README.md" and sum(document["files"].values()) == document["nbytes"]
    assert document["files"].keys() == {*contents(shards), "plan.json"}


def test_groups() -> None:
    assert groups({}, 10) == []
    assert groups({"a": 4, "b": 6, "c": 1, "d": 99, "e": 0, "f": 1}, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
