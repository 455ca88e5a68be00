"""Pruning, inspecting and planning straight from the Hub: real command lines, the real client, a Hub of our own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import SIGNATURE, TOKEN, Blob, Fault, Hub
from rewrite_models import EXPERTS, HIDDEN, Model, deepseek, digest, half, opened, qwen3, qwen3_vl

from expertcut.checkpoint import open_checkpoint, read_header
from expertcut.rewrite.layout import RECORD

NAME = "org/model"
ROOT = str(Path(__file__).parents[2])
COMMAND = """
import sys
import expertcut.checkpoint.remote as remote
from expertcut.cli import run
remote.WAIT, remote.BLOCK = 0.001, 20_000
code = run(sys.argv[1:])
assert not {"torch", "transformers"} & set(sys.modules)
sys.exit(code)
"""


def wide() -> Model:
    """One tensor per expert and projection, each 30 kB."""
    return qwen3(width=3000)


def fused() -> Model:
    """All experts of a projection in one tensor, each expert's part 16 kB or 8 kB."""
    model, width = qwen3_vl(), 400
    text = model.config["text_config"]
    text["moe_intermediate_size"] = width
    for layer in range(2):
        block = f"model.language_model.layers.{layer}.mlp"
        for part, shape in (("gate_up_proj", (HIDDEN, 2 * width)), ("down_proj", (width, HIDDEN))):
            model.add(f"{block}.experts.{part}", "BF16", EXPERTS, *shape, block=block, axis=0)
    return model


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


class Counting(Hub):
    """Stalls the n-th request for stored bytes from now on, if asked to."""

    countdown = 0

    def take(self, line: str) -> Fault | None:
        if line.startswith("GET /cdn/") and self.countdown:
            with self.lock:
                self.countdown -= 1
                if not self.countdown:
                    return Fault("", "stall", 0, 10, 0, {})
        return super().take(line)

    def ranges(self) -> list[tuple[str, int, int]]:
        """What was asked of the store: sha256, first byte, byte behind the last."""
        found = []
        for request in self.log:
            if request.method == "GET" and request.path.startswith("/cdn/"):
                first, last = map(int, re.findall(r"\d+", request.range or "bytes=0-0"))
                found.append((request.path.rsplit("/", 1)[-1], first, last + 1))
        return found

    @property
    def sent(self) -> int:
        """Bytes of weights that were sent."""
        return sum(request.sent for request in self.log if request.path.startswith("/cdn/"))


@pytest.fixture
def hub() -> Iterator[Counting]:
    server = Counting()
    with server:
        yield server


@dataclasses.dataclass(frozen=True)
class Damaged(Blob):
    """Other bytes than what its sha256, the ETag, says."""

    sha: str = ""

    @property
    def etag(self) -> str:
        return self.sha


class Case:
    """A model on the Hub and here, and half of it by a plan."""

    def __init__(self, hub: Counting, folder: Path, model: Model, fit: bool = False) -> None:
        self.hub, self.folder, self.local = hub, folder, model.write(folder / "model", fit=fit)
        self.commit = hub.add(NAME, self.local)
        ckpt, geometry = opened(self.local)
        self.plan = folder / "plan.json"
        half(ckpt, geometry).save(self.plan)

    def start(self, *args: str | Path, **settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMMAND, *map(str, args)]
        env = self.hub.environment(self.folder / "home", PYTHONPATH=ROOT, **settings)
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe, cwd=self.folder)

    def run(self, *args: str | Path, **settings: str) -> Ran:
        process = self.start(*args, **settings)
        out, err = process.communicate(timeout=120)
        for text in (out, err):
            assert TOKEN not in text and SIGNATURE not in text and "Traceback" not in text, text
        return Ran(process.returncode, out, err)

    def prune(self, out: str = "remote", *args: str | Path, source: str | Path = NAME, **settings: str) -> Ran:
        return self.run("prune", source, self.folder / out, "--plan", self.plan, *args, **settings)

    def expected(self, *args: str) -> dict[str, str]:
        """The files that a prune of the local copy writes."""
        ran = self.prune("local", *args, source=self.local)
        assert ran.code == 0, ran.err
        return digest(self.folder / "local")

    def written(self) -> dict[str, str]:
        """The files that were written from the Hub; what the record says of the source is made alike."""
        record = self.folder / "remote" / RECORD
        document = json.loads(record.read_text())
        assert document["source"] == NAME and document["revision"] == self.commit
        told = f'"source": "{NAME}",\n  "revision": "{document["revision"]}"'
        record.write_text(record.read_text().replace(told, '"source": "model"', 1))
        return digest(self.folder / "remote")

    def headers(self) -> int:
        return sum(
            8 + int.from_bytes((self.local / shard).read_bytes()[:8], "little")
            for shard in open_checkpoint(self.local).shards
        )


