"""The observer for every model type: counts, ranks, gate sums and entropy equal those recomputed in loops.

The recomputation shares nothing with the package or with transformers: it knows each type's way of routing by itself.
What routers are given and which logits they form comes from hooks on transformers' own model, run whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from reference import profile
from tiny_models import calibration, read_tensors, tokens
from tiny_types import EXPERTS, NOT_STREAMED, STREAMED, SUPPORTED, model_class, tiny_type

from expertcut.calibrate.profile import Profile, merge
from expertcut.checkpoint import open_checkpoint
from expertcut.errors import CheckpointError
from expertcut.model import read_geometry

Array = np.ndarray[Any, np.dtype[np.float64]]
DATA = tokens((9, 14, 11), seed=8)
SIGMOID = {
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note",
    "dots3_note_text", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa",
    "hy_v3", "hy_v4", "inkling2",
    "inkling2_text", "inkling_mm_model", "inkling_text", "kimi_k25", "kimi_linear", "laguna", "lfm2_moe",
    "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text", "muse_spark", "nemo_speechlm", "nemotron_h",
    "nemotron_h_omni", "solar_open", "step3p7",
}  # fmt: skip
BY_LOGIT = {
    "aria", "aria_text", "cohere2_moe", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared",
}  # fmt: skip
"""The softmax is taken over the chosen logits."""
NOT_SCALED = {
    "deepseek_ocr2", "deepseek_v2", "dots1", "flex_olmo", "jamba", "kolibri1", "longcat_flash", "olmoe", "qwen2_moe",
    "qwen3_moe", "unlimited_ocr", "llama4", "llama4_text", "zaya",
}  # fmt: skip
"""Gate weights are not scaled to sum to one, in the tiny configs."""
OUTSIDE = {"beam", "laguna", "minimax_m3_vl", "minimax_m3_vl_text", "step3p7"}
"""The scaling factor multiplies the experts' sum, not the gates."""
FACTORS = ("routed_scaling_factor", "router_scaling_factor", "route_scale")


@dataclass
class Seen:
    """What one router was given and returned, all tokens of one sequence."""

    router: Any
    inputs: Array
    logits: Array
    ids: np.ndarray


