"""What the observer records equals what loops over tokens and experts find, for every family."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import LoopBlock, block_inputs, load, moe_blocks, profile
from tiny_models import NAMES, tiny_model, tokens

from expertcut.calibrate.data import CalibrationSet
from expertcut.calibrate.profile import CONTRIBUTION, MAXIMA_E, MIXED_E, MOMENTS, PAIRS, SUMS_E, SUMS_K, Profile
from expertcut.checkpoint import open_checkpoint
from expertcut.model import read_geometry

EXACT = ("count", "rank_count", "coact", "tokens")
DATA = tokens((9, 17, 12, 13), seed=5)


def domain_of(data: CalibrationSet, domain: str) -> list[int]:
    return [i for i, sequence in enumerate(data.sequences) if sequence.domain == domain]


def assert_close(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    stat = what.rpartition(" ")[2]
    if stat in EXACT:
        np.testing.assert_array_equal(found, expected, err_msg=what)
    else:
        scale = max(1e-6, float(np.abs(expected).max()))
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * scale, err_msg=what)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(name, tmp_path_factory)


@pytest.fixture(scope="module")
def observed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Two micro-batches, the sequences padded, moments and matrices per domain."""
    return profile(folder, DATA, tmp_path_factory.mktemp("profile"), micro_tokens=34, moments=True, pair_domains=True)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[int, list[torch.Tensor]]:
    return block_inputs(load(folder), DATA)


def test_every_statistic_of_every_domain(
    folder: Path, observed: Profile, inputs: dict[int, list[torch.Tensor]]
) -> None:
    geometry = read_geometry(open_checkpoint(folder))
    assert [block.layer for block in geometry.trunk] == list(inputs)
    for block in geometry.trunk:
        loops = LoopBlock(folder, block.layer)
        lower = np.tril_indices(geometry.num_experts)
        for d, domain in enumerate(DATA.domains):
            expected = loops.statistics([inputs[block.layer][i] for i in domain_of(DATA, domain)])
            assert expected["count"].sum() == expected["tokens"] * geometry.top_k > 0
            for stat, value in expected.items():
                value = value[lower] if stat in PAIRS else value
                assert_close(observed.arrays[f"{block.prefix}/{stat}"][d], value, f"{block.prefix} {domain} {stat}")
        stored = {n.partition("/")[2] for n in observed.arrays if n.startswith(f"{block.prefix}/")}
        assert stored == {*expected, CONTRIBUTION}
    assert len(observed.arrays) == len(geometry.trunk) * len(stored) + 1  # and the text's hashes
    named = {*SUMS_E, *MIXED_E, *MAXIMA_E, *SUMS_K, *PAIRS, *MOMENTS, *EXACT, "rank_mass", "out_sq", "entropy"}
    assert named | {CONTRIBUTION} == stored


def test_the_loops_compute_what_transformers_does(folder: Path, inputs: dict[int, list[torch.Tensor]]) -> None:
    """So that agreeing with them means something: same experts, same output, eager implementation."""
    for layer, module in moe_blocks(load(folder, experts="eager")).items():
        loops = LoopBlock(folder, layer)
        x = inputs[layer][0]
        seen: list[torch.Tensor] = []
        hook = module.experts.register_forward_hook(lambda _, args, out, seen=seen: seen.extend((args[1], out)))
        with torch.no_grad():
            module(x[None])
        hook.remove()
        index, out = seen
        for t, token in enumerate(x.double().numpy()):
            assert {e for e, _ in loops.route(token, loops.top_k)} == set(index[t].tolist())
            np.testing.assert_allclose(out[t].double().numpy(), loops.output(token, loops.top_k), atol=2e-5)


