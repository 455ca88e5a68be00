"""Gains: the fit against transformers' own modules, one layer after the other; and none is kept that does not help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import load, moe_blocks
from tiny_models import silent, tiny_model, tokens
from tiny_types import tiny_type

from expertcut.calibrate.data import load_calibration
from expertcut.calibrate.passage import Passage
from expertcut.calibrate.run import ProfileOptions
from expertcut.calibrate.tokenizer import load_tokenizer
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan, make_plan
from expertcut.choose.plan import gains
from expertcut.errors import PlanError
from expertcut.measure.gain import EACH, ONE, fit_gains, gain_plans, with_gains
from expertcut.model import read_geometry

DEMO = "built-in model"
OPTIONS = ProfileOptions(device="cpu", dtype="float32")
DATA = tokens((40, 40, 25), seed=4)


class Model:
    """An opened checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, open_checkpoint(folder)
        self.geometry = read_geometry(self.checkpoint)

    def fewer(self, top_k: int) -> Plan:
        """All experts, a lower top-k."""
        return make_plan(self.checkpoint, self.geometry, top_k=top_k)


def fitted_by_hand(model: Model, top_k: int) -> dict[int, float]:
    """Layer by layer on transformers' model of the source: routers set lower, experts' outputs multiplied."""
    found: dict[int, float] = {}
    source: Any = load(model.folder)
    blocks = moe_blocks(source)
    routers = {layer: block.router if hasattr(block, "router") else block.gate for layer, block in blocks.items()}
    most = model.geometry.top_k
    for layer in blocks:
        outputs: dict[int, list[torch.Tensor]] = {most: [], top_k: []}
        for k in outputs:
            for other, router in routers.items():
                router.top_k = top_k if other < layer else k if other == layer else most
            gained = [
                blocks[other].experts.register_forward_hook(lambda m, a, out, c=found[other]: out * c)
                for other in found
            ]
            seen = outputs[k]
            hook = blocks[layer].experts.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            with torch.no_grad():
                for sequence in DATA.sequences:
                    source(torch.from_numpy(sequence.ids)[None])
            for one in [hook, *gained]:
                one.remove()
        whole, planned = (torch.cat([o.reshape(-1, o.shape[-1]) for o in outputs[k]]).double() for k in (most, top_k))
        found[layer] = float((whole * planned).sum() / (planned * planned).sum())
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", DEMO])
def test_the_fit_is_the_best_factor_on_the_plans_own_hidden_states(
    name: str, tmp_path_factory: pytest.TempPathFactory, demo_model: Path
) -> None:
    model = Model(demo_model if name == DEMO else tiny_model(name, tmp_path_factory))
    plan = model.fewer(1)
    found = fit_gains(
        model.checkpoint, model.geometry, {"a": plan, "b": with_gains(plan, dict.fromkeys(plan.layers, 3.0))},
        DATA, OPTIONS, notify=silent, advance=silent,
    )  # fmt: skip
    expected = fitted_by_hand(model, 1)
    assert found["a"] == found["b"], "gains that a plan has are not looked at"
    assert list(found["a"].values()) == pytest.approx([expected[b.layer] for b in model.geometry.trunk], abs=2e-4)


def test_padding_counts_for_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sequences of other lengths in one micro-batch give the gains that they give alone."""
    model = Model(tiny_model("qwen3_moe", tmp_path_factory))
    plans = {"a": model.fewer(1)}
    together, alone = (
        fit_gains(model.checkpoint, model.geometry, plans, tokens((40, 12, 25), seed=9),
                  ProfileOptions(device="cpu", dtype="float32", micro_tokens=size), notify=silent, advance=silent)["a"]
        for size in (10_000, 1)
    )  # fmt: skip
    assert list(together.values()) == pytest.approx(list(alone.values()), abs=1.1e-4)


def test_running_out_of_memory_changes_no_gain(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches are halved on the way, also between the two runs of a layer."""
    model = Model(tiny_model("qwen3_moe", tmp_path_factory))
    plans, run, refused = {"a": model.fewer(1), "b": model.fewer(2)}, Passage._run, list[int]()

    def fit() -> dict[str, dict[str, float]]:
        data = tokens((20, 20, 20, 20), seed=9)
        return fit_gains(model.checkpoint, model.geometry, plans, data, OPTIONS, notify=silent, advance=silent)

    def tight(self: Passage, index: int, layer: Any, track: int, at: int, watcher: Any) -> None:
        if len(self.prepared[at].batch.rows) > 4 - track:
            refused.append(track)
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, index, layer, track, at, watcher)

    whole = fit()
    monkeypatch.setattr(Passage, "_run", tight)
    halved = fit()
    assert refused
    for name in plans:
        assert list(halved[name].values()) == pytest.approx(list(whole[name].values()), abs=1.1e-4)


def test_gains_that_help_are_kept_and_others_are_not(demo_model: Path, tmp_path: Path) -> None:
    model, tokenizer = Model(demo_model), load_tokenizer(demo_model)
    recipe = tmp_path / "heldout.yaml"
    recipe.write_text("description: x\nsources:\n" + "".join(
        f"  - {{kind: builtin, domain: {domain}, part: heldout}}\n" for domain in ("prose", "german", "python")
    ))  # fmt: skip
    fit_on = load_calibration(["builtin"], tokenizer, tokens=3000, seq_len=128)
    judge_on = load_calibration([recipe], tokenizer, tokens=3000, seq_len=128)
    nothing = model.fewer(model.geometry.top_k)
    found, what = gain_plans(
        model.checkpoint, model.geometry, {"one": model.fewer(1), "nothing": nothing}, fit_on, judge_on, OPTIONS,
        notify=silent, advance=silent,
    )  # fmt: skip
    assert found["nothing"].kept is None and found["nothing"].plan == nothing
    kept = found["one"]
    assert kept.kept in (ONE, EACH) and what.difference(kept.shown, "one").sign < 0
    assert all(0.3 < gain < 1 for gain in gains(kept.plan, model.geometry).values())
    assert set(what.names) == {"base", "one", "nothing"} | {f"one, {kind}" for kind in (ONE, EACH)}


def test_a_family_that_can_carry_no_gain_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = Model(tiny_type("gemma4_text", tmp_path_factory))
    with pytest.raises(PlanError, match="outputs are normalised"):
        gain_plans(
            model.checkpoint, model.geometry, {"a": model.fewer(1)}, DATA, DATA, OPTIONS, notify=silent, advance=silent
        )
