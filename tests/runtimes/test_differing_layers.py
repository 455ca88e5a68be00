"""Checkpoints whose layers differ in expert count and top-k: vLLM serves them with the plug-in, and nobody without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from engines import ask, assert_same_tokens, comparable, interpreter
from generate import transformers_tokens
from quantised_models import quantised_pair
from tiny_models import tokens

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import LayerPlan, Plan, make_plan
from expertcut.model import read_geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure
from expertcut.runtimes.transformers import from_pretrained

pytestmark = [pytest.mark.runtimes, pytest.mark.timeout(600)]

NEW_TOKENS = 20
PROMPTS = [sequence.ids.tolist() for sequence in tokens((9, 14, 6, 20, 11), seed=5).sequences]


def olmoe(factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE, whose router does not renormalise, with heads as wide as vLLM's CPU attention wants."""
    folder = factory.mktemp("olmoe") / "model"
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=4, max_position_embeddings=256, initializer_range=0.3,
        pad_token_id=None, eos_token_id=0,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


def deepseek(factory: pytest.TempPathFactory) -> Path:
    return quantised_pair("FP8 blocks, MTP and groups", factory)[1]


SOURCES: dict[str, Callable[[pytest.TempPathFactory], Path] | None] = {
    "qwen3_moe": None, "deepseek_v3": deepseek, "olmoe": olmoe
}  # fmt: skip
"""How to make a model of each style; None: the built-in one."""


def differing(folder: Path, experts: bool, out: Path) -> Path:
    """Every other layer with fewer experts (if wanted) and a smaller top-k."""
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    everything, groups = tuple(range(geometry.num_experts)), geometry.n_group
    made = make_plan(checkpoint, geometry, strategy="random", experts=geometry.num_experts * 3 // 4 // groups * groups)
    layers = {
        prefix: LayerPlan(layer=entry.layer, kept=entry.kept if place % 2 and experts else everything,
                          top_k=geometry.top_k - place % 2)
        for place, (prefix, entry) in enumerate(made.layers.items())
    }  # fmt: skip
    plan: Plan = made.model_copy(update={"layers": layers, "per_layer": True})
    prune(checkpoint, geometry, plan, out)
    require(verify_structure(out, checkpoint) + verify_bytes(out, checkpoint))
    return out


@pytest.mark.parametrize("style", SOURCES)
def test_vllm_with_the_plug_in_gives_transformers_tokens(
    style: str, demo_model: Path, repo: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    make = SOURCES[style]
    source = demo_model if make is None else make(tmp_path_factory)
    out = differing(source, True, tmp_path / "out")
    reference = transformers_tokens(str(out), PROMPTS, NEW_TOKENS, from_pretrained)
    lengths = [comparable(*pair) for pair in zip(reference["tokens"], reference["margins"], strict=True)]
    assert sum(lengths) >= len(PROMPTS) * NEW_TOKENS // 2
    whole = transformers_tokens(str(source), PROMPTS, NEW_TOKENS)
    assert any(a[:n] != b[:n] for a, b, n in zip(whole["tokens"], reference["tokens"], lengths, strict=True))
    python = interpreter("vllm", repo)
    assert_same_tokens(ask(python, "vllm", out, PROMPTS, NEW_TOKENS, tmp_path), reference)


@pytest.mark.parametrize("experts", [True, False], ids=["experts and top-k", "top-k"])
@pytest.mark.parametrize("engine", ["vllm", "mlx", "llama"])
def test_no_stock_engine_serves_it(
    engine: str, experts: bool, demo_model: Path, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    out, python = differing(demo_model, experts, tmp_path / "out"), interpreter(engine, repo)
    with pytest.raises(AssertionError, match="(?i)expertcut_?qwen3_?moe"):
        ask(python, engine, out, PROMPTS, NEW_TOKENS, tmp_path)
