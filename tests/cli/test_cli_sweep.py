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

SHORT = ("--data", "builtin-heldout", "--tokens", 1000, "--seq-len", 64)


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
    assert "gain" not in rows[0] and not (out / "pareto.png").exists()


def test_points_with_a_predicted_speed_and_layers_that_differ(
    cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path
) -> None:
    out, service = tmp_path / "curve", ("--hardware", "rtx4090x2", "--tp", 1, "--input-len", 64, "--output-len", 32)
    args = ("sweep", demo_model, "--profile", profiled, "--experts", "32,16", "--top-k", "4,3", "--mean-top-k", "2.5",
            "--per-layer", "--strategy", "energy", "--concurrency", 8, *service, *SHORT, "-o", out)  # fmt: skip
    ran = cli(*args, "--json")
    assert "only expertcut's plug-ins serve those" in ran.err
    points = ran.document["points"]
    assert [(p["experts"], p["top_k"], p["per_layer"]) for p in points] == [
        (n, k, k == 2.5) for n in (32, 16) for k in (4, 3, 2.5)
    ]
    told = cli("estimate", demo_model, "--profile", profiled, "--concurrency", 8, *service, "--json").document["rows"]
    own = points[0]
    assert own["tokens_per_second"] == pytest.approx(told[0]["tokens_per_second"]) and own["gain"] == own["change"] == 0
    for one in points:
        beaten = [p for p in points if p["gain"] >= one["gain"] and p["change"] <= one["change"]
                  and (p["gain"], p["change"]) != (one["gain"], one["change"])]  # fmt: skip
        assert one["front"] == (not beaten)
    assert own["front"]
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [float(row["gain"]) for row in rows] == [one["gain"] for one in points]
    assert json.loads((out / "sweep.json").read_text())["service"]["hardware"]["name"] == "rtx4090"
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_points_with_a_measured_speed(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    row = {"experts": 32, "top_k": 4, "concurrency": 8, "input_len": 16, "output_len": 16, "tokens_per_s": 100.0}
    bench = {"rows": [row, row | {"top_k": 2, "tokens_per_s": 125.0}]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    args = ("sweep", demo_model, "--top-k", "3,2", "--concurrency", 8, "--bench", tmp_path / "bench.json", *SHORT)
    ran = cli(*args, "-o", tmp_path / "curve")
    assert "all experts, 32 experts, top-3: no throughput, bench.json has no row of it" in ran.err
    lines = {line.split()[3]: line.split()[-3:] for line in ran.out.splitlines() if line.startswith("all experts")}
    assert lines["2"] == ["125", "+25.0%", "front"] and lines["3"][-2:] == ["–", "–"]


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
        (["--mean-top-k", "3"], "say so with --per-layer"),
        (["--mean-top-k", "3", "--per-layer"], "--mean-top-k needs --profile"),
        (["--top-k", "3", "--per-layer"], "--per-layer has an effect with --mean-top-k only"),
        (["--top-k", "3", "--concurrency", "8"], "found no --hardware"),
        (["--top-k", "3", "--concurrency", "8,9", "--hardware", "cpu"], "8,9: expected one load"),
        (["--top-k", "3", "--hardware", "cpu"], "need --concurrency"),
        (["--top-k", "3", "--bench", "x.json"], "--bench needs --concurrency"),
        (["--top-k", "3", "--bench", "x.json", "--concurrency", "8", "--ep", "2"], "one or the other"),
    ],
)
def test_grids_that_cannot_be(options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    ran = cli("sweep", demo_model, *options, *DATA, "-o", tmp_path / "curve")
    assert what in ran.err and ran.code == 2
    assert not (tmp_path / "curve").exists()
