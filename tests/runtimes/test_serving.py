"""Starting, watching and ending a server in a process of its own: a stand-in called vllm, but real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fake_vllm import FakeVllm

from expertcut.errors import RuntimeLintError, UsageError
from expertcut.runtimes import serving
from expertcut.runtimes.machine import Watch, describe, held, tree
from expertcut.runtimes.serving import Served, check_arguments, find_vllm, vllm_server

PYTHON = Path(sys.executable)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    made = FakeVllm(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(made.site))
    return made


def serve(tmp_path: Path, arguments: Sequence[str] = (), seconds: float = 60) -> AbstractContextManager[Served]:
    return vllm_server(
        PYTHON, tmp_path, "a model", arguments, log=tmp_path / "log", start_timeout=seconds, timeout=20
    )  # fmt: skip


def test_a_server_answers_and_is_gone_with_its_children(fake: FakeVllm, tmp_path: Path) -> None:
    with serve(tmp_path, ["--dtype", "float32"]) as served:
        outcome = served.run([[1, 2], [3, 4]], 3, 2)
        assert served.pid is not None
        assert len(fake.alive) == 2 and {*fake.alive} <= {*tree(served.pid)}
    assert [reply.tokens for reply in outcome.replies] == [3, 3]
    assert outcome.memory is not None and outcome.memory > 1 << 20
    assert outcome.client_share > 0
    assert fake.alive == []
    (call,) = map(json.loads, fake.calls)
    assert call[call.index("--host") + 1] == "127.0.0.1" and call[-2:] == ["--dtype", "float32"]
    assert "--no-enable-prefix-caching" in call


def test_however_the_block_ends_no_process_is_left(fake: FakeVllm, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        with pytest.raises(KeyboardInterrupt), serve(tmp_path):
            os.kill(os.getpid(), number)
        assert fake.alive == []
    with pytest.raises(ZeroDivisionError), serve(tmp_path):
        raise ZeroDivisionError
    assert fake.alive == [] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


KILLED = """
import os, signal, sys
from pathlib import Path
from expertcut.runtimes.serving import vllm_server
folder = Path(sys.argv[1])
with vllm_server(Path(sys.executable), folder, "m", [], log=folder / "log", start_timeout=60, timeout=9):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_ends_by_itself_where_nobody_can_end_it(fake: FakeVllm, tmp_path: Path, repo: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(repo), str(fake.site)))}
    run = subprocess.run([PYTHON, "-c", KILLED, tmp_path], env=env)
    assert run.returncode == -signal.SIGKILL and fake.started
    deadline = time.monotonic() + 30
    while fake.alive and time.monotonic() < deadline:
        os.sched_yield()
    assert fake.alive == []


def test_a_server_that_does_not_listen_is_killed(
    fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "FAREWELL", 0.1)
    with serve(tmp_path, ["--deaf"]):
        assert len(fake.alive) == 2
    assert fake.alive == []


def test_a_server_that_fails_says_why(fake: FakeVllm, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("OldError: of an earlier start\n")
    with (
        pytest.raises(RuntimeLintError, match="ended with exit code 1: ValueError: no kernel for this model") as caught,
        serve(tmp_path, ["--fail"]),
    ):
        pass
    assert str(tmp_path / "log") in (caught.value.hint or "")


def test_a_server_that_never_comes_up_is_given_up(fake: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(RuntimeLintError, match="not up after 0.5 s: it said nothing"), serve(tmp_path, ["--hang"], 0.5):
        pass


def test_which_interpreter_has_vllm(fake: FakeVllm, tmp_path: Path) -> None:
    assert find_vllm(PYTHON) == (PYTHON, "vllm-fake 9.9")
    with pytest.raises(RuntimeLintError, match="not installed in this environment"):
        find_vllm(None)
    with pytest.raises(RuntimeLintError, match="cannot be run: No such file"):
        find_vllm(tmp_path / "python")


def test_an_interpreter_without_vllm() -> None:
    with pytest.raises(RuntimeLintError, match="no vLLM: vllm is not installed there"):
        find_vllm(PYTHON)


@pytest.mark.parametrize("argument", ["--model", "--port=1", "--served_model_name", "--api-key", "--hf-overrides"])
def test_arguments_that_are_not_the_users_to_give(argument: str) -> None:
    with pytest.raises(UsageError, match="is set by bench itself"):
        check_arguments(["--dtype", "float32", argument], overriding=True)


def test_others_are() -> None:
    check_arguments(["--dtype=float32", "--hf-overrides", "{}"], overriding=False)


def test_the_memory_that_a_process_holds() -> None:
    """Of a new process: one that has given memory back may take it again without holding more."""
    with Watch(os.getpid()) as watch:
        code = "block = bytearray(b'x') * (64 << 20); print('ready', flush=True); input()"
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            alone = held(process.pid)
            assert 60 << 20 < alone < 200 << 20
            assert held(os.getpid()) >= alone, "descendants count"
            process.communicate("\n")
    assert watch.peak > 0


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = describe()
    assert found.cpu and found.cores >= 1 and found.memory > 1 << 28
    assert found.settings["OMP_NUM_THREADS"] == "3"