MADE: dict[str, Callable[[], Model]] = {"per expert": wide, "fused": fused}


@pytest.mark.parametrize("kind", MADE)
def test_only_what_survives_is_fetched_and_the_result_is_the_same(kind: str, hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, MADE[kind]())
    ran = case.prune("remote", "--max-shard-size", "100kB")
    assert ran.code == 0, ran.err
    ckpt, geometry = opened(case.local)
    routers = sum(ckpt.tensors[block.router].nbytes for block in geometry.trunk)
    surviving = open_checkpoint(tmp_path / "remote").nbytes
    assert len(open_checkpoint(tmp_path / "remote").shards) > 1 and len(ckpt.shards) > 1
    assert surviving + case.headers() < hub.sent <= 1.01 * surviving + case.headers() + routers
    assert not any(path.is_file() and path.suffix == ".safetensors" for path in (tmp_path / "home").rglob("*"))
    assert case.written() == case.expected("--max-shard-size", "100kB")


def test_no_byte_of_a_dropped_expert_is_asked_for(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    assert case.prune().code == 0
    ckpt = open_checkpoint(case.local)
    plan = json.loads(case.plan.read_text())["layers"]
    hashes = {name: blob.sha256 for name, blob in hub.repositories[NAME].commits[case.commit].items() if blob.lfs}
    asked, dropped = hub.ranges(), 0
    for tensor in ckpt.tensors.values():
        block, _, rest = tensor.name.partition(".experts.")
        if rest.endswith("weight") and int(rest.split(".")[0]) not in plan[block]["kept"]:
            dropped += 1
            sha = hashes[tensor.shard]
            assert not any(sha == s and a < tensor.end and b > tensor.start for s, a, b in asked), tensor.name
    assert dropped == 2 * 3 * EXPERTS // 2


@pytest.mark.parametrize("make", [qwen3, qwen3_vl, deepseek])
def test_small_tensors_and_other_layouts(make: Callable[[], Model], hub: Counting, tmp_path: Path) -> None:
    """Runs so short that gaps are cheaper fetched, padding, correction biases, multi-token prediction."""
    case = Case(hub, tmp_path, make())
    ran = case.prune()
    assert ran.code == 0, ran.err
    assert case.written() == case.expected()


def test_shards_taken_whole_are_checked_by_their_sum(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, deepseek(), fit=True)
    args = ("--top-k", "2")
    ran = case.run("prune", NAME, tmp_path / "remote", *args)
    assert ran.code == 0, ran.err
    assert case.run("prune", case.local, tmp_path / "local", *args).code == 0
    same = {name: digest(tmp_path / "remote")[name] for name in open_checkpoint(case.local).shards}
    assert same.items() <= digest(tmp_path / "local").items()
    shutil.rmtree(tmp_path / "remote")
    sha, blob = next((s, b) for s, b in hub.objects.items())
    raw = bytearray(blob.all())
    raw[-1] ^= 1
    hub.objects[sha] = Damaged(bytes(raw), True, sha)
    ran = case.run("prune", NAME, tmp_path / "remote", *args)
    assert ran.code == 6 and "sha256" in ran.err and not (tmp_path / "remote").exists()


def test_inspect_and_estimate_fetch_headers_only(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    there = case.run("inspect", NAME, "--json")
    assert there.code == 0, there.err
    assert hub.sent == case.headers()
    here = json.loads(case.run("inspect", case.local, "--json").out)
    assert json.loads(there.out) == here | {"model": NAME}


def test_plan_fetches_headers_and_routers(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    for source, name in ((NAME, "there.json"), (case.local, "here.json")):
        ran = case.run("plan", source, "--strategy", "router-norm", "--experts", "4", "-o", name)
        assert ran.code == 0, ran.err
    ckpt, geometry = opened(case.local)
    routers = sum(ckpt.tensors[block.router].nbytes for block in geometry.trunk)
    assert hub.sent == case.headers() + routers
    there, here = (json.loads((tmp_path / name).read_text()) for name in ("there.json", "here.json"))
    assert there["layers"] == here["layers"] and there["source"]["fingerprint"] == here["source"]["fingerprint"]


FAULTS: dict[str, dict[str, Any]] = {
    "reset": {"kind": "reset", "after": 1000},
    "short read": {"kind": "close", "after": 1000},
    "unavailable": {"kind": "status", "status": 503},
    "too many requests": {"kind": "status", "status": 429, "headers": {"Retry-After": "0"}},
    "range ignored": {"kind": "ignore range"},
    "address expired": {"kind": "status", "status": 403},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_are_survived(fault: str, hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    hub.fault(r"GET /cdn/", times=6, **FAULTS[fault])
    ran = case.prune()
    assert ran.code == 0, ran.err
    assert hub.faults[0].times == 0
    assert case.written() == case.expected()


def test_a_broken_answer_is_taken_up_where_it_broke(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    hub.fault(r"GET /cdn/", "close", times=4, after=3)
    assert case.run("inspect", NAME).code == 0
    first = [(a, b) for _, a, b in hub.ranges() if a < 8]
    assert (0, 8) in first and (3, 8) in first
    assert hub.sent == case.headers()


@pytest.mark.parametrize("fault", FAULTS)
def test_lasting_faults_end_in_one_line_and_leave_nothing(fault: str, hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    wanted = FAULTS[fault] | {"after": 0}
    hub.fault(r"GET /cdn/", times=10_000, **wanted)
    ran = case.prune()
    assert ran.code == 6 and NAME in ran.err and "9 times in a row" in ran.err, ran.err
    assert ran.out == "" and not (tmp_path / "remote").exists()


def test_a_server_that_wants_to_be_left_alone_for_long(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    hub.fault(r"GET /cdn/", status=429, headers={"Retry-After": "3600"})
    ran = case.prune()
    assert ran.code == 6 and "429" in ran.err


def test_the_journal_is_kept_and_finished_shards_are_not_fetched_again(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    args = ("--max-shard-size", "100kB")
    hub.countdown = 40
    process = case.start("prune", NAME, tmp_path / "remote", "--plan", case.plan, *args)
    assert hub.stalled.wait(60)
    process.kill()
    process.communicate()
    hub.released.set()
    journal = tmp_path / ".remote.expertcut-partial" / "journal.jsonl"
    finished = sum(json.loads(line).get("nbytes", 0) for line in journal.read_text().splitlines())
    assert finished and not (tmp_path / "remote").exists()
    hub.log.clear()
    ran = case.prune("remote", *args)
    assert ran.code == 0, ran.err
    assert "resumed" in ran.out
    surviving = open_checkpoint(tmp_path / "remote").nbytes
    assert hub.sent < 1.01 * surviving - 0.9 * finished + case.headers() + 1000
    assert case.written() == case.expected(*args)


@pytest.mark.parametrize("pattern", [r"GET /cdn/", r"HEAD /org/model/resolve/.*safetensors$"])
def test_a_file_that_changes_under_its_commit(pattern: str, hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    hub.fault(pattern, "etag")
    ran = case.prune()
    assert ran.code == 6 and "has changed at commit" in ran.err, ran.err
    assert not (tmp_path / "remote").exists()


def test_a_moved_branch_does_not_matter_once_resolved_but_a_lost_commit_does(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    other = qwen3(seed=1, width=3000).write(tmp_path / "other")
    assert case.run("inspect", NAME).code == 0
    newer = hub.add(NAME, other)
    ran = case.prune()
    assert ran.code == 4 and "another model" in ran.err  # the plan is for what the branch was
    ran = case.prune("remote", "--revision", case.commit)
    assert ran.code == 0, ran.err
    assert newer != case.commit and case.written() == case.expected()
    del hub.repositories[NAME].commits[case.commit]
    ran = case.prune("again", "--revision", case.commit)
    assert ran.code == 6 and case.commit[:7] in ran.err and "no longer" in ran.err, ran.err


def test_what_is_complete_in_the_cache_needs_no_network(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    offline = {"HF_HUB_OFFLINE": "1"}
    assert case.run("inspect", NAME).code == 0
    ran = case.prune(**offline)
    assert ran.code == 6 and "HF_HUB_OFFLINE is set" in ran.err, ran.err
    load = "import sys; from expertcut.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1])"
    env = hub.environment(tmp_path / "home", PYTHONPATH=ROOT)
    subprocess.run([sys.executable, "-c", load, NAME], env=env, check=True, capture_output=True)
    hub.log.clear()
    ran = case.prune(**offline)
    assert ran.code == 0, ran.err
    assert not hub.log
    assert case.written() == case.expected()


def test_companions_are_checked_by_their_sum(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    hub.add(NAME, {p.name: p for p in case.local.iterdir()} | {"vocab.gz": b"\0" * 100})
    assert case.run("inspect", NAME).code == 0
    stored = next((tmp_path / "home").rglob("vocab.gz")).resolve()
    stored.chmod(0o600)
    stored.write_bytes(b"\0" * 99 + b"x")
    ran = case.run("inspect", NAME)
    assert ran.code == 6 and "vocab.gz: sha256" in ran.err


def test_no_link_to_what_is_elsewhere(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, deepseek(), fit=True)
    ran = case.run("prune", NAME, tmp_path / "remote", "--top-k", "2", "--link")
    assert ran.code == 2 and "--link" in ran.err


def test_the_token_goes_to_the_hub_alone_and_into_no_file(hub: Counting, tmp_path: Path) -> None:
    case = Case(hub, tmp_path, wide())
    hub.repositories[NAME].private = True
    assert case.prune().code == 0
    assert all(request.authorized == (not request.path.startswith("/cdn/")) for request in hub.log)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert TOKEN.encode() not in raw and SIGNATURE.encode() not in raw, path


def test_local_commands_do_not_import_the_client(tmp_path: Path, demo_model: Path) -> None:
    code = "import sys; from expertcut.cli import run; run(sys.argv[1:]); assert 'huggingface_hub' not in sys.modules"
    for args in (["--help"], ["inspect", str(demo_model)]):
        subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, cwd=ROOT)


def test_headers_alone_tell_the_same(hub: Counting, tmp_path: Path) -> None:
    """A damaged header on the Hub is refused as on disk."""
    case = Case(hub, tmp_path, wide())
    shard = next(iter(open_checkpoint(case.local).shards))
    assert read_header(case.local / shard)
    hub.add(NAME, {p.name: p for p in case.local.iterdir()} | {shard: (case.local / shard).read_bytes()[:-5]})
    ran = case.run("inspect", NAME)
    assert ran.code == 3 and f"{NAME}/{shard}: truncated" in ran.err, ran.err
