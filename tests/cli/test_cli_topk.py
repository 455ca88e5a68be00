"""Fewer activated experts from the command line: one number, a schedule, an average; alike or layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from expertcut.choose import Plan

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)


def top_ks(path: Path) -> list[int | None]:
    return [entry.top_k for entry in Plan.load(path).layers.values()]


def test_a_top_k_alone_keeps_every_expert(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    found = cli("plan", demo_model, "--top-k", 2, "-o", tmp_path / "plan.json", "--json").document
    assert found["experts"] == {"before": 32, "after": 32} and found["top_k"] == {"before": 4, "after": 2}
    assert top_ks(tmp_path / "plan.json") == [2] * 4
    plan = Plan.load(tmp_path / "plan.json")
    assert all(entry.kept == tuple(range(32)) for entry in plan.layers.values())
    assert found["overrides"] == [
        {"runtime": "vLLM", "arguments": "--hf-overrides '{\"num_experts_per_tok\": 2}'"},
        {"runtime": "SGLang", "arguments": "--json-model-override-args '{\"num_experts_per_tok\": 2}'"},
        {"runtime": "llama.cpp", "arguments": "--override-kv qwen3moe.expert_used_count=int:2"},
    ]
    assert plan.provenance["criterion"] is None and plan.provenance["top_k"] == "--top-k 2"


def test_a_schedule_layer_by_layer_from_plan_to_verified(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    made = cli("plan", demo_model, "--top-k-schedule", "4,2,3,3", "--per-layer", "-o", plan)
    assert "4 → 2 to 4 by layer, 3.00 on average" in made.out and "expertcut installed beside it" in made.out
    assert top_ks(plan) == [None, 3, 2, 3]
    cli("prune", demo_model, out, "--plan", plan)
    assert cli("verify", out, "--source", demo_model, "--numeric", "--json").document["ok"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "expertcut_qwen3_moe"
    assert config["expertcut"]["top_k"] == {"0": 4, "1": 3, "2": 2, "3": 3}
    assert "2 to" in cli("show", plan).out
    assert cli("inspect", out, "--json").document["family"] == "qwen3_moe"


def test_an_average_goes_where_it_loses_least(cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    cli("plan", demo_model, "--profile", profiled, "--mean-top-k", 2.5, "--per-layer", "-o", plan)
    assert sum(k or 4 for k in top_ks(plan)) == 10
    cli("plan", demo_model, "--profile", profiled, "--mean-top-k", 4, "-o", plan)
    assert top_ks(plan) == [None] * 4, "all of them: alike, and no plug-in needed"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--top-k-schedule", "4,2,3,3"], "plan with --per-layer"),
        (["--mean-top-k", "2.5", "--per-layer"], "needs --profile"),
        (["--mean-top-k", "5", "--per-layer"], "expected 1 to 4"),
        (["--mean-top-k", "2", "--top-k", "2"], "found --top-k and --mean-top-k, expected at most one"),
        (["--top-k", "2", "--experts", "16"], "--experts 16 needs --strategy"),
        ([], "no strategy given"),
    ],
)
def test_bad_options_are_refused(options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    found = cli("plan", demo_model, *options, "-o", tmp_path / "plan.json")
    assert what in found.err and found.code in (2, 4)
    assert not (tmp_path / "plan.json").exists()
