"""The command line, run in this process, and a profile, plan and checkpoint made through it: a pytest plugin."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from expertcut.cli import run


@dataclass(frozen=True)
class Ran:
    """What a run printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout as the one JSON document that it must be."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Cli = Callable[..., Ran]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads of several test runs on one machine would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run a command line; arguments may be paths."""

    def call(*args: object) -> Ran:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    with one_thread():
        yield call


@pytest.fixture(scope="session")
def profiled(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the built-in model on 3000 tokens of shipped text."""
    out = tmp_path_factory.mktemp("cli") / "model.profile"
    args = ["profile", demo_model, "--calibration", "builtin", "--tokens", 3000, "--seq-len", 128, "-o", out]
    with one_thread():
        assert run([str(arg) for arg in args]) == 0
    return out


@pytest.fixture(scope="session")
def planned(demo_model: Path, profiled: Path) -> Path:
    """A plan that keeps 16 of the built-in model's 32 experts."""
    out = profiled.parent / "half.json"
    args = ["plan", demo_model, "--profile", profiled, "--strategy", "reap", "--experts", 16, "-o", out]
    assert run([str(arg) for arg in args]) == 0
    return out


@pytest.fixture(scope="session")
def pruned(demo_model: Path, planned: Path) -> Path:
    """The built-in model with half of its experts. Read only."""
    out = planned.parent / "pruned"
    assert run([str(arg) for arg in ("prune", demo_model, out, "--plan", planned)]) == 0
    return out