class Rule:
    """One model type's way of routing, one token at a time, in float64."""

    def __init__(self, name: str, folder: Path) -> None:
        raw = open_checkpoint(folder).config
        text = raw.get("thinker_config", raw).get("text_config", raw)
        self.name, self.config = name, text
        self.top_k = 1 if name in ("llama4", "llama4_text", "zaya") else 2
        factor = next((text[key] for key in FACTORS if text.get(key) is not None), 1.0)
        self.factor = 1.0 if name in OUTSIDE else float(factor)
        self.groups = max(text.get("n_group") or 1, text.get("num_expert_group") or 1)
        biases = ("e_score_correction_bias", "expert_bias", "gate.bias", "router_bias", "balancing_biases")
        self.biases = {k: t.double().numpy().reshape(-1) for k, t in read_tensors(folder).items() if k.endswith(biases)}

    def bias(self, layer: int, size: int) -> Array:
        if self.name == "gpt_oss":
            return np.zeros(size)
        found = [t for k, t in self.biases.items() if re.search(rf"(layers|blocks)\.{layer}\.", k)]
        return found[0][:size] if found else np.zeros(size)  # Ernie-VL's holds that of its second router too

    def score(self, logits: Array) -> Array:
        """Weights before any choice, (E,)."""
        if self.name in SIGMOID or self.name == "kolibri1" or "llama4" in self.name:
            return cast(Array, 1 / (1 + np.exp(-logits)))
        if self.name == "deepseek_v4":
            return cast(Array, np.sqrt(np.log1p(np.exp(logits))))
        powers = np.exp(logits - logits.max())
        return cast(Array, powers / powers.sum())

    def entropy(self, logits: Array) -> float:
        p = self.score(logits)
        p = p / p.sum()
        return float(-(p * np.log(p)).sum())

    def route(self, seen: Seen, t: int, layer: int) -> list[tuple[int, float]]:
        """The chosen experts and their gate weights, best choice first."""
        logits = seen.logits[t]
        if self.name == "phimoe":
            return self._sparsemixer(logits)
        score = self.score(logits)
        choice = score + self.bias(layer, len(score))
        if self.name in BY_LOGIT or self.name == "kolibri1":
            choice = logits + (self.bias(layer, len(score)) if self.name == "kolibri1" else 0)
        if hasattr(seen.router, "tid2eid"):
            row = seen.router.tid2eid[int(seen.ids[t])].tolist()
            chosen = sorted(row, key=lambda e: -score[e])
        else:
            chosen = sorted(self._open(choice), key=lambda e: -choice[e])[: self.top_k]
        gates = [float(score[e]) for e in chosen]
        if self.name not in NOT_SCALED:
            total = sum(gates) + self._shared(seen, t)
            gates = [gate / total for gate in gates]
        if hasattr(seen.router, "per_expert_scale"):
            scales = seen.router.per_expert_scale.tolist()
            gates = [gate * scales[e] for e, gate in zip(chosen, gates, strict=True)]
        return [(e, self.factor * gate) for e, gate in zip(chosen, gates, strict=True)]

    def _open(self, choice: Array) -> list[int]:
        """Experts of the one group in use: the one whose two best are best."""
        experts = list(range(len(choice)))
        if self.groups == 1:
            return experts
        size = len(choice) // self.groups
        groups = [experts[g * size : (g + 1) * size] for g in range(self.groups)]
        return max(groups, key=lambda group: sum(sorted(choice[group])[-2:]))

    def _shared(self, seen: Seen, t: int) -> float:
        """Weight of shared experts that share in the total: Inkling's."""
        if self.name not in ("inkling_mm_model", "inkling_text"):
            return 0.0
        rows = seen.router.weight.detach().double().numpy()[EXPERTS:]
        return float((1 / (1 + np.exp(-(rows @ seen.inputs[t])))).sum())

    def _sparsemixer(self, logits: Array) -> list[tuple[int, float]]:
        chosen: list[tuple[int, float]] = []
        left = logits.copy()
        for _ in range(2):
            best = int(left.argmax())
            apart = (left[best] - logits) / np.maximum(np.abs(logits), left[best])
            near = apart <= 2 * self.config["router_jitter_noise"]
            powers = np.where(near & np.isfinite(left), np.exp(logits - left[best]), 0.0)
            chosen.append((best, float(powers[best] / powers.sum())))
            left[best] = -np.inf
        return chosen


def routers(model: torch.nn.Module) -> dict[int, Any]:
    """Routers by layer: what stands beside a module called experts."""
    found: dict[int, Any] = {}
    for name, _ in model.named_modules():
        path = re.fullmatch(r"(.*(?:layers|blocks)\.(\d+)(?:\.\w+){0,2})\.experts", name)
        if path and "vision" not in name and "talker" not in name:
            block = model.get_submodule(path[1])
            router = getattr(block, "router", None) or getattr(block, "gate", None)
            found[int(path[2])] = router
    return found


