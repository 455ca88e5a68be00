"""Fewer activated experts from the command line: one number, a schedule, an average; alike or layer by layer."""

from __future__ import annotations

import json
import shutil
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
    found = cli("inspect", out)
    assert "top-k                   2 to 4 by layer, 3.00 on average" in found.out
    assert "experts per layer       32 " in found.out
    facts = cli("inspect", out, "--json").document
    assert (facts["family"], facts["top_k"], facts["layer_top_k"]) == ("qwen3_moe", 4, [4, 3, 2, 3])
    whole = cli("inspect", demo_model, "--json").document
    one = facts["nbytes_per_expert"] // 2 // 4
    assert whole["activated"] - facts["activated"] == (0 + 1 + 2 + 1) * one, "bfloat16, four layers"


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
        (["--top-k", "2", "--data", "builtin"], "with --gain, --evolve, --budget global and auto only"),
        (["--top-k", "auto", "--max-loss", "speed<=1", "--data", "builtin"], "unknown metric 'speed'"),
    ],
)
def test_measuring_options_that_do_not_go_together(
    options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    found = cli("plan", demo_model, *options, "-o", tmp_path / "plan.json")
    assert what in found.err and found.code == 2


def test_a_lower_top_k_is_linked_as_the_dry_run_says(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(demo_model, model)
    cli("plan", model, "--top-k", 2, "-o", tmp_path / "plan.json")
    args = ("prune", model, out, "--plan", tmp_path / "plan.json", "--link")
    told = cli(*args, "--dry-run", "--json").document
    assert told["taken"] == "linked" and not out.exists()
    assert "3, the source's, linked" in cli(*args, "--dry-run").out
    done = cli(*args, "--json").document
    assert (done["taken"], done["nbytes_written"], done["shards"]) == ("linked", 0, 3)
    assert all(check["ok"] for check in done["checks"])
    shards = {name for name in told["files"] if name.endswith(".safetensors")}
    assert all((out / name).samefile(model / name) for name in shards)
    assert told["bytes_to_write"] == sum((out / name).stat().st_size for name in told["files"].keys() - shards)
    assert cli("verify", out, "--source", model, "--json").document["ok"]
    printed = cli(*args, "--force").out
    assert "3, the source's, linked" in printed and "/s, synced" not in printed
    copied = cli("prune", model, tmp_path / "copied", "--top-k", 2, "--json").document
    assert copied["taken"] in ("cloned", "copied")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--strategy", "odd", "--experts", "16"], "--link needs a plan that changes no tensor: "),
        (["--top-k", "2", "--max-shard-size", "1MB"], "--link needs shards of the source's size, without"),
    ],
)
def test_only_what_stays_can_be_linked(
    options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    for more in ([], ["--dry-run"]):
        ran = cli("prune", demo_model, tmp_path / "out", *options, *more, "--link")
        assert (ran.code, ran.out) == (2, "") and what in ran.err and "hint: leave out --link" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_warns_of_another_file_system(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == demo_model.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    out = shared / tmp_path.name / "out"
    ran = cli("prune", demo_model, out, "--top-k", 2, "--link", "--dry-run")
    assert ran.code == 0 and "warning: " in ran.err and "is on another file system" in ran.err
    assert not out.parent.exists()
