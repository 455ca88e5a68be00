"""How few experts a router can do with, against transformers itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from choose_models import geometry
from tiny_types import SUPPORTED, model_class, tiny_config
from transformers.models.auto.configuration_auto import model_type_to_module_name

from expertcut.choose.plan import min_experts
from expertcut.model import resolve_family

OVER = {"minimax_m3_vl_text"}
"""Shares its row with DeepSeek-V3, and ranks no groups."""


def least(model_type: str) -> int:
    config = {"model_type": model_type, "text_config": {"model_type": text_type(model_type)}}
    return min_experts(replace(geometry(8), family=resolve_family(config)))


def text_type(model_type: str) -> str:
    return str(tiny_config(model_type).get_text_config().model_type)


@pytest.mark.parametrize("model_type", sorted(set(SUPPORTED) - OVER))
def test_families_that_rank_a_single_group_are_those_of_transformers(model_type: str) -> None:
    folder = model_type_to_module_name(text_type(model_type))
    models = Path(transformers.__file__).parent / "models"
    source = (models / folder / f"modeling_{folder}.py").read_text()
    assert least(model_type) == (2 if ".topk(2, dim=-1)[0]" in source else 1)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "nemotron_h", "mistral4", "minimax_m2", "qwen3_moe"])
def test_the_least_count_runs_and_one_fewer_does_not(model_type: str) -> None:
    enough = least(model_type)
    forward(model_type, enough)
    if enough > 1:
        with pytest.raises(RuntimeError, match="selected index k out of range"):
            forward(model_type, enough - 1)


def forward(model_type: str, experts: int) -> None:
    """Run a tiny model with one group of so many experts, top-1, in transformers."""
    config = tiny_config(model_type)
    groups = {"n_group": 1, "topk_group": 1}
    counts = dict.fromkeys(resolve_family({"model_type": model_type}).experts, experts)
    for key, value in {**groups, **counts, "num_experts_per_tok": 1}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    torch.manual_seed(0)
    with torch.no_grad():
        model_class(model_type)(config).eval()(torch.arange(8)[None])
