"""vLLM, mlx-lm and llama.cpp load the pruned built-in model and generate transformers' greedy tokens in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

pytestmark = [pytest.mark.runtimes, pytest.mark.timeout(600)]

PROMPTS = (
    "The history of the city began when",
    "def add(a, b):\n    return",
    "12 + 35 =",
    "Der alte Mann ging",
    "The scheduler keeps a list of",
    "Il y avait une fois",
)
NEW_TOKENS = 24
END_OF_TEXT = 0
TIE = 1e-3
"""Logits this close may swap places by rounding alone."""


def run(arguments: list[str | Path], home: Path) -> None:
    """Run a program with caches of its own under `home`; its output is shown if it fails."""
    env = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    done = subprocess.run(arguments, env=env, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments[0]}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def generate(python: str | Path, engine: str, model: Path, home: Path) -> dict[str, Any]:
    """Greedy tokens of every prompt, by the engine installed beside `python`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    request, answer = home / f"{engine}-request.json", home / f"{engine}-answer.json"
    request.write_text(json.dumps({"model": str(model), "prompts": prompts, "new_tokens": NEW_TOKENS}))
    run([python, Path(__file__).with_name("generate.py"), engine, request, answer], home)
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


@pytest.fixture(scope="module")
def pruned(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other expert of the built-in model, so that all ids but one change, and top-3 instead of top-4."""
    out = tmp_path_factory.mktemp("pruned") / "model"
    expertcut = Path(sys.executable).with_name("expertcut")
    choice = ["--strategy", "odd", "--experts", "16", "--top-k", "3"]
    run([expertcut, "prune", demo_model, out, *choice], out.parent)
    return out


@pytest.fixture(scope="module")
def reference(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return generate(sys.executable, "transformers", pruned, tmp_path_factory.mktemp("reference"))


def comparable(tokens: list[int], margins: list[float]) -> int:
    """How many tokens every float32 engine must agree on: up to the end of the text or the first near tie."""
    ends = [
        i for i, (token, margin) in enumerate(zip(tokens, margins, strict=True)) if margin < TIE or token == END_OF_TEXT
    ]
    return min(ends, default=len(tokens))


def test_the_comparison_means_something(
    reference: dict[str, Any], demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Most tokens are compared, and the source model gives others."""
    lengths = [comparable(*pair) for pair in zip(reference["tokens"], reference["margins"], strict=True)]
    assert sum(lengths) >= len(PROMPTS) * NEW_TOKENS * 3 // 4
    source = generate(sys.executable, "transformers", demo_model, tmp_path_factory.mktemp("source"))
    assert all(a[:n] != b[:n] for a, b, n in zip(source["tokens"], reference["tokens"], lengths, strict=True))


@pytest.mark.parametrize("engine", ["vllm", "mlx", "llama"])
def test_engine_gives_transformers_tokens(
    engine: str, pruned: Path, reference: dict[str, Any], repo: Path, tmp_path: Path
) -> None:
    python = repo / f".venv-{engine}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venv-{engine}: run scripts/runtimes {engine}")
    found = generate(python, engine, pruned, tmp_path)
    for ours, theirs, margins in zip(reference["tokens"], found["tokens"], reference["margins"], strict=True):
        length = comparable(ours, margins)
        assert theirs[:length] == ours[:length], f"{engine} {found['version']}, transformers {reference['version']}"
