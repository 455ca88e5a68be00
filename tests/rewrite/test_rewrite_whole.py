"""Plans that change no tensor: the source's files are taken over whole, and linked if asked for."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rewrite_models import digest, opened, plan_for
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny

from expertcut.checkpoint import Checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.errors import DestinationError, UsageError
from expertcut.model import Geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure, writer
from expertcut.rewrite.kernel import clone


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "in", "deepseek_v3")


def lower(ckpt: Checkpoint, geometry: Geometry) -> Plan:
    return make_plan(ckpt, geometry, top_k=1)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("link", [False, True])
def test_files_are_taken_over_whole(source: Path, link: bool, tmp_path: Path) -> None:
    ckpt, geometry = opened(source)
    done = prune(ckpt, geometry, lower(ckpt, geometry), tmp_path / "out", link=link)
    assert done.taken in (["linked"] if link else ["cloned", "copied"])
    assert done.nbytes_written == (0 if done.taken != "copied" else sum(p.stat().st_size for p in shards(source)))
    before, after = shards(source), shards(tmp_path / "out")
    assert len(before) > 1 and [p.read_bytes() for p in before] == [p.read_bytes() for p in after]
    assert [a.samefile(b) for a, b in zip(before, after, strict=True)] == [link] * len(before)
    out, _ = opened(tmp_path / "out")
    require(verify_structure(out, ckpt) + verify_bytes(out, ckpt))
    assert out.config["num_experts_per_tok"] == 1


def test_a_linked_file_is_not_read_to_be_compared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt, geometry = opened(source)
    prune(ckpt, geometry, lower(ckpt, geometry), tmp_path / "out", link=True)
    read, plain = list[str](), os.preadv

    def noting(file: int, *rest: Any) -> int:
        read.append(os.readlink(f"/proc/self/fd/{file}"))
        return plain(file, *rest)

    monkeypatch.setattr(os, "preadv", noting)
    require(verify_bytes(tmp_path / "out", ckpt))
    assert not [name for name in read if name.endswith(".safetensors")]


def test_a_shard_that_was_changed_in_place_shows_in_a_copy(source: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(source)
    prune(ckpt, geometry, lower(ckpt, geometry), tmp_path / "out")
    path = shards(tmp_path / "out")[-1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert [check.name for check in verify_bytes(tmp_path / "out", ckpt) if not check.ok] == ["tensor bytes"]


def test_a_size_that_is_asked_for_lays_shards_out_anew(source: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(source)
    plan = lower(ckpt, geometry)
    done = prune(ckpt, geometry, plan, tmp_path / "out", max_shard_size=10**9)
    assert done.taken is None and len(shards(tmp_path / "out")) == 1
    with pytest.raises(UsageError, match="--link: the shards get another size"):
        prune(ckpt, geometry, plan, tmp_path / "other", max_shard_size=10**9, link=True)


def test_only_whole_files_can_be_linked(source: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(source)
    with pytest.raises(UsageError, match="--link: the plan changes tensors"):
        prune(ckpt, geometry, make_plan(ckpt, geometry, strategy="odd", keep=0.5), tmp_path / "out", link=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_names_and_headers_that_runtimes_do_not_expect_are_mended(source: Path, tmp_path: Path) -> None:
    """Files of other names are renamed; a header without its format means writing the shards."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for name in sorted(set(index["weight_map"].values())):
        (source / name).rename(source / f"weights-{name}")
    index["weight_map"] = {tensor: f"weights-{name}" for tensor, name in index["weight_map"].items()}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    ckpt, geometry = opened(source)
    plan = lower(ckpt, geometry)
    prune(ckpt, geometry, plan, tmp_path / "out", link=True)
    require(verify_structure(tmp_path / "out", ckpt) + verify_bytes(tmp_path / "out", ckpt))
    save_file(load_file(shards(source)[0]), shards(source)[0])
    ckpt, geometry = opened(source)
    done = prune(ckpt, geometry, plan, tmp_path / "mended")
    assert done.taken is None
    require(verify_structure(tmp_path / "mended", ckpt) + verify_bytes(tmp_path / "mended", ckpt))
    with pytest.raises(UsageError, match="or the files need mending"):
        prune(ckpt, geometry, plan, tmp_path / "linked", link=True)


def test_links_of_a_hub_cache_lead_to_its_files(source: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "model/snapshots/abc", tmp_path / "model/blobs"
    snapshot.mkdir(parents=True)
    source.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    ckpt, geometry = opened(snapshot)
    prune(ckpt, geometry, lower(ckpt, geometry), tmp_path / "out", link=True)
    for path in shards(tmp_path / "out"):
        assert not path.is_symlink() and path.samefile(blobs / path.name)


def test_another_file_system_is_refused(source: Path) -> None:
    ckpt, geometry = opened(source)
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == source.stat().st_dev:
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with pytest.raises(DestinationError, match="is on another file system") as caught:
            prune(ckpt, geometry, lower(ckpt, geometry), Path(folder, "out"), link=True)
        assert caught.value.hint is not None and "leave out --link" in caught.value.hint
        assert not Path(folder, "out").exists()


def test_an_unfinished_linked_run_is_not_finished_with_copies(source: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(source)
    partial = tmp_path / ".out.expertcut-partial"
    plan = lower(ckpt, geometry)
    prune(ckpt, geometry, plan, tmp_path / "whole", link=True)
    pid = os.fork()
    if pid == 0:
        setattr(writer, "publish", lambda *args: os._exit(9))  # noqa: B010
        prune(ckpt, geometry, plan, tmp_path / "out", link=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9 and partial.exists()
    with pytest.raises(DestinationError, match="another shard size"):
        prune(ckpt, geometry, plan, tmp_path / "out")
    assert prune(ckpt, geometry, plan, tmp_path / "out", link=True).resumed
    assert digest(tmp_path / "out") == digest(tmp_path / "whole") and not partial.exists()


def test_cloning_says_whether_it_could(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 8192)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb") as target:
        cloned = clone(source.fileno(), target.fileno())
    assert (tmp_path / "b").read_bytes() == (b"x" * 8192 if cloned else b"")
    shutil.rmtree(tmp_path)


def test_the_identity_plan_is_one_of_them(source: Path, tmp_path: Path) -> None:
    ckpt, geometry = opened(source)
    everything = plan_for(ckpt, geometry, [range(geometry.num_experts)] * len(geometry.trunk))
    assert prune(ckpt, geometry, everything, tmp_path / "out", link=True).taken == "linked"
    assert [p.read_bytes() for p in shards(tmp_path / "out")] == [p.read_bytes() for p in shards(source)]
