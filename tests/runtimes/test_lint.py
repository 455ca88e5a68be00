"""Every rule keeps one subject and catches another; known models by example; counts that stay fast, sizes that fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from differing import differing
from golden_names import as_checkpoint, expand
from tiny_models import tiny_model

from expertcut.checkpoint import open_checkpoint
from expertcut.model import read_geometry
from expertcut.rewrite.config import edit_config
from expertcut.rewrite.quantization import quantization_edits
from expertcut.runtimes.lint import (
    Advice,
    Fit,
    advise,
    broken_rules,
    fast_expert_counts,
    fits,
    lint,
    lint_subject,
)
from expertcut.runtimes.rules import READ, RULES, RUNTIMES, LintSubject

QWEN3 = LintSubject("qwen3_moe", 128, 8)
DEEPSEEK_V3 = LintSubject("deepseek_v3", 256, 8, 8, 4, group_best=2, grouped=True, correction_bias=True)
DEEPSEEK_V2 = LintSubject("deepseek_v2", 160, 6, 8, 3, grouped=True)
NEMOTRON = LintSubject("nemotron_h", 512, 22, grouped=True, correction_bias=True)
DEEPSEEK_V4 = LintSubject("deepseek_v4", 256, 6, correction_bias=True)
FP8 = replace(QWEN3, quant_method="fp8")
GPT_OSS = LintSubject("gpt_oss", 128, 4, quant_method="mxfp4")
SPLIT = replace(QWEN3, tp=8, ep=8)
GLM = LintSubject("glm4_moe", 128, 8, group_best=2, grouped=True, correction_bias=True)
BLOCKS = replace(FP8, width=2048, block=128)

# (rule, runtime): a subject that keeps it, changes that break it, and what is then found.
CASES: dict[tuple[str, ...], tuple[LintSubject, dict[str, Any], str]] = {
    **{("alike", r): (QWEN3, {"uneven": True}, "refuses") for r in RUNTIMES},
    ("alike", "vLLM", "quantised"): (GPT_OSS, {"uneven": True}, "refuses"),
    **{("groups", r): (DEEPSEEK_V3, {"experts": 250}, "refuses") for r in RUNTIMES if r != "vLLM"},
    ("groups", "vLLM"): (DEEPSEEK_V3, {"experts": 250}, "wrong"),
    **{("group-size", r): (DEEPSEEK_V3, {"experts": 8, "top_k": 4}, "refuses") for r in RUNTIMES if r != "vLLM"},
    ("group-size", "transformers", "single"): (GLM, {"experts": 1, "top_k": 1}, "refuses"),
    **{("top-k", r): (QWEN3, {"top_k": 129}, "refuses") for r in RUNTIMES},
    **{("top-k-in-groups", r): (DEEPSEEK_V3, {"experts": 16, "topk_group": 3}, "wrong") for r in RUNTIMES},
    ("proper-groups", "llama.cpp"): (DEEPSEEK_V3, {"topk_group": 8}, "refuses"),
    ("max-experts", "llama.cpp"): (replace(QWEN3, experts=1024), {"experts": 1025}, "refuses"),
    ("top-k-kernel", "vLLM"): (replace(QWEN3, experts=192), {"experts": 96}, "loads"),
    ("top-k-kernel", "vLLM", "deepseek_v4"): (DEEPSEEK_V4, {"experts": 160}, "refuses"),
    ("top-k-kernel", "SGLang"): (QWEN3, {"experts": 192}, "loads"),
    ("grouped-kernel", "vLLM"): (NEMOTRON, {"top_k": 12}, "loads"),
    ("grouped-kernel", "TensorRT-LLM"): (DEEPSEEK_V3, {"experts": 320}, "loads"),
    ("tuned-config", "vLLM"): (QWEN3, {"experts": 192}, "loads"),
    ("trtllm-fp8", "vLLM"): (FP8, {"experts": 62}, "loads"),
    ("trtllm-gen", "TensorRT-LLM"): (GPT_OSS, {"experts": 62}, "loads"),
    ("shared-fusion", "SGLang"): (DEEPSEEK_V3, {"experts": 128}, "loads"),
    **{
        ("tensor-parallel", runtime, what): case
        for runtime in ("vLLM", "SGLang")
        for what, case in {
            "experts": (SPLIT, {"tp": 256}, "refuses"),
            "heads": (replace(SPLIT, heads=32), {"heads": 12}, "refuses"),
            "width": (replace(SPLIT, width=768), {"width": 764}, "refuses"),
            "blocks": (replace(BLOCKS, tp=8), {"width": 768}, "refuses"),
            "blocks on one": (BLOCKS, {"width": 704}, "refuses"),
        }.items()
    },
    ("expert-parallel", "vLLM"): (SPLIT, {"redundant": 4}, "loads"),
    ("expert-parallel", "SGLang"): (SPLIT, {"experts": 100}, "refuses"),
    ("expert-scheme", "vLLM"): (FP8, {"misread": 3}, "refuses"),
    **{
        ("mtp-count", r): (DEEPSEEK_V3, {"mtp_uneven": True}, "refuses")
        for r in ("vLLM", "SGLang", "llama.cpp", "TensorRT-LLM")
    },
    ("mtp-announced", "llama.cpp"): (DEEPSEEK_V3, {"mtp_missing": True}, "refuses"),
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
    assert found.source and found.version == READ[runtime]


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


def test_rules_are_asked_of_every_layer() -> None:
    """Where layers differ, the first that breaks a rule is named, and what fits must fit all."""
    uneven = replace(QWEN3, uneven=True, layers=((128, 8), (96, 8), (64, 4)), heads=64)
    reasons = [f.reason for f in lint(uneven) if f.runtime == "vLLM"]
    assert "layers differ" in reasons[0] and "for 96 experts" in reasons[1] and "for 96 experts" in reasons[2]
    assert fit(uneven, "vLLM") == Fit("vLLM", (), (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32))
    assert fit(replace(uneven, layers=((128, 8), (20, 4))), "vLLM").tp == (1, 2, 4, 8, 16)
    assert fit(replace(uneven, layers=((128, 8), (20, 4))), "vLLM").ep == (1, 2, 4)


def test_subject_of_layers_that_differ(demo_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(differing(demo_model, tmp_path / "out"))
    subject = lint_subject(read_geometry(checkpoint), checkpoint.config)
    assert subject.uneven and (subject.experts, subject.top_k) == (32, 4)
    assert subject.layers == ((32, 4), (24, 3), (32, 4), (24, 3))


def test_deepseek_v3_counts_that_keep_the_grouped_kernel() -> None:
    counts = fast_expert_counts(DEEPSEEK_V3, 300)
    assert counts == list(range(16, 257, 8)), "multiples of 8 groups, top-8 of 4 groups' experts, at most 32 a group"
    assert {192, 160} <= set(counts)
    assert fast_expert_counts(replace(DEEPSEEK_V3, n_group=6, topk_group=3), 256)[-1] == 192


def test_ungrouped_counts() -> None:
    assert fast_expert_counts(QWEN3, 200) == [8, 16, 32, 64, 128, 192]
    assert fast_expert_counts(QWEN3, 200, "SGLang") == [8, 16, 32, 64, 128]
    assert fast_expert_counts(QWEN3, 12, "transformers") == [8, 9, 10, 11, 12]
    assert fast_expert_counts(QWEN3, 7) == []
    assert fast_expert_counts(replace(QWEN3, tp=64), 200) == [64, 128, 192]


def fit(subject: LintSubject, runtime: str) -> Fit:
    (found,) = (found for found in fits(subject) if found.runtime == runtime)
    return found


def test_what_fits() -> None:
    small = replace(QWEN3, experts=60, top_k=4, width=1408, heads=16)
    divisors = (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60)
    assert fit(small, "vLLM") == Fit("vLLM", (4, 8, 16, 32), (1, 2, 4, 8, 16), divisors)
    assert fit(replace(small, experts=6), "SGLang").tp == (1, 2, 4), "no more ranks than experts"
    assert fit(replace(small, heads=12), "vLLM").tp == (1, 2, 4)
    assert fit(replace(small, redundant=4), "vLLM").ep == (1, 2, 4, 8, 16, 32, 64)
    assert fit(small, "llama.cpp") == Fit("llama.cpp", tuple(range(4, 61)), None, None)
    assert [found.runtime for found in fits(small)] == list(RUNTIMES)


def test_block_fp8_splits_whole_blocks_only() -> None:
    """Qwen3-30B-A3B-FP8: experts of width 768 are six blocks of 128."""
    found = replace(QWEN3, width=768, heads=32, quant_method="fp8", block=128)
    assert fit(found, "vLLM").tp == (1, 2)
    assert fit(replace(found, block=None), "vLLM").tp == (1, 2, 4, 8, 16, 32)
    assert fit(replace(found, width=704), "SGLang").tp == ()


def test_subject_of_the_built_in_model(demo_model: Path) -> None:
    checkpoint = open_checkpoint(demo_model)
    subject = lint_subject(read_geometry(checkpoint), checkpoint.config)
    assert subject == LintSubject("qwen3_moe", 32, 4, tied_head=True, width=64, heads=4)
    renamed = {("num_local_experts" if k == "num_experts" else k): v for k, v in checkpoint.config.items()}
    assert lint_subject(read_geometry(checkpoint), renamed).expert_key == "num_experts"


@pytest.mark.parametrize(("name", "least"), [("deepseek_v3", 2), ("glm4_moe", 2), ("deepseek_v2-lite", 1)])
def test_subject_of_grouped_routers(name: str, least: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = open_checkpoint(tiny_model(name, tmp_path_factory))
    subject = lint_subject(read_geometry(checkpoint), checkpoint.config)
    assert subject.grouped and subject.group_best == least
    assert not (subject.uneven or subject.mtp_uneven or subject.mtp_missing)


def test_announced_layers_that_are_not_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = open_checkpoint(tiny_model("deepseek_v3-ungrouped", tmp_path_factory))
    config = checkpoint.config | {"num_nextn_predict_layers": 1}
    subject = lint_subject(read_geometry(checkpoint), config)
    assert subject.mtp_missing
    assert not lint_subject(read_geometry(checkpoint), checkpoint.config | {"num_mtp_modules": 3}).mtp_missing
    assert "mtp-announced" in {rule.name for rule in broken_rules(subject, "llama.cpp")}


QUANTISED = """
    model.layers.{0-1}.mlp.gate.weight BF16 4x32
    model.layers.{0-1}.mlp.experts.{0-3}.{gate,up,down}_proj.weight F8_E4M3 32x32
    model.layers.{0-1}.mlp.experts.{0-3}.{gate,up,down}_proj.weight_scale BF16 32x1
