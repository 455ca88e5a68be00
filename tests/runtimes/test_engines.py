"""vLLM, mlx-lm and llama.cpp load the pruned built-in model and generate transformers' greedy tokens in float32."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from engines import Answer, ask, assert_same_tokens, comparable, interpreter, run
from tokenizers import Tokenizer

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import make_plan
from expertcut.model import read_geometry
from expertcut.rewrite import prune
from expertcut.runtimes.overrides import top_k_overrides

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


def test_vllm_tries_a_top_k_by_override(demo_model: Path, repo: Path, tmp_path: Path) -> None:
    """What `plan` prints for vLLM makes the whole model compute what the model written with that top-k computes."""
    checkpoint = open_checkpoint(demo_model)
    geometry = read_geometry(checkpoint)
    prune(checkpoint, geometry, make_plan(checkpoint, geometry, top_k=2), tmp_path / "out")
    (override,) = (o for o in top_k_overrides(geometry, checkpoint.config, 2) if o.runtime == "vLLM")
    flag, text = shlex.split(override.arguments)
    assert flag == "--hf-overrides"
    python, prompts = interpreter("vllm", repo), [[5, 6, 7, 8, 9], [100, 200, 300]]
    found = ask(python, "vllm", demo_model, prompts, NEW_TOKENS, tmp_path, hf_overrides=json.loads(text))
    assert_same_tokens(found, ask(sys.executable, "transformers", tmp_path / "out", prompts, NEW_TOKENS, tmp_path))
