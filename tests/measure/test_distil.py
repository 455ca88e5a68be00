"""Router distillation: what is trained, that it helps on other text, and that the file is what was measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import silent, tiny_model, tokens
from tiny_types import tiny_type

from expertcut.calibrate.data import CalibrationSet, load_calibration
from expertcut.calibrate.run import ProfileOptions
from expertcut.calibrate.tokenizer import load_tokenizer
from expertcut.checkpoint import Checkpoint, open_checkpoint, read_array
from expertcut.choose import Plan, make_plan
from expertcut.errors import DataError, PlanError
from expertcut.measure import distil
from expertcut.measure.heal import DISTILLED, Healed, distil_healed, heal_plan
from expertcut.measure.heal_fit import fit_deltas
from expertcut.measure.quality import WhatIf
from expertcut.measure.whatif import evaluate
from expertcut.model import Geometry, read_geometry
from expertcut.rewrite import prune

OPTIONS = ProfileOptions(device="cpu", dtype="float32")
STEPS = 12


class Model:
    """An opened checkpoint."""

    def __init__(self, folder: Path, keep: float = 0.75) -> None:
        self.keep = keep
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.geometry: Geometry = read_geometry(self.checkpoint)

    @cached_property
    def plan(self) -> Plan:
        """Without some of the experts, by random."""
        return make_plan(self.checkpoint, self.geometry, strategy="random", keep=self.keep, seed=1)

    def distilled(self, plan: Plan, data: CalibrationSet, path: Path, steps: int = STEPS) -> Plan:
        deltas = distil.distil_routers(
            self.checkpoint, self.geometry, plan, data, path, OPTIONS, steps=steps, notify=silent, advance=silent
        )
        return plan.beside(path.parent, deltas)

    def healed(self, data: CalibrationSet, path: Path) -> Plan:
        deltas, _ = fit_deltas(
            self.checkpoint, self.geometry, self.plan, data, path, OPTIONS, notify=silent, advance=silent
        )
        return self.plan.beside(path.parent, deltas)

    def whatif(self, data: CalibrationSet, **plans: Plan) -> WhatIf:
        return evaluate(self.checkpoint, self.geometry, data, plans, OPTIONS, notify=silent, advance=silent)

    @property
    def routers(self) -> set[str]:
        return {block.router for block in self.geometry.trunk}


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Model:
    return Model(demo_model, keep=0.5)


@pytest.fixture(scope="module")
def texts(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrationSet, CalibrationSet]:
    """Calibration text and other text, both of the built-in model's kinds."""
    recipe = tmp_path_factory.mktemp("recipe") / "heldout.yaml"
    recipe.write_text("description: x\nsources:\n" + "".join(
        f"  - {{kind: builtin, domain: {domain}, part: heldout}}\n" for domain in ("prose", "german", "python")
    ))  # fmt: skip
    tokenizer = load_tokenizer(demo_model)
    return (
        load_calibration(["builtin"], tokenizer, tokens=10_000, seq_len=128),
        load_calibration([recipe], tokenizer, tokens=4000, seq_len=128),
    )


