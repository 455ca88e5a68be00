"""`eval --tasks`: options that go together, verdicts in words, the table and the JSON, and a source from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from expertcut.cli.common import console
from expertcut.cli.scored import record, table, verdicts
from expertcut.measure.scores import Metric, Run

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)

ARITHMETIC = ("--tasks", "expertcut_arithmetic", "--limit", 60)


def made(model: str, values: tuple[float, ...], better: bool | None = True, value: float | None = None) -> Run:
    """A run with one metric, a mean of values or else a plain value."""
    figure = sum(values) / len(values) if values else value
    metric = Metric(task="sums", metric="acc", higher_is_better=better, value=figure, values=values or None)
    documents = {"sums": tuple(map(str, range(len(values) or 9)))}
    return Run(model=model, engine="none", asked=("sums",), documents=documents, metrics=(metric,))


def said(base: Run, other: Run) -> str:
    (line,) = verdicts([base, other])
    return line.removeprefix("other: sums, acc: ")


HALF, LESS = (1.0, 0.0) * 50, (1.0, 0.0, 0.0, 0.0) * 25


def test_what_is_worse_is_said_in_points() -> None:
    line = said(made("base", HALF), made("other", LESS))
    assert line.startswith("worse by 25.0 points (") and line.endswith(", 95%)")
    low, high = (float(end) for end in line.partition("(")[2].partition(",")[0].split(" to "))
    assert 15 < low < 25 < high < 35
    assert said(made("base", LESS), made("other", HALF)).startswith("better by 25.0 points (")


@pytest.mark.parametrize("better, word", [(True, "worse"), (False, "better"), (None, "lower")])
def test_the_task_says_what_is_better(better: bool | None, word: str) -> None:
    assert said(made("base", HALF, better), made("other", LESS, better)).startswith(f"{word} by ")


def test_other_units_other_words() -> None:
    seconds = tuple(value * 7 for value in HALF)
    assert said(made("base", seconds), made("other", HALF)).startswith("worse by 3.0000 (")
    assert said(made("base", HALF), made("other", HALF)) == "no difference in any document"
    swapped = (0.0, 1.0, *HALF[2:])
    assert said(made("base", HALF), made("other", swapped)).startswith("no significant difference (-")
    assert said(made("base", (1.0,) * 4), made("other", (0.0,) * 4)) == (
        "worse by 100.0 points; no interval: 4 documents, 5 or more are needed"
    )


def test_what_is_no_mean_has_a_value_only() -> None:
    base, other = made("base", (), False, 12.5), made("other", (), False, 13.0)
    assert said(base, other) == "worse by 0.5000; no interval: the metric is no mean over documents"
    assert said(base, made("other", (), False, None)) == "not finite: try --dtype float32"


def test_the_record_holds_runs_and_comparisons() -> None:
    base, other = made("base", HALF), made("other", LESS)
    document = record([base, other], 100)
    assert [Run.model_validate(run) for run in json.loads(json.dumps(document["runs"]))] == [base, other]
    (comparison,) = document["comparisons"]
    assert comparison["name"] == "other" and comparison["change"]["value"] == -0.25
    assert f"other: sums, acc: {comparison['verdict']}" in verdicts([base, other])
    assert record([base], None)["comparisons"] == []


def test_the_table_has_a_line_for_every_model(capsys: pytest.CaptureFixture[str]) -> None:

    console(sys.stdout).print(table([made("base", HALF), made("other", LESS)]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["task", "metric", "model", "documents", "value", "change"]
    assert lines[2][:5] == ["sums", "acc", "base", "100", "50.0%"] and len(lines[2]) == 8
    assert lines[3][:5] == ["sums", "acc", "other", "100", "25.0%"] and lines[3][8] == "-25.0"


def test_plans_by_text_and_tasks_in_one_call(cli: Cli, demo_model: Path, planned: Path) -> None:
    given = ("eval", demo_model, "--plan", planned, *ARITHMETIC, "--micro-tokens", 512)
    text = ("--data", "builtin-heldout", "--tokens", 1500, "--seq-len", 128)
    both = cli(*given, *text, "--json").document
    assert both["tokens"] and both["results"][1]["name"] == str(planned)
    base, half = both["tasks"]["runs"]
    assert (base["model"], half["model"]) == ("base", str(planned)) and base["engine"].startswith("stream, lm-eval ")
    assert len(base["documents"]["expertcut_arithmetic"]) == both["tasks"]["limit"] == 60
    alone = cli(*given)
    assert alone.code == 0 and "loss: nats" not in alone.out
    (comparison,) = both["tasks"]["comparisons"]
    assert f"{planned}: expertcut_arithmetic, acc: {comparison['verdict']}" in alone.out
    assert comparison["verdict"].startswith("worse by ") and "points" in comparison["verdict"]
    assert "it/s" not in alone.err  # bars of libraries


def test_a_written_checkpoint_beside_its_source(
    cli: Cli, demo_model: Path, planned: Path, pruned: Path, tmp_path: Path
) -> None:
    """The plan's figures; the source may be what an earlier call printed for it, by another engine."""
    before = cli("eval", demo_model, "--plan", planned, *ARITHMETIC, "--json").document["tasks"]
    after = cli("eval", pruned, "--source", demo_model, *ARITHMETIC, "--json").document["tasks"]
    assert [run["metrics"] for run in after["runs"]] == [run["metrics"] for run in before["runs"]]
    assert after["runs"][1]["model"] == str(pruned)
    file = tmp_path / "source.json"
    file.write_text(cli("eval", demo_model, *ARITHMETIC, "--json").out)
    again = cli("eval", pruned, "--source", file, *ARITHMETIC, "--engine", "transformers", "--json").document["tasks"]
    assert again["comparisons"][0]["change"] == after["comparisons"][0]["change"]
    assert again["runs"][1]["engine"].startswith("transformers, ")
    other = cli("eval", pruned, "--source", file, "--tasks", "expertcut_arithmetic", "--limit", 50)
    assert other.code == 4 and "found 50, expected 60" in other.err and not other.out


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "neither --data nor --tasks"),
        (("--data", "builtin-heldout", "--limit", 3), "no --tasks"),
        (("--data", "builtin-heldout", "--engine", "vllm"), "no --tasks"),
        (("--tokens", 100, *ARITHMETIC), "--data only"),
        ((*ARITHMETIC, "--engine", "sglang"), "engine 'sglang' is unknown"),
        ((*ARITHMETIC, "--limit", 0), "--limit"),
        ((*ARITHMETIC, "--engine", "http://localhost:1", "--source", "OTHER"), "takes a file"),
        (("--tasks", "expertcut_arithmetic_generate"), "wants text written"),
        (
            (*ARITHMETIC, "--engine", "transformers", "--micro-tokens", 9),
            "--micro-tokens has no effect with --engine trans",
        ),
        (
            (*ARITHMETIC, "--engine", "http://localhost:1", "--dtype", "float32"),
            "--dtype has no effect with --engine http",
        ),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(
    args: tuple[object, ...], message: str, cli: Cli, demo_model: Path
) -> None:
    ran = cli("eval", demo_model, *args)
    assert ran.code == 2 and message in ran.err and not ran.out


def test_plans_need_the_streamed_engine_and_have_their_base(cli: Cli, demo_model: Path, planned: Path) -> None:
    plan = ("eval", demo_model, "--plan", planned, *ARITHMETIC)
    assert "runs written checkpoints, no plans" in cli(*plan, "--engine", "transformers").err
    assert "give one of them" in cli(*plan, "--source", demo_model).err


def test_engines_that_are_not_there(cli: Cli, demo_model: Path) -> None:
    ran = cli("eval", demo_model, *ARITHMETIC, "--engine", "vllm")
    assert ran.code == 6 and "vLLM is not installed" in ran.err and "http://" in ran.err
    ran = cli("eval", demo_model, *ARITHMETIC, "--engine", "http://127.0.0.1:9")
    assert ran.code == 6 and "no list of models" in ran.err
