"""A disk whose files can share blocks, a small one, and a fast one: a pytest plugin."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def sharing_disk(tmp_path: Path) -> Iterator[Path]:
    """The disk of the tests if it is such a one, else a small btrfs or XFS in memory; skips where there is neither."""
    (tmp_path / "a").write_bytes(b"x" * 4096)
    if not failed("cp", "--reflink=always", tmp_path / "a", tmp_path / "b"):
        yield tmp_path
        return
    make = next((tool for tool in ("mkfs.btrfs", "mkfs.xfs") if shutil.which(tool)), None)
    if os.geteuid() or make is None:
        pytest.skip("no disk whose files can share blocks")
    folder = tmp_path / "disk"
    folder.mkdir()
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as image:
        image.truncate(320 * 2**20)
        if failed(make, "-q", image.name) or failed("mount", "-o", "loop", image.name, folder):
            pytest.skip("may not mount a disk whose files can share blocks")
        yield folder
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount") or failed("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder):
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where syncs cost nothing, or else on disk."""
    shared = "/dev/shm"
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def failed(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True).returncode != 0
