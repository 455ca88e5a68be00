"""Every rule keeps one subject and catches another; known models by example; counts that stay fast."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertcut.checkpoint import open_checkpoint
from expertcut.model import read_geometry
from expertcut.runtimes.lint import (
    broken_rules,
    ep_sizes,
    fast_expert_counts,
    lint,
    lint_subject,
    nearest_fast_counts,
    tp_sizes,
)
from expertcut.runtimes.rules import RULES, RUNTIMES, LintSubject

QWEN3 = LintSubject("qwen3_moe", 128, 8)
DEEPSEEK_V3 = LintSubject("deepseek_v3", 256, 8, 8, 4, group_best=2, grouped=True, correction_bias=True)
DEEPSEEK_V2 = LintSubject("deepseek_v2", 160, 6, 8, 3, grouped=True)
NEMOTRON = LintSubject("nemotron_h", 512, 22, grouped=True, correction_bias=True)
DEEPSEEK_V4 = LintSubject("deepseek_v4", 256, 6, correction_bias=True)
FP8 = replace(QWEN3, quant_method="fp8")
GPT_OSS = LintSubject("gpt_oss", 128, 4, quant_method="mxfp4")
SPLIT = replace(QWEN3, tp=8, ep=8)

# (rule, runtime): a subject that keeps it, changes that break it, and what is then found.
CASES: dict[tuple[str, ...], tuple[LintSubject, dict[str, Any], str]] = {
    **{("groups", r): (DEEPSEEK_V3, {"experts": 250}, "refuses") for r in RUNTIMES if r != "vLLM"},
    ("groups", "vLLM"): (DEEPSEEK_V3, {"experts": 250}, "wrong"),
    **{("group-size", r): (DEEPSEEK_V3, {"experts": 8, "top_k": 4}, "refuses") for r in RUNTIMES if r != "vLLM"},
    **{("top-k", r): (QWEN3, {"top_k": 129}, "refuses") for r in RUNTIMES},
    **{("top-k-in-groups", r): (DEEPSEEK_V3, {"experts": 16, "topk_group": 3}, "wrong") for r in RUNTIMES},
    ("proper-groups", "llama.cpp"): (DEEPSEEK_V3, {"topk_group": 8}, "refuses"),
    ("max-experts", "llama.cpp"): (replace(QWEN3, experts=512), {"experts": 513}, "refuses"),
    ("top-k-kernel", "vLLM"): (replace(QWEN3, experts=192), {"experts": 96}, "loads"),
    ("top-k-kernel", "vLLM", "deepseek_v4"): (DEEPSEEK_V4, {"experts": 160}, "refuses"),
    ("top-k-kernel", "SGLang"): (QWEN3, {"experts": 192}, "loads"),
    ("grouped-kernel", "vLLM"): (NEMOTRON, {"top_k": 12}, "loads"),
    ("grouped-kernel", "TensorRT-LLM"): (DEEPSEEK_V3, {"experts": 320}, "loads"),
    ("tuned-config", "vLLM"): (QWEN3, {"experts": 192}, "loads"),
    ("trtllm-fp8", "vLLM"): (FP8, {"experts": 62}, "loads"),
    ("trtllm-gen", "TensorRT-LLM"): (GPT_OSS, {"experts": 62}, "loads"),
    ("shared-fusion", "SGLang"): (DEEPSEEK_V3, {"experts": 128}, "loads"),
    ("tensor-parallel", "vLLM"): (SPLIT, {"tp": 256}, "refuses"),
    ("tensor-parallel", "SGLang"): (SPLIT, {"tp": 256}, "refuses"),
    ("expert-parallel", "vLLM"): (SPLIT, {"redundant": 4}, "loads"),
    ("expert-parallel", "SGLang"): (SPLIT, {"experts": 100}, "refuses"),
    ("hub-keys", "mlx-lm"): (QWEN3, {"expert_key": "num_experts"}, "refuses"),
    ("own-head", "mlx-lm"): (DEEPSEEK_V3, {"tied_head": True}, "refuses"),
    ("own-head", "vLLM"): (DEEPSEEK_V3, {"tied_head": True}, "wrong"),
}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_rule_keeps_and_catches(case: tuple[str, ...]) -> None:
    name, runtime = case[:2]
    good, change, status = CASES[case]
    bad = replace(good, **change)
    assert name not in {rule.name for rule in broken_rules(good, runtime)}
    (found,) = (f for f in lint(bad) if f.runtime == runtime and f.rule == name)
    assert found.status == status
    assert found.reason and "{" not in found.reason


def test_every_row_of_the_table_has_a_case() -> None:
    caught = set()
    for (name, runtime, *_), (good, change, _) in CASES.items():
        caught |= {id(r) for r in broken_rules(replace(good, **change), runtime) if r.name == name}
    assert [rule for rule in RULES if id(rule) not in caught] == []
    assert {(r.name, runtime) for r in RULES for runtime in r.runtimes} == {case[:2] for case in CASES}


def test_released_models_are_fast_in_vllm_as_they_are() -> None:
    for subject in (QWEN3, DEEPSEEK_V3, DEEPSEEK_V2, NEMOTRON, DEEPSEEK_V4, FP8, GPT_OSS):
        assert {f.status for f in lint(subject) if f.runtime == "vLLM"} == {"fast"}, subject


def test_every_runtime_is_judged_in_order() -> None:
    findings = lint(replace(QWEN3, experts=96))
    assert list(dict.fromkeys(f.runtime for f in findings)) == list(RUNTIMES)
    assert "no fused top-k kernel for 96 experts (powers of two up to 512 have one)" in {f.reason for f in findings}
    assert [(f.status, f.rule) for f in findings if f.runtime == "vLLM"] == [
        ("loads", "top-k-kernel"),
        ("loads", "tuned-config"),
    ]
    assert [f.status for f in findings if f.runtime == "transformers"] == ["fast"]


def test_deepseek_v3_counts_that_keep_the_grouped_kernel() -> None:
    counts = fast_expert_counts(DEEPSEEK_V3, 300)
    assert counts == list(range(16, 257, 8)), "multiples of 8 groups, top-8 of 4 groups' experts, at most 32 a group"
    assert {192, 160} <= set(counts)
    assert fast_expert_counts(replace(DEEPSEEK_V3, n_group=6, topk_group=3), 256)[-1] == 192


def test_ungrouped_counts() -> None:
    assert fast_expert_counts(QWEN3, 200) == [8, 16, 32, 64, 128, 192]
    assert fast_expert_counts(QWEN3, 200, ("vLLM", "SGLang")) == [8, 16, 32, 64, 128]
    assert fast_expert_counts(QWEN3, 12, ("transformers",)) == [8, 9, 10, 11, 12]
    assert fast_expert_counts(QWEN3, 7) == []
    assert fast_expert_counts(replace(QWEN3, tp=64), 200) == [64, 128, 192]


def test_parallel_sizes() -> None:
    assert tp_sizes(6) == [1, 2, 4]
    assert tp_sizes(128, 16) == [1, 2, 4, 8, 16]
    assert ep_sizes(48, maximum=8) == [1, 2, 3, 4, 6, 8]
    assert ep_sizes(60, redundant=4, maximum=32) == [1, 2, 4, 8, 16, 32]


def test_subject_of_the_built_in_model(demo_model: Path) -> None:
    checkpoint = open_checkpoint(demo_model)
    subject = lint_subject(read_geometry(checkpoint), checkpoint.config)
    assert subject == LintSubject("qwen3_moe", 32, 4, topk_group=1, group_best=2, tied_head=True)
    renamed = {("num_local_experts" if k == "num_experts" else k): v for k, v in checkpoint.config.items()}
    assert lint_subject(read_geometry(checkpoint), renamed).expert_key == "num_experts"


def test_nearest_fast_counts() -> None:
    assert nearest_fast_counts(replace(QWEN3, experts=64), 128) == (64, 64)
    assert nearest_fast_counts(replace(QWEN3, experts=100), 128) == (64, 128)
    assert nearest_fast_counts(replace(QWEN3, experts=100), 100) == (64, None)
    assert nearest_fast_counts(replace(QWEN3, experts=4, top_k=8), 128) == (None, 8)
