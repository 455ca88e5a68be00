"""The trade-off curve from the command line: every plan of the grid, as a table, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)

DATA = ("--data", "builtin-heldout", "--tokens", 3000, "--seq-len", 128)


def test_a_grid_is_measured_and_drawn(cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "curve"
    ran = cli(
        "sweep", demo_model, "--profile", profiled, "--experts", "32,16,2", "--top-k", "4,3", "--strategy",
        "energy,random", *DATA, "-o", out, "--json",
    )  # fmt: skip
    found = ran.document["points"]
    cells = [(one["strategy"], one["experts"], one["top_k"]) for one in found]
    assert cells == [
        ("all experts", 32, 4), ("all experts", 32, 3), ("energy", 16, 4), ("energy", 16, 3), ("random", 16, 4),
        ("random", 16, 3),
    ]  # fmt: skip
    assert "energy, 2 experts, top-4 is left out" in ran.err
    by = dict(zip(cells, found, strict=True))
    assert by["all experts", 32, 4]["change"] == 0 and by["all experts", 32, 4]["agreement"] == 1
    assert by["energy", 16, 4]["change"] < by["random", 16, 4]["change_low"]
    assert by["energy", 16, 4]["nbytes"] < by["all experts", 32, 4]["nbytes"] == ran.document["nbytes"]
    assert json.loads((out / "sweep.json").read_text())["points"] == found
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [float(row["change"]) for row in rows] == [one["change"] for one in found]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_is_what_eval_says_of_its_plan(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    swept = cli("sweep", demo_model, "--top-k", "2", *DATA, "-o", tmp_path / "curve", "--json").document["points"]
    cli("plan", demo_model, "--top-k", 2, "-o", tmp_path / "plan.json")
    told = cli("eval", demo_model, "--plan", tmp_path / "plan.json", *DATA, "--json").document["results"][1]["overall"]
    assert swept[0]["change"] == told["change"]["value"] and swept[0]["kl"] == told["kl"]["value"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ([], "found neither --experts nor --top-k"),
        (["--experts", "16,x"], "--experts 16,x: expected whole numbers"),
        (["--experts", "16", "--strategy", "reaper"], "unknown strategy 'reaper'"),
        (["--experts", "16", "--strategy", "reap"], "nothing of the grid can be planned"),
    ],
)
def test_grids_that_cannot_be(options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    ran = cli("sweep", demo_model, *options, *DATA, "-o", tmp_path / "curve")
    assert what in ran.err and ran.code == 2
    assert not (tmp_path / "curve").exists()
