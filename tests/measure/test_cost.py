"""The cost model as laws: limits that are known, what may only grow or fall, and routing that is simulated."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from golden_names import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from expertcut.measure.cost import USABLE, predict, predict_all
from expertcut.measure.cost_hardware import PRESETS, Machine, read_machine
from expertcut.measure.cost_model import ModelCost, model_cost, spread
from expertcut.measure.cost_traffic import Load, distinct, tally
from expertcut.model import read_geometry

MODELS = ("deepseek-v2-lite", "qwen3-30b", "gpt-oss-20b", "mixtral-8x7b")
A800 = read_machine("a800x2")
models, machines = st.sampled_from(MODELS), st.sampled_from([*PRESETS.values(), A800, read_machine("h200x8")])
loads = st.builds(Load, st.integers(1, 700), st.integers(1, 3000), st.integers(1, 3000))
popularities = st.lists(st.floats(0, 1e6), min_size=2, max_size=40).map(np.array)


@cache
def work(name: str) -> ModelCost:
    checkpoint = golden(name).checkpoint()
    return model_cost(checkpoint, read_geometry(checkpoint))


def touched(chosen: np.ndarray, *tokens: float) -> list[float]:
    found: list[float] = distinct(chosen, np.array(tokens, float)).tolist()
    return found


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5000))
def test_equally_popular_experts_follow_the_papers_formula(experts: int, k: int, tokens: int) -> None:
    k = min(k, experts)
    uniform = np.full(experts, k / experts)
    none, one, some, all_ = touched(uniform, 0, 1, tokens, 1e9)
    assert none == 0
    assert one == pytest.approx(k)
    assert some == pytest.approx(experts * (1 - (1 - k / experts) ** tokens))
    assert all_ == pytest.approx(experts)
    assert touched(np.ones(experts), 1, tokens) == [experts, experts]


@given(popularities, st.floats(0.01, 1), st.integers(1, 500))
def test_popularities_are_scaled_to_the_top_k(weights: np.ndarray, share: float, tokens: int) -> None:
    k = share * len(weights)
    chosen = spread(weights, k)
    assert chosen.sum() == pytest.approx(k) and chosen.min() >= 0 and chosen.max() <= 1 + 1e-9
    free = chosen < 1 - 1e-9
    ratio = chosen[free] / np.maximum(weights[free], 1e-9)
    assert ratio == pytest.approx(np.full(free.sum(), ratio[0] if free.any() else 0), rel=1e-6)
    # skew only ever makes tokens share experts
    assert touched(chosen, tokens)[0] <= touched(np.full(len(weights), share), tokens)[0] + 1e-6


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_the_formula_counts_what_simulated_routers_touch(skew: float) -> None:
    random = np.random.default_rng(0)
    experts, k, tokens = 32, 4, 60_000
    logits = skew * random.normal(size=experts) + random.gumbel(size=(tokens, experts))
    used = np.zeros((tokens, experts), bool)
    np.put_along_axis(used, np.argpartition(-logits, k, axis=1)[:, :k], True, axis=1)
    for batch in (1, 4, 16, 100):
        measured = used.reshape(-1, batch, experts).any(axis=1).sum(axis=1).mean()
        assert touched(used.mean(axis=0), batch)[0] == pytest.approx(measured, rel=0.01)
    uniform = experts * (1 - (1 - k / experts) ** 16)
    assert (touched(used.mean(axis=0), 16)[0] < 0.9 * uniform) == (skew > 0)


@settings(max_examples=60)
@given(models, machines, loads, st.data())
def test_fewer_experts_or_a_lower_top_k_never_slow_a_model_down(
    name: str, machine: Machine, load: Load, data: st.DataObject
) -> None:
    model = work(name)
    experts, k = len(model.moe[0].chosen), round(float(model.moe[0].chosen.sum()))
    fewer = data.draw(st.integers(k, experts))
    lower = data.draw(st.integers(1, k))
    base = predict(model, machine, load)
    for changed in (model.with_counts(fewer), model.with_counts(None, lower), model.with_counts(fewer, lower)):
        found = predict(changed, machine, load)
        assert found.tokens_per_second >= base.tokens_per_second * (1 - 1e-9)
        assert found.weights_nbytes <= base.weights_nbytes and found.cache_nbytes == base.cache_nbytes
        assert found.ttft <= base.ttft * (1 + 1e-9) and found.tpot <= base.tpot * (1 + 1e-9)


@settings(max_examples=60)
@given(models, machines, loads)
def test_a_better_machine_is_faster_and_a_higher_load_takes_longer(name: str, machine: Machine, load: Load) -> None:
    base = predict(work(name), machine, load)
    for field in ("bandwidth_gb_s", "bf16_tflops", "link_gb_s"):
        better = machine.model_copy(update={field: 2 * getattr(machine, field)})
        assert predict(work(name), better, load).tokens_per_second >= base.tokens_per_second
    more = predict(work(name), machine, replace(load, concurrency=load.concurrency + 1))
    assert more.tpot >= base.tpot * (1 - 1e-9)
    assert more.device_nbytes > base.device_nbytes


@settings(max_examples=60)
@given(models, machines, loads)
def test_what_is_predicted_adds_up(name: str, machine: Machine, load: Load) -> None:
    """First token, further tokens and throughput tell of the same time."""
    found = predict(work(name), machine, load)
    whole = load.concurrency * load.output_len / found.tokens_per_second
    last = found.ttft + (load.output_len - 1) * found.tpot
    assert last == pytest.approx(whole) if load.output_len > 1 else found.ttft <= whole * (1 + 1e-9)
    assert min(found.step.values()) >= 0 and sum(found.step.values()) <= found.tpot * (1 + 1e-9)
    assert found.fits == (found.device_nbytes <= USABLE * machine.memory_gb * 1e9)


def test_a_step_of_one_token_reads_what_the_headers_hold() -> None:
    """With all experts activated, one token reads every tensor but the embedding."""
    checkpoint = golden("deepseek-v2-lite").checkpoint()
    model = work("deepseek-v2-lite")
    traffic = tally(model.with_counts(None, 64), Load(1))
    read = traffic.expert_nbytes[0].sum() + traffic.dense_nbytes[0]
    assert read == checkpoint.nbytes - checkpoint.tensors["model.embed_tokens.weight"].nbytes
    activated = tally(model, Load(1)).expert_flops[0].sum() + tally(model, Load(1)).dense_flops[0]
    assert activated / 2 == pytest.approx(2.45e9, rel=0.01)  # of 15.7 billion, without the embedding


@pytest.mark.parametrize(("tp", "ep"), [(None, None), (1, None), (4, None), (None, 8), (2, 4)])
def test_weights_and_caches_are_laid_out_over_devices(tp: int | None, ep: int | None) -> None:
    machine = read_machine("h100x8", tp=tp, ep=ep)
    model = work("qwen3-30b")
    load = Load(16, 100, 100)
    found = predict(model, machine, load)
    copies = 8 // (tp or 8)
    heads = min(tp or 8, model.attention.kv_heads)
    shared = found.cache_nbytes / copies / heads + model.fixed_nbytes / (tp or 8)
    assert found.device_nbytes == pytest.approx(model.expert_nbytes / 8 + shared)
    assert predict(model, read_machine("h100"), load).step["communication"] == 0 < found.step["communication"]


def test_tensor_parallelism_moves_what_the_paper_says() -> None:
    """2(n−1)·L·d for every all-reduce of a layer's attention or experts, over the links of n devices."""
    model, load = work("deepseek-v2-lite"), Load(7)
    moved = 2 * 2 * (4 - 1) * 7 * 2048 * 27 * 2  # two all-reduces, BF16
    machine = read_machine("a100x4")
    assert predict(model, machine, load).step["communication"] == pytest.approx(moved / 4 / (machine.link_gb_s * 1e9))


