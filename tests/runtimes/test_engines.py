"""vLLM, mlx-lm and llama.cpp load the pruned built-in model and generate transformers' greedy tokens in float32."""

import sys
from pathlib import Path

import pytest
from engines import Answer, ask, assert_same_tokens, comparable, interpreter, run
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


def generate(python: str | Path, engine: str, model: Path, home: Path) -> Answer:
    """Greedy tokens of every prompt, by the engine installed beside `python`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return ask(python, engine, model, [tokenizer.encode(prompt).ids for prompt in PROMPTS], NEW_TOKENS, home)


@pytest.fixture(scope="module")
def pruned(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other expert of the built-in model, so that all ids but one change, and top-3 instead of top-4."""
    out = tmp_path_factory.mktemp("pruned") / "model"
    expertcut = Path(sys.executable).with_name("expertcut")
    choice = ["--strategy", "odd", "--experts", "16", "--top-k", "3"]
    run([expertcut, "prune", demo_model, out, *choice], out.parent)
    return out


@pytest.fixture(scope="module")
def reference(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    return generate(sys.executable, "transformers", pruned, tmp_path_factory.mktemp("reference"))


def test_the_comparison_means_something(
    reference: Answer, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Most tokens are compared, and the source model gives others."""
    lengths = [comparable(*pair) for pair in zip(reference["tokens"], reference["margins"], strict=True)]
    assert sum(lengths) >= len(PROMPTS) * NEW_TOKENS * 3 // 4
    source = generate(sys.executable, "transformers", demo_model, tmp_path_factory.mktemp("source"))
    assert all(a[:n] != b[:n] for a, b, n in zip(source["tokens"], reference["tokens"], lengths, strict=True))


@pytest.mark.parametrize("engine", ["vllm", "mlx", "llama"])
def test_engine_gives_transformers_tokens(
    engine: str, pruned: Path, reference: Answer, repo: Path, tmp_path: Path
) -> None:
    python = interpreter(engine, repo)
    found = generate(python, engine, pruned, tmp_path)
    assert_same_tokens(found, reference)
