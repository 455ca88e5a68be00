"""`expertcut estimate`: what it prints, for a small model and for the largest, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sparse
from golden_names import golden

from expertcut.calibrate.profile import Profile
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan
from expertcut.measure.cost import predict_plans
from expertcut.measure.cost_hardware import read_machine
from expertcut.measure.cost_model import model_cost
from expertcut.measure.cost_traffic import Load
from expertcut.model import read_geometry

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)


def test_json_is_what_the_function_says(cli: Cli, demo_model: Path, profiled: Path, planned: Path) -> None:
    args = ("--hardware", "rtx4090x2", "--concurrency", "1,8", "--profile", profiled, "--plan", planned)
    ran = cli("estimate", demo_model, *args, "--input-len", 64, "--output-len", 32, "--json")
    assert ran.err == "the constants of rtx4090 are guessed, fitted to no measurement: see expertcut estimate --fit\n"
    document, checkpoint = ran.document, open_checkpoint(demo_model)
    assert (document["routing"], document["hardware"]["count"]) == ("profile", 2)
    geometry, plans = read_geometry(checkpoint), {str(planned): Plan.load(planned)}
    work = model_cost(checkpoint, geometry, Profile.load(profiled))
    expected = [
        (name, one)
        for clients in (1, 8)
        for name, one in predict_plans(
            work, geometry, plans, read_machine("rtx4090x2"), Load(clients, 64, 32)
        ).items()
    ]  # fmt: skip
    assert [row["variant"] for row in document["rows"]] == ["base", str(planned)] * 2
    for row, (_, one) in zip(document["rows"], expected, strict=True):
        assert row["concurrency"] == one.concurrency
        assert row["tokens_per_second"] == pytest.approx(one.tokens_per_second)
        assert row["weights_nbytes"] == one.weights_nbytes and row["why"] == one.why
    assert document["rows"][1]["weights_nbytes"] < document["rows"][0]["weights_nbytes"] == checkpoint.nbytes


def test_tables_say_what_was_assumed(cli: Cli, demo_model: Path) -> None:
    ran = cli("estimate", demo_model, "--hardware", "cpu", "--experts", "32,16", "--top-k", "4,2", "--concurrency", 8)
    assert "uniform, as there is no --profile" in ran.out
    names = [line.split("  ")[0] for line in ran.out.splitlines() if line.startswith(("base", "32 ", "16 "))]
    assert names == ["base", "32 experts, top-2", "16 experts, top-4", "16 experts, top-2"]
    assert ran.out.count("concurrency 8, ") == 1 and "half the top-k would gain" in ran.out


def test_own_measurements_make_own_constants(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    """What is fitted to a file of rows is written, and read again it predicts those rows."""
    slow = tmp_path / "slow.json"
    machine = read_machine("cpu").model_copy(update={"fitted": "made up"})
    constants = machine.constants.model_copy(update={"layer_us": 900.0, "sequence_us": 300.0})
    machine.model_copy(update={"constants": constants, "bandwidth_gb_s": 0.5}).save(slow)
    grid = ("--top-k", "4,2,1", "--concurrency", "1,4,32", "--input-len", 16, "--output-len", 16)
    told = cli("estimate", demo_model, "--hardware", slow, *grid, "--json")
    assert told.err == ""
    rows = [
        {"experts": 32, "top_k": round(row["top_k"]), "concurrency": row["concurrency"], "input_len": 16,
         "output_len": 16, "tokens_per_s": row["tokens_per_second"], "ttft": row["ttft"]}
        for row in told.document["rows"]
    ]  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps({"schema": "expertcut.bench/1", "rows": rows}))
    own = tmp_path / "own.json"
    sheet = json.loads(slow.read_text()) | {"constants": read_machine("cpu").constants.model_dump()}
    (tmp_path / "sheet.json").write_text(json.dumps(sheet))
    fitting = ("--hardware", tmp_path / "sheet.json", "--fit", tmp_path, "--save-hardware", own)
    found = cli("estimate", demo_model, *fitting, *grid, "--json").document
    assert found["fit"]["error"] < 0.2 and found["fit"]["drift"] < 0.01
    again = cli("estimate", demo_model, "--hardware", own, *grid, "--json").document
    assert again["hardware"]["fitted"] == "bench.json" and again["rows"] == found["rows"]
    for row, was in zip(again["rows"], told.document["rows"], strict=True):
        assert row["tokens_per_second"] == pytest.approx(was["tokens_per_second"], rel=0.02)
    text = cli("estimate", demo_model, *fitting, *grid).out
    assert "errors of the fit" in text and "for loads left out of it" in text


def test_the_largest_models_need_a_laptop(repo: Path, tmp_path: Path) -> None:
    source = sparse.write(golden("deepseek-v3"), tmp_path / "in")
    args = ("estimate", source, "--hardware", "h200x8", "--concurrency", "32,512", "--top-k", "4", "--json")
    code = "import sys; from expertcut.cli import run; code = run(sys.argv[1:]); " \
           "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"  # fmt: skip
    command = [sys.executable, "-c", code, *map(str, args)]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(repo)}, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "False\n")
    found = json.loads(ran.stdout)
    assert [row["fits"] for row in found["rows"]] == [True, True, False, False]
    assert 1100 < found["rows"][0]["tokens_per_second"] < 1300 and found["rows"][1]["gain"] > 0.1


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("--hardware", "h300"), 2, "h300: no such hardware and no such file; there are a100, a800"),
        (("--hardware", "h100x8", "--tp", 3), 2, "h100x8: tp 3 does not divide the 8 devices"),
        (("--hardware", "cpu", "--concurrency", "0"), 2, "--concurrency 0: expected whole numbers of 1 or more"),
        (("--hardware", "cpu", "--experts", "64"), 2, "64 of 32 experts with top-4"),
        (("--hardware", "cpu", "--experts", "3"), 2, "3 of 32 experts with top-4"),
        (("--hardware", "cpu", "--plan", "none.json"), 4, "none.json: no such file"),
        (("--hardware", "cpu", "--profile", "none"), 4, "none: no profile here"),
        (("--hardware", "cpu", "--fit", "none.json"), 4, "none.json: No such file or directory"),
    ],
)
def test_bad_input_is_refused(cli: Cli, demo_model: Path, args: tuple[object, ...], code: int, told: str) -> None:
    ran = cli("estimate", demo_model, *args)
    assert (ran.code, ran.out) == (code, "")
    assert told in ran.err


def test_plans_and_profiles_of_other_models_are_refused(
    cli: Cli, planned: Path, profiled: Path, tmp_path: Path
) -> None:
    source = sparse.write(golden("granite-3.1-1b"), tmp_path / "in")
    for option, path in (("--plan", planned), ("--profile", profiled)):
        ran = cli("estimate", source, "--hardware", "cpu", option, path)
        assert ran.code == 4 and "_demo_model, of another geometry" in ran.err
