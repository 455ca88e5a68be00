"""Asking an inference engine for greedy tokens, and comparing them with transformers'."""

from __future__ import annotations

import json
import os
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


def run(arguments: list[str | Path], home: Path) -> None:
    """Run a program with caches of its own under `home`; its output is shown if it fails."""
    env = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    done = subprocess.run(arguments, env=env, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments[0]}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def ask(
    python: str | Path, engine: str, model: Path, prompts: Sequence[Sequence[int]], new_tokens: int, home: Path,
    **settings: object,
) -> Answer:  # fmt: skip
    """Greedy tokens of every prompt, by the engine installed beside `python`; `settings` are the engine's own."""
    request, answer = home / f"{engine}-request.json", home / f"{engine}-answer.json"
    request.write_text(json.dumps({"model": str(model), "prompts": prompts, "new_tokens": new_tokens} | settings))
    run([python, Path(__file__).with_name("generate.py"), engine, request, answer], home)
    result: Answer = json.loads(answer.read_text())
    return result


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
