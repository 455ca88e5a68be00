"""The laws for plans with new values: what a fit assumes is what the healed model does, in memory and on disk.

Experts are dropped and the top-k lowered. The fit says what the hidden states behind every healed layer will be; that
is compared with the layer itself, run with the values of the file, and with the written checkpoint.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from law_models import Model
from quantised_models import EIGHT_BITS, quantised_pair
from test_law_gain import gained
from tiny_models import NAMES, silent, tiny_model, tokens
from tiny_types import NOT_STREAMED, STREAMED, tiny_type
from torch import nn

from expertcut.calibrate import residual
from expertcut.calibrate.batches import make_batches
from expertcut.calibrate.executor import LayerStream, find_experts
from expertcut.calibrate.passage import Passage
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import Plan
from expertcut.errors import CheckpointError, PlanError
from expertcut.measure import heal_fit
from expertcut.measure.heal import _prefixes
from expertcut.measure.heal_fit import fit_deltas
from expertcut.measure.heal_record import LayerHealed
from expertcut.measure.numeric import verify_numeric
from expertcut.measure.variants import Variant
from expertcut.model import read_geometry
from expertcut.model.families import SCALING_KEYS
from expertcut.rewrite import Check, prune, require, verify_bytes, verify_structure
from expertcut.rewrite.record import Record

OPTIONS = ProfileOptions(device="cpu", dtype="float32")
DATA = tokens((56, 56, 40), seed=12)
UNHEALABLE = {"muse_spark": "muse_spark: a norm follows each expert"}
"""Types that cannot be healed, and what the refusal says."""
FACTORS = {*SCALING_KEYS, *residual.FACTORS.values()}
"""Config keys of factors on what experts add; many are 1 unless a config says otherwise, which would hide them."""


@dataclass
class Assumed:
    """What a fit took the hidden states before and behind a layer to be, by micro-batch."""

    entered: list[torch.Tensor]
    """The unchanged model's."""
    given: list[torch.Tensor]
    """The plan's, healed so far."""
    carried: list[torch.Tensor | None]
    healed: list[torch.Tensor]


@dataclass
class Fitted:
    """A plan with new values, and what their fit assumed."""

    plan: Plan
    healed: Plan
    layers: dict[int, LayerHealed]
    assumed: dict[int, Assumed]


def scaled(folder: Path, out: Path) -> Model:
    """A copy of a checkpoint, each of its FACTORS multiplied."""

    def changed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: changed(below, name) for name, below in value.items()}
        return value * 1.25 if key in FACTORS and value else value

    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(changed(config)))
    return Model(out)


def lower(model: Model) -> Plan:
    """Fewer experts, and fewer per token where the family lets a plan say so."""
    family, top_k = model.geometry.family, model.geometry.top_k
    return model.random_plan(seed=3, top_k=top_k - 1 if top_k > 1 and not family.fixed_top_k else None)


