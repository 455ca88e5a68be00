"""The calibration pass as a whole: what it records about itself, and how it goes on after an interruption."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import profile
from tiny_models import messages, tiny_model, tokens

from expertcut.calibrate.profile import Profile
from expertcut.calibrate.reader import TensorReader
from expertcut.checkpoint import open_checkpoint
from expertcut.errors import ProfileError, UsageError
from expertcut.model import check_fingerprint, read_geometry

DATA = tokens((18, 11, 16, 7, 14), seed=9)
FAMILIES = ["qwen2_moe", "qwen3_moe-tied", "deepseek_v3", "gpt_oss", "qwen3_5_moe"]


class Interrupted(Exception):
    """Stands for anything that ends a run."""


class StopAfter:
    """Raises once a number of layers is done; notes the progress that it was told."""

    def __init__(self, layers: int | None = None) -> None:
        self.layers = layers
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if done == self.layers:
            raise Interrupted


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory)


@pytest.fixture
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory)


def assert_same(found: Profile, expected: Profile) -> None:
    assert found.meta == expected.meta
    assert set(found.arrays) == set(expected.arrays)
    for name in expected.arrays:
        np.testing.assert_array_equal(found.arrays[name], expected.arrays[name], err_msg=name)


def test_metadata_says_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    made = profile(folder, DATA, tmp_path / "p")
    checkpoint = open_checkpoint(folder)
    geometry = read_geometry(checkpoint)
    check_fingerprint(made.meta.fingerprint, checkpoint, geometry)
    assert made.prefixes == [block.prefix for block in geometry.trunk]
    assert made.meta.tokens() == DATA.tokens_by_domain == {"prose": 48, "code": 18}
    assert (made.meta.experts, made.meta.top_k) == (geometry.num_experts, geometry.top_k)
    assert made.meta.dtype == "float32"  # auto on a CPU
    assert made.meta.data[0].fingerprint == DATA.fingerprint
    assert {"expertcut", "torch", "transformers"} <= made.meta.versions.keys()
    assert_same(Profile.load(tmp_path / "p"), made)
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["profile.json", "profile.safetensors"]


def test_progress_ends_with_the_last_moe_layer(folder: Path, tmp_path: Path) -> None:
    """Dense layers behind it would tell nothing."""
    progress = StopAfter()
    profile(folder, DATA, tmp_path / "p", advance=progress)
    last = read_geometry(open_checkpoint(folder)).trunk[-1].layer + 1
    assert progress.calls == [(done, last) for done in range(1, last + 1)]


@pytest.mark.parametrize("layers", [1, 2])
def test_interrupted_pass_resumes_at_the_last_finished_layer(folder: Path, layers: int, tmp_path: Path) -> None:
    last = read_geometry(open_checkpoint(folder)).trunk[-1].layer + 1
    expected = profile(folder, DATA, tmp_path / "whole", micro_tokens=40)
    with pytest.raises(Interrupted):
        profile(folder, DATA, tmp_path / "p", advance=StopAfter(layers), micro_tokens=40)
    assert not (tmp_path / "p" / "profile.json").exists()
    heard, notify = messages()
    progress = StopAfter()
    found = profile(folder, DATA, tmp_path / "p", advance=progress, notify=notify, micro_tokens=40)
    assert heard == [f"resuming at layer {layers} of 3"]
    assert progress.calls == [(done, last) for done in range(layers + 1, last + 1)]
    assert_same(found, expected)
    assert not (tmp_path / "p" / ".partial").exists()


def test_resuming_reads_no_finished_layer(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        profile(qwen, DATA, tmp_path, advance=StopAfter(2))
    read: list[str] = []
    view = TensorReader.view

    def noted(self: TensorReader, name: str) -> torch.Tensor:
        read.append(name)
        return view(self, name)

    monkeypatch.setattr(TensorReader, "view", noted)
    profile(qwen, DATA, tmp_path)
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"2"}


def test_a_second_interruption(qwen: Path, tmp_path: Path) -> None:
    expected = profile(qwen, DATA, tmp_path / "whole")
    for layers in (1, 3):  # the second one after the last layer, before the profile is written
        with pytest.raises(Interrupted):
            profile(qwen, DATA, tmp_path / "p", advance=StopAfter(layers))
    assert_same(profile(qwen, DATA, tmp_path / "p"), expected)


def test_interruption_while_the_state_is_written(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of the next layer are there, but nothing says so yet: the layer before counts."""
    expected = profile(qwen, DATA, tmp_path / "whole")
    replace, calls = os.replace, 0

    def second_fails(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Interrupted
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "replace", second_fails)
        profile(qwen, DATA, tmp_path / "p")
    heard, notify = messages()
    assert_same(profile(qwen, DATA, tmp_path / "p", notify=notify), expected)
    assert heard == ["resuming at layer 1 of 3"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from reference import profile
from test_run import DATA
def advance(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
profile(Path({folder!r}), DATA, Path({out!r}), advance=advance)
"""


def test_killed_process(qwen: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = [str(path) for path in (here, here.parent, here.parent.parent)]
    script = KILLED.format(paths=paths, folder=str(qwen), out=str(tmp_path / "p"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr[-2000:]
    heard, notify = messages()
    found = profile(qwen, DATA, tmp_path / "p", notify=notify)
    assert heard == ["resuming at layer 2 of 3"]
    expected = profile(qwen, DATA, tmp_path / "whole")
    for name in expected.arrays:  # threads may differ in number
        np.testing.assert_allclose(found.arrays[name], expected.arrays[name], rtol=1e-4, atol=1e-6, err_msg=name)


class Hungry:
    """A decoder layer of transformers that asks for too much when it gets more than two sequences."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

        forward, self.failures = Qwen3MoeDecoderLayer.forward, 0

        def hungry(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = forward(layer, hidden_states, *args, **kwargs)
            if hidden_states.shape[0] > 2 and not hidden_states.is_meta:
                self.failures += 1
                torch.empty(1 << 60, dtype=torch.uint8)  # after the observer has seen the micro-batch
            return out

        monkeypatch.setattr(Qwen3MoeDecoderLayer, "forward", hungry)


def test_lack_of_memory_counts_nothing_twice(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = profile(qwen, DATA, tmp_path / "free", moments=True, pair_domains=True)
    hungry = Hungry(monkeypatch)
    heard, notify = messages()
    found = profile(qwen, DATA, tmp_path / "p", notify=notify, moments=True, pair_domains=True)
    assert hungry.failures == len(heard) == 2  # 5 → 2 + 3 → 1 + 2
    for name in expected.arrays:
        np.testing.assert_allclose(found.arrays[name], expected.arrays[name], rtol=1e-4, atol=1e-5, err_msg=name)
        if name.endswith("count"):
            np.testing.assert_array_equal(found.arrays[name], expected.arrays[name])


def test_interruption_after_lack_of_memory(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are narrower than the whole was; the resumed run finds them as they were left."""
    Hungry(monkeypatch)
    expected = profile(qwen, DATA, tmp_path / "whole")
    with pytest.raises(Interrupted):
        profile(qwen, DATA, tmp_path / "p", advance=StopAfter(1))
    heard, notify = messages()
    assert_same(profile(qwen, DATA, tmp_path / "p", notify=notify), expected)
    assert heard == ["resuming at layer 1 of 3"]


@pytest.mark.parametrize(
    "change", [{"data": tokens((18, 11), seed=10)}, {"moments": True}, {"pair_domains": True}, {"dtype": "bfloat16"}]
)
def test_state_of_another_run_is_refused(qwen: Path, tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(Interrupted):
        profile(qwen, DATA, tmp_path, advance=StopAfter(1))
    before = {path: path.read_bytes() for path in (tmp_path / ".partial").iterdir()}
    data = change.pop("data", DATA)
    assert isinstance(data, type(DATA))
    with pytest.raises(ProfileError, match="another model, data or options") as caught:
        profile(qwen, data, tmp_path, **change)
    assert "rm -r" in str(caught.value.hint)
    assert {path: path.read_bytes() for path in (tmp_path / ".partial").iterdir()} == before


def test_state_of_another_model_is_refused(
    qwen: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(Interrupted):
        profile(qwen, DATA, tmp_path, advance=StopAfter(1))
    with pytest.raises(ProfileError, match="another model"):
        profile(tiny_model("olmoe", tmp_path_factory), DATA, tmp_path)


@pytest.mark.parametrize("damage", ["state.json", "hidden-2.safetensors", "sums-1.safetensors"])
@pytest.mark.parametrize("kept", [None, 0, 20])
def test_damaged_state_is_an_error_with_a_way_out(qwen: Path, tmp_path: Path, damage: str, kept: int | None) -> None:
    with pytest.raises(Interrupted):
        profile(qwen, DATA, tmp_path, advance=StopAfter(2))
    path = tmp_path / ".partial" / damage
    if kept is not None:
        path.write_bytes(path.read_bytes()[:kept])
    else:
        path.unlink()
    if damage == "state.json" and kept is None:
        assert profile(qwen, DATA, tmp_path).meta.tokens()  # nothing to resume: starts anew
        return
    with pytest.raises(ProfileError, match="damaged") as caught:
        profile(qwen, DATA, tmp_path)
    assert "rm -r" in str(caught.value.hint)


def test_another_micro_batch_size_may_resume(qwen: Path, tmp_path: Path) -> None:
    expected = profile(qwen, DATA, tmp_path / "whole", micro_tokens=40)
    with pytest.raises(Interrupted):
        profile(qwen, DATA, tmp_path / "p", advance=StopAfter(1), micro_tokens=40)
    assert_same(profile(qwen, DATA, tmp_path / "p", micro_tokens=1000), expected)


def test_resident_leaves_no_state(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        profile(qwen, DATA, tmp_path / "p", advance=StopAfter(1), resident=True)
    assert not (tmp_path / "p").exists()


def test_sequences_longer_than_the_model_has_positions(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="513 tokens.*512 positions") as caught:
        profile(qwen, tokens((513,)), tmp_path / "p")
    assert "--seq-len 512" in str(caught.value.hint)
    assert not (tmp_path / "p").exists()
    profile(qwen, tokens((512,)), tmp_path / "p")


def test_unknown_dtype(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float8"):
        profile(qwen, DATA, tmp_path / "p", dtype="float8")
