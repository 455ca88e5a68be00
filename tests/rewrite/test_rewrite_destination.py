"""What may be written to and replaced, and what the system says when it cannot be."""

import shutil
from pathlib import Path

import pytest
from rewrite_models import deepseek, digest, half, listing, opened, plan_for, qwen3

from expertcut.checkpoint import Checkpoint
from expertcut.choose import Plan
from expertcut.errors import CheckpointError, DestinationError, UsageError
from expertcut.model import Geometry
from expertcut.rewrite import destination, prune, require, verify_bytes, verify_structure
from expertcut.rewrite.writer import prepare

pytest_plugins = ("sharing",)

Job = tuple[Checkpoint, Geometry, Plan]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    ckpt, geometry = opened(qwen3().write(tmp_path / "in"))
    return ckpt, geometry, half(ckpt, geometry)


def refused(job: Job, out: Path, match: str, force: bool = False) -> None:
    """The run refuses, and leaves everything as it was."""
    folder = job[0].path.parent
    before = digest(folder), sorted(p.relative_to(folder) for p in folder.rglob("*"))
    with pytest.raises(DestinationError, match=match):
        prune(*job, out, force=force)
    assert before == (digest(folder), sorted(p.relative_to(folder) for p in folder.rglob("*")))


def test_the_source_and_its_neighbourhood_are_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in (tmp_path / "in", tmp_path / "link", tmp_path / "in/../in", tmp_path / "in/."):
        refused(job, out, "is the source itself", force=True)
    refused(job, tmp_path / "in/out", "lies inside the source", force=True)
    refused(job, tmp_path / "link/deep/out", "lies inside the source", force=True)
    refused(job, tmp_path, "the source .* lies inside it", force=True)
    refused(job, Path("/"), "the source .* lies inside it|is the source itself", force=True)


def test_what_exists_is_refused_without_force(job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("empty", "file", "dangling"):
        refused(job, tmp_path / name, f"{name}: exists$")
    prune(*job, tmp_path / "out")
    refused(job, tmp_path / "out", "out: exists$")


def test_force_replaces_only_what_expertcut_wrote(job: Job, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    prune(*job, tmp_path / "ours")
    (tmp_path / "link").symlink_to("ours")
    for name in ("other", "file", "link"):
        refused(job, tmp_path / name, r"is not a checkpoint that expertcut wrote \(no expertcut.json\)", force=True)


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_all_of_it(exchange: bool, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(destination, "exchange", lambda one, other: False)
    ckpt, geometry, plan = job
    prune(ckpt, geometry, plan_for(ckpt, geometry, [range(8)] * 2), tmp_path / "out", max_shard_size=500)
    (tmp_path / "out/notes.txt").write_text("old")
    result = prune(*job, tmp_path / "out", force=True)
    assert not result.resumed
    prune(*job, tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")
    assert listing(tmp_path) == ["fresh", "in", "out"]


def test_force_needs_nothing_to_replace(job: Job, tmp_path: Path) -> None:
    prune(*job, tmp_path / "deep/er/out", force=True)
    require(verify_structure(tmp_path / "deep/er/out", job[0]))


def test_a_relative_destination(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prune(*job, "out").out == tmp_path / "out"
    assert listing(tmp_path) == ["in", "out"]


def test_a_destination_that_appears_meanwhile_is_not_replaced(job: Job, tmp_path: Path) -> None:
    def appear(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(DestinationError, match="out: exists"):
        prune(*job, tmp_path / "out", progress=appear)
    assert listing(tmp_path / "out") == []


def test_what_was_prepared_is_what_is_written(job: Job, tmp_path: Path) -> None:
    prepared = prepare(*job, tmp_path / "out", max_shard_size=700)
    assert listing(tmp_path) == ["in"]
    result = prune(*job, tmp_path / "out", max_shard_size=700)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert prepared.files == written
    assert prepared.needed == sum(written.values())
    layout = prepared.layout
    assert (layout.nbytes, len(layout.shards)) == (result.nbytes_after, result.shards)
    assert 0 < layout.in_memory < layout.nbytes


def test_a_shard_size_must_be_positive(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-shard-size 0"):
        prune(*job, tmp_path / "out", max_shard_size=0)


def test_a_companion_that_vanishes(job: Job, tmp_path: Path) -> None:
    (tmp_path / "in/LICENSE").unlink()
    with pytest.raises(CheckpointError, match="in/LICENSE: cannot be read: No such file"):
        prune(*job, tmp_path / "out")
    assert listing(tmp_path) == ["in"]


def test_a_folder_that_cannot_be_written(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="Not a directory|File exists"):
        prune(*job, tmp_path / "file/out")


def test_too_small_a_disk_is_refused_before_anything_is_written(disk: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(qwen3(width=5000).write(tmp_path / "in"))
    with pytest.raises(DestinationError, match=r"disk: \d.* MiB needed, 1\.00 MiB free"):
        prune(ckpt, geometry, half(ckpt, geometry), disk / "out")
    assert listing(disk) == []


def test_a_disk_that_fills_up_and_is_cleared(disk: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(qwen3(width=1500).write(tmp_path / "in"))
    job = ckpt, geometry, half(ckpt, geometry)
    filler = disk / "filler"

    def fill(done: int, total: int) -> None:
        if done > total // 2 and not filler.exists():
            free = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(free))

    with pytest.raises(DestinationError, match=r"out: no space left; the checkpoint needs \d.* KiB in all") as caught:
        prune(*job, disk / "out", max_shard_size=60_000, progress=fill)
    assert "run the same command again" in str(caught.value.hint)
    assert listing(disk) == [".out.expertcut-partial", "filler"]
    filler.unlink()
    assert prune(*job, disk / "out", max_shard_size=60_000).resumed
    assert listing(disk) == ["out"]
    require(verify_structure(disk / "out", ckpt) + verify_bytes(disk / "out", ckpt))


def test_a_file_size_limit_is_said(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    ckpt, geometry = opened(deepseek().write(tmp_path / "in"))
    job = ckpt, geometry, half(ckpt, geometry)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(DestinationError, match="out: file size limit reached"):
            prune(*job, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert prune(*job, tmp_path / "out").resumed
    require(verify_bytes(tmp_path / "out", ckpt))
