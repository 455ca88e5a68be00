"""A checkpoint in; vLLM's OpenAI server for it out, in a process of its own, and gone with all its children at the end.

vLLM may live in another environment: nothing of it is imported here. Invariant: however the block ends, by an error,
Ctrl-C or a signal too, no process of the server outlives it; if this process is killed, the server ends by itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

from expertcut.checkpoint.jsonio import shown
from expertcut.errors import RuntimeLintError, UsageError
from expertcut.measure.load import Target, run_load, served_name
from expertcut.measure.rounds import Outcome
from expertcut.runtimes.machine import Watch, gpus, group_runs

MODULE = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs; the command itself is missing in some builds."""
OWN = ("--model", "--served-model-name", "--host", "--port", "--api-key", "--uds")
"""Arguments that are not the user's to give."""
FINDS = (
    "from importlib.metadata import packages_distributions as p, version as v; "
    "d = p().get('vllm', ['']); d[0] and print(d[0], v(d[0]))"
)
LAUNCH = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)
"""Becomes the server, which is asked to end if this process is killed and cannot ask itself (PR_SET_PDEATHSIG)."""
PERIOD = 0.2
"""Seconds between two looks whether the server is up."""
FAREWELL = 20.0
"""Seconds that the server has to end by itself."""


class Served:
    """A model behind a URL; `pid` is its server's, where it runs here."""

    def __init__(self, target: Target, pid: int | None = None) -> None:
        self.target, self.pid = target, pid

    def run(self, prompts: Sequence[Sequence[int]], output_len: int, clients: int) -> Outcome:
        """Send the prompts; see `run_load`. Memory is looked at meanwhile, if the server runs here."""
        wall, cpu = time.perf_counter(), time.process_time()
        with Watch(self.pid) if self.pid else nullcontext() as watch:
            replies = run_load(self.target, prompts, output_len, clients)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        if watch is None:
            return Outcome(replies, share)
        used = [used for _, used in gpus()]
        return Outcome(replies, share, watch.peak, sum(used) if used else None)


def find_vllm(python: Path | None) -> tuple[Path, str]:
    """Return an interpreter that has vLLM, this one unless another is named, and the version.

    Raises:
        RuntimeLintError: it has none.
    """
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            raise RuntimeLintError(
                "vLLM is not installed in this environment", "name the interpreter of one that has it: --python PATH"
            )
        python = Path(sys.executable)
    try:
        run = subprocess.run([python, "-c", FINDS], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise RuntimeLintError(f"--python {python}: cannot be run: {error.strerror}") from error
    if run.returncode or not run.stdout.strip():
        last = run.stderr.strip().splitlines()[-1:] or ["vllm is not installed there"]
        raise RuntimeLintError(f"--python {python}: no vLLM: {shown(last[0])}", "name an environment that has it")
    return python, run.stdout.strip()


def check_arguments(arguments: Sequence[str], overriding: bool) -> None:
    """Refuse arguments that bench gives itself; with `overriding`, that a top-k is put on, `--hf-overrides` too.

    Raises:
        UsageError: there is one.
    """
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name in OWN or (overriding and name == "--hf-overrides"):
            raise UsageError(f"--engine-args: {name} is set by bench itself", "leave it out")


@contextmanager
def vllm_server(
    python: Path, folder: Path, name: str, arguments: Sequence[str], *, log: Path, start_timeout: float, timeout: float
) -> Iterator[Served]:
    """Serve a checkpoint on a free port of the loopback interface; what the server says is added to the file `log`.

    Keeping prefixes is switched off, and the checkpoint's own sampling is not used. `arguments` come last and win.

    Raises:
        RuntimeLintError: it ends, or is not up within `start_timeout` seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    target = Target(f"http://127.0.0.1:{port}/v1", name, timeout)
    command: list[str | Path] = [
        python, "-c", LAUNCH, str(os.getpid()), "-m", MODULE, "--model", folder.resolve(), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm", "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log", *arguments,
    ]  # fmt: skip
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    env.pop("VLLM_API_KEY", None)  # nobody else asks on the loopback interface
    with log.open("ab") as said, _signals_interrupt():
        begin = said.tell()
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _await(process, target, log, begin, start_timeout)
            yield Served(target, process.pid)
        finally:
            _end(process)


def _await(process: subprocess.Popen[bytes], target: Target, log: Path, begin: int, seconds: float) -> None:
    """Return as soon as the server has the model loaded."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(RuntimeLintError):
            if served_name(Target(target.url, target.model, timeout=5)) == target.model:
                return
        late = time.monotonic() > deadline
        if process.poll() is not None or late:
            how = f"is not up after {seconds:g} s" if late else f"ended with exit code {process.returncode}"
            raise RuntimeLintError(
                f"{target.model}: vLLM {how}: {_reason(log, begin)}",
                f"its output is in {log}; " + ("allow more: --start-timeout" if late else "arguments: --engine-args"),
            )
        with suppress(subprocess.TimeoutExpired):
            process.wait(PERIOD)


def _reason(log: Path, begin: int) -> str:
    """What the server said: its first error, else its last line."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode("utf-8", "replace").splitlines()
    errors = [found[0] for line in lines if (found := re.search(r"\b\w*(Error|Exception): .+|\berror: .+", line))]
    return shown(next(iter(errors), lines[-1].strip() if lines else "it said nothing"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then make its whole group end; its memory is free again when this returns."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(FAREWELL)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group is the server's own
        process.wait()
        deadline = time.monotonic() + FAREWELL
        while group_runs(process.pid) and time.monotonic() < deadline:
            time.sleep(PERIOD / 10)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let signals to end act like Ctrl-C meanwhile: by default they would end this process and leave the server."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_DFL]
    for one in wanted:
        signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one in wanted:
            signal.signal(one, signal.SIG_DFL)
