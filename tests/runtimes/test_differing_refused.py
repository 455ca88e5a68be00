"""What the plug-in refuses, vLLM refuses by name; what it takes quantised lies in buffers as long as its layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from differing import QUANTISED, differing, quantised, source
from engines import HERE, exchange, interpreter
from quantised_models import quantised_pair
from tiny_types import tiny_type

pytestmark = [pytest.mark.runtimes, pytest.mark.timeout(600)]

MODELS: dict[str, Callable[[pytest.TempPathFactory], Path]] = {
    "qwen3_moe": lambda factory: source("qwen3_moe", factory),
    "deepseek_v3": lambda factory: source("deepseek_v3", factory),
    "gpt_oss": lambda factory: source("gpt_oss", factory),
    "MXFP4": lambda factory: quantised_pair("MXFP4, stacked", factory)[0],
    "flex_olmo": lambda factory: tiny_type("flex_olmo", factory),
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "EPLB": ("qwen3_moe", {}, {"parallel_config.enable_eplb": True}, "not served with --enable-eplb"),
    "weight filter": (
        "qwen3_moe", {"enable_expert_parallel": True, "enable_ep_weight_filter": True}, {},
        "not served with --enable-ep-weight-filter",
    ),
    "returned experts": (
        "qwen3_moe", {}, {"aux_output_config.enable_return_routed_experts": True}, "with enable_return_routed_experts"
    ),
    "gpt_oss over ranks": ("gpt_oss", {"enable_expert_parallel": True}, {}, "--enable-expert-parallel for gpt_oss"),
    "speculation": (
        "deepseek_v3", {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}, {},
        "not served with speculation by multi-token prediction",
    ),
    "quantisation": ("MXFP4", {}, {}, "layers that differ, quantised by mxfp4: not served; served: awq, compressed"),
    "no make_layers": ("flex_olmo", {}, {}, "for FlexOlmoForCausalLM, which vLLM builds without make_layers"),
    "other numbers": (
        "qwen3_moe", {"hf_overrides": {"mlp_only_layers": [1]}}, {},
        "builds model.layers.1 of qwen3_moe with (experts, top-k) [], expected (24, 3)",
    ),
}  # fmt: skip
"""A model, arguments, settings of the finished config, and what is then said."""


@pytest.fixture(scope="module")
def found(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All of vLLM's answers, from one process."""
    python, folder = interpreter("vllm", repo), tmp_path_factory.mktemp("refused")
    models = {name: str(differing(make(tmp_path_factory), folder / name)) for name, make in MODELS.items()}
    plain, held = source("olmoe", tmp_path_factory), {}
    for name in QUANTISED:
        held[name] = str(differing(quantised(name, plain, folder / name / "whole"), folder / name / "out"))
    refusals = {
        name: {"model": models[model], "arguments": arguments, "settings": settings}
        for name, (model, arguments, settings, _) in CASES.items()
    }
    refusals["as it is"] = {"model": models["qwen3_moe"], "arguments": {}, "settings": {}}
    request = {"versions": models["qwen3_moe"], "refusals": refusals, "buffers": held}
    return exchange([python, HERE / "inside.py"], request, folder)


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name(case: str, found: Any) -> None:
    said = found["refusals"][case]
    assert said.startswith("RuntimeLintError: ") and CASES[case][-1] in said


def test_nothing_else_is_refused(found: Any) -> None:
    assert found["refusals"]["as it is"] is None


def test_other_versions_of_vllm(found: Any) -> None:
    said = found["versions"]
    assert "vLLM 0.31.2 is older than 0.32, with which layers that differ were tested: pip install" in said["older"]
    assert "make_layers takes num_hidden_layers, layer_fn, prefix, offset, expected num_hidden" in said["changed"]
    assert said["newer"] is None
    assert said["newer, said"] == "layers that differ: vLLM 0.99.0 is not the tested 0.32, but newer"
    assert said["imported before"] is None


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_experts_lie_in_their_layers_buffers(name: str, found: Any) -> None:
    assert found["buffers"][name] == {"0": [8, True], "1": [6, True], "2": [8, True]}
