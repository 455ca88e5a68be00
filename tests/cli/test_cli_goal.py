"""Plans for a speed from the command line: the goal met, out of reach in two ways, and options that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from expertcut.choose import Plan

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)

DATA = ("--data", "builtin-heldout", "--tokens", 1500, "--seq-len", 64)
LOAD = ("--concurrency", 8, "--input-len", 16, "--output-len", 64)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine on which the built-in model's experts take most of the time."""
    path = tmp_path_factory.mktemp("machine") / "slow.json"
    constants = {"bandwidth": 0.8, "compute": 0.5, "layer_us": 20, "moe_us": 5, "sequence_us": 9}
    path.write_text(json.dumps({"memory_gb": 8, "bandwidth_gb_s": 2, "bf16_tflops": 0.05, "link_gb_s": 1, "count": 2,
                                "constants": constants}))  # fmt: skip
    return path


def test_the_goal_is_met_at_the_least_loss(
    cli: Cli, demo_model: Path, profiled: Path, slow: Path, tmp_path: Path
) -> None:
    plan, service = tmp_path / "plan.json", ("--hardware", slow, *LOAD, "--tp", 1)
    ran = cli(
        "plan", demo_model, "--profile", profiled, "--strategy", "reap", "--per-layer", "--goal", "throughput=+9%",
        "--max-loss", "nll<=8%", *service, *DATA, "-o", plan, "--json",
    )  # fmt: skip
    goal = ran.document["goal"]
    assert goal["goal"] == "throughput=+9%" and goal["predicted"] >= 0.09
    assert {one["ok"] for one in goal["candidates"]} == {True, False}
    assert all(one["predicted"] >= 0.09 for one in goal["candidates"])
    assert any(one["top_k"] % 1 for one in goal["candidates"]) and any(
        one["experts"] < 32 for one in goal["candidates"]
    )
    kept = {one["name"]: one["change"]["value"] for one in goal["candidates"] if one["ok"]}
    assert goal["chosen"] == min(kept, key=lambda name: kept[name])

    told = cli("estimate", demo_model, "--profile", profiled, "--plan", plan, *service, "--json").document["rows"]
    by = {row["variant"]: row for row in told}
    assert by[str(plan)]["gain"] == pytest.approx(goal["predicted"])
    assert by[str(plan)]["tokens_per_second"] == pytest.approx(goal["tokens_per_second"])
    facts = Plan.load(plan).provenance["goal"]
    assert isinstance(facts, dict)
    assert (facts["goal"], facts["hardware"], facts["tp"], facts["concurrency"]) == ("throughput=+9%", "2 slow", 1, 8)
    assert facts["predicted"] == goal["predicted"] and facts["max_loss"] == ["nll<=8%"]
    judged = cli("eval", demo_model, "--plan", plan, *DATA, "--json")
    assert judged.document["results"][1]["overall"]["change"]["value"] == pytest.approx(kept[goal["chosen"]])
    assert "was chosen by how it does on" in judged.err


def test_all_criteria_are_tried_and_the_table_says_how_each_did(
    cli: Cli, demo_model: Path, profiled: Path, slow: Path, tmp_path: Path
) -> None:
    ran = cli(
        "plan", demo_model, "--profile", profiled, "--strategy", "auto", "--goal", "tpot=-10%", "--max-loss",
        "nll<=20%", "--hardware", slow, *LOAD, *DATA, "-o", tmp_path / "plan.json",
    )  # fmt: skip
    assert ran.code == 0 and "mone is left out" in ran.err
    lines = [line for line in ran.out.splitlines() if " experts, top-" in line]
    assert {"all experts", "reap", "energy"} <= {line.split(",")[0] for line in lines}
    assert "aimer" not in ran.out  # which would read all weights for every number of experts
    assert [line for line in lines if line.rstrip().endswith("chosen")] == lines[:1]
    assert "tpot, predicted" in ran.out and "  -1" in lines[0]


@pytest.mark.parametrize(
    ("goal", "limit", "told"),
    [
        ("throughput=+8%", "nll<=0.1%", "the least loss at the goal: all experts, 32 experts, top-3: nll<=0.1%: up to"),
        ("throughput=3x", "nll<=9%", "out of reach by prediction, whatever the loss: at most throughput +"),
    ],
)
def test_out_of_reach_writes_nothing(
    goal: str, limit: str, told: str, cli: Cli, demo_model: Path, slow: Path, tmp_path: Path
) -> None:
    options = ("--strategy", "odd", "--goal", goal, "--max-loss", limit, "--hardware", slow, *LOAD, *DATA)
    ran = cli("plan", demo_model, *options, "-o", tmp_path / "plan.json")
    assert (ran.code, ran.out) == (5, "") and told in ran.err
    assert not (tmp_path / "plan.json").exists()
    assert ("the most within the limits: none of those tried" in ran.err) == (goal != "throughput=3x")


ALL = ("--goal", "throughput=+10%", "--max-loss", "nll<=1%", "--hardware", "cpu", "--concurrency", "8", *DATA)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (ALL + ("--experts", 16), "--goal chooses experts and top-k itself: leave out --experts"),
        (ALL + ("--keep", "50%"), "leave out --keep"),
        (ALL + ("--drop", 4), "leave out --drop"),
        (ALL + ("--fit", "1GiB"), "leave out --fit"),
        (ALL + ("--top-k", "auto"), "leave out --top-k"),
        (ALL + ("--mean-top-k", 3), "leave out --mean-top-k"),
        (ALL + ("--gain", "--calibration", "builtin"), "--goal does not go with it: leave out --gain"),
        (ALL + ("--strategy", "naee"), "--goal does not go with --strategy naee"),
        (ALL + ("--strategy", "auto"), "--goal with --strategy auto needs --profile"),
        (ALL + ("--per-layer",), "--goal with --per-layer needs --profile"),
        (ALL + ("--concurrency", "8,32"), "--concurrency 8,32: expected one load"),
        (ALL + ("--hardware", "h300"), "h300: no such hardware"),
        (ALL + ("--tp", 3), "tp 3 does not divide"),
        (ALL + ("--max-loss", "nll>=1%"), "nll is better lower"),
        (("--goal", "faster"), "--goal faster: expected throughput=+10%"),
        (("--goal", "tpot=-5%"), "--goal needs --hardware and --concurrency and --max-loss and --data"),
        (("--top-k", 3, "--hardware", "cpu"), "need --goal"),
    ],
)
def test_options_that_cannot_be(options: tuple[object, ...], told: str, cli: Cli, tmp_path: Path) -> None:
    """Said before anything is opened: there is no such model."""
    ran = cli("plan", tmp_path / "none", *options, "-o", tmp_path / "plan.json")
    assert ran.code == 2 and told in ran.err
