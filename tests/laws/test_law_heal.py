"""The laws for plans with new values of tensors: what a fit assumes is what the healed model does, in memory and on disk.

Experts are dropped and the top-k lowered. The fit says what the hidden states behind every healed layer will be; that is
compared with the layer itself, run with the values of the file, and with the written checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from law_models import Model
from tiny_models import NAMES, silent, tiny_model, tokens
from tiny_types import NOT_STREAMED, STREAMED, SUPPORTED, tiny_type

from expertcut.calibrate.batches import Batch, make_batches
from expertcut.calibrate.passage import Passage
from expertcut.calibrate.run import ProfileOptions, open_stream
from expertcut.checkpoint import Checkpoint, open_checkpoint
from expertcut.choose import Plan
from expertcut.errors import CheckpointError, PlanError
from expertcut.measure import heal_fit
from expertcut.measure.heal_fit import LayerHealed, fit_deltas
from expertcut.measure.variants import Variant
from expertcut.measure.whatif import run_plans
from expertcut.model import read_geometry
from expertcut.rewrite import prune, require, verify_bytes, verify_structure

OPTIONS = ProfileOptions(device="cpu", dtype="float32")
DATA = tokens((60, 60, 44, 60), seed=12)
REFUSED = {"gemma4": "x", "gemma4_text": "x"}
"""Types that cannot be healed, and what the refusal says."""


@dataclass
class Assumed:
    """What a fit takes a layer's input and output to be, micro-batch by micro-batch."""

    given: list[torch.Tensor]
    carried: list[torch.Tensor | None]
    base: list[torch.Tensor]
    """What the unchanged model's layer made of its own input."""
    healed: list[torch.Tensor]


@dataclass
class Fitted:
    """A plan with new values, and what the fit assumed."""

    plan: Plan
    healed: Plan
    layers: list[LayerHealed]
    assumed: dict[int, Assumed] = field(default_factory=dict)


def batches() -> list[Batch]:
    return make_batches([s.ids for s in DATA.sequences], [0] * len(DATA.sequences), OPTIONS.micro_tokens)


def lower(model: Model) -> Plan:
    """Fewer experts, and fewer per token where the family lets a plan say so."""
    family, top_k = model.geometry.family, model.geometry.top_k
    return model.random_plan(seed=3, top_k=top_k - 1 if top_k > 1 and not family.fixed_top_k else None)


def fitted(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Fitted:
    """Fit all layers with the same ridge, as random weights and text may not tell that one helps."""
    plan, assumed, heal = lower(model), dict[int, Assumed](), heal_fit._Run.heal

    def noted(self: Any, block: Any, base: Any, names: list[str]) -> Any:
        track = self.track or 0
        given, carried = list(self.passage.hidden[track]), list(self.passage.carried[track])
        found = heal(self, block, base, names)
        assumed[block.layer] = Assumed(
            given, carried, list(self.passage.hidden[0]), list(self.passage.hidden[self.track])
        )
        return found

    with monkeypatch.context() as patch:
        patch.setattr(heal_fit, "best_ridge", lambda *args: (0.1, 0.0))
        patch.setattr(heal_fit._Run, "heal", noted)
        deltas, layers = fit_deltas(
            model.checkpoint, model.geometry, plan, DATA, folder / "new.safetensors", OPTIONS, notify=silent,
            advance=silent,
        )  # fmt: skip
    return Fitted(plan, plan.beside(folder, deltas), layers, assumed)


def check_arithmetic(model: Model, fit: Fitted, rounding: float) -> None:
    """Compare every healed layer, on what the fit brought to it, with what the fit took it to do.

    `rounding` is the largest difference, as a share of what healing changes.
    """
    with open_stream(model.checkpoint, model.geometry, DATA, OPTIONS, silent) as stream:
        passage, done = Passage(stream, batches(), 1, silent), 0
        plain, healed = Variant(stream, fit.plan), Variant(stream, fit.healed)
        for index, base in stream.layers():
            if index not in fit.assumed:
                continue
            said = fit.assumed[index]
            before, after = (
                [
                    stream.call(layer, said.given[at], prepared.calls[index], said.carried[at])[0]
                    for at, prepared in enumerate(passage.prepared)
                ]
                for layer in (plain.layer(index, base), healed.layer(index, base))
            )
            valid = torch.cat([p.batch.domain.flatten() >= 0 for p in passage.prepared])
            planned, found, expected, whole = (
                torch.cat([t.flatten(0, -2) for t in some])[valid] for some in (before, after, said.healed, said.base)
            )
            size = float((found - planned).square().mean().sqrt())
            assert size > 0
            print(f"  layer {index}: {float((found - expected).abs().max()) / size:.2e}", size, fit.layers[done])
            assert float((found - expected).abs().max()) <= rounding * size, index
            done += 1
        assert done == len(fit.layers)


def logits(checkpoint: Checkpoint, plans: list[Plan]) -> list[list[torch.Tensor]]:
    """Logits of the tokens of every plan, of the checkpoint itself if there is none."""
    with open_stream(checkpoint, read_geometry(checkpoint), DATA, OPTIONS, silent) as stream:
        passage, tracks = run_plans(stream, batches(), plans, silent, silent)
        return [[found for _, _, found in passage.logits(track)] for track in tracks or [0]]


def check_written(model: Model, fit: Fitted, out: Path) -> None:
    prune(model.checkpoint, model.geometry, fit.healed, out)
    require(verify_structure(out, model.checkpoint) + verify_bytes(out, model.checkpoint))
    healed, planned = logits(model.checkpoint, [fit.healed, fit.plan])
    (written,) = logits(open_checkpoint(out), [])
    assert all(torch.equal(one, other) for one, other in zip(healed, written, strict=True))
    assert not torch.equal(healed[0], planned[0])


@pytest.mark.parametrize("name", SUPPORTED)
def test_law_3_for_healed_plans(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tiny_type(name, tmp_path_factory))
    fit = fitted(model, tmp_path, monkeypatch)
    assert all(layer.changed == layer.maps or layer.changed >= 1 for layer in fit.layers)
    check_arithmetic(model, fit, 1e-3)
    check_written(model, fit, tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_law_3_for_healed_plans_as_the_hub_stores_them(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tiny_model(name, tmp_path_factory))
    fit = fitted(model, tmp_path, monkeypatch)
    check_arithmetic(model, fit, 0.1)
    check_written(model, fit, tmp_path / "out")
