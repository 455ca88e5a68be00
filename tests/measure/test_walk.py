"""Choosing while the model runs: against transformers' own modules, narrowed by hand layer by layer."""

from __future__ import annotations

import copy
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import LoopBlock, block_inputs, load, moe_blocks, profile
from tiny_models import silent, tiny_model, tokens
from tiny_types import STREAMED, tiny_type

from expertcut.calibrate.executor import LayerStream, find_block, find_experts
from expertcut.calibrate.profile import Profile
from expertcut.calibrate.run import ProfileOptions
from expertcut.checkpoint import open_checkpoint
from expertcut.choose import LayerPlan, Plan, make_plan, select
from expertcut.choose.make import Request
from expertcut.choose.subset import Mask
from expertcut.choose.trials import least_tried
from expertcut.errors import PlanError, UsageError
from expertcut.measure.replay import Replay
from expertcut.measure.walk import walk
from expertcut.model import read_geometry

DATA = tokens((24, 9, 33, 17), seed=8)
FAMILIES = ["qwen3_moe", "deepseek_v3", "deepseek_v2", "gpt_oss", "mixtral", "qwen3_5_moe"]
REFUSED = {"llama4": "scale what goes into", "llama4_text": "scale what goes into", "gemma4": "outside the MoE block",
           "gemma4_text": "outside the MoE block"}  # fmt: skip
"""Types that cannot be replayed, and what the refusal says."""
Seen = dict[int, tuple[Replay, Mask]]


def walked(
    folder: Path, strategy: str, experts: int, *, sequential: bool = True, micro_tokens: int = 70, **options: Any
) -> tuple[Plan, Profile]:  # fmt: skip
    """A plan whose experts were chosen while the model ran, and what was seen on the way."""
    checkpoint = open_checkpoint(folder)
    seen: list[Profile] = []

    def run(request: Request) -> tuple[dict[str, LayerPlan], Profile]:
        layers, found = walk(
            request, DATA, ProfileOptions(device="cpu", micro_tokens=micro_tokens), sequential=sequential,
            tokenizer="t", notify=silent, advance=silent,
        )  # fmt: skip
        seen.append(found)
        return layers, found

    plan = make_plan(
        checkpoint, read_geometry(checkpoint), strategy=strategy, experts=experts, walk=run, sequential=sequential,
        **options,
    )  # fmt: skip
    return plan, seen[0]


