"""Every command on the built-in model: what it prints, as JSON and as tables, and what it leaves on disk."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from tiny_models import tiny_model

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan
from expertcut.cli.common import WIDE, Output, console
from expertcut.cli.tables import ranges, steps, table

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)


def test_inspect(cli: Cli, demo_model: Path) -> None:
    found = cli("inspect", demo_model, "--json").document
    checkpoint = open_checkpoint(demo_model)
    assert found["model"] == str(demo_model)
    assert (found["family"], found["experts"], found["top_k"]) == ("qwen3_moe", 32, 4)
    assert found["moe_layers"] == [0, 1, 2, 3] and found["mtp_layers"] == []
    assert found["nbytes"] == checkpoint.nbytes == 2 * found["parameters"]
    one = 2 * (3 * 96 * 64 + 96)  # three matrices and a router row, in BF16
    assert found["nbytes_per_expert"] == 4 * one
    assert found["nbytes_experts"] == 32 * 4 * one
    assert found["activated"] == found["parameters"] - 28 * 4 * one // 2
    assert {finding["runtime"] for finding in found["lint"]} >= {"transformers", "vLLM", "llama.cpp", "mlx-lm"}
    text = cli("inspect", demo_model).out
    assert "qwen3_moe" in text and "5,826,752 bytes" in text and "2.91 million" in text


def test_inspect_says_what_fits(cli: Cli, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    fits = {found["runtime"]: found for found in cli("inspect", demo_model, "--json").document["fits"]}
    assert fits["vLLM"]["fast_experts"] == [4, 8, 16, 32]
    assert (fits["vLLM"]["tp"], fits["vLLM"]["ep"]) == ([1, 2, 4], [1, 2, 4, 8, 16, 32])
    assert fits["mlx-lm"]["fast_experts"] == list(range(4, 33)) and fits["mlx-lm"]["tp"] is None
    grouped = cli("inspect", tiny_model("deepseek_v3", tmp_path_factory))
    rows = {line.split()[0]: line for line in grouped.out.splitlines() if line}
    assert "6, 9, 12" in rows["vLLM"], "equal groups of two or more"
    assert "none" in rows["SGLang"]


def test_findings_name_their_source(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    args = ("plan", demo_model, "--strategy", "odd", "--experts", 24, "-o", tmp_path / "p.json")
    found = [f for f in cli(*args, "--json").document["lint"] if f["runtime"] == "vLLM"]
    assert {(f["rule"], f["source"], f["version"]) for f in found} == {
        ("top-k-kernel", "csrc/moe/topk_softmax_kernels.cu", "0.33"), ("tuned-config", "fused_moe/configs", "0.33")
    }  # fmt: skip
    assert "[csrc/moe/topk_softmax_kernels.cu]" in cli(*args).out


def test_profile_writes_what_it_says(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    args = ("profile", demo_model, "--calibration", "builtin,self", "--tokens", 1200, "--seq-len", 64, "--padded")
    ran = cli(*args, "--seed", 3, "--resident", "--pair-domains", "--moments", "-o", tmp_path / "p", "--json")
    found = ran.document
    assert found["tokens"] == sum(found["domains"].values())
    assert found["domains"]["self"] == 600
    meta = json.loads((tmp_path / "p/profile.json").read_text())
    assert (meta["pair_domains"], meta["moments"]) == (True, True)
    assert (meta["data"][0]["seed"], meta["data"][0]["packed"], meta["data"][0]["seq_len"]) == (3, False, 64)
    assert cli("profile", *args[1:], "--resident", "--force", "-o", tmp_path / "p", "--json").code == 0
    assert json.loads((tmp_path / "p/profile.json").read_text())["data"][0]["seed"] == 0


def test_the_models_limit_bounds_the_sequences(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    ran = cli("profile", demo_model, "--calibration", "builtin", "--tokens", 2000, "-o", tmp_path / "p", "--json")
    assert ran.document["seq_len"] == 1024
    assert "sequences of 1024 tokens, the model's limit" in ran.err


def test_too_little_text_is_a_warning(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A short text.\n")
    ran = cli("eval", demo_model, "--data", text, "--tokens", 1000, "--seq-len", 64, "--json")
    assert ran.document["tokens"] < 20
    assert ran.err.startswith(f"warning: {text}: short: only ")


def test_merge_adds_up(cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path) -> None:
    args = ("profile", demo_model, "--calibration", "builtin-heldout", "--tokens", 1000, "--seq-len", 128)
    other = cli(*args, "-o", tmp_path / "other", "--json").document
    found = cli("merge", profiled, tmp_path / "other", "-o", tmp_path / "sum", "--json").document
    assert found["tokens"] == 3000 + other["tokens"]
    assert found["domains"] == {
        name: count + json.loads((profiled / "profile.json").read_text())["data"][0]["tokens"][name]
        for name, count in other["domains"].items()
    }
    again = cli("merge", tmp_path / "sum", tmp_path / "other", "-o", tmp_path / "twice")
    assert again.code == 4 and "count twice" in again.err
    assert not (tmp_path / "twice").exists()


def test_show_profile(cli: Cli, profiled: Path) -> None:
    found = cli("show", profiled, "--domains", "--json").document
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    for layer in found["layers"]:
        assert layer["tokens"] == 3000
        assert 0 <= layer["dead"] < 28 and layer["busiest"] >= 1
        lost, error = layer["lost_mass"], layer["relative_error"]
        assert len(lost) == len(error) == 3
        assert lost == sorted(lost, reverse=True) and error == sorted(error, reverse=True)
    for number in range(4):
        per_domain = [layers[number]["tokens"] for layers in found["layers_by_domain"].values()]
        assert sum(per_domain) == 3000
    text = cli("show", profiled, "--domains").out
    assert text.count("gate weight lost") == 1 + len(found["domains"])


def test_show_plan(cli: Cli, planned: Path) -> None:
    found = cli("show", planned, "--json").document
    plan = Plan.load(planned)
    assert found["layers"]["model.layers.2.mlp"]["kept"] == list(plan.layers["model.layers.2.mlp"].kept)
    assert found["provenance"]["criterion"] == "reap"
    short, long = cli("show", planned).out, cli("show", planned, "-v").out
    kept = ranges(plan.layers["model.layers.2.mlp"].kept)
    assert kept in long and kept not in short


def test_plan_records_the_command_without_places(
    cli: Cli, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "with space.json"
    cli("plan", demo_model, "--strategy", "random", "--seed", 7, "--keep", "50%", "-o", out)
    plan = Plan.load(out)
    typed = "expertcut plan _demo_model --strategy random --seed 7 --keep 50% -o 'with space.json'"
    assert plan.provenance["command"] == typed
    assert plan.source.name == "_demo_model"
    assert plan.experts == 16
    monkeypatch.chdir(demo_model)
    assert cli("plan", ".", "--strategy", "random", "--keep=0.5", f"--out={out}").code == 0
    assert Plan.load(out).source.name == "_demo_model"
    assert Plan.load(out).provenance["command"] == (
        "expertcut plan . --strategy random --keep=0.5 '--out=with space.json'"
    )


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"), ("/home/me/models/m", "m"), ("/home/me/models/m/", "m"),
        ("../../me/m", "m"), ("~/m", "m"), ("runs/m", "runs/m"), ("--out=/home/me/p.json", "--out=p.json"),
        ("-o/home/me/p.json", "-op.json"), ("builtin,/home/me/a.txt", "builtin,a.txt"),
        ("--revision=refs/pr/3", "--revision=refs/pr/3"), ("1:0,5", "1:0,5"),
        ("/", "/"), ("--keep=50%", "--keep=50%"),
    ],
)  # fmt: skip
def test_recorded_arguments_tell_nothing_of_the_machine(typed: str, recorded: str) -> None:
    assert Output(["plan", typed]).command == shlex.join(["expertcut", "plan", recorded])


def test_a_pruned_checkpoint_tells_nothing_of_the_machine(pruned: Path, demo_model: Path) -> None:
    record = (pruned / "expertcut.json").read_text()
    assert json.loads(record)["source"] == json.loads(record)["plan"]["source"]["name"] == "_demo_model"
    assert str(demo_model.parent) not in record and str(pruned.parent) not in record


def test_plan_options_reach_the_plan(cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path) -> None:
    options = ["--strategy", "energy", "--profile", profiled, "--experts", 12, "--top-k", 2]
    more = ["--protect", "1:0,5", "--protect", "7", "--protect-super", "--domain-weights", "german=2,french=1"]
    found = cli("plan", demo_model, *options, *more, "-o", tmp_path / "p.json", "--json").document
    assert found["experts"] == {"before": 32, "after": 12}
    assert found["top_k"] == {"before": 4, "after": 2}
    assert found["nbytes"]["before"] - found["nbytes"]["after"] == 20 * 4 * 2 * (3 * 96 * 64 + 96)
    assert [(n["runtime"], n["below"], n["above"]) for n in found["nearest_fast"]] == [
        ("vLLM", 8, 16), ("SGLang", 8, 16)
    ]  # fmt: skip
    assert any(finding["status"] == "loads" for finding in found["lint"] if finding["runtime"] == "vLLM")
    plan = Plan.load(tmp_path / "p.json")
    assert {0, 5, 7} <= set(plan.layers["model.layers.1.mlp"].kept)
    assert all(7 in layer.kept for layer in plan.layers.values())
    assert plan.provenance["domain_weights"] == {"german": 2.0, "french": 1.0}
    for prefix, ids in found["super_experts"].items():
        assert set(ids) <= set(plan.layers[prefix].kept)


def test_fit_takes_the_largest_fast_count(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    args = ("plan", demo_model, "--strategy", "router-norm", "-o", tmp_path / "p.json", "--fit")
    found = cli(*args, "4MB", "--json").document
    assert found["experts"]["after"] == 16
    assert found["nearest_fast"] == []
    assert "keeping 16 of 32 experts" in found["note"]
    assert "keeping 16 of 32 experts" in cli(*args, "2MB", "--tp", 2).out
    assert cli(*args, "1MB").code == 4


def test_a_slow_count_is_taken_as_asked_with_a_hint(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    """One line per runtime: why, and the counts next to it; nothing where the count is fast or nothing is cut."""
    choice = ("--strategy", "odd", "--experts", 24)
    made = cli("plan", demo_model, *choice, "-o", tmp_path / "p.json", "--json")
    assert made.document["experts"]["after"] == 24
    vllm, sglang = made.err.splitlines()
    assert vllm.startswith("24 experts leave the fast path of vLLM: no fused top-k kernel for 24 experts")
    assert vllm.endswith("; nearest on it: 16 and 32")
    assert sglang.startswith("24 experts leave the fast path of SGLang: ")
    assert cli("prune", demo_model, tmp_path / "out", *choice, "--dry-run", "--json").err == made.err
    told = cli("prune", demo_model, tmp_path / "out", "--plan", tmp_path / "p.json", "--dry-run", "--json")
    assert told.err == "" and told.document["nearest_fast"] == made.document["nearest_fast"]
    for experts in (16, 32):
        args = ("plan", demo_model, "--strategy", "odd", "--experts", experts, "-o", tmp_path / "q.json")
        assert cli(*args).err == ""


def test_dry_run_tells_exactly_what_is_written_then(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("prune", demo_model, out, "--plan", planned, "--max-shard-size", "1MB")
    told = cli(*args, "--dry-run", "--json").document
    assert list(tmp_path.iterdir()) == []
    done = cli(*args, "--json").document
    assert told["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert told["bytes_to_write"] == sum(told["files"].values())
    assert told["config"] == [{"key": "num_experts", "old": 32, "new": 16}]
    assert told["experts"] == done["experts"] and told["nbytes"] == done["nbytes"]
    assert done["nbytes_after"] == done["nbytes"]["after"] == open_checkpoint(out).nbytes
    assert all(check["ok"] for check in done["checks"]) and len(done["checks"]) > 5


def test_prune_without_a_plan_file(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    args = ("prune", demo_model, tmp_path / "out", "--strategy", "last", "--drop", 24)
    found = cli(*args, "--no-verify", "--json").document
    assert found["experts"]["after"] == 8 and found["checks"] == []
    assert cli(*args).code == 1
    assert cli(*args, "--force").code == 0
    record = json.loads((tmp_path / "out/expertcut.json").read_text())
    assert record["plan"]["layers"]["model.layers.0.mlp"]["kept"] == list(range(24, 32))


def test_verify(cli: Cli, demo_model: Path, pruned: Path) -> None:
    alone = cli("verify", pruned, "--json")
    assert alone.code == 0
    found = cli("verify", pruned, "--source", demo_model, "--numeric", "--tokens", 300, "--json").document
    assert set(found) == {"ok", "checks"} and found["ok"] is True
    assert all(set(check) == {"name", "ok", "detail"} for check in found["checks"])
    names = [check["name"] for check in found["checks"]]
    assert found["checks"][0]["detail"].endswith(" tensors in 1 shard; headers, files and index agree")
    assert len(alone.document["checks"]) < len(names)
    assert "tensor bytes" in names and any(name.startswith("numeric: logits equal") for name in names)


def test_verify_finds_a_changed_byte(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("prune", demo_model, out, "--plan", planned).code == 0
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    ran = cli("verify", out, "--source", demo_model, "--numeric", "--json")
    assert ran.code == 5
    assert ran.document["ok"] is False
    assert [check["name"] for check in ran.document["checks"] if not check["ok"]] == ["tensor bytes"]
    text = cli("verify", out, "--source", demo_model).out
    assert "FAILED" in text and "tensor bytes" in text


def test_verify_reports_a_checkpoint_that_does_not_open(cli: Cli, tmp_path: Path) -> None:
    ran = cli("verify", tmp_path, "--json")
    assert ran.code == 5
    assert [check["name"] for check in ran.document["checks"]] == ["opens"]


def test_eval(cli: Cli, demo_model: Path, planned: Path, pruned: Path) -> None:
    args = ("--data", "builtin-heldout", "--tokens", 1500, "--seq-len", 128)
    found = cli("eval", demo_model, "--plan", planned, *args, "--json").document
    base, half = found["results"]
    assert (base["name"], half["name"]) == ("base", str(planned))
    assert base["overall"]["change"]["value"] == 0 < half["overall"]["change"]["low"]
    assert half["overall"]["change"]["value"] == pytest.approx(half["overall"]["nll"] - base["overall"]["nll"])
    assert set(base["domains"]) == {"prose", "documentation", "german", "french", "python", "arithmetic"}
    tokens = sum(domain["tokens"] for domain in half["domains"].values())
    mean = sum(domain["tokens"] * domain["nll"] for domain in half["domains"].values()) / tokens
    assert half["overall"]["tokens"] == tokens
    assert half["overall"]["nll"] == pytest.approx(mean)
    (written,) = cli("eval", pruned, *args, "--json").document["results"]
    assert written["overall"]["nll"] == half["overall"]["nll"]
    text = cli("eval", demo_model, "--plan", planned, *args).out
    assert f"{half['overall']['nll']:.4f}" in text and f"{half['overall']['change']['value']:+.4f}" in text


def test_tables_are_not_cut_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * (WIDE // 3)
    console(sys.stdout).print(table(("name", ">bytes"), [(long, "1,234,567")]))
    lines = capsys.readouterr().out.splitlines()
    assert any(long in line and "1,234,567" in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_steps() -> None:
    assert steps(()) == ""
    assert steps((4, 8, 16, 32)) == "4, 8, 16, 32"
    assert steps((4, 5, 6, 7, 8)) == "4-8"
    assert steps((1, 2, 4, 16, 24, 32, 40, 128)) == "1, 2, 4, 16, 24 … 40, 128"
    assert steps((6, 9, 12)) == "6, 9, 12"


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal: bool) -> None:
    printed = io.StringIO()
    out = Output(())
    out._stderr = Console(file=printed, force_terminal=terminal, width=100)
    with out.progress("writing", lambda speed: f"{speed:.0f} B/s", 10) as advance, out.busy("checking"):
        for done in range(1, 6):
            advance(done, 5)
    assert ("writing" in printed.getvalue() and "100%" in printed.getvalue()) is terminal
