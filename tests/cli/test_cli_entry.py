"""Start-up, help, exit codes, and how errors and interruptions are told. Real command lines, most in real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import expertcut
from expertcut import errors
from expertcut.choose import CRITERIA
from expertcut.choose.criteria import FAMILY, NAEE, without_profile
from expertcut.cli.app import COMMANDS
from expertcut.cli.common import Output, exit_code

if TYPE_CHECKING:
    from command_line import Cli

pytest_plugins = ("command_line",)

PYTHON = [sys.executable, "-m", "expertcut"]
HEAVY = ("torch", "transformers", "numpy", "pydantic", "safetensors", "huggingface_hub", "yaml")


def process(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*PYTHON, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from expertcut.cli import run; assert run(['--help']) == 0; "
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "HEAVY []", run.stderr


def test_help_takes_at_most_twice_the_time_of_importing_typer_and_rich() -> None:
    commands = {"help": [*PYTHON, "--help"], "imports": [sys.executable, "-c", "import typer, rich"]}
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(12):  # the fastest of many: other work on the machine only ever adds
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            best[name] = min(best[name], time.perf_counter() - started)
    assert best["help"] <= 2 * best["imports"], best


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_it_understands(
    name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    ran = cli(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    (example,) = re.findall(rf"Example:\s+(expertcut {name} .*?)\s*\n", ran.out)
    options = set(re.findall(r"(?<= )--?[a-z][a-z-]*", ran.out.replace(example, "")))
    assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", example)) <= options
    assert "--json" in options


def test_no_arguments_show_the_commands(cli: Cli) -> None:
    ran = cli()
    assert ran.code == 0
    assert all(name in ran.out for name in COMMANDS)


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"expertcut {expertcut.__version__}\n"


def test_the_help_lists_every_strategy_where_it_belongs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = re.sub(r"\s+", " ", cli("plan", "--help").out)
    listed = re.search(r"With a profile: (.*?)\. Without: (.*?)\. With --calibration: (.*?)\.", text)
    assert listed is not None
    assert listed[3] == NAEE.name
    assert sorted(listed[2].split(", ")) == sorted(without_profile())
    assert sorted(listed[1].split(", ")) == sorted({*CRITERIA, FAMILY} - set(without_profile()))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError(""), 2),
        (errors.CheckpointError(""), 3),
        (errors.UnknownTensorError(""), 3),
        (errors.ConfigConflictError(""), 3),
        (errors.ProfileError(""), 4),
        (errors.PlanError(""), 4),
        (errors.DataError(""), 4),
        (errors.VerifyError(""), 5),
        (errors.GateError(""), 5),
        (errors.RuntimeLintError(""), 6),
        (errors.HubError(""), 6),
        (errors.DestinationError(""), 1),
        (errors.ExpertcutError(""), 1),
        (OSError(28, "No space left on device"), 1),
        (RuntimeError(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_every_error_class_has_an_exit_code_in_the_test_above() -> None:
    tested = {type(mark[0]) for mark in test_exit_codes.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    ours = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert ours <= tested


def test_usage_errors(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong: list[tuple[object, ...]] = [
        ("nonsense",),
        ("inspect",),
        ("inspect", demo_model, "--nonsense"),
        ("plan", demo_model, "--strategy", "random", "--experts", "many", "-o", out),
        ("plan", demo_model, "--strategy", "random", "-o", out),
        ("plan", demo_model, "--experts", 16, "-o", out),
        ("plan", demo_model, "--strategy", "random", "--experts", 16, "--keep", "50%", "-o", out),
        ("plan", demo_model, "--strategy", "best", "--experts", 16, "-o", out),
        ("plan", demo_model, "--strategy", "reap", "--experts", 16, "-o", out),
        ("prune", demo_model, out),
        ("prune", demo_model, out, "--plan", planned, "--top-k", 2),
        ("prune", demo_model, out, "--plan", planned, "--max-shard-size", "big"),
        ("merge", tmp_path, "-o", out),
        ("verify", out, "--numeric"),
        ("eval", demo_model, "--data", "builtin", "--device", "abacus"),
        ("eval", demo_model, "--data", "builtin", "--dtype", "int3"),
    ]
    for args in wrong:
        ran = cli(*args)
        assert (ran.code, ran.out) == (2, ""), args
        assert ran.err.startswith("error: "), args
        assert len(ran.err.splitlines()) == 1 + ("\nhint: " in ran.err), args
    assert not out.exists()


def corrupt(folder: Path, what: str) -> str:
    """Damages a copy of the built-in model; returns what the error must name."""
    shard = folder / "model-00002-of-00003.safetensors"
    index = folder / "model.safetensors.index.json"
    if what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
        return shard.name
    if what == "empty":
        shard.write_bytes(b"")
        return shard.name
    if what == "no config":
        (folder / "config.json").unlink()
        return "config.json"
    if what == "not UTF-8":
        (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
        return "config.json"
    if what == "pickle":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"PK")
        return "pytorch_model.bin"
    if what == "absent tensor":
        document = json.loads(index.read_text())
        document["weight_map"]["model.ghost.weight"] = shard.name
        index.write_text(json.dumps(document))
        return "model.ghost.weight"
    if what == "unknown family":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_moe"}))
        return "no_such_moe"
    assert what == "one expert fewer in the config"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 31}))
    return "31"


@pytest.mark.parametrize(
    "what",
    [
        "truncated", "empty", "no config", "not UTF-8", "pickle", "absent tensor", "unknown family",
        "one expert fewer in the config",
    ],
)  # fmt: skip
def test_a_malformed_checkpoint_is_told_in_one_line_and_leaves_nothing(
    what: str, cli: Cli, demo_model: Path, planned: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    named = corrupt(model, what)
    work = tmp_path / "work"
    work.mkdir()
    for args in (
        ("inspect", model),
        ("profile", model, "--calibration", "builtin", "-o", work / "p"),
        ("plan", model, "--strategy", "random", "--experts", 16, "-o", work / "plan.json"),
        ("prune", model, work / "out", "--plan", planned),
        ("prune", model, work / "out", "--plan", planned, "--dry-run", "--json"),
        ("eval", model, "--data", "builtin-heldout"),
    ):
        ran = cli(*args)
        assert (ran.code, ran.out) == (3, "")
        first, *rest = ran.err.splitlines()
        assert first.startswith("error: ") and named in first
        assert [line.partition(":")[0] for line in rest] in ([], ["hint"])
    assert list(work.iterdir()) == []


def test_profile_plan_and_data_errors(cli: Cli, demo_model: Path, planned: Path, tmp_path: Path) -> None:
    stranger = json.loads(planned.read_text())
    stranger["source"]["fingerprint"]["sketch"]["model.layers.1.mlp"] = [0.0] * 8
    (tmp_path / "stranger.json").write_text(json.dumps(stranger))
    (tmp_path / "broken.json").write_text("{")
    wrong: list[tuple[object, ...]] = [
        ("show", tmp_path),
        ("show", tmp_path / "broken.json"),
        ("show", tmp_path / "absent.json"),
        ("prune", demo_model, tmp_path / "out", "--plan", tmp_path / "stranger.json"),
        ("prune", demo_model, tmp_path / "out", "--strategy", "random", "--experts", 2),
        ("eval", demo_model, "--data", "builtin", "--plan", tmp_path / "stranger.json"),
        ("eval", demo_model, "--data", tmp_path / "absent.txt"),
        ("eval", demo_model, "--data", "no-such-recipe"),
        ("profile", demo_model, "--calibration", "builtin", "--seq-len", 2048, "-o", tmp_path / "p"),
    ]
    for args in wrong:
        ran = cli(*args)
        assert (ran.code, ran.out) == (4, ""), args
        assert "error: " in ran.err
    assert not (tmp_path / "out").exists()


def test_the_hub_has_a_code_of_its_own(cli: Cli) -> None:
    ran = cli("inspect", "nobody/no-such-model")
    assert (ran.code, ran.out) == (6, "")
    assert ran.err.startswith("error: nobody/no-such-model ")


def test_an_existing_destination_is_kept(cli: Cli, demo_model: Path, planned: Path, profiled: Path) -> None:
    before = (profiled / "profile.json").read_bytes()
    for args in (
        ("profile", demo_model, "--calibration", "builtin", "-o", profiled),
        ("merge", profiled, profiled, "-o", profiled),
        ("prune", demo_model, profiled, "--plan", planned),
        ("prune", demo_model, profiled, "--plan", planned, "--force"),
        ("prune", demo_model, profiled, "--plan", planned, "--dry-run"),
        ("demo", "--out", profiled),
    ):
        ran = cli(*args)
        assert (ran.code, ran.out) == (1, ""), args
        assert str(profiled) in ran.err
    assert (profiled / "profile.json").read_bytes() == before


UNEXPECTED = (
    "import expertcut.checkpoint as c; c.open_checkpoint = lambda *a, **k: 1 / 0\n"
    "from expertcut.cli import main; main()"
)


def test_an_unexpected_error_is_one_line_and_a_traceback_only_with_debug() -> None:
    quiet = subprocess.run([sys.executable, "-c", UNEXPECTED, "inspect", "x"], capture_output=True, text=True)
    assert (quiet.returncode, quiet.stdout) == (1, "")
    assert quiet.stderr.splitlines()[0] == "error: unexpected ZeroDivisionError: division by zero"
    assert quiet.stderr.splitlines()[1:] == ["hint: run it again as: expertcut --debug …"]
    debug = subprocess.run(
        [sys.executable, "-c", UNEXPECTED, "--debug", "inspect", "x"], capture_output=True, text=True
    )
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr and "ZeroDivisionError" in debug.stderr


def test_debug_shows_where_an_expected_error_comes_from() -> None:
    run = process("--debug", "inspect", "/no/such/model")
    assert run.returncode == 3
    assert "Traceback" in run.stderr
    assert run.stderr.splitlines()[-2].startswith("error: /no/such/model")


def test_a_reader_that_leaves_is_no_drama(planned: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([*PYTHON, "show", planned, "-v"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")


def test_a_signal_ends_the_run_with_130(demo_model: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "text.txt"
    os.mkfifo(fifo)
    command = [*PYTHON, "profile", demo_model, "--calibration", fifo, "-o", tmp_path / "p"]
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with fifo.open("w"):  # returns when the command has opened the other end: it is inside its work now
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (130, "")
    assert "error: interrupted" in err and "Traceback" not in err


def test_an_interrupted_profile_resumes(
    cli: Cli, demo_model: Path, profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertcut.calibrate.passage import Passage

    args = ("profile", demo_model, "--calibration", "builtin", "--tokens", 3000, "--seq-len", 128, "-o", tmp_path / "p")
    step, calls = Passage.step, []

    def interrupted(*args: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        step(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Passage, "step", interrupted)
        ran = cli(*args)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.splitlines()[-2:] == ["error: interrupted", "hint: the same command resumes"]
    ran = cli(*args)
    assert ran.code == 0
    assert "resuming at layer 2 of 4" in ran.err
    assert (tmp_path / "p/profile.safetensors").read_bytes() == (profiled / "profile.safetensors").read_bytes()


def test_with_json_whatever_is_printed_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(["inspect"]) as out:
        out.only_json()
        print("a library that talks")
        out.warn("careful")
        out.finish({"loss": float("inf"), "layers": (1, 2)}, "a table")
    print("after")
    printed = capsys.readouterr()
    document, _, rest = printed.out.partition("\n}\n")
    assert json.loads(document + "}") == {"loss": None, "layers": [1, 2]}
    assert rest == "after\n"
    assert printed.err.splitlines() == ["a library that talks", "warning: careful"]
