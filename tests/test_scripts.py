"""scripts/lib.sh: which Python is taken, and when something is installed. Run by bash with nothing around it."""

import subprocess
import sys
from pathlib import Path

import pytest


def bash(tree: Path, script: str, path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash as the scripts do: lib.sh of `tree` sourced, `path` as the whole PATH."""
    code = f"set -euo pipefail; source '{tree}/scripts/lib.sh'; {script}"
    command = ["/bin/bash", "-c", code, "scripts/demo"]
    return subprocess.run(command, env={"PATH": str(path), **env}, capture_output=True, text=True)


def stub(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with the few tools that lib.sh needs, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("dirname", "cat", "cksum"):
        (folder / tool).symlink_to(next(p for p in (Path("/usr/bin", tool), Path("/bin", tool)) if p.exists()))
    return folder


@pytest.fixture
def tree(repo: Path, tmp_path: Path) -> Path:
    """The files of a fresh clone that decide what is installed."""
    folder = tmp_path / "a tree"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/lib.sh", "scripts/constraints.txt", "pyproject.toml"):
        (folder / name).write_text((repo / name).read_text())
    return folder


def test_no_usable_python_is_said_with_the_way_out(repo: Path, path: Path) -> None:
    stub(path / "python3", "exit 1")  # what the version check gives for another version
    run = bash(repo, "create_venv /nonexistent", path)
    assert run.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 found" in run.stderr
    assert "PYTHON=" in run.stderr


def test_the_default_python_comes_first_then_newer_ones(repo: Path, path: Path) -> None:
    for name in ("python3", "python3.13", "python3.12"):
        (path / name).symlink_to(sys.executable)
    assert bash(repo, "find_python", path).stdout == "python3\n"
    (path / "python3").unlink()
    stub(path / "python3", "exit 1")
    assert bash(repo, "find_python", path).stdout == "python3.13\n"


def test_a_named_python_is_obeyed_and_nothing_else_tried(repo: Path, path: Path) -> None:
    for name in ("python3", "python3.12"):
        (path / name).symlink_to(sys.executable)
    assert bash(repo, "find_python", path, PYTHON="python3.12").stdout == "python3.12\n"
    assert bash(repo, "find_python", path, PYTHON="python3.11").returncode != 0


def test_a_second_run_installs_nothing_and_a_changed_pin_installs_again(tree: Path, path: Path) -> None:
    log = tree / "log"
    stub(tree / ".venv/bin/python", f'[[ "$*" != *install* ]] || echo "$*" >> "{log}"')
    assert bash(tree, "ensure_venv", path).returncode == 0
    first = log.read_text().splitlines()
    assert [line.split("constraints.txt ")[-1] for line in first] == ["torch", f"--editable {tree}[dev,eval]"]
    assert all(f"--constraint {tree}/scripts/constraints.txt" in line for line in first)

    assert bash(tree, "ensure_venv", path).returncode == 0
    assert log.read_text().splitlines() == first

    with (tree / "scripts/constraints.txt").open("a") as pins:
        pins.write("six==1.17.0\n")
    assert bash(tree, "ensure_venv", path).returncode == 0
    assert len(log.read_text().splitlines()) == 2 * len(first)


def test_an_interrupted_installation_leaves_no_stamp(tree: Path, path: Path) -> None:
    stub(tree / ".venv/bin/python", '[[ "$*" != *--editable* ]]')
    assert bash(tree, "ensure_venv", path).returncode != 0
    assert not (tree / ".venv/expertcut.stamp").exists()


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test", "scripts/lib.sh", ".ci/run"])
def test_the_scripts_parse(repo: Path, script: str) -> None:
    subprocess.run(["bash", "-n", repo / script], check=True)
