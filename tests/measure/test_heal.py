"""Healing: it helps where it can, is kept only then, and what is compared is what would be written."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import EIGHT_BITS, FORMATS, quantised_pair
from tiny_models import calibration, read_tensors, silent, tokens, write_shards
from tiny_types import tiny_type

from expertcut.calibrate.data import CalibrationSet, load_calibration
from expertcut.calibrate.passage import Passage
from expertcut.calibrate.run import ProfileOptions
from expertcut.calibrate.tokenizer import load_tokenizer
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.errors import DestinationError, PlanError
from expertcut.measure import heal, heal_fit
from expertcut.measure.gain import with_gains
from expertcut.measure.heal import PLAN, Healed, heal_plan
from expertcut.measure.heal_fit import fit_deltas
from expertcut.measure.heal_record import LayerHealed
from expertcut.measure.quality import BASE, WhatIf
from expertcut.measure.whatif import METRICS, evaluate
from expertcut.model import Geometry, read_geometry
from expertcut.rewrite import prune, require, verify_bytes
from expertcut.rewrite.deltas import DeltaFile, new_tensors, read_new

OPTIONS = ProfileOptions(device="cpu", dtype="float32")
DATA = tokens((40, 40, 25, 40, 33), seed=4)
FILE = "new.safetensors"


def named(count: int, layers: int = 4) -> str:
    """What a number of healed layers is called."""
    return "healed" if count == layers else f"healed, the first {count} of {layers} layers"


@dataclass(frozen=True)
class Texts:
    """The built-in model, text to fit on and other text to judge on."""

    checkpoint: Checkpoint
    geometry: Geometry
    fit_on: CalibrationSet
    judge_on: CalibrationSet

    def heal(self, plan: Plan, path: Path) -> Healed:
        return heal_plan(
            self.checkpoint, self.geometry, plan, self.fit_on, self.judge_on, path, OPTIONS, notify=silent,
            advance=silent,
        )  # fmt: skip

    def judge(self, plans: dict[str, Plan]) -> WhatIf:
        return evaluate(
            self.checkpoint, self.geometry, self.judge_on, plans, OPTIONS, notify=silent, advance=silent
        )  # fmt: skip

    @property
    def half(self) -> Plan:
        return make_plan(self.checkpoint, self.geometry, strategy="router-norm", experts=16)


@pytest.fixture(scope="module")
def texts(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    recipe, tokenizer = tmp_path_factory.mktemp("recipe") / "heldout.yaml", load_tokenizer(demo_model)
    recipe.write_text("description: x\nsources:\n" + "".join(
        f"  - {{kind: builtin, domain: {domain}, part: heldout}}\n" for domain in ("prose", "german", "python")
    ))  # fmt: skip
    checkpoint = open_checkpoint(demo_model)
    return Texts(
        checkpoint, read_geometry(checkpoint), load_calibration(["builtin"], tokenizer, tokens=3600, seq_len=128),
        load_calibration([recipe], tokenizer, tokens=1800, seq_len=128),
    )  # fmt: skip


@pytest.fixture(scope="module")
def brief(texts: Texts) -> Texts:
    """Less text, for what does not depend on how well healing does."""

    def third(data: CalibrationSet) -> CalibrationSet:
        return calibration(data.sequences[::3], tuple(dict.fromkeys(s.domain for s in data.sequences[::3])))

    return replace(texts, fit_on=third(texts.fit_on), judge_on=third(texts.judge_on))


@pytest.fixture(scope="module")
def healed(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Healed, Path]:
    """Half of the experts, healed, and where the new values are."""
    path = tmp_path_factory.mktemp("healed") / FILE
    return texts.heal(texts.half, path), path


def figures(found: WhatIf, name: str) -> list[np.ndarray]:
    at = found.names.index(name)
    return [getattr(found, metric)[at] for metric in METRICS]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_half_of_the_experts_healed_do_better_on_unseen_text(texts: Texts, healed: tuple[Healed, Path]) -> None:
    found, path = healed
    lost = found.found.mean("nll", PLAN) - found.found.mean("nll", BASE)
    won = found.found.difference(found.name, PLAN)
    assert won.sign < 0 and won.value < -0.4 * lost
    assert found.kept >= 3 and found.name == named(found.kept)
    assert [layer.layer for layer in found.layers] == [block.layer for block in texts.geometry.trunk]
    assert all(layer.ridge and layer.changed <= layer.maps == 16 and 0 < layer.left < 0.8 for layer in found.layers)
    assert {"one gain", "a gain per layer"} & set(found.found.names)
    assert found.plan.deltas_path == path and found.plan.beside(path.parent, None) == texts.half


def test_the_file_holds_what_the_plan_names_and_nothing_else(texts: Texts, healed: tuple[Healed, Path]) -> None:
    found, path = healed
    infos = new_tensors(texts.checkpoint, texts.geometry, found.plan)
    assert found.plan.deltas is not None
    assert len(infos) == 16 * found.kept and infos.keys() == found.plan.deltas.tensors.keys()
    assert sum(info.nbytes for info in infos.values()) + 100_000 > path.stat().st_size
    for name, info in infos.items():
        assert len(read_new(info, found.plan.deltas.tensors[name])) == texts.checkpoint.tensors[name].nbytes
    assert [p.name for p in path.parent.iterdir()] == [FILE]


def test_the_written_checkpoint_has_the_figures_that_were_judged(
    texts: Texts, healed: tuple[Healed, Path], tmp_path: Path
) -> None:
    found, path = healed
    found.plan.save(path.parent / "plan.json")
    plan = Plan.load(path.parent / "plan.json")
    assert plan == found.plan
    prune(texts.checkpoint, texts.geometry, plan, tmp_path / "out")
    require(verify_bytes(tmp_path / "out", texts.checkpoint))
    written = open_checkpoint(tmp_path / "out")
    again = evaluate(
        written, read_geometry(written), texts.judge_on, {}, OPTIONS, notify=silent, advance=silent
    )  # fmt: skip
    assert np.array_equal(again.nll[0], found.found.nll[found.found.names.index(found.name)])
    (path.parent / "plan.json").unlink()


def test_prefixes_are_judged_as_if_each_were_alone(texts: Texts, healed: tuple[Healed, Path]) -> None:
    """They share hidden states as long as they do the same."""
    found, _ = healed
    prefixes = dict(heal._prefixes(texts.geometry, found.plan))
    assert list(prefixes) == [1, 2, 3, 4][: found.kept]
    together = texts.judge({str(count): plan for count, plan in prefixes.items()} | {PLAN: texts.half})
    assert len({tuple(figures(together, name)[0]) for name in together.names}) == len(prefixes) + 2
    for count, plan in prefixes.items():
        assert same(figures(texts.judge({"alone": plan}), "alone"), figures(together, str(count))), count
        assert same(figures(found.found, named(count)), figures(together, str(count))), count


def test_the_same_values_in_other_places_are_another_plan(texts: Texts, healed: tuple[Healed, Path]) -> None:
    """Two experts that swap their new values share no hidden states with those that do not."""
    found, _ = healed
    infos = new_tensors(texts.checkpoint, texts.geometry, found.plan)
    assert found.plan.deltas is not None
    one, other, *_ = infos
    path, digests = found.plan.deltas_path.with_name("swapped"), dict(found.plan.deltas.tensors)
    digests[one], digests[other] = digests[other], digests[one]
    data, (a, b) = bytearray(found.plan.deltas_path.read_bytes()), (infos[one], infos[other])
    data[a.start : a.end], data[b.start : b.end] = data[b.start : b.end], data[a.start : a.end]
    path.write_bytes(data)
    deltas = found.plan.deltas.model_copy(update={"file": path.name, "tensors": digests})
    swapped = found.plan.beside(path.parent, deltas)
    together = texts.judge({"healed": found.plan, "swapped": swapped})
    assert not same(figures(together, "healed"), figures(together, "swapped"))
    assert same(figures(together, "swapped"), figures(texts.judge({"alone": swapped}), "alone"))
    path.unlink()


def test_a_shorter_prefix_leaves_a_shorter_file(brief: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal, "_best", lambda found: named(2))
    found = brief.heal(brief.half, tmp_path / FILE)
    assert (found.kept, len(found.layers)) == (2, 4) and found.plan.deltas is not None
    infos = new_tensors(brief.checkpoint, brief.geometry, found.plan)
    assert {name.split(".mlp.")[0] for name in infos} == {"model.layers.0", "model.layers.1"} and len(infos) == 32
    assert (tmp_path / FILE).stat().st_size < sum(info.nbytes for info in infos.values()) + 100_000
    assert same(figures(brief.judge({"again": found.plan}), "again"), figures(found.found, found.name))
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_where_nothing_is_lost_the_plan_stays_as_it_came(brief: Texts, tmp_path: Path) -> None:
    plan = make_plan(brief.checkpoint, brief.geometry, top_k=brief.geometry.top_k)
    found = brief.heal(plan, tmp_path / FILE)
    assert (found.plan, found.name, found.kept) == (plan, PLAN, 0)
    assert all((layer.ridge, layer.changed, layer.left) == (None, 0, 1.0) for layer in found.layers)
    assert list(tmp_path.iterdir()) == []


def test_what_does_harm_on_other_text_is_not_kept(
    brief: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few random tokens, learnt by heart."""
    monkeypatch.setattr(heal_fit, "best_ridge", lambda *args: (1e-5, 0.0))
    found = replace(brief, fit_on=tokens((100,) * 5, seed=5, vocabulary=400)).heal(brief.half, tmp_path / FILE)
    assert all(layer.changed and layer.left < 0.5 for layer in found.layers)
    assert all(found.found.difference(name, PLAN).sign > 0 for name in found.found.names if name.startswith("healed"))
    assert (found.plan, found.name, found.kept) == (brief.half, PLAN, 0) and list(tmp_path.iterdir()) == []


