"""`heal` and `prune --heal`: what they print, write, remember and refuse; what card, report and `show` make of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import tiny_model

from expertcut.choose.plan import Plan
from expertcut.cli import run
from expertcut.measure.heal_record import HealRecord
from expertcut.rewrite.record import Record

if TYPE_CHECKING:
    from command_line import Cli, Ran

pytest_plugins = ("command_line",)
TEXT = ("--calibration", "builtin", "--tokens", 4000, "--seq-len", 128)


@pytest.fixture(scope="module")
def healed(demo_model: Path, planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of half of the built-in model's experts, healed. Read only."""
    out = tmp_path_factory.mktemp("heal") / "healed.json"
    args = ("heal", demo_model, "--plan", planned, *TEXT, "-o", out)
    assert run([str(arg) for arg in args]) == 0
    return out


@pytest.fixture(scope="module")
def written(demo_model: Path, healed: Path) -> Path:
    """The checkpoint of that plan. Read only."""
    out = healed.parent / "out"
    assert run([str(arg) for arg in ("prune", demo_model, out, "--plan", healed)]) == 0
    return out


def record_of(path: Path) -> HealRecord:
    found = HealRecord.of_plan(Plan.load(path))
    assert found is not None
    return found


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def cut_short(cli: Cli, monkeypatch: pytest.MonkeyPatch, *args: object) -> Ran:
    """A `prune` that is interrupted when its plan is healed and it begins to write."""
    with monkeypatch.context() as patch:
        patch.setattr("expertcut.cli.prune._prune", interrupted)
        ran = cli(*args)
    assert ran.code == 130
    return ran


def test_a_healed_plan_says_what_was_done(planned: Path, healed: Path) -> None:
    plan, before, record = Plan.load(healed), Plan.load(planned), record_of(healed)
    assert plan.layers == before.layers and plan.deltas is not None
    assert plan.provenance["command"] == before.provenance["command"] != record.command
    assert record.command.startswith("expertcut heal _demo_model --plan half.json --calibration builtin")
    assert record.helped and record.best.layers == len(record.layers) == 4 and not record.distilled
    assert record.best.beside.sign < 0 and record.tried[0].beside.value == 0
    assert record.best.change.value == pytest.approx(record.tried[0].change.value + record.best.beside.value)
    assert [one.layers for one in record.tried][:5] == [0, 1, 2, 3, 4]
    assert len(record.domains) == 6 and record.harmed == []
    assert record.tokens > record.judged_tokens > 0 and record.tokens + record.judged_tokens <= 4000
    assert files(healed.parent) >= {"healed.json", "healed.deltas.safetensors"}


def test_its_checkpoint_is_an_ordinary_one(cli: Cli, demo_model: Path, written: Path, healed: Path) -> None:
    document = cli("verify", written, "--source", demo_model, "--numeric", "--json").document
    assert all(check["ok"] for check in document["checks"])
    text = ("--data", "builtin-heldout", "--tokens", 1500, "--seq-len", 128, "--json")
    whatif = cli("eval", demo_model, "--plan", healed, *text).document["results"][1]
    alone = cli("eval", written, *text).document["results"][0]
    assert whatif["overall"]["nll"] == alone["overall"]["nll"]


def test_prune_heals_as_heal_does(cli: Cli, demo_model: Path, planned: Path, written: Path, tmp_path: Path) -> None:
    ran = cli("prune", demo_model, tmp_path / "out", "--plan", planned, "--heal", *TEXT, "--json")
    assert ran.code == 0, ran.err
    record = HealRecord.model_validate(ran.document["healing"])
    assert record.best.layers == 4 and record.command.startswith("expertcut prune")
    shards = [path for path in written.iterdir() if path.suffix == ".safetensors"]
    assert shards and all((tmp_path / "out" / path.name).read_bytes() == path.read_bytes() for path in shards)
    assert files(tmp_path) == {"out"}, "the healed plan was for this checkpoint only"