def test_statistics_agree_with_each_other(folder: Path, observed: Profile) -> None:
    """Identities that hold whatever the model: diagonals, totals, and the ends of the top-k curve."""
    for prefix in observed.prefixes:
        stats = observed.layer(prefix)
        np.testing.assert_array_equal(np.diag(stats.coact), stats.count)
        np.testing.assert_allclose(np.diag(stats.coenergy), stats.gated_norm_sq_sum, rtol=1e-6)
        np.testing.assert_allclose(np.diag(stats.gram), stats.gated_norm_sq_sum, rtol=1e-6)
        np.testing.assert_allclose(stats.gram.sum(), stats.out_sq, rtol=1e-6)
        np.testing.assert_array_equal(stats.rank_count.sum(axis=1), stats.count)
        np.testing.assert_allclose(stats.rank_mass.sum(axis=1), stats.gate_sum, rtol=1e-9)
        assert stats.rank_count.sum(axis=0).tolist() == [stats.tokens] * observed.meta.top_k
        assert stats.tokens == DATA.tokens
        assert stats.topk_error[-1] == stats.lost_mass[-1] == 0
        assert stats.topk_error[0] > 0 and stats.lost_mass[0] > 0
        np.testing.assert_allclose([stats.topk_sq[-1], stats.topk_cross[-1]], stats.out_sq, rtol=1e-9)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_curve_over_k_against_transformers_run_with_that_k(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """y_k from transformers' own router and experts, set to top-k = k, on the inputs of the default."""
    folder = tiny_model(name, tmp_path_factory)
    data = tokens((20, 20), seed=6)
    found = profile(folder, data, tmp_path_factory.mktemp("profile"))
    base = load(folder)
    inputs = {layer: torch.cat(x) for layer, x in block_inputs(base, data).items()}
    outputs = []
    for k in range(1, found.meta.top_k + 1):
        model = load(folder, num_experts_per_tok=k)
        outputs.append({layer: experts_output(block, inputs[layer]) for layer, block in moe_blocks(model).items()})
    for prefix, layer in zip(found.prefixes, inputs, strict=True):
        stats = found.layer(prefix)
        y = outputs[-1][layer]
        for i, y_k in enumerate(out[layer] for out in outputs):
            for stat, value in (("error", (y_k - y) ** 2), ("cross", y_k * y), ("sq", y_k * y_k)):
                found_value = getattr(stats, f"topk_{stat}")[i]
                np.testing.assert_allclose(found_value, float(value.sum()), rtol=1e-4, atol=1e-5 * stats.out_sq)


@torch.no_grad()
def experts_output(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(T, H) float64 output of the routed experts, shared ones left out."""
    seen: list[torch.Tensor] = []
    hook = block.get_submodule("experts").register_forward_hook(lambda _, args, out: seen.append(out))
    block(x[None])
    hook.remove()
    return seen[0].double()


def test_rank_is_the_order_of_choice_not_of_the_gate(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Correction biases part the two: ranked by gate weight, the first column would hold the largest mass."""
    folder = tiny_model("deepseek_v3", tmp_path_factory)
    loops = LoopBlock(folder, 1)
    routes = [loops.route(x, 3) for x in torch.cat(block_inputs(load(folder), DATA)[1]).double().numpy()]
    assert any(route[0][1] < max(gate for _, gate in route) for route in routes)


def test_bfloat16_is_close_to_float32(folder: Path, observed: Profile, tmp_path: Path) -> None:
    half = profile(folder, DATA, tmp_path, dtype="bfloat16")
    assert half.meta.dtype == "bfloat16"
    assert observed.meta.dtype == "float32"
    for prefix in observed.prefixes:
        found, expected = half.layer(prefix), observed.layer(prefix)
        assert found.count.sum() == expected.count.sum()
        assert np.abs(found.count - expected.count).sum() <= 0.2 * expected.count.sum()
        np.testing.assert_allclose(found.out_sq, expected.out_sq, rtol=0.15)
        np.testing.assert_allclose(found.gate_sum.sum(), expected.gate_sum.sum(), rtol=0.05)
        np.testing.assert_allclose(found.entropy, expected.entropy, rtol=0.05)
        np.testing.assert_allclose(found.contribution_sum.sum(), expected.contribution_sum.sum(), rtol=0.1)
