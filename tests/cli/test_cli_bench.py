"""`bench` from the command line: by URL, with a stand-in for vLLM, in transformers; what is kept when it breaks off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from completions_server import FAULTS, Server
from fake_vllm import FakeVllm

from expertcut.measure import load
from expertcut.measure.bench import load_bench

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line", "completions_fixture")

Serve = Callable[..., Server]
SMALL = ("--concurrency", "2,4", "--input-len", 6, "--output-len", 4, "--rounds", 2)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    made = FakeVllm(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(made.site))
    return made


def test_two_servers_take_turns(
    cli: Cli, serve: Serve, demo_model: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    first, second = serve(), serve()
    second.models = [pruned.name]
    out = tmp_path / "load"
    engines = ("--engine", first.url, "--engine", second.url)
    ran = cli("bench", demo_model, pruned, *engines, *SMALL, "-o", out, "--json")
    found = load_bench(out)
    assert found.complete and found.machine is None and found.engine == f"{first.url}, {second.url}"
    assert ran.document["rows"] == json.loads((out / "bench.json").read_text())["rows"]
    assert [(r.variant, r.experts, r.top_k, r.concurrency) for r in found.rows] == [
        ("_demo_model", 32, 4, 2), ("_demo_model", 32, 4, 4), ("pruned", 16, 4, 2), ("pruned", 16, 4, 4)
    ]  # fmt: skip
    assert all(row.rounds == (1, 2) and row.memory is None and not row.counted for row in found.rows)
    assert all((row.ratio is None) == (row.variant == "_demo_model") for row in found.rows)
    assert [len(r["prompt"]) for r in first.asked] == [6] * 3 * (4 + 4), "a warm-up and two rounds, of 4 each"
    assert sorted(r["prompt"] for r in first.asked) == sorted(r["prompt"] for r in second.asked)
    assert first.keys[0] == "Bearer sk-very-secret"
    text = "".join(path.read_text() for path in out.glob("bench.[jc]s*")) + ran.out + ran.err
    assert "secret" not in text and str(tmp_path) not in (out / "bench.json").read_text()
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG") and (out / "bench.csv").exists()


@pytest.mark.parametrize("kind", ["error", "stall", "reset", "garbage", "short"])
def test_what_was_measured_before_a_fault_is_kept(
    kind: str, cli: Cli, serve: Serve, demo_model: Path, tmp_path: Path
) -> None:
    server = serve(*["good"] * (8 + 4 + 4 + 4), kind)
    ran = cli("bench", demo_model, "--engine", server.url, *SMALL, "--timeout", 1, "-o", tmp_path / "load", "--json")
    assert (ran.code, ran.out) == (6, "")
    note, error, hint = ran.err.splitlines()
    assert note == f"kept: 3 runs in {tmp_path / 'load/bench.json'}, marked as incomplete"
    assert error.startswith(f"error: {server.url}: ") and FAULTS[kind] in error and hint.startswith("hint: ")
    found = load_bench(tmp_path / "load")
    assert not found.complete and [row.rounds for row in found.rows] == [(1, 2), (1,)]


def test_a_server_that_does_not_count_is_a_warning(cli: Cli, serve: Serve, demo_model: Path, tmp_path: Path) -> None:
    ran = cli("bench", demo_model, "--engine", serve("uncounted").url, *SMALL, "-o", tmp_path / "load")
    assert ran.code == 0 and "pieces of its streams were counted" in ran.err
    assert load_bench(tmp_path / "load").rows[0].counted


def test_given_prompts_are_tokenised_here(cli: Cli, serve: Serve, demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("12 + 35 =\nThe history of the city\n")
    server = serve()
    args = ("--engine", server.url, "--prompts", tmp_path / "p.txt", "--concurrency", 2, "--output-len", 4)
    assert cli("bench", demo_model, *args, "--rounds", 1, "-o", tmp_path / "load").code == 0
    found = load_bench(tmp_path / "load")
    lengths = [len(request["prompt"]) for request in server.asked]
    assert found.prompts == "p.txt" and found.rows[0].input_len == round(sum(lengths) / len(lengths))
    assert found.rows[0].total_tokens_per_s == pytest.approx(
        found.rows[0].tokens_per_s * (1 + sum(lengths[-2:]) / (2 * 4))
    )


def test_vllm_is_started_for_every_variant(cli: Cli, fake: FakeVllm, demo_model: Path, tmp_path: Path) -> None:
    ran = cli(
        "bench", demo_model, "--top-k", "4,2", "--python", sys.executable, "--engine-args", "--dtype 'float32'", *SMALL,
        "--at-once", 2, "-o", tmp_path / "load",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    base, lower = map(json.loads, fake.calls)
    assert "--hf-overrides" not in base and base[-2:] == lower[-2:] == ["--dtype", "float32"]
    assert json.loads(lower[lower.index("--hf-overrides") + 1]) == {"num_experts_per_tok": 2}
    assert base[base.index("--max-model-len") + 1] == "10" and "--skip-tokenizer-init" not in base
    found = load_bench(tmp_path / "load")
    assert found.engine == "vllm-fake 9.9" and found.machine is not None
    assert [(row.variant, row.top_k) for row in found.rows][::2] == [
        ("_demo_model, top-4", 4),
        ("_demo_model, top-2", 2),
    ]
    assert all(row.memory is not None and row.memory > 1 << 20 for row in found.rows)
    assert fake.alive == []


def test_an_interruption_keeps_what_there_is_and_leaves_no_server(
    fake: FakeVllm, demo_model: Path, tmp_path: Path, repo: Path
) -> None:
    out, script = tmp_path / "load", ",".join(["good"] * (8 + 4) + ["stall"])
    path = os.pathsep.join((str(repo), str(fake.site)))
    command = [sys.executable, "-m", "expertcut", "bench", demo_model, "--python", sys.executable, *SMALL, "-o", out]
    process = subprocess.Popen(
        list(map(str, command)), env=os.environ | {"PYTHONPATH": path, "SCRIPT": script}, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not (out / "bench.json").exists():
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, printed) == (130, ""), said
    assert "kept: 1 runs" in said and "error: interrupted" in said
    assert not load_bench(out).complete and len(load_bench(out).rows) == 1
    assert fake.alive == []


def test_transformers_as_a_floor(cli: Cli, demo_model: Path, pruned: Path, tmp_path: Path) -> None:
    args = ("--engine", "transformers", "--top-k", "4,2", *SMALL, "-o", tmp_path / "load", "--json")
    rows = cli("bench", demo_model, pruned, *args).document["rows"]
    assert len({row["variant"] for row in rows}) == 4
    assert all(row["requests"] == 2 * row["concurrency"] * -(-4 // row["concurrency"]) for row in rows)
    assert all(row["memory"] > 1 << 20 for row in rows)
    assert all(row["ttft"] > 0 and row["tpot"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--engine", "sglang"], "engine sglang: expected vllm, transformers or URLs"),
        (["--engine", "vllm", "--engine", "transformers"], "expected vllm, transformers or URLs"),
        (["--engine", "http://a/v1", "--engine", "http://b/v1"], "found 2 engines for 1 DIRs"),
        (["--engine", "http://a/v1", "--top-k", "2"], "--top-k has no effect"),
        (["--engine", "http://a/v1", "--at-once", "2"], "--at-once has no effect"),
        (["--engine", "http://a/v1", "--engine-args", "--x"], "--engine-args has an effect with --engine vllm only"),
        (["--engine", "transformers", "--python", "x"], "--python has an effect with --engine vllm only"),
        (["--concurrency", "1,x"], "--concurrency 1,x: expected whole numbers"),
        (["--top-k", "33"], "--top-k 33 exceeds the 32 experts"),
        (["--input-len", "1000", "--output-len", "64"], "take 1064 tokens, but the model has 1024 positions"),
        (["--input-len", "8", "--prompts", "p.txt"], "--input-len is for random ones"),
        (["--python", sys.executable, "--engine-args=--port 1"], "--port is set by bench itself"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    ran = cli("bench", demo_model, *options, "-o", tmp_path / "load")
    assert (ran.code, ran.out) == (2, "") and what in ran.err
    assert not (tmp_path / "load").exists()


def test_engines_that_are_not_there(
    cli: Cli, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "BACKOFF", ())
    for options, what in (
        ((), "vLLM is not installed in this environment"),
        (("--engine", "http://127.0.0.1:1/v1"), "no list of models: cannot connect: Connection refused"),
    ):
        ran = cli("bench", demo_model, *options, "-o", tmp_path / "load")
        assert ran.code == 6 and what in ran.err
    assert not (tmp_path / "load").exists()
