"""`expertcut demo`, as a user runs it."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan
from expertcut.cli.common import console
from expertcut.cli.demo import result_parts
from expertcut.measure.demo import DemoResult, DemoRow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]", float]:
    out = tmp_path_factory.mktemp("demo") / "files"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "expertcut", "demo", "--out", str(out), "--json"], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return out, run, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


Demo = tuple[Path, "subprocess.CompletedProcess[str]", float]


def test_the_whole_path_takes_under_a_minute_and_holds(demo: Demo) -> None:
    _, run, seconds = demo
    assert run.returncode == 0, run.stderr
    assert seconds < 60  # of processor time: other work on the machine does not count
    found = json.loads(run.stdout)
    assert found["ok"] and all(check["ok"] for check in found["checks"])
    names = {check["name"] for check in found["checks"]}
    assert {"tensor bytes", "loss of the written checkpoint equals its plan's"} <= names
    assert any(name.startswith("numeric") for name in names)
    assert found["heldout_tokens"] >= 10_000


def test_the_profile_is_worth_its_while(demo: Demo) -> None:
    rows = {row["name"]: row for row in json.loads(demo[1].stdout)["results"]}
    assert list(rows) == ["unpruned", "reap", "frequency", "random"]
    assert [row["experts"] for row in rows.values()] == [32, 16, 16, 16]
    assert rows["random"]["deviation"] > 0
    for name in ("reap", "frequency"):
        assert rows["unpruned"]["nll"] < rows[name]["nll"] < rows["random"]["nll"] - rows["random"]["deviation"]


def test_the_files_are_where_it_says(demo: Demo) -> None:
    out, run, _ = demo
    found = json.loads(run.stdout)
    assert found["folder"] == str(out)
    pruned = open_checkpoint(found["pruned"])
    assert pruned.config["num_experts"] == 16
    assert (out / "profile/profile.json").exists()
    plans = {path.stem: Plan.load(path) for path in (out / "plans").iterdir()}
    assert set(plans) == {"reap", "frequency", *(f"random-{seed}" for seed in range(5))}
    assert found["pruned_nll"] == {row["name"]: row["nll"] for row in found["results"]}[found["pruned_by"]]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = (
        DemoRow("unpruned", 32, 2048, 3.0, None),
        DemoRow("reap", 16, 1024, 3.5, None),
        DemoRow("random", 16, 1024, 4.25, 0.125),
    )
    result = DemoResult(Path("out"), Path("model"), rows, 100, 200, 5, Path("out/pruned"), "reap", 3.5, (), 12.0)
    for part in result_parts(result):
        console(sys.stdout).print(part)
    lines = capsys.readouterr().out.splitlines()
    (random,) = (line for line in lines if line.startswith("random"))
    assert random.split("  ")[0] == "random, mean of 5 seeds"
    assert "4.2500 ± 0.1250" in random and "+1.2500" in random
    assert any(line.startswith("pruned model") and "out/pruned, by reap" in line for line in lines)