def watch(name: str, folder: Path, ids: np.ndarray) -> dict[int, Seen]:
    """Run one sequence through transformers' own model."""
    model = model_class(name).from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[int, Seen] = {}
    hooks = [
        router.register_forward_hook(
            lambda module, args, out, layer=layer: seen.update({layer: Seen(module, *_arrays(args[0], out), ids)})
        )
        for layer, router in routers(model).items()
    ]
    with torch.no_grad():
        (model.thinker if name == "qwen3_omni_moe" else model)(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def _arrays(inputs: torch.Tensor, out: Any) -> tuple[Array, Array]:
    outs = out if isinstance(out, tuple) else (out,)
    logits = outs[1] if len(outs) == 2 else outs[0]  # Llama-4 returns scores first
    flat = logits.flatten(0, -2).double()
    return inputs.flatten(0, -2).double().numpy(), flat.numpy()


@pytest.fixture(scope="module", params=STREAMED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_type(name, tmp_path_factory)


@pytest.fixture(scope="module")
def observed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile(folder, DATA, tmp_path_factory.mktemp("profile"), micro_tokens=1, moments=True)


def test_routing_of_every_layer(name: str, folder: Path, observed: Profile) -> None:
    geometry = read_geometry(open_checkpoint(folder))
    rule = Rule(name, folder)
    runs = [watch(name, folder, sequence.ids) for sequence in DATA.sequences]
    for block in geometry.trunk:
        count, mass = np.zeros((EXPERTS, rule.top_k)), np.zeros((EXPERTS, rule.top_k))
        entropy = 0.0
        for seen in (run[block.layer] for run in runs):
            if "gemma4" in name:
                seen.logits = np.log(seen.logits)  # this router returns probabilities
            for t in range(len(seen.ids)):
                entropy += rule.entropy(seen.logits[t])
                for rank, (e, gate) in enumerate(rule.route(seen, t, block.layer)):
                    if e < EXPERTS:  # those behind are no experts
                        count[e, rank] += 1
                        mass[e, rank] += gate
        found = observed.layer(block.prefix)
        np.testing.assert_array_equal(found.rank_count, count)
        np.testing.assert_array_equal(found.count, count.sum(axis=1))
        np.testing.assert_allclose(found.rank_mass, mass, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.gate_sum, mass.sum(axis=1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4)
        assert found.tokens == DATA.tokens


def test_profiles_of_parts_add_up(folder: Path, observed: Profile, tmp_path: Path) -> None:
    """Law 6; every sequence runs by itself, so that only the order of float64 sums differs."""
    prose, *rest = DATA.sequences
    parts = [calibration([prose], ("prose",)), calibration(rest, ("prose", "code"))]
    one, other = (profile(folder, part, tmp_path / str(i), micro_tokens=1) for i, part in enumerate(parts))
    both = merge(one, other)
    assert both.meta.domains == observed.meta.domains and both.meta.tokens() == observed.meta.tokens()
    for key, values in both.arrays.items():
        np.testing.assert_allclose(values, observed.arrays[key], rtol=1e-9, atol=1e-12, err_msg=key)


def test_padded_micro_batches_give_the_same_counts(folder: Path, observed: Profile, tmp_path: Path) -> None:
    """Where a model's other layers look past padding; within rounding of ties."""
    padded = profile(folder, DATA, tmp_path, micro_tokens=10**6)
    for prefix in observed.prefixes:
        found, expected = padded.layer(prefix), observed.layer(prefix)
        assert found.tokens == expected.tokens
        assert np.abs(found.count - expected.count).sum() <= 2
        np.testing.assert_allclose(found.out_sq, expected.out_sq, rtol=1e-2)


def test_what_cannot_be_profiled_says_why(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    for name, words in NOT_STREAMED.items():
        with pytest.raises(CheckpointError, match=words):
            profile(tiny_type(name, tmp_path_factory), DATA, tmp_path / name)
    assert {*NOT_STREAMED, *STREAMED} == set(SUPPORTED)


@pytest.mark.parametrize("name", ["glm_moe_dsa", "zaya"])
def test_resumed_where_layers_hand_more_than_hidden_states_on(
    name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tiny_type(name, tmp_path_factory)

    def stop(done: int, of: int) -> None:
        if done == of - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(folder, DATA, tmp_path / "resumed", advance=stop)
    notices: list[str] = []
    resumed = profile(folder, DATA, tmp_path / "resumed", notify=notices.append)
    assert any("resuming at layer" in notice for notice in notices)
    whole = profile(folder, DATA, tmp_path / "whole")
    for key, values in whole.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[key], values, err_msg=key)
