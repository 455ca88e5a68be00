"""`--drop-mtp`: what it leaves, and where it is a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import tiny_model

from expertcut.checkpoint import load_json, open_checkpoint
from expertcut.model import read_geometry

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)


def test_dropped(cli: Cli, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model("deepseek_v3", tmp_path_factory)
    choice = ("--strategy", "router-norm", "--experts", 6, "--drop-mtp")
    assert cli("plan", model, *choice, "-o", tmp_path / "plan.json").code == 0
    assert load_json(tmp_path / "plan.json")["mtp"] == "drop"
    done = cli("prune", model, tmp_path / "out", "--plan", tmp_path / "plan.json", "--json")
    assert done.code == 0, done.err
    assert done.document["nbytes"]["after"] == open_checkpoint(tmp_path / "out").nbytes
    assert read_geometry(open_checkpoint(tmp_path / "out")).mtp == ()


def test_nothing_to_drop_is_a_mistake(cli: Cli, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model("qwen3_moe", tmp_path_factory)
    ran = cli("plan", model, "--strategy", "odd", "--experts", 4, "--drop-mtp", "-o", tmp_path / "plan.json")
    assert ran.code == 2
    assert "no multi-token-prediction layers" in ran.err