def test_prune_uses_what_an_interrupted_run_healed(
    cli: Cli, demo_model: Path, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("prune", demo_model, tmp_path / "out", "--plan", planned, "--heal", *TEXT)
    cut_short(cli, monkeypatch, *args)
    assert files(tmp_path) == {"out.healed.json", "out.healed.deltas.safetensors"}
    told = record_of(tmp_path / "out.healed.json").told

    with monkeypatch.context() as patch:
        patch.setattr("expertcut.measure.heal.fit_deltas", interrupted)
        ran = cli(*args)
        assert ran.code == 0 and "healed before, by a run that did not end" in ran.err and told in ran.out
    assert files(tmp_path) == {"out"}


def test_values_of_another_run_are_not_used(
    cli: Cli, demo_model: Path, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed while it judged leaves its values beside the plan of the run before."""
    args = ("prune", demo_model, tmp_path / "out", "--plan", planned, "--heal", *TEXT)
    deltas = tmp_path / "out.healed.deltas.safetensors"
    cut_short(cli, monkeypatch, *args, "--tokens", 3000)
    other = deltas.read_bytes()
    cut_short(cli, monkeypatch, *args)
    assert deltas.read_bytes() != other
    deltas.write_bytes(other)
    ran = cli(*args)
    assert ran.code == 0 and "healed before" not in ran.err
    assert files(tmp_path) == {"out"}


def test_other_text_is_healed_anew(
    cli: Cli, demo_model: Path, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("prune", demo_model, tmp_path / "out", "--plan", planned, "--heal", *TEXT)
    cut_short(cli, monkeypatch, *args)
    before = (tmp_path / "out.healed.json").read_bytes()
    ran = cut_short(cli, monkeypatch, *args, "--seed", 7)
    assert "healed before" not in ran.err and (tmp_path / "out.healed.json").read_bytes() != before


def test_what_no_text_can_show_is_not_kept(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    """Three sequences to judge on have no interval."""
    text = tmp_path / "text.txt"
    text.write_text("The river ran on below the hill, and nobody in the house said a word. " * 15)
    ran = cli("heal", demo_model, "--plan", planned, *TEXT, "--data", text, "-o", tmp_path / "healed.json")
    assert ran.code == 0 and "nothing kept" in ran.out
    plan, record = Plan.load(tmp_path / "healed.json"), record_of(tmp_path / "healed.json")
    assert plan.deltas is None and not record.helped and record.domains == {}
    assert files(tmp_path) == {"text.txt", "healed.json"}
    assert cli("prune", demo_model, tmp_path / "out", "--plan", tmp_path / "healed.json").code == 0


def test_harm_to_a_domain_is_said(cli: Cli, healed: Path, tmp_path: Path) -> None:
    """Whatever the loss over all text is."""
    plan = json.loads(healed.read_text())
    plan["provenance"]["healing"]["domains"]["german"] = {"value": 0.2, "low": 0.1, "high": 0.3}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert record_of(tmp_path / "plan.json").told.endswith("; worse in german")
    assert "worse in german" in cli("show", tmp_path / "plan.json").out


def test_healing_that_harms_a_domain_warns(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    """Fitted on English prose alone: it helps on all the text to judge on together, and harms Python."""

    def recipe(name: str, part: str, *domains: str) -> Path:
        sources = "".join(f"  - {{kind: builtin, domain: {domain}, part: {part}}}\n" for domain in domains)
        (tmp_path / name).write_text(f"description: x\nsources:\n{sources}")
        return tmp_path / name

    fit, judge = (
        recipe("fit.yaml", "calibration", "prose"),
        recipe("judge.yaml", "heldout", "prose", "french", "python"),
    )
    ran = cli("heal", demo_model, "--plan", planned, "--calibration", fit, "--data", judge, "--seq-len", 64,
              "-o", tmp_path / "healed.json", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    record = HealRecord.model_validate(ran.document["healing"])
    assert record.best.beside.sign < 0 and record.domains["prose"].sign < 0 and record.harmed == ["python"]
    assert "does worse in python than it did: +" in ran.err and record.told.endswith("; worse in python")


def test_too_little_text_says_what_to_do(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Only a few words, then no more of them.")
    ran = cli("heal", demo_model, "--plan", planned, "--calibration", tmp_path / "text.txt", "-o", tmp_path / "p.json")
    assert ran.code == 4 and "nothing is left to judge the healing on" in ran.err and "--data" in ran.err
    assert files(tmp_path) == {"text.txt"}
    two = tmp_path / "two.jsonl"
    many, one = "All that is said here is said twice. " * 300, "Nur einmal steht es hier, und dann nicht mehr."
    two.write_text("\n".join(json.dumps({"text": t, "domain": d}) for t, d in ((many, "many"), (one, "one"))))
    ran = cli("heal", demo_model, "--plan", planned, "--calibration", two, "--seq-len", 64, "-o", tmp_path / "p.json")
    assert ran.code == 0 and "only one sequence of one" in ran.err


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("heal", "{model}", "--plan", "{plan}", *TEXT, "-o", "x.safetensors"), 2, "named like a file"),
        (("heal", "{model}", "--plan", "{healed}", *TEXT, "-o", "x.json"), 4, "healed already"),
        (("heal", "{other}", "--plan", "{plan}", *TEXT, "-o", "x.json"), 4, "was made for"),
        (("prune", "{model}", "out", "--plan", "{plan}", "--heal"), 2, "--heal needs --calibration"),
        (("prune", "{model}", "out", "--plan", "{plan}", *TEXT[:2]), 2, "with --heal only"),
        (("prune", "{model}", "out", "--plan", "{plan}", "--heal", *TEXT, "--link"), 2, "found --heal and --link"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused_and_leaves_nothing(
    args: tuple[object, ...], code: int, told: str, cli: Cli, demo_model: Path, planned: Path, healed: Path,
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"model": demo_model, "plan": planned, "healed": healed}
    if "{other}" in args:
        places["other"] = tiny_model("deepseek_v3", tmp_path_factory)
    ran = cli(*(str(arg).format(**places) for arg in args))
    assert (ran.code, told in ran.err) == (code, True), ran.err
    assert files(tmp_path) == set()


def test_the_card_tells_healed_tensors_from_the_base_s(cli: Cli, written: Path) -> None:
    record = HealRecord.of_plan(Record.load(written).plan)
    assert record is not None
    card = cli("push", written, "org/half", "--dry-run", "--json").document["card"]
    assert "bytes, but for the 64 tensors that were healed, and routers" in card and "Nothing was trained" in card
    assert f"| healed (this model) | {record.best.change.shown} | {record.best.beside.shown} |" in card
    assert all(f"| {name} | {change.shown} |" in card for name, change in record.domains.items())
    assert "But for that loss, nothing was measured" in card and "was not trained again" not in card
    repeat = card.partition("## Repeat it")[2]
    assert "expertcut verify OUT" in repeat and "expertcut prune" not in repeat, "plan.json has no new values beside it"
    assert "expertcut plan _demo_model" in repeat and record.command in repeat


def test_a_gain_that_did_better_than_new_values(
    cli: Cli, demo_model: Path, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no new values then, but what made the plan is `heal` all the same."""
    monkeypatch.setattr("expertcut.measure.heal._best", lambda found: "one gain")
    plan, out = tmp_path / "gained.json", tmp_path / "out"
    assert cli("heal", demo_model, "--plan", planned, *TEXT, "-o", plan).code == 0
    record = record_of(plan)
    assert (record.kept, record.refitted, Plan.load(plan).deltas) == ("one gain", "", None)
    assert cli("prune", demo_model, out, "--plan", plan).code == 0
    card = cli("push", out, "org/half", "--dry-run", "--json").document["card"]
    assert "a gain did better" in card and "| one gain (this model) |" in card and record.command in card
    assert "expertcut prune" in card.partition("## Repeat it")[2] and "tensors that were healed" not in card
    assert cli("report", out, "-o", tmp_path / "page.html").code == 0
    assert "expertcut prune _demo_model out --plan gained.json" in (tmp_path / "page.html").read_text()


def test_the_card_says_what_was_trained_and_how_far(cli: Cli, written: Path, tmp_path: Path) -> None:
    """Of a record that says so: distilled routers behind the first three layers' new values."""
    shutil.copytree(written, tmp_path / "out")
    path = tmp_path / "out" / "expertcut.json"
    document = json.loads(path.read_text())
    healing = document["plan"]["provenance"]["healing"]
    healing["distilled"], healing["kept"] = True, next(one["name"] for one in healing["tried"] if one["layers"] == 3)
    healing["domains"]["a|b\nc"] = {"value": 0.1, "low": None, "high": None}
    path.write_text(json.dumps(document))
    card = cli("push", tmp_path / "out", "org/half", "--dry-run", "--json").document["card"]
    assert "Its routers were trained for a few steps" in card and "Nothing was trained" not in card
    assert (
        "down projections in the first 3 of 4 MoE layers were refitted" in card and "and routers were trained" in card
    )
    assert "| a\\|b c | +0.1000 |" in card


def test_the_report_draws_it(cli: Cli, written: Path, healed: Path, tmp_path: Path) -> None:
    document = cli("report", written, "-o", tmp_path / "page.html", "--json").document
    assert document["sections"] == ["checkpoint", "plan", "healing"]
    assert document["figures"] == ["kept", "healed", "residual"]
    text, record = (tmp_path / "page.html").read_text(), record_of(healed)
    assert all(f"<td>{one.change.shown}</td>" in text for one in record.tried)
    assert all(f"<td>{layer.left:.1%}</td>" in text for layer in record.layers)
    assert record.command in text and "expertcut prune _demo_model out --plan healed.json" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len({*ids})


def test_records_of_another_form_are_shown_as_they_are(cli: Cli, healed: Path, tmp_path: Path) -> None:
    plan = json.loads(healed.read_text())
    plan["provenance"]["healing"] = {"kept": "something"}
    del plan["deltas"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert "kept something" in cli("show", tmp_path / "plan.json").out
    assert cli("report", tmp_path / "plan.json", "-o", tmp_path / "page.html").code == 0
    assert "kept something" in (tmp_path / "page.html").read_text()
