"""The laws for plans with a gain: a factor on what a layer's routed experts add up to, in the config or in weights.

Told apart by an independent way: transformers' own model of the source, its experts' output multiplied by a hook.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from law_models import Model
from test_law_types import load, logits
from tiny_models import read_tensors, silent, tokens
from tiny_types import STREAMED, SUPPORTED, tiny_type

from expertcut.checkpoint import open_checkpoint
from expertcut.choose import Plan
from expertcut.errors import PlanError
from expertcut.measure.numeric import verify_numeric
from expertcut.model.places import in_tower
from expertcut.rewrite import prune, require, verify_bytes, verify_structure
from expertcut.rewrite.gain import config_gain, folded

GAIN = 0.5
"""A power of two: folding it rounds nothing."""
DATA = tokens((30, 30), seed=11)
NONE = {"gemma4", "gemma4_text", "diffusion_gemma", "diffusion_gemma_text"}
"""Types that normalise what the experts add up to, so that a factor on it does nothing."""
BY_CONFIG_ONLY = {"longcat_flash", "muse_spark"}
"""Types that a gain cannot be folded into."""


@pytest.fixture(scope="module", params=SUPPORTED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_type(name, tmp_path_factory))


def gained(plan: Plan, *gains: float) -> Plan:
    """The plan with these gains in its layers, by turns."""
    places = sorted({entry.layer for entry in plan.layers.values()})
    layers = {
        prefix: entry.model_copy(update={"gain": gains[places.index(entry.layer) % len(gains)]})
        for prefix, entry in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})


@contextmanager
def scaled(source: Any, layers: set[int]) -> Iterator[None]:
    """While this lasts, the experts of these layers give GAIN times what they do."""
    pattern = re.compile(r"(?:layers|blocks)\.(\d+)\.(?:[a-z_]+\.)*experts$")
    hooks = [
        module.register_forward_hook(lambda module, args, out: out * GAIN)
        for path, module in source.named_modules()
        if (found := pattern.search(path)) and int(found[1]) in layers and not in_tower(path)
    ]
    assert len(hooks) >= len(layers)
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("differ", [False, True], ids=["alike", "differ"])
def test_a_gain_multiplies_what_the_experts_add_up_to(name: str, model: Model, differ: bool, tmp_path: Path) -> None:
    plan = gained(model.plan(range(model.geometry.num_experts)), GAIN, *[1.0] * differ)
    if name in NONE or (differ and name in BY_CONFIG_ONLY):
        with pytest.raises(PlanError, match="gain: "):
            prune(model.checkpoint, model.geometry, plan, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return
    prune(model.checkpoint, model.geometry, plan, tmp_path / "out")
    require(verify_structure(tmp_path / "out", model.checkpoint) + verify_bytes(tmp_path / "out", model.checkpoint))
    source, found = load(name, model.folder), logits(name, load(name, tmp_path / "out"))
    plain = logits(name, source)
    with scaled(source, {entry.layer for entry in plan.layers.values() if entry.gain == GAIN}):
        expected = logits(name, source)
    spread = float(plain.std())
    assert float((found - expected).abs().max()) <= 1e-5 * spread
    assert float((found - plain).abs().max()) > 1e-5 * spread
    changed = [
        n for n, t in read_tensors(tmp_path / "out").items() if not torch.equal(t, read_tensors(model.folder)[n])
    ]
    assert bool(changed) != bool(config_gain(model.checkpoint.config, model.geometry, plan))
    assert sorted(changed) == sorted(folded(model.checkpoint, model.geometry, plan))


@pytest.mark.parametrize("name", [name for name in STREAMED if name not in NONE], indirect=True)
def test_law_3_as_verify_checks_it(name: str, model: Model, tmp_path: Path) -> None:
    """With dropped experts, and gains that round: the in-memory variant is the written checkpoint, bit for bit."""
    plan = gained(model.random_plan(seed=3), 0.8, *[1.1] * (name not in BY_CONFIG_ONLY))
    prune(model.checkpoint, model.geometry, plan, tmp_path / "out")
    checks = verify_numeric(
        open_checkpoint(tmp_path / "out"), model.checkpoint, plan, DATA, device="cpu", notify=silent, advance=silent
    )
    assert [check for check in checks if not check.ok] == []
