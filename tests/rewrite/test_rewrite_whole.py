"""Plans that change no tensor: the source's shards are taken over whole; linked if asked for, else cloned or copied."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rewrite_models import MODELS, Model, deepseek, digest, half, kept_of, large, listing, opened, plan_for, qwen3

from expertcut.checkpoint import Checkpoint
from expertcut.choose import Plan
from expertcut.errors import CheckpointError, DestinationError, UsageError
from expertcut.model import Geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure, writer
from expertcut.rewrite.compare import changed_tensors, survivors
from expertcut.rewrite.kernel import can_clone, clone
from expertcut.rewrite.writer import prepare

pytest_plugins = ("sharing",)

INDEX = "model.safetensors.index.json"
PARTIAL = ".out.expertcut-partial"
Job = tuple[Checkpoint, Geometry, Plan]


def lower(ckpt: Checkpoint, geometry: Geometry, top_k: int | None = 1) -> Job:
    """A plan for a lower top-k, or for no change at all."""
    return ckpt, geometry, plan_for(ckpt, geometry, [range(8)] * len(geometry.trunk), top_k=top_k)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return lower(*opened(deepseek().write(tmp_path / "in", fit=True)))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def linked(folder: Path, source: Path) -> list[bool]:
    return [a.samefile(b) for a, b in zip(shards(folder), shards(source), strict=True)]


def edit_index(folder: Path, change: Callable[[str], str]) -> None:
    document = json.loads((folder / INDEX).read_text())
    document["weight_map"] = {tensor: change(shard) for tensor, shard in document["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(document))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("link", [False, True], ids=["taken", "linked"])
@pytest.mark.parametrize("top_k", [1, None], ids=["lower", "identity"])
@pytest.mark.parametrize("count", [1, 3])
def test_shards_are_taken_over_whole(
    make: Callable[[], Model], link: bool, top_k: int | None, count: int, tmp_path: Path
) -> None:
    ckpt, geometry, plan = lower(*opened(make().write(tmp_path / "in", shards=count, fit=True)), top_k)
    before = digest(ckpt.path)
    done = prune(ckpt, geometry, plan, tmp_path / "out", link=link)
    assert done.taken in (["linked"] if link else ["cloned", "copied"])
    assert done.nbytes_written == (sum(ckpt.shards.values()) if done.taken == "copied" else 0)
    assert linked(tmp_path / "out", ckpt.path) == [link] * count
    found = digest(tmp_path / "out")
    assert {name: found[name] for name in ckpt.shards} == {name: before[name] for name in ckpt.shards}
    out, after = opened(tmp_path / "out")
    require(verify_structure(out, ckpt) + verify_bytes(out, ckpt))
    assert after.top_k == (top_k or geometry.top_k)
    assert digest(ckpt.path) == before and listing(tmp_path) == ["in", "out"]


def test_linked_cloned_and_copied_are_the_same_bytes(job: Job, tmp_path: Path) -> None:
    prune(*job, tmp_path / "linked", link=True)
    prune(*job, tmp_path / "other")
    assert digest(tmp_path / "linked") == digest(tmp_path / "other")


def test_deleting_either_leaves_the_other(job: Job, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prune(*job, tmp_path / name, link=True)
    shutil.rmtree(tmp_path / "one")
    require(verify_bytes(tmp_path / "two", job[0]))
    shutil.rmtree(tmp_path / "in")
    require(verify_structure(tmp_path / "two"))


def test_replacing_linked_shards_leaves_the_source(job: Job, tmp_path: Path) -> None:
    before = digest(tmp_path / "in")
    prune(*job, tmp_path / "out", link=True)
    prune(job[0], job[1], half(job[0], job[1]), tmp_path / "out", force=True)
    require(verify_bytes(tmp_path / "out", job[0]))
    assert digest(tmp_path / "in") == before


def test_linked_shards_are_not_read_to_be_compared(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(*job, tmp_path / "linked", link=True)
    prune(*job, tmp_path / "other")
    read, real = list[str](), os.preadv

    def noting(file: int, *rest: Any) -> int:
        read.append(os.readlink(f"/proc/self/fd/{file}"))
        return real(file, *rest)

    monkeypatch.setattr(os, "preadv", noting)
    require(verify_bytes(tmp_path / "linked", job[0]))
    assert not [name for name in read if name.endswith(".safetensors")]
    require(verify_bytes(tmp_path / "other", job[0]))
    assert {name for name in read if name.endswith(".safetensors")} == {
        str(path) for folder in ("in", "other") for path in shards(tmp_path / folder)
    }  # fmt: skip


def test_one_file_is_no_proof_where_tensors_lie_elsewhere(job: Job) -> None:
    """Two experts of the source, swapped in its own file."""
    ckpt, geometry, plan = job
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (3, 4)]
    one, other = (ckpt.tensors[name] for name in names)
    swapped = replace(ckpt, tensors={
        **ckpt.tensors, names[0]: replace(other, name=names[0]), names[1]: replace(one, name=names[1])
    })  # fmt: skip
    expected = list(survivors(ckpt, geometry, kept_of(plan, geometry), {1: 1, 2: 1, 3: 1}))
    assert not list(changed_tensors(ckpt, ckpt, expected))
    assert len(list(changed_tensors(swapped, ckpt, expected))) == 2


def test_a_changed_byte_in_a_copy_is_found(job: Job, tmp_path: Path) -> None:
    prune(*job, tmp_path / "out")
    path = shards(tmp_path / "out")[-1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert [check.name for check in verify_bytes(tmp_path / "out", job[0]) if not check.ok] == ["tensor bytes"]


def test_a_size_that_is_asked_for_lays_shards_out_anew(job: Job, tmp_path: Path) -> None:
    done = prune(*job, tmp_path / "out", max_shard_size=10**9)
    assert done.taken is None and done.shards == 1 and done.nbytes_written > 0
    with pytest.raises(UsageError, match="--link needs shards of the source's size, without --max-shard-size"):
        prune(*job, tmp_path / "other", max_shard_size=10**9, link=True)


@pytest.mark.parametrize("link", [False, True])
def test_a_plan_that_changes_tensors_cannot_be_linked(link: bool, job: Job, tmp_path: Path) -> None:
    ckpt, geometry, _ = job
    plan = half(ckpt, geometry)
    if not link:
        assert prune(ckpt, geometry, plan, tmp_path / "out").taken is None
        return
    changed = r"75 of 93 change or go, as model\.layers\.1\.mlp\.gate\.e_score_correction_bias$"
    with pytest.raises(UsageError, match=f"^--link needs a plan that changes no tensor: {changed}"):
        prune(ckpt, geometry, plan, tmp_path / "out", link=True)
    assert listing(tmp_path) == ["in"]


def test_other_names_of_shards_are_mended(tmp_path: Path) -> None:
    folder = qwen3().write(tmp_path / "in", fit=True)
    for shard in shards(folder):
        shard.rename(shard.with_name(f"weights-{shard.name}"))
    edit_index(folder, lambda shard: f"weights-{shard}")
    job = lower(*opened(folder))
    prune(*job, tmp_path / "out", link=True)
    assert linked(tmp_path / "out", folder) == [True] * 3
    assert [path.name for path in shards(tmp_path / "out")] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    require(verify_structure(tmp_path / "out", job[0]) + verify_bytes(tmp_path / "out", job[0]))


def without_format(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"format": "pt"}', b'{"source": "xx"}'))


@pytest.mark.parametrize("what", ["format", "alignment"])
def test_shards_that_verification_would_reject_are_written_anew(what: str, tmp_path: Path) -> None:
    folder = qwen3().write(tmp_path / "in", fit=what == "format")
    if what == "format":
        without_format(shards(folder)[1])
    job = lower(*opened(folder))
    assert prune(*job, tmp_path / "out").taken is None
    require(verify_structure(tmp_path / "out", job[0]) + verify_bytes(tmp_path / "out", job[0]))
    found = "00002-of-00003.safetensors: header metadata lacks" if what == "format" else "is not aligned to its"
    with pytest.raises(UsageError, match=f"--link needs shards that can stay as they are: .*{found}"):
        prune(*job, tmp_path / "linked", link=True)


def test_links_of_a_hub_cache_lead_to_its_files(tmp_path: Path) -> None:
    blobs = deepseek().write(tmp_path / "models--x/blobs", fit=True)
    snapshot = tmp_path / "models--x/snapshots/main"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
        path.chmod(0o444)
    job = lower(*opened(snapshot))
    prune(*job, tmp_path / "out", link=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert linked(tmp_path / "out", blobs) == [True] * 3
    require(verify_structure(tmp_path / "out", job[0]) + verify_bytes(tmp_path / "out", job[0]))


def test_another_file_system_is_refused_and_the_hint_works(job: Job) -> None:
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == job[0].path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with pytest.raises(DestinationError, match="00001-of-00003.safetensors: .* another file system") as caught:
            prune(*job, Path(folder, "out"), link=True)
        assert str(caught.value.hint).startswith("leave out --link")
        assert listing(Path(folder)) == []
        with pytest.raises(DestinationError, match="another file system"):
            prepare(*job, Path(folder, "out"), None, link=True).check_links()
        assert not prune(*job, Path(folder, "out")).resumed


def test_files_of_another_user_are_refused(job: Job, tmp_path: Path) -> None:
    protected = Path("/proc/sys/fs/protected_hardlinks")
    if os.geteuid() or not protected.exists() or protected.read_text().strip() != "1":
        pytest.skip("needs to become another user, and a system that protects files from links")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(job[0].path, Path(folder, "in"))
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        other = lower(*opened(Path(folder, "in")))
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setgid(65534)
            os.setuid(65534)
            try:
                prune(*other, Path(folder, "out"), link=True)
            except DestinationError as error:
                os.write(write, f"{error.message}\n{error.hint}".encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        message, hint = os.read(read, 10_000).decode().splitlines()
        os.close(read)
        assert message.endswith("cannot be linked: it belongs to another user, and you may not write to it")
        assert hint == "leave out --link, or run as its owner"
        assert listing(Path(folder)) == ["in"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_links(code: int, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(DestinationError, match=f"cannot be linked: {os.strerror(code)}"):
            prune(*job, tmp_path / "out", link=True)
    assert listing(tmp_path) == ["in"]


@pytest.mark.parametrize("link", [False, True])
def test_a_source_that_has_changed_since(link: bool, job: Job, tmp_path: Path) -> None:
    os.truncate(shards(tmp_path / "in")[1], 1000)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors: 1000 bytes, \d+ expected; it has changed"):
        prune(*job, tmp_path / "out", link=link)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_linked_run_is_not_finished_with_copies(job: Job, tmp_path: Path) -> None:
    prune(*job, tmp_path / "whole", link=True)
    pid = os.fork()
    if pid == 0:
        setattr(writer, "publish", lambda *args: os._exit(9))  # noqa: B010
        prune(*job, tmp_path / "out", link=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with pytest.raises(DestinationError, match=r"another use of --link$"):
        prune(*job, tmp_path / "out")
    assert linked(tmp_path / PARTIAL / "checkpoint", tmp_path / "in") == [True] * 3
    done = prune(*job, tmp_path / "out", link=True)
    assert (done.resumed, done.taken) == (True, "linked")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole") and listing(tmp_path) == ["in", "out", "whole"]


def test_copied_shards_are_resumed(job: Job, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(*job, tmp_path / "out", progress=interrupt)
    told = list[tuple[int, int]]()
    done = prune(*job, tmp_path / "out", progress=lambda *numbers: told.append(numbers))
    total = sum(job[0].shards.values())
    assert done.resumed and told[0][0] > 0 and told[-1] == (total, total)
    prune(*job, tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_the_space_that_is_needed(job: Job, tmp_path: Path) -> None:
    """Links need none, and what they hold of an unfinished run will not be freed either."""
    free = prepare(*job, tmp_path / "out", None, link=True)
    assert set(free.files) - set(free.written) == set(job[0].shards)
    assert free.needed == sum(free.files.values()) - sum(job[0].shards.values())
    parts = prepare(*job, tmp_path / "out", 10**9)
    assert parts.written == parts.files


def test_files_that_share_blocks(sharing_disk: Path) -> None:
    """A source of more than a quarter of the disk is cloned again and again."""
    job = lower(*opened(large().write(sharing_disk / "in", fit=True)))
    assert can_clone(shards(sharing_disk / "in")[0], sharing_disk)
    os.sync()
    before = shutil.disk_usage(sharing_disk).free
    for number in range(6):
        prepared = prepare(*job, sharing_disk / str(number), None)
        assert (prepared.taken, set(prepared.files) - set(prepared.written)) == ("cloned", set(job[0].shards))
        done = prune(*job, sharing_disk / str(number))
        assert (done.taken, done.nbytes_written) == ("cloned", 0)
        require(verify_structure(sharing_disk / str(number), job[0]) + verify_bytes(sharing_disk / str(number), job[0]))
    os.sync()
    assert before - shutil.disk_usage(sharing_disk).free < job[0].nbytes
    path = shards(sharing_disk / "0")[0]
    whole = digest(sharing_disk / "in")
    with path.open("r+b") as file:
        file.write(b"changed")
    assert digest(sharing_disk / "in") == whole


def test_shards_on_two_disks(sharing_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each is taken over as its disk allows."""
    folder, elsewhere = deepseek().write(sharing_disk / "in", fit=True), tmp_path_factory.mktemp("elsewhere")
    if elsewhere.stat().st_dev == folder.stat().st_dev:
        pytest.skip("one disk for all")
    shard = shards(folder)[1]
    shutil.move(shard, elsewhere / shard.name)
    shard.symlink_to(elsewhere / shard.name)
    job = lower(*opened(folder))
    assert prepare(*job, sharing_disk / "out", None).taken == "copied"
    done = prune(*job, sharing_disk / "out")
    assert (done.taken, done.nbytes_written) == ("copied", job[0].shards[shard.name])
    require(verify_structure(sharing_disk / "out", job[0]) + verify_bytes(sharing_disk / "out", job[0]))


def test_cloning_says_whether_it_could(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 8192)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb") as target:
        cloned = clone(source.fileno(), target.fileno())
    assert (tmp_path / "b").read_bytes() == (b"x" * 8192 if cloned else b"")
    assert can_clone(tmp_path / "a", tmp_path) == cloned
    assert listing(tmp_path) == ["a", "b"]
    assert not can_clone(tmp_path / "a", tmp_path / "none")
