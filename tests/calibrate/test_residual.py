"""The residual stream before and after the routed experts, for every model type, by switching the experts off.

The recomputation runs transformers' own model, whole: what a layer's output lacks without its experts is what they add,
and what they add it to is what entered the norm before the block, found by its name. The output of each choice comes
from the experts module given that choice alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from reference import profile
from tiny_models import tokens
from tiny_types import EXPERTS, STREAMED, TWEAKS, build, model_class, tiny_config, tiny_type

from expertcut.calibrate.profile import CONTRIBUTION, Profile
from expertcut.calibrate.residual import ELSEWHERE, FACTORS
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import make_plan
from expertcut.errors import ProfileError
from expertcut.model import read_geometry

Array = np.ndarray[Any, np.dtype[np.float64]]
DATA = tokens((9, 14, 11), seed=8)
NORMS = ("post_attention_layernorm", "pre_ff_layernorm", "norm_2", "ffn_norm", "norm")
"""Names of the norm before a MoE block, the most special one first."""
APART = {
    "afmoe", "axk1", "beam", "cohere2_moe", "deepseek_v4", "flex_olmo", "gemma4", "gemma4_text", "glm5_next", "hy_v4",
    "inkling2", "inkling2_text", "inkling_mm_model", "inkling_text", "kolibri1", "longcat_flash", "minimax",
    "muse_spark", "qwen4_exp", "qwen4_exp_text",
}  # fmt: skip
"""Types whose experts' sum does not plainly join what the norm was given."""
FACTOR_KEYS = {
    "granitemoe": "residual_multiplier", "granitemoe_swa": "residual_multiplier",
    "granitemoehybrid": "residual_multiplier", "granitemoeshared": "residual_multiplier",
    "laguna": "moe_routed_scaling_factor", "minimax_m3_vl_text": "routed_scaling_factor",
    "step3p7": "text_config.moe_router_scaling_factor",
}  # fmt: skip
"""Type → path of the config key that multiplies their sum on its way there."""


class Layer:
    """A decoder layer of transformers' own model, and what went through it in one run."""

    before: torch.Tensor
    """Input of the norm before the block."""
    out: torch.Tensor
    routed: Any
    """What the experts module was called with: hidden states, indices, gates."""

    def __init__(self, module: Any) -> None:
        parts = [(name.rpartition(".")[2], part) for name, part in module.named_modules()]
        self.module, self.experts = module, next(part for name, part in parts if name == "experts")
        norm = next(part for wanted in NORMS for name, part in parts if name == wanted)
        self.hooks = [
            module.register_forward_pre_hook(self._on_layer, with_kwargs=True),
            module.register_forward_hook(lambda _, args, out: setattr(self, "out", _first(out))),
            norm.register_forward_pre_hook(lambda _, args: setattr(self, "before", args[0])),
            self.experts.register_forward_hook(lambda _, args, out: setattr(self, "routed", args)),
        ]

    def _on_layer(self, _: Any, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def contribution(self) -> Array:
        """(E,) Σ (1 − cos(h, h̃)) g‖f‖; of a dense experts module, which does not say who was chosen, the sum alone."""
        for hook in self.hooks:
            hook.remove()
        off = self.experts.register_forward_hook(lambda _, args, out: torch.zeros_like(out))
        added = self.out - _first(self.module(*self.args, **self.kwargs))
        off.remove()
        before, added = self.before.flatten(0, 1).double(), added.flatten(0, 1).double()
        turn = 1 - torch.nn.functional.cosine_similarity(before, before + added)
        if len(self.routed) == 1:
            return cast(Array, (turn * added.norm(dim=-1)).sum().numpy()[None])
        found = torch.zeros(EXPERTS + 5, dtype=torch.float64)
        x, index, gates = self.routed
        for chosen, gate in zip(index.split(1, dim=1), gates.split(1, dim=1), strict=True):
            one = self.experts(x, chosen, gate).flatten(0, -2).double().norm(dim=-1)
            found.index_add_(0, chosen[:, 0], turn * one)
        return cast(Array, found[:EXPERTS].numpy())


def _first(out: Any) -> torch.Tensor:
    return cast(torch.Tensor, out[0] if isinstance(out, tuple) else out)


@torch.no_grad()
def contributions(name: str, folder: Path) -> dict[int, Array]:
    """By layer, over all sequences."""
    total: dict[int, Array] = {}
    model = model_class(name).from_pretrained(folder, dtype=torch.float32).eval()
    for sequence in DATA.sequences:
        layers = {number: Layer(module) for number, module in decoder_layers(model)}
        language = model.thinker if name == "qwen3_omni_moe" else model
        language(input_ids=torch.from_numpy(sequence.ids)[None], use_cache=False)
        for number, layer in layers.items():
            total[number] = total.get(number, 0) + layer.contribution()
    return total


def decoder_layers(model: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    for name, module in model.named_modules():
        place = re.fullmatch(r"(.*)(?:layers|blocks)\.(\d+)", name)
        routed = any(part.rpartition(".")[2] == "experts" for part, _ in module.named_modules())
        if place and routed and not re.search("vision|talker", place[1]):
            yield int(place[2]), module


def check(found: Profile, expected: dict[int, Array]) -> None:
    for prefix in found.prefixes:
        stats = found.layer(prefix)
        mine = stats.contribution_sum
        if len(expected[stats.layer]) == 1:
            mine = mine.sum(keepdims=True)
        assert mine.max() > 0
        np.testing.assert_allclose(mine, expected[stats.layer], rtol=2e-3, atol=2e-4 * mine.max())


@pytest.mark.parametrize("name", STREAMED)
def test_contribution_of_every_type(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_type(name, tmp_path_factory)
    found = profile(folder, DATA, tmp_path_factory.mktemp("profile"), micro_tokens=1)
    if name not in APART:
        check(found, contributions(name, folder))
        return
    assert not any(key.endswith(CONTRIBUTION) for key in found.arrays)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ProfileError, match=rf"{CONTRIBUTION}: .*not plainly added to the residual stream") as caught:
        make_plan(checkpoint, read_geometry(checkpoint), strategy="easy-ep", experts=4, profile=found)
    assert caught.value.hint == "use another --strategy, such as gated-norm-sum"


@pytest.mark.parametrize(("name", "key"), FACTOR_KEYS.items())
def test_what_the_layer_multiplies_their_sum_by(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TWEAKS, name, TWEAKS.get(name, {}) | {key: 0.25})
    build(name).save_pretrained(tmp_path / "model")
    found = profile(tmp_path / "model", DATA, tmp_path / "profile", micro_tokens=1)
    check(found, contributions(name, tmp_path / "model"))


def test_experts_in_a_space_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they return is not what joins the stream."""
    monkeypatch.setitem(TWEAKS, "nemotron_h", TWEAKS["nemotron_h"] | {"moe_latent_size": 16})
    build("nemotron_h").save_pretrained(tmp_path / "model")
    found = profile(tmp_path / "model", DATA, tmp_path / "profile")
    assert found.layer(found.prefixes[0]).norm_sum.max() > 0
    assert not any(key.endswith(CONTRIBUTION) for key in found.arrays)


def test_the_package_lists_what_is_tested_here() -> None:
    def text_types(names: Iterable[str]) -> set[str]:
        return {tiny_config(name).get_text_config().model_type for name in names}

    assert text_types(APART) == ELSEWHERE
    assert text_types(FACTOR_KEYS) == FACTORS.keys()