"""
FP8_KEY = "modules_to_not_convert"


def quantised_config(quantization: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32,
        "moe_intermediate_size": 32, "num_hidden_layers": 2, "quantization_config": quantization,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "key", "entries", "misread"),
    [
        ("compressed-tensors", "ignore", ["lm_head", "re:.*gate$"], None),
        ("compressed-tensors", "ignore", ["model.layers.1.mlp.experts.0.up_proj"], 1),
        ("compressed-tensors", "ignore", ["model.layers.1.mlp.experts.3.up_proj"], None),
        ("compressed-tensors", "ignore", [r"re:.*layers\.0\.mlp\.experts\..*"], 0),
        ("fp8", FP8_KEY, ["lm_head", "model.layers.0.mlp.gate"], None),
        ("fp8", FP8_KEY, ["model.layers.1.mlp.experts.3.up_proj"], 1),
        ("fp8", "ignored_layers", ["model.layers.0.mlp.experts"], 0),
        ("awq", FP8_KEY, ["model.layers.0.mlp.experts"], None),
    ],
)
def test_one_entry_speaks_for_all_experts_of_a_layer(
    method: str, key: str, entries: list[str], misread: int | None
) -> None:
    config = quantised_config({"quant_method": method, key: entries})
    checkpoint = as_checkpoint(list(expand(QUANTISED)), config)
    subject = lint_subject(read_geometry(checkpoint), config)
    assert subject.misread == misread
    plain = as_checkpoint(list(expand(QUANTISED.replace("weight_scale", "bias"))), config)
    assert lint_subject(read_geometry(plain), config).misread is None, "stored as the entry says"


@pytest.mark.parametrize(("kept", "misread"), [((0, 1, 2), None), ((1, 2, 3), 1)])
def test_entries_for_dropped_experts_speak_for_none(kept: tuple[int, ...], misread: int | None) -> None:
    """The config is judged as a plan leaves it."""
    config = quantised_config({"quant_method": "fp8", FP8_KEY: ["model.layers.1.mlp.experts.3.up_proj"]})
    geometry = read_geometry(as_checkpoint(list(expand(QUANTISED)), config))
    edits = quantization_edits(config, geometry, dict.fromkeys(geometry.blocks, kept))
    assert lint_subject(geometry, edit_config(config, edits)).misread == misread


def near(subject: LintSubject, maximum: int) -> dict[str, tuple[int | None, int | None]]:
    return {found.runtime: (found.below, found.above) for found in advise(subject, maximum)}


def test_nearest_fast_counts() -> None:
    assert advise(replace(QWEN3, experts=64), 128) == []
    assert near(replace(QWEN3, experts=100), 128) == {"vLLM": (64, 128), "SGLang": (64, 128)}
    assert near(replace(QWEN3, experts=100), 100) == {"vLLM": (64, None), "SGLang": (64, None)}
    assert near(replace(QWEN3, experts=4, top_k=8), 128)["vLLM"] == (None, 8)
    assert near(replace(DEEPSEEK_V3, experts=192), 256) == {"SGLang": (None, 256)}
    assert near(replace(QWEN3, experts=192), 256) == {"SGLang": (128, 256)}, "vLLM's kernel only wants tuning"
    (first, _) = advise(replace(QWEN3, experts=24), 128)
    assert first == Advice("vLLM", "no fused top-k kernel for 24 experts (powers of two up to 512, 192, 320, 384, 448, "
                           "576 have one)", 16, 32)  # fmt: skip