def kept(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {entry.layer: entry.kept for entry in plan.layers.values()}


def sizes(folder: Path) -> tuple[int, int, int]:
    """Experts in all, to keep, and the router's groups."""
    geometry = read_geometry(open_checkpoint(folder))
    return geometry.num_experts, geometry.num_experts - 2 * geometry.n_group, geometry.n_group


def narrow(block: Any, kept: tuple[int, ...], experts: int) -> None:
    """Cut a block of transformers' model down by hand: whatever is as long as there are experts, and every count."""
    for module in block.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.dim() and len(tensor) == experts:
                cut = tensor.detach()[list(kept)]
                setattr(module, name, torch.nn.Parameter(cut) if name in module._parameters else cut)
        for name, value in vars(module).items():
            if value == experts and "expert" in name:
                setattr(module, name, len(kept))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strategy", ["gram", "mone", "naee"])
def test_with_all_experts_kept_it_sees_what_a_profile_sees(
    name: str, strategy: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_model(name, tmp_path_factory)
    plan, found = walked(folder, strategy, sizes(folder)[0])
    assert plan.experts == sizes(folder)[0]
    expected = profile(folder, DATA, tmp_path, moments=strategy == "mone", micro_tokens=70)
    assert set(found.arrays) == set(expected.arrays) and found.digest() == expected.digest()
    for array, values in expected.arrays.items():
        scale = float(np.abs(values).max(initial=0))
        np.testing.assert_allclose(found.arrays[array], values, rtol=1e-4, atol=1e-5 * scale, err_msg=array)


@pytest.mark.parametrize("strategy", ["reap", "gram"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "olmoe"])
def test_the_first_moe_layer_keeps_what_the_ordinary_plan_keeps(
    name: str, strategy: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So a model of one MoE layer gets the ordinary plan; and without `sequential` every layer does."""
    folder = tiny_model(name, tmp_path_factory)
    options: dict[str, Any] = {"protect": ["0"], "domain_weights": {"code": 2.0, "prose": 0.5}, "top_k": 2}
    made, checkpoint = profile(folder, DATA, tmp_path, pair_domains=True), open_checkpoint(folder)
    number = sizes(folder)[1]
    plain = make_plan(
        checkpoint, read_geometry(checkpoint), strategy=strategy, experts=number, profile=made, **options
    )  # fmt: skip
    after, seen = walked(folder, strategy, number, **options)
    first = min(kept(plain))
    assert kept(after)[first] == kept(plain)[first] and after.top_k(read_geometry(checkpoint)) == 2
    assert all(0 in ids for ids in kept(after).values())
    last = f"{list(plain.layers)[-1]}/gate_sum"
    assert not np.allclose(seen.arrays[last], made.arrays[last]), "later layers are seen behind pruned ones"
    other, seen = walked(folder, strategy, number, sequential=False, **options)
    assert kept(other) == kept(plain) and np.allclose(seen.arrays[last], made.arrays[last])
    assert after.provenance["sequential"] is True and after.provenance["calibration_text"] is not None


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_sequential_choices_are_those_of_modules_narrowed_by_hand(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Statistics from loops over tokens and experts, on what transformers' narrowed model brings to each layer."""
    folder = tiny_model(name, tmp_path_factory)
    experts, number, groups = sizes(folder)
    found, seen = walked(folder, "reap", number)
    model = load(folder)
    for layer, block in moe_blocks(model).items():
        sums = LoopBlock(folder, layer).statistics(block_inputs(model, DATA)[layer])
        prefix = next(key for key, entry in found.layers.items() if entry.layer == layer)
        np.testing.assert_array_equal(seen.layer(prefix).count, sums["count"])
        scores = np.divide(sums["gated_norm_sum"], np.maximum(sums["count"], 1)).reshape(groups, -1)
        best = np.sort(np.argsort(-scores, axis=1)[:, : number // groups], axis=1)
        expected = tuple((best + np.arange(groups)[:, None] * (experts // groups)).ravel().tolist())
        assert kept(found)[layer] == expected
        narrow(block, expected, experts)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Replay, Mask, np.ndarray[Any, Any]]]:
    """What was asked of each layer's replay, with one set of all that could be dropped a row, and its losses."""
    heard: list[tuple[Replay, Mask, np.ndarray[Any, Any]]] = []

    def spy(losses: Any, drop: int, may_go_E: Mask, n_group: int = 1) -> Mask:
        sets_SE = all_sets(may_go_E.size, drop, n_group)
        heard.append((losses, sets_SE, losses(sets_SE)))
        return least_tried(losses, drop, may_go_E, n_group)

    monkeypatch.setattr(select, "least_tried", spy)
    return heard


def all_sets(experts: int, drop: int, groups: int) -> Mask:
    size = experts // groups
    choices = product(*(combinations(range(g * size, (g + 1) * size), drop) for g in range(groups)))
    return np.array([[e in sum(chosen, ()) for e in range(experts)] for chosen in choices])


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_naee_is_brute_force_over_modules_narrowed_by_hand(
    name: str, sequential: bool, replays: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every set of every layer: the routed output of transformers' block without it, beside that of the whole block."""
    folder = tiny_model(name, tmp_path_factory)
    experts, number, groups = sizes(folder)
    found, _ = walked(folder, "naee", number, sequential=sequential)
    model = load(folder)
    for (layer, block), (_, sets_SE, losses) in zip(moe_blocks(model).items(), replays, strict=True):
        inputs = torch.cat(block_inputs(model, DATA)[layer])[None]
        whole, expected = routed(block, inputs), []
        for gone in sets_SE:
            mine = copy.deepcopy(block)
            narrow(mine, tuple(np.flatnonzero(~gone).tolist()), experts)
            expected.append(float(((routed(mine, inputs) - whole) ** 2).sum()))
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        best = tuple(np.flatnonzero(~sets_SE[int(np.argmin(expected))]).tolist())
        assert kept(found)[layer] == best and len(best) == number
        if sequential:
            narrow(block, best, experts)


@torch.no_grad()
def routed(block: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What the routed experts of a block add up to, float64."""
    seen: list[torch.Tensor] = []
    hook = block.experts.register_forward_hook(lambda module, args, out: seen.append(out.double()))
    block(inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", STREAMED)
def test_a_replay_is_what_the_experts_that_are_left_make(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every type of transformers: the tables against the block with its experts, on the same tokens."""
    compared: list[int] = []

    @torch.inference_mode()
    def compare(losses: Replay, drop: int, may_go_E: Mask, n_group: int = 1) -> Mask:
        gone_E = np.zeros(len(losses), np.bool_)
        for goes in range(drop):
            gone_E.reshape(n_group, -1)[:, goes] = True
        outputs: list[torch.Tensor] = []
        variant, index, base = losses._variants[len(losses) - int(gone_E.sum())], losses._index, losses._base
        variant.kept[index] = tuple(np.flatnonzero(~gone_E).tolist())
        for layer in (base, variant.layer(index, base)):
            experts = layer.get_submodule(find_experts(base) or "")
            hook = experts.register_forward_hook(
                lambda module, args, out: outputs.append(out.reshape(-1, out.shape[-1]))
            )
            for args, kwargs in losses._sample.calls:
                find_block(layer, losses._stream.geometry.family)(*args, **kwargs)
            hook.remove()
        calls = len(losses._sample.calls)
        change = torch.cat(outputs[calls:]).double() - torch.cat(outputs[:calls]).double()
        assert losses(gone_E[None])[0] == pytest.approx(float((change**2).sum()), rel=1e-3)
        assert losses(np.zeros_like(gone_E)[None])[0] == pytest.approx(0, abs=1e-5)
        compared.append(index)
        return gone_E

    monkeypatch.setattr(select, "least_tried", compare)
    folder = tiny_type(name, tmp_path_factory)
    if name in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[name]):
            walked(folder, "naee", 6)
        return
    plan, _ = walked(folder, "naee", 6)
    assert compared == [block.layer for block in read_geometry(open_checkpoint(folder)).trunk]
    assert plan.experts == 6


def test_so_many_tokens_are_replayed_evenly_over_the_text(
    monkeypatch: pytest.MonkeyPatch, replays: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every third of 83 tokens, in whatever micro-batches, also where memory runs out and they are halved."""
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    monkeypatch.setattr("expertcut.measure.walk.TOKENS", 28)
    plans = [walked(folder, "naee", 6, micro_tokens=size)[0] for size in (70, 1000)]
    call = LayerStream.call
    failed: list[torch.nn.Module] = []

    def fails_once(self: LayerStream, layer: torch.nn.Module, hidden: torch.Tensor, *args: Any) -> Any:
        out = call(self, layer, hidden, *args)
        if len(hidden) == 4 and not failed:
            failed.append(layer)
            raise torch.OutOfMemoryError
        return out

    monkeypatch.setattr(LayerStream, "call", fails_once)
    plans.append(walked(folder, "naee", 6, micro_tokens=1000)[0])
    assert failed and plans[1:] == [plans[0]] * 2
    samples = [replay._sample for replay, _, _ in replays[::3]]
    assert [len(sample.calls) for sample in samples] == [2, 1, 2]
    given = [torch.cat([part[0] for part in sample.parts]) for sample in samples]
    rows = sorted((len(s.ids) for s in DATA.sequences), reverse=True)
    assert rows == [33, 24, 17, 9] and given[0].shape == (28, 32)
    torch.testing.assert_close(given[1], given[0])
    torch.testing.assert_close(given[2], given[0])
    inputs = block_inputs(load(folder), DATA)[0]
    torch.testing.assert_close(given[0], torch.cat(sorted(inputs, key=len, reverse=True))[::3])


def test_what_has_no_part_in_it_is_refused(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = tiny_model("qwen3_moe", tmp_path_factory)
    with pytest.raises(UsageError, match="looks at no data"):
        walked(folder, "random", 6)
    with pytest.raises(UsageError, match="leave out --profile"):
        walked(folder, "reap", 6, protect_super=True)
    with pytest.raises(UsageError, match="'x' is not in the profile"):
        walked(folder, "naee", 6, domain_weights={"x": 1.0})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UsageError, match="strategy naee runs the model"):
        make_plan(checkpoint, read_geometry(checkpoint), strategy="naee", experts=6)