def test_regimes_come_in_the_papers_order() -> None:
    found = [predict(work("deepseek-v2-lite"), A800, Load(c)) for c in (2, 8, 32, 128, 512, 1024)]
    assert [one.regime for one in found] == [*["memory-bound"] * 2, *["union-saturated"] * 2, *["compute-bound"] * 2]
    for one in found:
        assert (one.regime == "union-saturated") == (one.half_experts > one.half_top_k)
        assert f"half the top-k would gain {one.half_top_k:.1%}" in one.why
    slow = A800.model_copy(update={"constants": A800.constants.model_copy(update={"layer_us": 1e6})})
    assert predict(work("deepseek-v2-lite"), slow, Load(8)).regime == "overhead-bound"


def test_the_levers_are_the_gains_of_such_models() -> None:
    model, load = work("deepseek-v2-lite"), Load(32)
    base = predict(model, A800, load)
    found = predict_all({"base": model, "k": model.with_counts(None, 3), "e": model.with_counts(32)}, A800, load)
    assert found["base"].gain == 0
    assert found["k"].gain == pytest.approx(base.half_top_k) and found["e"].gain == pytest.approx(base.half_experts)


def test_the_most_popular_experts_stay() -> None:
    first, both = np.array([0.4, 0.0, 0.1, 0.5]), np.array([0.1, 0.7, 0.2, 1.0])
    moe = replace(work("mixtral-8x7b").moe[0], chosen=both, popular=np.stack([first, both]))
    assert moe.narrowed(2).chosen.tolist() == [1, 1]
    assert moe.narrowed(3).chosen == pytest.approx(spread(np.array([1, 0.7, 0.2]), 2))
    assert moe.narrowed(3, 1).chosen == pytest.approx([0.5, 0.4, 0.1])
    assert moe.narrowed(3).narrowed(2, 1).chosen == pytest.approx([5 / 6, 1 / 6])  # of those that are left