@pytest.fixture(scope="module")
def healed(demo: Model, texts: tuple[CalibrationSet, CalibrationSet], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return demo.healed(texts[0], tmp_path_factory.mktemp("healed") / "healed.safetensors")


@pytest.fixture(scope="module")
def distilled(
    demo: Model, healed: Plan, texts: tuple[CalibrationSet, CalibrationSet], tmp_path_factory: pytest.TempPathFactory
) -> Plan:
    return demo.distilled(healed, texts[0], tmp_path_factory.mktemp("distilled") / "distilled.safetensors")


def test_text_that_was_not_trained_on_is_predicted_more_like_the_base(
    demo: Model, healed: Plan, distilled: Plan, texts: tuple[CalibrationSet, CalibrationSet]
) -> None:
    found = demo.whatif(texts[1], healed=healed, distilled=distilled)
    assert found.mean("kl", "distilled") < 0.99 * found.mean("kl", "healed")
    assert found.difference("distilled", "healed").value < 0


def test_only_routers_change(demo: Model, healed: Plan, distilled: Plan) -> None:
    assert healed.deltas is not None and distilled.deltas is not None
    before, after = healed.deltas.tensors, distilled.deltas.tensors
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == demo.routers
    assert distilled.layers == healed.layers
    new = load_file(distilled.deltas_path)
    for block in demo.geometry.trunk:
        source = read_array(demo.checkpoint, block.router)[list(distilled.layers[block.prefix].kept)]
        assert source.shape == tuple(new[block.router].shape)
        assert (source != new[block.router].float().numpy()).any(), block.router


def test_the_written_checkpoint_does_what_was_measured(
    demo: Model, distilled: Plan, texts: tuple[CalibrationSet, CalibrationSet], tmp_path: Path
) -> None:
    prune(demo.checkpoint, demo.geometry, distilled, tmp_path / "out")
    measured = demo.whatif(texts[1], distilled=distilled)
    written = Model(tmp_path / "out").whatif(texts[1])
    assert written.mean("nll", "base") == pytest.approx(measured.mean("nll", "distilled"), abs=1e-6)


def test_training_that_does_harm_leaves_the_routers_as_they_were(
    demo: Model, texts: tuple[CalibrationSet, CalibrationSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "RATE", 1e4)
    plan = demo.distilled(demo.plan, texts[0], tmp_path / "new.safetensors", steps=4)
    new = load_file(plan.deltas_path)
    for block in demo.geometry.trunk:
        source = read_array(demo.checkpoint, block.router)[list(plan.layers[block.prefix].kept)]
        assert (source == new[block.router].float().numpy()).all(), block.router


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "ernie4_5_vl_moe", "llama4", "dbrx", "gemma4_text", "zaya"]
)
def test_routers_of_every_kind_are_trained_and_written(
    name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored transposed, behind other matrices, beside a second set, scaling inputs: all go the same way."""
    monkeypatch.setattr(distil, "LOOKS", 2)
    try:
        model = Model(tiny_model(name, tmp_path_factory))
    except KeyError:
        model = Model(tiny_type(name, tmp_path_factory))
    data = tokens((30, 30, 20, 12), seed=3)
    plan = model.distilled(model.plan, data, tmp_path / "new.safetensors", steps=2)
    assert plan.deltas is not None and plan.deltas.tensors.keys() == model.routers
    prune(model.checkpoint, model.geometry, plan, tmp_path / "out")
    written = Model(tmp_path / "out").whatif(data)
    assert written.mean("nll", "base") == pytest.approx(model.whatif(data, x=plan).mean("nll", "x"), abs=1e-5)


def test_distilled_routers_that_do_not_help_are_not_kept(
    demo: Model, healed: Plan, texts: tuple[CalibrationSet, CalibrationSet], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "new.safetensors"
    before = Healed(
        healed, "healed", [], {"healed": 4}, {}, False, demo.whatif(texts[1], plain=demo.plan, healed=healed)
    )

    def finish(steps: int) -> Healed:
        return distil_healed(
            demo.checkpoint, demo.geometry, before, *texts, path, OPTIONS, steps=steps, notify=silent, advance=silent
        )

    with monkeypatch.context() as patch:
        patch.setattr(distil, "RATE", 0.0)
        same = finish(1)
    assert (same.distilled, same.plan, same.name) == (False, healed, "healed")
    assert same.found.difference(DISTILLED.format("healed"), "healed").value == 0
    assert not list(tmp_path.iterdir())

    kept = finish(STEPS)
    assert kept.distilled and kept.plan.deltas_path == path
    assert kept.found.difference(kept.name, "healed").sign < 0
    assert set(load_file(path)) == kept.plan.deltas.tensors.keys() > demo.routers  # type: ignore[union-attr]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_healing_distils_what_it_chose(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model, data = Model(tiny_model("qwen3_moe", tmp_path_factory)), tokens((30,) * 8, seed=3)
    found = heal_plan(
        model.checkpoint, model.geometry, model.plan, data, data, tmp_path / "new.safetensors", OPTIONS, distil=2,
        notify=silent, advance=silent,
    )  # fmt: skip
    assert DISTILLED.format(found.name.removesuffix(DISTILLED.format(""))) == found.found.names[-1]
    assert bool(found.plan.deltas) == (tmp_path / "new.safetensors").exists()


def test_what_cannot_be_trained_is_refused(
    demo: Model, texts: tuple[CalibrationSet, CalibrationSet], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="found 1 sequences"):
        demo.distilled(demo.plan, replace(texts[0], sequences=texts[0].sequences[:1]), tmp_path / "x")
    router, tensors = min(demo.routers), dict(demo.checkpoint.tensors)
    tensors[router] = replace(tensors[router], dtype="F8_E4M3")
    with pytest.raises(PlanError, match="no router can be trained in"):
        distil.distil_routers(
            replace(demo.checkpoint, tensors=tensors), demo.geometry, demo.plan, texts[0], tmp_path / "x", OPTIONS,
            steps=1, notify=silent, advance=silent,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
