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


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    recipe = tmp_path / "heldout.yaml"
    parts = "".join(f"  - {{kind: builtin, domain: {d}, part: heldout}}\n" for d in ("prose", "german", "python"))
    recipe.write_text(f"description: Shipped text, the part to measure on.\nsources:\n{parts}")
    return recipe


def test_the_fewest_that_keep_a_limit_with_a_gain(cli: Cli, demo_model: Path, heldout: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    text = ["--data", heldout, "--tokens", 2500, "--seq-len", 128]
    found = cli(
        "plan", demo_model, "--top-k", "auto", "--max-loss", "nll<=20%", *text, "--gain", "--calibration", "builtin",
        "-o", plan, "--json",
    )  # fmt: skip
    tried = {one["top_k"]: one for one in found.document["tried"]}
    assert list(tried) == [1, 2, 3]
    chosen = found.document["top_k"]["after"]
    assert chosen == min(k for k, one in tried.items() if one["ok"])
    assert found.document["gain"]["kept"] is not None
    gains = {entry.gain for entry in Plan.load(plan).layers.values()}
    assert all(gain is not None and 0.5 < gain < 1 for gain in gains)
    ran = cli("eval", demo_model, "--plan", plan, *text, "--json")
    assert "was chosen by how it does on 100% of this text" in ran.err
    shown = ran.document["results"][1]
    assert shown["overall"]["change"] == pytest.approx(tried[chosen]["change"]), "eval finds what the search found"
    seen = cli("eval", demo_model, "--plan", plan, "--data", "builtin", "--tokens", 2500, "--seq-len", 128)
    assert seen.code == 4 and "plan.json's gain" in seen.err
    assert "folded into 128 BF16 tensors" in cli("prune", demo_model, out, "--plan", plan).out
    assert cli("verify", out, "--source", demo_model, "--numeric", "--json").document["ok"]


def test_averages_are_tried_where_layers_may_differ(
    cli: Cli, demo_model: Path, profiled: Path, heldout: Path, tmp_path: Path
) -> None:
    args = ["--data", heldout, "--tokens", 2000, "--seq-len", 128, "--per-layer", "--profile", profiled]
    plan = tmp_path / "plan.json"
    found = cli("plan", demo_model, "--top-k", "auto", "--max-loss", "nll<=4%", *args, "-o", plan).out
    assert "top-2.5 on average" in found and "chosen" in found
    assert 1 < sum(k or 4 for k in top_ks(plan)) / 4 < 4


def test_a_limit_that_nothing_keeps_writes_no_plan(cli: Cli, demo_model: Path, heldout: Path, tmp_path: Path) -> None:
    text = ["--data", heldout, "--tokens", 2000, "--seq-len", 128]
    found = cli("plan", demo_model, "--top-k", "auto", "--max-loss", "kl<=0", *text, "-o", tmp_path / "plan.json")
    assert found.code == 5 and "top-3: kl<=0: up to" in found.err and "raise --max-loss" in found.err
    assert not (tmp_path / "plan.json").exists()


def test_a_gain_that_does_not_help_is_not_kept(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    text = ["--gain", "--calibration", "builtin", "--tokens", 1500, "--seq-len", 64]
    found = cli("plan", demo_model, "--top-k", 4, *text, "-o", tmp_path / "plan.json")
    assert "gain: none kept" in found.out and "every 4th sequence" in found.err
    assert all(entry.gain is None for entry in Plan.load(tmp_path / "plan.json").layers.values())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--top-k", "auto"], "needs --max-loss and --data"),
        (["--top-k", "two"], "expected a whole number of 1 or more, or auto"),
        (["--top-k", "2", "--max-loss", "nll<=1%"], "with --top-k auto only"),
        (["--top-k", "2", "--gain"], "--gain needs --calibration"),
        (["--top-k", "2", "--calibration", "builtin"], "with --gain, --sequential and --strategy naee only"),
        (["--top-k", "2", "--data", "builtin"], "with --gain, --evolve and auto only"),
        (["--top-k", "auto", "--max-loss", "speed<=1", "--data", "builtin"], "unknown metric 'speed'"),
    ],
)
def test_measuring_options_that_do_not_go_together(
    options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    found = cli("plan", demo_model, *options, "-o", tmp_path / "plan.json")
    assert what in found.err and found.code == 2
