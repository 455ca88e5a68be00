"""Checkpoints whose layers differ in expert count and top-k: vLLM serves them with the plug-in, and nobody without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import local_experts
import pytest
from differing import NEW_TOKENS, PROMPTS, STYLES, differing, source
from engines import HERE, Answer, ask, assert_same_tokens, comparable, exchange, interpreter
from generate import ROTARY, transformers_tokens

from expertcut.runtimes.transformers import from_pretrained

pytestmark = [pytest.mark.runtimes, pytest.mark.timeout(600)]

EAGER_BUT_WARMED_UP: dict[str, Any] = {
    "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager", "custom_ops": ROTARY}
}  # fmt: skip
"""For stages: on a CPU, vLLM 0.32 prepares what they hand over only when it warms up."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every style whose layers differ."""
    folder = tmp_path_factory.mktemp("differing")
    return {style: differing(source(style, tmp_path_factory), folder / style) for style in STYLES}


@pytest.fixture(scope="module")
def references(written: dict[str, Path]) -> dict[str, Answer]:
    """transformers' tokens."""
    return {
        style: transformers_tokens(str(out), PROMPTS, NEW_TOKENS, from_pretrained) for style, out in written.items()
    }


@pytest.fixture(scope="module")
def answers(written: dict[str, Path], repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """vLLM's tokens, of all styles in one process."""
    command: list[str | Path] = [interpreter("vllm", repo), HERE / "generate.py", "vllm_each"]
    request = {"models": [str(out) for out in written.values()], "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    return dict(zip(written, exchange(command, request, tmp_path_factory.mktemp("answers")), strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_the_comparison_means_something(
    style: str, references: dict[str, Answer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Half of the tokens and more are compared, and the whole model gives others."""
    reference = references[style]
    lengths = [comparable(*pair) for pair in zip(reference["tokens"], reference["margins"], strict=True)]
    assert sum(lengths) >= len(PROMPTS) * NEW_TOKENS // 2
    whole = transformers_tokens(str(source(style, tmp_path_factory)), PROMPTS, NEW_TOKENS)
    assert any(a[:n] != b[:n] for a, b, n in zip(whole["tokens"], reference["tokens"], lengths, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_vllm_with_the_plug_in_gives_transformers_tokens(
    style: str, answers: dict[str, Answer], references: dict[str, Answer]
) -> None:
    assert_same_tokens(answers[style], references[style])


def test_its_server_does_over_two_tensor_parallel_ranks(
    written: dict[str, Path], references: dict[str, Answer], repo: Path, tmp_path: Path
) -> None:
    python, arguments = interpreter("vllm", repo), ["--tensor-parallel-size", "2"]
    found = ask(python, "vllm_server", written["qwen3_moe"], PROMPTS, NEW_TOKENS, tmp_path, arguments=arguments)
    assert_same_tokens(found, references["qwen3_moe"])


def test_it_does_over_two_pipeline_stages(
    written: dict[str, Path], references: dict[str, Answer], repo: Path, tmp_path: Path
) -> None:
    """The second stage's layers have their own numbers, by their number in the model."""
    python = interpreter("vllm", repo)
    found = ask(
        python, "vllm", written["qwen3_moe"], PROMPTS, NEW_TOKENS, tmp_path, pipeline_parallel_size=2,
        **EAGER_BUT_WARMED_UP,
    )  # fmt: skip
    assert_same_tokens(found, references["qwen3_moe"])


def test_it_does_over_two_expert_parallel_ranks(
    written: dict[str, Path], references: dict[str, Answer], repo: Path, tmp_path: Path
) -> None:
    """12 and 9 experts, the latter in shares of 5 and 4."""
    python, path = interpreter("vllm", repo), local_experts.install(tmp_path)
    found = ask(
        python, "vllm", written["deepseek_v3"], PROMPTS, NEW_TOKENS, tmp_path, path, tensor_parallel_size=2,
        enable_expert_parallel=True,
    )  # fmt: skip
    assert_same_tokens(found, references["deepseek_v3"])


@pytest.mark.parametrize("experts", [True, False], ids=["experts and top-k", "top-k"])
@pytest.mark.parametrize("engine", ["vllm", "mlx", "llama"])
def test_no_stock_engine_serves_it(
    engine: str, experts: bool, demo_model: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    out, python = differing(demo_model, tmp_path / "out", experts), interpreter(engine, repo)
    with pytest.raises(AssertionError, match="(?i)expertcut_?qwen3_?moe"):
        ask(python, engine, out, PROMPTS, NEW_TOKENS, tmp_path)
