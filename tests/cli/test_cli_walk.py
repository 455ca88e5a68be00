"""Experts chosen while the model runs, from the command line: from text to a verified checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from expertcut.choose import Plan

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)

TEXT = ["--calibration", "builtin", "--tokens", 1500, "--seq-len", 128]


@pytest.mark.parametrize("options", [["--strategy", "gram", "--sequential"], ["--strategy", "naee"]])
def test_from_text_to_a_verified_checkpoint(options: list[str], cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    made = cli("plan", demo_model, *options, *TEXT, "--drop", 2, "-o", plan, "--json").document
    assert made["experts"] == {"before": 32, "after": 30} and made["strategy"] == options[1]
    facts = Plan.load(plan).provenance
    assert facts["criterion"] == options[1] and facts.get("sequential", False) is ("--sequential" in options)
    seen = cli("eval", demo_model, "--plan", plan, "--data", "builtin", "--tokens", 1500, "--seq-len", 128)
    assert seen.code == 4 and "is in the calibration text of" in seen.err
    data = ["--data", "builtin-heldout", "--tokens", 1500, "--seq-len", 128]
    assert cli("eval", demo_model, "--plan", plan, *data).code == 0
    gated = cli("prune", demo_model, out, "--plan", plan, "--gate", "kl<=0", *data)
    assert gated.code == 5 and "the plan's experts were chosen while the model ran" in gated.err
    assert cli("prune", demo_model, out, "--plan", plan).code == 0
    assert cli("verify", out, "--source", demo_model, "--json").document["ok"]


def test_a_gain_on_top(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    made = cli(
        "plan", demo_model, "--strategy", "reap", "--sequential", "--gain", "--calibration", "builtin",
        "--tokens", 3000, "--seq-len", 64, "--keep", "50%", "--top-k", 1, "-o", tmp_path / "plan.json", "--json",
    ).document  # fmt: skip
    assert made["experts"]["after"] == 16 and "kept" in made["gain"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--strategy", "reap", "--sequential"], "--sequential needs --calibration"),
        (["--strategy", "naee"], "--strategy naee needs --calibration"),
        (["--sequential", *TEXT], "--sequential needs one --strategy"),
        (["--strategy", "auto", "--sequential", "--data", "builtin", *TEXT], "--sequential needs one --strategy"),
        (["--strategy", "router-norm", "--sequential", *TEXT], "looks at no data"),
        (["--strategy", "naee", "--protect-super", *TEXT], "leave out --profile, --protect-super"),
        (["--strategy", "naee", "--data", "builtin", *TEXT], "with --gain, --evolve, --budget global and auto only"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[object], what: str, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    found = cli("plan", demo_model, "--experts", 16, *options, "-o", tmp_path / "plan.json")
    assert what in found.err and found.code == 2


def test_prune_says_where_it_can_be_had(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    found = cli("prune", demo_model, tmp_path / "out", "--strategy", "naee", "--experts", 16)
    assert found.code == 2 and "expertcut plan MODEL --calibration TEXT" in found.err
