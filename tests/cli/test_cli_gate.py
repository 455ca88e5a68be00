"""Limits and held-out text from the command line: what is refused, what is written, what would help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from expertcut.calibrate.profile import TEXT, Profile
from expertcut.choose import Plan

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)

DATA = ("--data", "builtin-heldout", "--tokens", 6000, "--seq-len", 128)
BAD = ("--strategy", "random", "--experts", 8)


def test_a_bad_plan_is_stopped_and_nothing_is_written(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    gates = ("--gate", "nll<=10%", "--gate", "kl<=9", "--gate", "agreement>=0.9@each")
    ran = cli("prune", demo_model, tmp_path / "out", *BAD, *gates, *DATA)
    assert (ran.code, ran.out) == (5, "")
    assert list(tmp_path.iterdir()) == []
    error, hint = ran.err.splitlines()[-2:]
    assert error.startswith("error: the plan: nothing is written, the gate fails: nll<=10%: up to ")
    for domain in ("prose", "documentation", "german", "french", "python", "arithmetic"):
        assert f"agreement>=0.9@{'each'} in {domain}: down to 0." in error
    assert "too little" in error and "too much" in error and "kl<=9" not in error
    assert hint == "hint: even 29 of 32 experts fail: try another --strategy (tried: 11, 14, 17, 20, 23, 26, 29)"


def test_a_good_plan_passes_and_the_record_says_by_what(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert cli("plan", demo_model, "--top-k", 3, "-o", plan).code == 0
    args = ("prune", demo_model, out, "--plan", plan, "--gate", "ppl<=5%", "--gate", "acceptance>=0.8", *DATA)
    told = cli(*args, "--dry-run", "--json").document
    assert not out.exists()
    ran = cli(*args, "--json")
    assert ran.document["gate"] == told["gate"]
    growth, acceptance = ran.document["gate"]
    assert growth["limit"] == "ppl<=5%" and growth["ok"] and 0 < growth["value"] < growth["bound"] < 0.05
    assert acceptance["bound"] == acceptance["low"] < acceptance["value"]
    (found,) = cli("eval", demo_model, "--plan", plan, *DATA, "--json").document["results"][1:]
    assert found["overall"]["acceptance"]["low"] == acceptance["low"]
    assert (out / "expertcut.json").exists()
    assert f"ppl<=5%: up to {growth['bound']:.2%} over the base" in cli(*args, "--force").out


def test_what_would_pass_is_found_in_the_plans_own_way(
    cli: Cli, demo_model: Path, profiled: Path, planned: Path, tmp_path: Path
) -> None:
    """From a plan file with its profile, and from the options that make the same plan."""
    gate = ("--gate", "nll<=8%", *DATA)
    with_file = cli("prune", demo_model, tmp_path / "out", "--plan", planned, "--profile", profiled, *gate)
    options = ("--profile", profiled, "--strategy", "reap", "--experts", 16)
    with_options = cli("prune", demo_model, tmp_path / "out", *options, *gate)
    assert with_file.code == with_options.code == 5
    hint = with_file.err.splitlines()[-1]
    assert hint == with_options.err.splitlines()[-1]
    assert hint.endswith("(tried: 18, 20, 22, 24, 26, 28, 30)")
    experts = int(hint.partition("--experts ")[2].partition(",")[0])
    passing = cli("prune", demo_model, tmp_path / "out", *options[:-1], experts, *gate)
    assert passing.code == 0
    alone = cli("prune", demo_model, tmp_path / "other", "--plan", planned, *gate)
    assert alone.code == 5 and "nothing else was tried: the plan was made with a profile; add --profile" in alone.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--data", "builtin-heldout"), "no --gate"),
        (("--device", "cpu"), "no --gate"),
        (("--gate", "nll<=1%"), "--gate needs --data"),
        (("--gate", "loss<=1%", *DATA), "unknown metric"),
        (("--gate", "nll<=1%@greek", *DATA), "no domain 'greek'"),
    ],
)
def test_gates_that_make_no_sense(
    options: tuple[object, ...], what: str, cli: Cli, demo_model: Path, tmp_path: Path
) -> None:
    ran = cli("prune", demo_model, tmp_path / "out", *BAD, *options)
    assert (ran.code, ran.out) == (2, "") and what in ran.err
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_no_judge(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    few = ("--data", "builtin-heldout", "--tokens", 1000, "--seq-len", 128)
    ran = cli("prune", demo_model, tmp_path / "out", *BAD, "--gate", "nll<=1%@each", *few)
    assert ran.code == 4 and "domain prose has 2 sequences, expected 5 or more" in ran.err


def test_an_existing_destination_is_refused_before_the_text_is_read(
    cli: Cli, demo_model: Path, pruned: Path
) -> None:  # fmt: skip
    ran = cli("prune", demo_model, pruned, *BAD, "--gate", "nll<=1%", "--data", "no-such-recipe")
    assert ran.code == 1 and "exists" in ran.err


def test_text_that_a_plan_was_calibrated_on_is_refused(
    cli: Cli, demo_model: Path, planned: Path, pruned: Path, tmp_path: Path
) -> None:
    """In any packing, by the plan alone, for the checkpoint that was made by it, and by the gate."""
    seen = ("--data", "builtin", "--tokens", 3000, "--seq-len", 200)
    gate = ("prune", demo_model, tmp_path / "out", "--plan", planned, "--gate", "kl<=9")
    for args in (("eval", demo_model, "--plan", planned), ("eval", pruned), gate):
        ran = cli(*args, *seen)
        assert (ran.code, ran.out) == (4, "")
        assert "of the held-out domain prose (builtin) is in the calibration text of" in ran.err
    assert cli("eval", demo_model, *seen).code == 0
    assert cli("eval", demo_model, "--plan", planned, *DATA).err == ""


def test_plans_without_a_record_of_their_text(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    plan = Plan.load(planned)
    assert isinstance(plan.provenance["calibration_text"], str)
    for text, code, words in ((None, 0, "overlap cannot be checked"), ("t:16:###", 4, "calibration_text is damaged")):
        provenance = plan.provenance | {"calibration_text": text}
        plan.model_copy(update={"provenance": provenance}).save(tmp_path / "plan.json")
        ran = cli("eval", demo_model, "--plan", tmp_path / "plan.json", *DATA)
        assert ran.code == code and words in ran.err


def test_a_profile_keeps_the_sketch_of_its_text_through_merging(
    cli: Cli, demo_model: Path, profiled: Path, planned: Path, tmp_path: Path
) -> None:
    args = ("profile", demo_model, "--calibration", "builtin-heldout", "--tokens", 1000, "--seq-len", 128)
    assert cli(*args, "-o", tmp_path / "other").code == 0
    assert cli("merge", profiled, tmp_path / "other", "-o", tmp_path / "both").code == 0
    parts = [set(Profile.load(path).arrays[TEXT].tolist()) for path in (profiled, tmp_path / "other")]
    assert set(Profile.load(tmp_path / "both").arrays[TEXT].tolist()) == parts[0] | parts[1] and all(parts)
    sketch = Profile.load(profiled).sketch
    assert sketch is not None and Plan.load(planned).provenance["calibration_text"] == str(sketch)
    assert "calibration_text" not in cli("show", planned).out, "it is for commands to read"
    assert json.dumps(str(sketch)) in cli("show", planned, "--json").out


def test_an_early_profile_without_a_sketch_still_serves(
    cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path
) -> None:
    early = Profile.load(profiled)
    Profile(early.meta, {name: early.arrays[name] for name in early.arrays if name != TEXT}).save(tmp_path / "early")
    args = ("--profile", tmp_path / "early", "--strategy", "reap", "--experts", 16, "-o", tmp_path / "plan.json")
    assert cli("plan", demo_model, *args).code == 0
    assert Plan.load(tmp_path / "plan.json").provenance.get("calibration_text") is None
    assert cli("merge", tmp_path / "early", profiled, "-o", tmp_path / "both").code == 4  # the same data
    more = ("profile", demo_model, "--calibration", "builtin-heldout", "--tokens", 1000, "--seq-len", 128)
    assert cli(*more, "-o", tmp_path / "other").code == 0
    assert cli("merge", tmp_path / "early", tmp_path / "other", "-o", tmp_path / "both").code == 0
    assert Profile.load(tmp_path / "both").sketch is None


def test_the_best_of_all_criteria_and_what_evolves_from_them(
    cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    ran = cli(
        "plan", demo_model, "--profile", profiled, "--strategy", "auto", "--keep", 0.5, *DATA, "--evolve", 1, "-o",
        plan, "--json",
    )  # fmt: skip
    found = ran.document["searched"]
    tried = {one["name"]: one["loss"] for one in found["candidates"]}
    assert {"reap", "energy", "hope", "gram", "aimer"} <= tried.keys() and "random" not in tried
    assert "mone is left out" in ran.err
    assert found["chosen"] == min(tried, key=lambda name: tried[name])
    assert any(name.startswith("generation 1") for name in tried)
    report = {one["name"]: one["value"] for one in found["report"]}
    assert report[found["chosen"]] < min(value for name, value in report.items() if name.startswith("random"))
    assert {len(entry.kept) for entry in Plan.load(plan).layers.values()} == {16}
    assert "was chosen by how it does on" in cli("eval", demo_model, "--plan", plan, *DATA).err


def test_a_budget_spread_over_the_layers(cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    options = ("--strategy", "energy", "--keep", 0.5, "--budget", "global", "--per-layer", "--floor", 10)
    ran = cli("plan", demo_model, "--profile", profiled, *options, *DATA, "-o", plan, "--json")
    made = Plan.load(plan)
    kept = [len(entry.kept) for entry in made.layers.values()]
    assert sum(kept) <= 4 * 16 and min(kept) >= 10 and len(set(kept)) > 1
    tried = {one["name"]: one["loss"] for one in ran.document["searched"]["candidates"]}
    assert tried["energy, spread over the layers"] < tried["energy"]
    facts = json.loads(plan.read_text())["provenance"]
    assert facts["criterion"] == "energy" and facts["spread"]["floor"] == 10 and facts["spread"]["ceiling"] == 32
    assert "differ" in json.dumps(ran.document["lint"]), "stock runtimes refuse it, and the lint says so"
    assert cli("prune", demo_model, tmp_path / "out", "--plan", plan).code == 0
    failed = cli("prune", demo_model, tmp_path / "no", "--plan", plan, "--gate", "nll<=0.01%", *DATA)
    assert failed.code == 5 and "the plan's layers keep different numbers of experts" in failed.err


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--strategy", "odd", "--keep", "0.5", "--budget", "global"], "--budget global needs --data"),
        (["--strategy", "odd", "--keep", "0.5", "--budget", "global", *DATA], "say so with --per-layer"),
        (["--strategy", "odd", "--keep", "0.5", "--budget", "local", *DATA], "--budget local: unknown; known: uniform"),
        (["--strategy", "odd", "--keep", "0.5", "--floor", "8"], "--floor and --ceiling have an effect with --budget"),
        (["--budget", "global", "--top-k", "2", *DATA], "--budget global needs --strategy"),
        (
            ["--strategy", "odd", "--keep", "0.5", "--budget", "global", "--per-layer", "--floor", "20", *DATA],
            "--floor 20",
        ),
        (["--strategy", "auto", "--keep", "0.5"], "--strategy auto needs --data"),
        (["--strategy", "auto", "--keep", "0.5", *DATA], "--strategy auto needs --profile"),
        (["--strategy", "odd", "--keep", "0.5", "--evolve", "2"], "--evolve needs --data"),
        (["--top-k", "2", "--evolve", "2", *DATA], "--evolve needs --strategy"),
        (["--strategy", "odd", "--keep", "0.5", "--by", "kl"], "--by has an effect with --strategy auto, --evolve and"),
        (["--strategy", "odd", "--keep", "0.5", "--evolve", "1", "--by", "time", *DATA], "--by time: unknown"),
    ],
)
def test_searches_that_cannot_be(options: list[str], what: str, cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    ran = cli("plan", demo_model, *options, "-o", tmp_path / "plan.json")
    assert what in ran.err and ran.code == 2
    assert not (tmp_path / "plan.json").exists()