def fitted(model: Model, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Fitted:
    """Fit all layers with the same ridge, as random weights and text may not tell that one helps."""
    assumed, heal = dict[int, Assumed](), heal_fit._Run.heal

    def noted(self: Any, block: Any, base: Any, names: list[str]) -> Any:
        passage, track = self.passage, self.track or 0
        before = list(passage.hidden[0]), list(passage.hidden[track]), list(passage.carried[track])
        found = heal(self, block, base, names)
        assumed[block.layer] = Assumed(*before, list(passage.hidden[self.track]))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(heal_fit, "best_ridge", lambda *args: (0.1, 0.0))
        patch.setattr(heal_fit._Run, "heal", noted)
        deltas, layers = fit_deltas(
            model.checkpoint, model.geometry, plan, DATA, folder / "new.safetensors", OPTIONS, notify=silent,
            advance=silent,
        )  # fmt: skip
    return Fitted(plan, plan.beside(folder, deltas), {layer.layer: layer for layer in layers}, assumed)


def opened(checkpoint: Checkpoint, folder: ExitStack) -> tuple[LayerStream, Passage]:
    """The checkpoint's layers, and the text ready to enter them."""
    stream = folder.enter_context(open_stream(checkpoint, read_geometry(checkpoint), DATA, OPTIONS, silent))
    batches = make_batches([s.ids for s in DATA.sequences], [0] * len(DATA.sequences), OPTIONS.micro_tokens)
    return stream, Passage(stream, batches, 1, silent)


def logits(passage: Passage) -> list[torch.Tensor]:
    return [found for _, _, found in passage.logits(0)]


def through(
    passage: Passage, index: int, layer: nn.Module, given: list[torch.Tensor], carried: list[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states behind a layer, and what its experts added up to, without padding: (T, …)."""
    hidden, sums = list[torch.Tensor](), list[torch.Tensor]()
    experts = layer.get_submodule(find_experts(layer) or "")
    hook = experts.register_forward_hook(lambda module, args, out: sums.append(out.flatten(0, -2)))
    for at, prepared in enumerate(passage.prepared):
        hidden.append(passage.stream.call(layer, given[at], prepared.calls[index], carried[at])[0])
    hook.remove()
    return real(passage, hidden), torch.cat(sums)[valid(passage)]


def valid(passage: Passage) -> torch.Tensor:
    return torch.cat([p.batch.domain.flatten() >= 0 for p in passage.prepared])


def real(passage: Passage, hidden: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([some.flatten(0, 1) for some in hidden])[valid(passage)]


def check_layers(model: Model, fit: Fitted, rounding: float) -> list[torch.Tensor]:
    """Run every healed layer on what the fit brought to it, and compare with what it took the layer to do.

    `rounding` is how far they may be apart, as a share of what healing changes, both as root mean squares. Returns the
    healed model's logits.
    """
    with ExitStack() as stack:
        stream, passage = opened(model.checkpoint, stack)
        assert bool(valid(passage).all()) is False
        plain, healed = Variant(stream, fit.plan), Variant(stream, fit.healed)
        joins = residual.joining_factor(stream.config) is not None
        for index, base in stream.layers():
            layer = healed.layer(index, base)
            if index in fit.assumed:
                said, fewer = fit.assumed[index], plain.layer(index, base)
                whole = through(passage, index, base, said.entered, said.carried)
                before, after = (through(passage, index, it, said.given, said.carried) for it in (fewer, layer))
                change, wrong = (
                    float((after[0] - other).square().mean().sqrt())
                    for other in (before[0], real(passage, said.healed))
                )
                assert change > 0 and fit.layers[index].changed > 0
                assert wrong <= rounding * change, index
                target, planned, found = (states[0 if joins else 1].double() for states in (whole, before, after))
                left = float((target - found).square().sum() / (target - planned).square().sum())
                assert left < 1 and fit.layers[index].left == pytest.approx(left, rel=rounding)
            passage.step(index, layer)
        assert fit.assumed.keys() == fit.layers.keys() == {block.layer for block in model.geometry.trunk}
        return logits(passage)


def logits_of(model: Model, plan: Plan) -> list[torch.Tensor]:
    """What the plan in memory makes of the text."""
    with ExitStack() as stack:
        stream, passage = opened(model.checkpoint, stack)
        variant = Variant(stream, plan)
        for index, base in stream.layers():
            passage.step(index, variant.layer(index, base))
        return logits(passage)


def check_written(model: Model, fit: Fitted, out: Path, expected: list[torch.Tensor]) -> None:
    prune(model.checkpoint, model.geometry, fit.healed, out)
    require(verify_structure(out, model.checkpoint) + verify_bytes(out, model.checkpoint))
    with ExitStack() as stack:
        stream, passage = opened(open_checkpoint(out), stack)
        for index, layer in stream.layers():
            passage.step(index, layer)
        assert all(torch.equal(one, other) for one, other in zip(logits(passage), expected, strict=True))


@pytest.mark.parametrize("name", [name for name in STREAMED if name not in UNHEALABLE])
def test_law_3_for_healed_plans(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scaled(tiny_type(name, tmp_path_factory), tmp_path / "model")
    fit = fitted(model, lower(model), tmp_path, monkeypatch)
    check_written(model, fit, tmp_path / "out", check_layers(model, fit, 1e-4))


@pytest.mark.parametrize("name", NAMES)
def test_law_3_for_healed_plans_as_the_hub_stores_them(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New values are rounded to bfloat16."""
    model = scaled(tiny_model(name, tmp_path_factory), tmp_path / "model")
    fit = fitted(model, lower(model), tmp_path, monkeypatch)
    check_written(model, fit, tmp_path / "out", check_layers(model, fit, 0.05))


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("gain", [None, 0.8])
def test_law_3_for_healed_plans_of_8_bits(
    name: str, gain: float | None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Codes are coarse, but the fit knows what they come to."""
    model = Model(quantised_pair(name, tmp_path_factory)[0])
    plan = lower(model)
    if gain and name != "MXFP8":  # whose scales hold no gain
        plan = gained(plan, gain, 1.1)
    fit = fitted(model, plan, tmp_path, monkeypatch)
    check_written(model, fit, tmp_path / "out", check_layers(model, fit, 1e-4))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe"])
@pytest.mark.parametrize("gains", [(0.8,), (0.8, 1.1)], ids=["one", "each"])
def test_law_3_with_gains_and_new_values_of_some_layers(
    name: str, gains: tuple[float, ...], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """New values are found with the gain; where there are none it is in the config, or in the old ones and biases."""
    model = scaled(tiny_model(name, tmp_path_factory), tmp_path / "model")
    fit = fitted(model, gained(lower(model), *gains), tmp_path, monkeypatch)
    expected = check_layers(model, fit, 0.05)
    check_written(model, fit, tmp_path / "out", expected)
    some = dict(_prefixes(model.geometry, fit.healed))[1]
    check_written(model, replace(fit, healed=some), tmp_path / "some", logits_of(model, some))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe"])
def test_law_3_for_healed_plans_whose_layers_differ(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first layer with experts loses any; those behind it mend what it leaves."""
    model = scaled(tiny_model(name, tmp_path_factory), tmp_path / "model")
    plan, first = lower(model), model.geometry.trunk[0].prefix
    whole = model.plan(range(model.geometry.num_experts)).layers
    plan = plan.model_copy(update={"layers": whole | {first: plan.layers[first]}, "per_layer": True})
    fit = fitted(model, plan, tmp_path, monkeypatch)
    check_written(model, fit, tmp_path / "out", check_layers(model, fit, 0.05))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe"])
def test_law_3_as_verify_checks_it(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of new values is not asked for: the record has their sums, the checkpoint has them."""
    model = Model(tiny_model(name, tmp_path_factory))
    fit = fitted(model, lower(model), tmp_path, monkeypatch)
    prune(model.checkpoint, model.geometry, fit.healed, tmp_path / "out")
    (tmp_path / "new.safetensors").unlink()

    def verified() -> list[Check]:
        return verify_numeric(
            open_checkpoint(tmp_path / "out"), model.checkpoint, Record.load(tmp_path / "out").plan, DATA,
            device="cpu", notify=silent, advance=silent,
        )  # fmt: skip

    require(verified())
    prune(model.checkpoint, model.geometry, fit.plan, tmp_path / "plain")
    for shard in (tmp_path / "plain").glob("*.safetensors"):
        shutil.copy(shard, tmp_path / "out")
    with pytest.raises(PlanError, match="does not have the sha256 that the plan gives"):
        verified()


@pytest.mark.parametrize("name", UNHEALABLE)
def test_a_type_that_cannot_be_healed_is_refused_by_name(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tiny_type(name, tmp_path_factory))
    with pytest.raises(PlanError, match=UNHEALABLE[name]):
        fitted(model, lower(model), tmp_path, monkeypatch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NOT_STREAMED)
def test_a_type_that_cannot_be_streamed_is_refused(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tiny_type(name, tmp_path_factory))
    with pytest.raises(CheckpointError, match=NOT_STREAMED[name]):
        fitted(model, lower(model), tmp_path, monkeypatch)
    assert list(tmp_path.iterdir()) == []