def test_an_error_while_judging_leaves_no_file(brief: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        assert (tmp_path / FILE).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(heal, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        brief.heal(brief.half, tmp_path / FILE)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_fitting_leaves_what_was_there(
    brief: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DeltaFile(tmp_path / FILE, [("a", "U8", (3,))]) as file:
        file.add("a", np.zeros(3, np.uint8))
        file.finish()
    mine = (tmp_path / FILE).read_bytes()

    def third(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_deltas(
            brief.checkpoint, brief.geometry, brief.half, brief.fit_on, tmp_path / FILE, OPTIONS, notify=silent,
            advance=third,
        )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == [FILE] and (tmp_path / FILE).read_bytes() == mine


def test_a_healed_plan_is_not_healed_again(texts: Texts, healed: tuple[Healed, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="healed already"):
        texts.heal(healed[0].plan, tmp_path / FILE)
    with pytest.raises(DestinationError, match="cannot be written"):
        texts.heal(texts.half, tmp_path / "none" / FILE)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_gains_is_healed_with_them(texts: Texts, tmp_path: Path) -> None:
    plan = with_gains(texts.half, dict.fromkeys(texts.half.layers, 0.9))
    found = texts.heal(plan, tmp_path / FILE)
    assert not {"one gain", "a gain per layer"} & set(found.found.names)
    assert found.kept and found.plan.beside(tmp_path, None) == plan
    assert found.found.difference(found.name, PLAN).sign < 0


TYPES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text"]
"""The last one's experts do not plainly join the residual stream: two runs of a layer, one after the other."""


def fitted(
    name: str, factory: pytest.TempPathFactory, path: Path, monkeypatch: pytest.MonkeyPatch, micro_tokens: int = 2048,
    dtype: str = "float32",
) -> tuple[dict[str, torch.Tensor], list[LayerHealed]]:  # fmt: skip
    """New values of a tiny model, float32, all layers by one ridge."""
    checkpoint = open_checkpoint(tiny_type(name, factory))
    geometry = read_geometry(checkpoint)
    plan = make_plan(checkpoint, geometry, strategy="random", experts=6, top_k=1)
    monkeypatch.setattr(heal_fit, "best_ridge", lambda *args: (0.3, 0.0))
    options = ProfileOptions(device="cpu", dtype=dtype, micro_tokens=micro_tokens)
    deltas, layers = fit_deltas(checkpoint, geometry, plan, DATA, path, options, notify=silent, advance=silent)
    infos = new_tensors(checkpoint, geometry, plan.beside(path.parent, deltas))
    values = {
        name: torch.from_numpy(read_new(info, deltas.tensors[name]).view(np.float32)) for name, info in infos.items()
    }
    return values, layers


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", TYPES)
def test_padding_counts_for_nothing(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of other lengths in one micro-batch give the values that they give alone."""
    assert_alike(*(fitted(name, tmp_path_factory, tmp_path / FILE, monkeypatch, size)[0] for size in (10_000, 1)))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bits_are_healed_in_bfloat16(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = open_checkpoint(quantised_pair(name, tmp_path_factory)[0])
    geometry = read_geometry(checkpoint)
    plan = make_plan(checkpoint, geometry, strategy="random", keep=0.5, top_k=1)
    options = ProfileOptions(device="cpu", dtype="bfloat16")
    deltas, layers = fit_deltas(
        checkpoint, geometry, plan, DATA, tmp_path / FILE, options, notify=silent, advance=silent
    )  # fmt: skip
    assert deltas.tensors and len(layers) == len(geometry.trunk)


@pytest.mark.parametrize("name", [*TYPES, "longcat_flash"])
def test_a_pass_in_bfloat16_finds_about_the_same(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half = (
        fitted(name, tmp_path_factory, tmp_path / FILE, monkeypatch, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert [layer.left for layer in half[1]] == pytest.approx([layer.left for layer in whole[1]], abs=0.05)
    assert half[0].keys() == whole[0].keys()


@pytest.mark.parametrize("name", TYPES)
def test_running_out_of_memory_changes_nothing(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches are halved on the way, also between the base's run of a layer and the plan's."""
    run, refused = Passage._run, list[int]()
    whole, _ = fitted(name, tmp_path_factory, tmp_path / FILE, monkeypatch)

    def tight(self: Passage, index: int, layer: Any, track: int, at: int, watcher: Any) -> None:
        if len(self.prepared[at].batch.rows) > (4, 2, 1)[track]:
            refused.append(track)
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, index, layer, track, at, watcher)

    monkeypatch.setattr(Passage, "_run", tight)
    assert_alike(fitted(name, tmp_path_factory, tmp_path / FILE, monkeypatch)[0], whole)
    assert len(set(refused)) == 2, "in the base's run and in the plan's"


def in_fp8(folder: Path, out: Path, block: int = 32) -> Path:
    """A copy of a checkpoint whose projections are 8-bit floats with a scale per block."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in read_tensors(folder).items():
        tensors[name] = weight
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            parts = weight.float().view(rows // block, block, columns // block, block)
            scale = parts.abs().amax((1, 3)) / 448
            tensors[name] = (parts / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    write_shards(out, tensors, 10**9)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_eight_bits_have_room_for_what_healing_wins(texts: Texts, healed: tuple[Healed, Path], tmp_path: Path) -> None:
    whole = healed[0].found
    checkpoint = open_checkpoint(in_fp8(texts.checkpoint.path, tmp_path / "fp8"))
    coded = replace(texts, checkpoint=checkpoint, geometry=read_geometry(checkpoint))
    plan = texts.half.model_copy(update={"source": coded.half.source})
    found = coded.heal(plan, tmp_path / FILE)
    won = found.found.difference(found.name, PLAN).value
    assert won == pytest.approx(whole.difference(healed[0].name, PLAN).value, rel=0.1)
    infos = new_tensors(checkpoint, coded.geometry, found.plan)
    assert {info.dtype for info in infos.values()} == {"F8_E4M3"}
    prune(checkpoint, coded.geometry, found.plan, tmp_path / "out")
    require(verify_bytes(tmp_path / "out", checkpoint))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in EIGHT_BITS])
def test_a_format_without_room_is_refused_before_anything_runs(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any) -> Any:
        raise AssertionError("opened for running")

    monkeypatch.setattr(heal_fit, "open_stream", run)
    checkpoint = open_checkpoint(quantised_pair(name, tmp_path_factory)[0])
    geometry = read_geometry(checkpoint)
    plan = make_plan(checkpoint, geometry, top_k=1)
    with pytest.raises(PlanError, match="cannot be given new values; expected") as caught:
        heal_plan(
            checkpoint, geometry, plan, DATA, DATA, tmp_path / FILE, OPTIONS, notify=silent, advance=silent
        )  # fmt: skip
    assert ".safetensors: " in caught.value.message and "down_proj" in caught.value.message
    assert caught.value.hint and list(tmp_path.iterdir()) == []
