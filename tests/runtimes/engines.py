"""Asking an inference engine for greedy tokens, and comparing them with transformers'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

END_OF_TEXT = 0
TIE = 1e-3
"""Logits this close may swap places by rounding alone."""
Answer = dict[str, Any]
"""`version`, `tokens` of every prompt and, from transformers, `margins` over the runners-up."""
HERE = Path(__file__).parent


def run(arguments: list[str | Path], home: Path, path: Sequence[Path] = (), timeout: float = 300) -> None:
    """Run a program with caches of its own under `home`, and `path` before its module path.

    Its output is shown if it fails. At a time-out it goes with all that it started.
    """
    modules = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    env |= {"PYTHONPATH": modules} if modules else {}
    with subprocess.Popen(
        arguments, env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, f"{arguments[0]}\n{out[-3000:]}\n{err[-6000:]}"


def ask(
    python: str | Path, engine: str, model: Path, prompts: Sequence[Sequence[int]], new_tokens: int, home: Path,
    path: Sequence[Path] = (), **settings: object,
) -> Answer:  # fmt: skip
    """Greedy tokens of every prompt, by the engine installed beside `python`; `settings` are the engine's own."""
    request = {"model": str(model), "prompts": prompts, "new_tokens": new_tokens} | settings
    answer: Answer = exchange([python, HERE / "generate.py", engine], request, home, path)
    return answer


def exchange(command: list[str | Path], request: object, home: Path, path: Sequence[Path] = ()) -> Any:
    """Run a script that reads one JSON file and writes another; what it wrote."""
    question, answer = home / "request.json", home / "answer.json"
    question.write_text(json.dumps(request))
    run([*command, question, answer], home, path)
    return json.loads(answer.read_text())


def interpreter(engine: str, repo: Path) -> Path:
    """The interpreter of an engine's environment; the test is skipped where that is not built."""
    python = repo / f".venv-{engine}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venv-{engine}: run scripts/runtimes {engine}")
    return python


def comparable(tokens: list[int], margins: list[float]) -> int:
    """How many tokens every float32 engine must agree on: up to the end of the text or the first near tie."""
    ends = [
        i for i, (token, margin) in enumerate(zip(tokens, margins, strict=True)) if margin < TIE or token == END_OF_TEXT
    ]
    return min(ends, default=len(tokens))


def assert_same_tokens(found: Answer, reference: Answer) -> None:
    """Every token that can be compared is transformers'."""
    for ours, theirs, margins in zip(reference["tokens"], found["tokens"], reference["margins"], strict=True):
        length = comparable(ours, margins)
        assert theirs[:length] == ours[:length], f"found {found['version']}, transformers {reference['version']}"
